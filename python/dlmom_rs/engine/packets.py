"""The calls of one advance, as they come across the boundary, read and checked on the host."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NOBODY: frozenset[int] = frozenset()
IDS = np.dtype("<i8")
UNSIGNED = np.dtype("<u8")
PROBS = np.dtype("<f4")
#: One span: (slot, ids, probs, n, k, payload); a payload (kind, values) stands in for the packets.
RawSpan = tuple[int, bytearray, bytearray, int, int, "tuple[str, bytearray] | None"]
#: One step: (slots, ids, probs, k, payloads); a payload (kind, rows, values) replaces its rows.
RawStep = tuple[list[int], bytearray, bytearray, int, "list[tuple[str, list[int], bytearray]]"]
#: One agent's call: (agent, spans, step or None, slots whose hidden states are kept).
RawCall = tuple[int, list[RawSpan], RawStep | None, list[int]]


@dataclass(slots=True)
class Entries:
    """Packets of one width: ``ids`` [n, k] int64, ``probs`` [n, k] float32."""

    ids: NDArray[np.int64]
    probs: NDArray[np.float32]


@dataclass(slots=True)
class Values:
    """Messages that are no packets: ``values`` [n, width] float32.

    ``embed`` holds input embeddings, ``dense`` the probabilities of every token in id order.
    """

    kind: str
    values: NDArray[np.float32]


@dataclass(slots=True)
class Call:
    """What one agent appends: whole spans, each to its slot, and one position to some slots.

    ``payloads`` are messages in place of the packets of some rows of the step; ``hidden`` names the
    slots whose last hidden states are kept.
    """

    agent: int
    spans: list[tuple[int, Entries | Values]]
    step_slots: list[int]
    step: Entries | None
    payloads: list[tuple[list[int], Values]]
    hidden: frozenset[int]

    def appended(self) -> list[tuple[int, int]]:
        """(slot, positions appended) of every row of this call."""
        spans = [
            (slot, len(feed.values) if isinstance(feed, Values) else len(feed.ids))
            for slot, feed in self.spans
        ]
        return spans + [(slot, 1) for slot in self.step_slots]

    def slots(self) -> list[int]:
        """The slots of this call."""
        return [slot for slot, _ in self.spans] + self.step_slots


def read_entries(ids: bytearray, probs: bytearray, n: int, k: int, vocab: int) -> Entries:
    """Read little-endian i64 ids and f32 probabilities, row-major [n, k], where they lie.

    ValueError for a size that does not fit, an empty packet or an id outside ``0..vocab``.
    """
    if n < 1 or k < 1:
        raise ValueError(f"packets need at least one row and one entry, not {n} x {k}")
    if len(ids) != 8 * n * k or len(probs) != 4 * n * k:
        raise ValueError(
            f"{n} x {k} packets need {8 * n * k} bytes of ids and {4 * n * k} of probabilities, "
            f"not {len(ids)} and {len(probs)}"
        )
    table: NDArray[np.int64] = np.ndarray((n, k), IDS, ids)
    weights: NDArray[np.float32] = np.ndarray((n, k), PROBS, probs)
    # Seen as unsigned, a negative id is beyond every vocabulary.
    unsigned: NDArray[np.uint64] = np.ndarray(n * k, UNSIGNED, ids)
    if np.maximum.reduce(unsigned) >= vocab:
        worst = table.flat[int(unsigned.argmax())]
        raise ValueError(f"token {worst} is outside the vocabulary of {vocab} ids")
    return Entries(table, weights)


def _width(kind: str, vocab: int, hidden: int) -> int:
    """Values of one payload of a kind."""
    return {"embed": hidden, "dense": vocab}.get(kind, 0)


def read_values(kind: str, data: bytearray, n: int, width: int) -> Values:
    """Read ``n`` messages of ``width`` little-endian f32 values.

    ValueError for a size that does not fit, and for a kind other than ``embed`` and ``dense``.
    """
    if kind not in ("embed", "dense"):
        raise ValueError(f"unknown payload {kind!r}")
    if n < 1 or len(data) != 4 * n * width:
        raise ValueError(f"{n} {kind} payloads of {width} values are not {len(data)} bytes")
    return Values(kind, np.frombuffer(data, PROBS).reshape(n, width))


def read_call(raw: RawCall, vocab: int, hidden: int) -> Call:
    """Read one agent's call; ValueError where it is malformed or names a slot twice."""
    agent, spans, step, keeping = raw
    read: list[tuple[int, Entries | Values]] = []
    for slot, ids, probs, n, k, payload in spans:
        if payload is None:
            read.append((slot, read_entries(ids, probs, n, k, vocab)))
        else:
            read.append((slot, read_values(*payload, n, _width(payload[0], vocab, hidden))))
    slots: list[int] = []
    entries: Entries | None = None
    payloads: list[tuple[list[int], Values]] = []
    if step is not None and step[0]:
        slots = list(step[0])
        entries = read_entries(step[1], step[2], len(slots), step[3], vocab)
        for kind, rows, data in step[4]:
            if any(not 0 <= row < len(slots) for row in rows):
                raise ValueError(f"a payload names a row outside 0..{len(slots)}")
            values = read_values(kind, data, len(rows), _width(kind, vocab, hidden))
            payloads.append((rows, values))
    named = [*(slot for slot, _ in read), *slots] if read else slots
    if len(set(named)) != len(named):
        twice = next(slot for slot in named if named.count(slot) > 1)
        raise ValueError(f"slot {twice} appears twice in one call of agent {agent}")
    return Call(agent, read, slots, entries, payloads, frozenset(keeping) if keeping else NOBODY)
