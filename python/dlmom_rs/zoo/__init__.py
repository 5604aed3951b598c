"""The shipped tiny experts: two small causal language models trained on generated problems.

They exist so that demonstrations and tests run real ensembles on any machine, without a download.
"""

from __future__ import annotations

import difflib
from pathlib import Path

__all__ = ["names", "path"]

_MODELS = Path(__file__).resolve().parent / "models"
_NAMES = ("tiny-general", "tiny-math")


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
