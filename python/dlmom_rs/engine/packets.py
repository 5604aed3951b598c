"""The calls of one advance, as they come across the boundary, read and checked on the host."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: One span: (slot, ids, probs, n, k).
RawSpan = tuple[int, bytearray, bytearray, int, int]
#: One step: (slots, ids, probs, k).
RawStep = tuple[list[int], bytearray, bytearray, int]
#: One agent's call: (agent, spans, step or None).
RawCall = tuple[int, list[RawSpan], RawStep | None]


@dataclass(frozen=True)
class Entries:
    """Packets of one width: ``ids`` [n, k] int64, ``probs`` [n, k] float32."""

    ids: NDArray[np.int64]
    probs: NDArray[np.float32]


@dataclass(frozen=True)
class Call:
    """What one agent appends: whole spans, each to its slot, and one position to some slots."""

    agent: int
    spans: list[tuple[int, Entries]]
    step_slots: list[int]
    step: Entries | None

    def appended(self) -> list[tuple[int, int]]:
        """(slot, positions appended) of every row of this call."""
        spans = [(slot, entries.ids.shape[0]) for slot, entries in self.spans]
        return spans + [(slot, 1) for slot in self.step_slots]


def read_entries(ids: bytearray, probs: bytearray, n: int, k: int, vocab: int) -> Entries:
    """Read little-endian u32 ids and f32 probabilities, row-major [n, k].

    ValueError for a size that does not fit, an empty packet or an id outside ``0..vocab``.
    """
    if n < 1 or k < 1:
        raise ValueError(f"packets need at least one row and one entry, not {n} x {k}")
    if len(ids) != 4 * n * k or len(probs) != 4 * n * k:
        raise ValueError(
            f"{n} x {k} packets need {4 * n * k} bytes, not {len(ids)} of ids "
            f"and {len(probs)} of probabilities"
        )
    table = np.frombuffer(ids, dtype="<u4").reshape(n, k).astype(np.int64)
    weights = np.frombuffer(probs, dtype="<f4").reshape(n, k).astype(np.float32)
    highest = int(table.max())
    if highest >= vocab:
        raise ValueError(f"token {highest} is outside the vocabulary of {vocab} ids")
    return Entries(table, weights)


def read_call(raw: RawCall, vocab: int) -> Call:
    """Read one agent's call; ValueError where it is malformed or names a slot twice."""
    agent, spans, step = raw
    read = [(slot, read_entries(ids, probs, n, k, vocab)) for slot, ids, probs, n, k in spans]
    slots: list[int] = []
    entries: Entries | None = None
    if step is not None and step[0]:
        slots = list(step[0])
        entries = read_entries(step[1], step[2], len(slots), step[3], vocab)
    call = Call(agent, read, slots, entries)
    named = [slot for slot, _ in call.appended()]
    if len(set(named)) != len(named):
        twice = next(slot for slot in named if named.count(slot) > 1)
        raise ValueError(f"slot {twice} appears twice in one call of agent {agent}")
    return call
