"""Ensembles, prompts and runs that benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dlmom_rs import _core
from dlmom_rs.api import DeepLatentMoM
from dlmom_rs.sessions import Parts, Running


def questions(count: int) -> list[str]:
    """The first questions of ``tinygsm``."""
    path = Path(__file__).parents[1] / "data" / "tinygsm.jsonl"
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["question"] for line, _ in zip(lines, range(count), strict=False)]


def ensemble(experts: Sequence[str], rows: int, *, fast: bool = False) -> DeepLatentMoM:
    """Models in float32 on the CPU, one thread."""
    return DeepLatentMoM.from_pretrained(
        list(experts),
        device="cpu",
        dtype="fp32",
        batch_size=rows,
        max_len=512,
        threads=1,
        fast=fast,
    )


def loop_config(ensemble: DeepLatentMoM, **changes: Any) -> dict[str, Any]:
    """The reference pipeline with fields of the loop and of its controller replaced."""
    config = ensemble.default_config()
    for name, value in changes.items():
        target = config["controller"] if name in config["controller"] else config
        target[name] = value
    return config


def run(
    ensemble: DeepLatentMoM,
    sources: Sequence[Mapping[str, Any]],
    config: Mapping[str, Any],
    rows: int,
) -> dict[str, float]:
    """Run one sample for every prompt source, without traces; the session's statistics."""
    jobs = [
        {
            "key": {"item_id": str(index), "seed": 0, "sample": 0},
            "prompts": json.loads(_core.role_prompts(ensemble._seating, json.dumps(source))),
            "trace": False,
        }
        for index, source in enumerate(sources)
    ]
    running = Running(
        ensemble._engine,
        ensemble._turnstile,
        use="a benchmark",
        config=config,
        jobs=jobs,
        rows=rows,
        parts=Parts(),
        cancel=None,
    )
    with running:
        while running.turn(False)[0]:
            pass
        return running.stats()


def asked(question: str) -> dict[str, Any]:
    """A question as the prompt of a chat."""
    return {"kind": "chat", "messages": [{"role": "user", "content": question}]}


def tokens(count: int, salt: int) -> dict[str, Any]:
    """A prompt of ``count`` token ids that any vocabulary has."""
    return {"kind": "tokens", "ids": [(7 * i + 13 * salt) % 250 for i in range(1, count + 1)]}


def tiny(folder: Path) -> Path:
    """A model of one layer and random weights, which is never sure of anything."""
    from transformers import Qwen2Config

    from dlmom_rs.engine.testing import save_model

    config = Qwen2Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    return save_model(folder, config)
