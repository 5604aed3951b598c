"""Slots that are refilled at once, against batches that wait for their last sample."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from . import models
from .timing import Entry, in_turns

ROWS = 16


def entries(rounds: int, threads: int) -> Iterator[Entry]:
    """The reference pipeline over ``tinygsm``; wall time in process CPU seconds."""
    torch.set_num_threads(threads)
    pair = models.ensemble(["zoo:tiny-math", "zoo:tiny-general"], ROWS)
    asked = [models.asked(question) for question in models.questions(8 * ROWS)]
    config = models.loop_config(pair, alpha=0.3, alpha_unit="nats", max_steps=256)
    stats: dict[str, dict[str, float]] = {}

    def slots() -> None:
        stats["slots"] = models.run(pair, asked, config, ROWS)

    def batches() -> None:
        parts = [
            models.run(pair, asked[start : start + ROWS], config, ROWS)
            for start in range(0, len(asked), ROWS)
        ]
        stats["batches"] = {name: sum(part[name] for part in parts) for name in parts[0]}

    found = in_turns({"ours": slots, "baseline": batches}, rounds=rounds)
    ours, theirs = stats["slots"], stats["batches"]
    yield Entry(
        f"refill B={ROWS}",
        found["ours"],
        found["baseline"],
        "s",
        "static batches of the same size",
        facts={
            "samples": len(asked),
            "occupancy": ours["rows"] / (ours["steps"] * ROWS),
            "occupancy_before_drain": ours["full_rows"] / (ours["full_steps"] * ROWS),
            "static_occupancy": theirs["rows"] / (theirs["steps"] * ROWS),
        },
    )
