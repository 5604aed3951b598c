"""Timing of variants in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One comparison.

    ``ours`` and ``baseline`` are in ``unit``, and ``ratio`` is how many times better ours is: the
    baseline over ours where less is better, ours over the baseline where ``more`` is.
    """

    name: str
    ours: float
    baseline: float
    unit: str
    #: What the baseline is.
    against: str
    more: bool = False
    #: Further figures of the same measurement.
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """How many times better ours is."""
        better, worse = (self.ours, self.baseline) if self.more else (self.baseline, self.ours)
        return better / worse if worse > 0 else float("inf")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, with the ratio."""
        return {**asdict(self), "ratio": self.ratio}


def cpu_seconds() -> float:
    """CPU time of the process, all threads: other load on the machine does not count."""
    return time.process_time()


def in_turns(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    clock: Callable[[], float] = cpu_seconds,
    inner: int = 1,
) -> dict[str, float]:
    """Median seconds of one call of each variant, ``rounds`` times one after the other.

    Each is called once before, unmeasured; ``inner`` calls make one measurement.
    """
    if rounds < 1 or inner < 1:
        raise ValueError("rounds and inner must be positive")
    times: dict[str, list[float]] = {name: [] for name in variants}
    for work in variants.values():
        work()
    for turn in range(rounds):
        # Every other round backwards, so that none always comes after the same one.
        order = list(variants) if turn % 2 == 0 else list(variants)[::-1]
        for name in order:
            began = clock()
            for _ in range(inner):
                variants[name]()
            times[name].append((clock() - began) / inner)
    return {name: statistics.median(found) for name, found in times.items()}
