"""The shipped tiny experts: four small causal language models trained on generated problems.

They exist so that demonstrations and tests run real ensembles on any machine, without a download.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path

__all__ = ["describe", "names", "path"]

_MODELS = Path(__file__).resolve().parent / "models"
_NAMES = ("tiny-code", "tiny-general", "tiny-llama", "tiny-math")


def names() -> list[str]:
    """The names of the shipped experts, sorted."""
    return list(_NAMES)


def path(name: str) -> Path:
    """The folder with the checkpoint of expert ``name``, as ``from_pretrained`` wants it.

    ValueError, naming the nearest match, if there is no such expert.
    """
    if name not in _NAMES:
        near = difflib.get_close_matches(name.lower(), _NAMES, n=1, cutoff=0.3)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no expert named {name!r} in the zoo ({', '.join(_NAMES)}){hint}")
    return _MODELS / name


def describe() -> list[tuple[str, str]]:
    """Every shipped expert with a line on its architecture; ``not there`` without its folder."""
    lines = []
    for name in _NAMES:
        try:
            config = json.loads((_MODELS / name / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            lines.append((name, "not there"))
            continue
        kind = config["architectures"][0].removesuffix("ForCausalLM")
        layers, width = config["num_hidden_layers"], config["hidden_size"]
        lines.append(
            (name, f"{kind}, {layers} layers of width {width}, vocabulary {config['vocab_size']}")
        )
    return lines
