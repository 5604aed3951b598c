"""What is proved of a loaded model before it is used: its path is right, its rows independent.

Two questions, both asked with a few short made-up rows. *Reference*: do ragged rows, stepping
together on printed and mixed inputs, give the logits that each gives alone on transformers' own
cache? *Invariance*: are a row's bits the same in another slot, with other mates, at another visible
length and with another number of slots?
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from .cache import BUCKET, padded_rows, round_up
from .device import out_of_memory
from .embed import embed
from .experts import Expert, one_line
from .graphs import Graph
from .lanes import Lanes, PerRowLanes, RowSlotLanes
from .packets import Entries

#: Largest difference from a lone run, as a share of the largest logit, in float32.
TOLERANCE = 1e-4
#: The same for half precisions: root mean square of the difference over that of the logits.
HALF_TOLERANCE = 0.1
STEPS = 4
PROMPTS = (5, 9, 2)
#: Rows of up to this many positions are tried at their own visible length and at the longest.
LONGEST = 512


@dataclass(frozen=True)
class Row:
    """A made-up row: the embeddings of its prompt [n, hidden] and of its steps [STEPS, hidden], and
    the packets that those are of."""

    prompt: Tensor
    steps: Tensor
    packets: Entries


def make_row(expert: Expert, seed: int, length: int, device: torch.device) -> Row:
    """A row that depends on ``seed`` only; its steps alternate printed tokens and mixtures."""
    rng = np.random.Generator(np.random.PCG64(seed))
    vocab = expert.vocabulary.size
    prompt = rng.integers(0, vocab, (length, 1))
    ids = rng.integers(0, vocab, (STEPS, 3))
    probs = np.tile(np.array([[1.0, 0.0, 0.0], [0.5, 0.3125, 0.1875]], np.float32), (STEPS // 2, 1))
    ones = np.ones((length, 1), np.float32)
    return Row(
        embed(expert.embeddings, prompt, ones, device),
        embed(expert.embeddings, ids, probs, device),
        Entries(ids, probs),
    )


def drive(lanes: Lanes, rows: dict[int, Row], *, packets: bool = False) -> dict[int, Tensor]:
    """Run rows by slot through the lanes; each slot's logits [1 + STEPS, head rows] in float32.

    With ``packets`` steps are given those and not their embeddings, which takes row-slot lanes.
    """
    slots = sorted(rows)
    out: dict[int, list[Tensor]] = {}
    for slot in slots:
        lanes.open(slot, rows[slot].prompt.shape[0] + STEPS)
        out[slot] = [lanes.span(slot, rows[slot].prompt)]
    for i in range(STEPS):
        if packets:
            assert isinstance(lanes, RowSlotLanes)
            given = [rows[slot].packets for slot in slots]
            ids, probs = (
                np.stack(x) for x in zip(*((p.ids[i], p.probs[i]) for p in given), strict=True)
            )
            every = lanes.step_packets(slots, Entries(ids, probs))
            logits = every[[lanes.row(slot) for slot in slots]]
        else:
            logits = lanes.step(slots, torch.stack([rows[slot].steps[i] for slot in slots]))
        for j, slot in enumerate(slots):
            # A captured step leaves the next one's logits in the same place.
            out[slot].append(logits[j].clone())
    for slot in slots:
        lanes.close(slot)
    return {slot: torch.stack(logits).float() for slot, logits in out.items()}


def alone(expert: Expert, row: Row) -> Tensor:
    """The row on transformers' own cache and masks, alone: [1 + STEPS, head rows] float32."""
    cache = DynamicCache(config=expert.model.config)
    out = []
    for x in (row.prompt, *row.steps[:, None]):
        taken = {expert.cache_keyword: cache}
        logits = expert.model(inputs_embeds=x[None], use_cache=True, **taken).logits
        out.append(logits[0, -1])
    return torch.stack(out).float()


def uncached(expert: Expert, row: Row) -> Tensor:
    """The row in one forward without any cache: [1 + STEPS, head rows] float32."""
    x = torch.cat([row.prompt, row.steps])
    logits: Tensor = expert.model(inputs_embeds=x[None], use_cache=False).logits
    return logits[0, row.prompt.shape[0] - 1 :].float()


def difference(got: Tensor, want: Tensor, half: bool) -> str | None:
    """Why two sets of logits do not agree within the tolerance of their precision, or None."""
    if not bool(torch.isfinite(want).all()):
        return "the model's own logits are not finite"
    if not bool(torch.isfinite(got).all()):
        return "logits are not finite"
    if half:
        spread = float((want - want.mean(-1, keepdim=True)).pow(2).mean().sqrt())
        share, bound = float((got - want).pow(2).mean().sqrt()) / (spread + 1e-30), HALF_TOLERANCE
    else:
        share = float((got - want).abs().max()) / (float(want.abs().max()) + 1e-30)
        bound = TOLERANCE
    return None if share <= bound else f"logits differ by {share:.1e} of their size"


def reference_failure(expert: Expert, lanes: Lanes) -> str | None:
    """Why the lanes do not give the logits of lone rows, or None where they do.

    Row-slot lanes are compared with ``DynamicCache``; per-row lanes, which use that themselves,
    with forwards that have no cache at all.
    """
    truth: Callable[[Expert, Row], Tensor] = alone
    if isinstance(lanes, PerRowLanes):
        truth = uncached
    half = expert.dtype != torch.float32
    made = [make_row(expert, i, n, lanes.device) for i, n in enumerate(PROMPTS)]
    slots = sorted({0, lanes.slots // 2, lanes.slots - 1})
    rows = dict(zip(slots, made, strict=False))
    got = drive(lanes, rows)
    for slot, row in rows.items():
        reason = difference(got[slot], truth(expert, row), half)
        if reason is not None:
            return reason
    if isinstance(lanes, PerRowLanes):
        lanes.open(0, PROMPTS[0])
        lanes.span(0, made[0].prompt)
        written = lanes.layers_written(0)
        lanes.close(0)
    else:
        assert isinstance(lanes, RowSlotLanes)
        written = lanes.layers_written()
    return None if written else "some layers keep no keys and values"


def _length_free(expert: Expert, lanes: RowSlotLanes, crowd: dict[int, Row], alone: Tensor) -> bool:
    """Whether bits are the same however much more than its own positions a row could see.

    Short rows at two greater lengths, and longer rows, which fill several blocks of a kernel's
    sums, at their own length and at the longest.
    """
    capacity = lanes.cache.plan.capacity
    last = lanes.slots - 1

    def at(length: int, rows: dict[int, Row]) -> Tensor:
        lanes.min_bucket = length
        try:
            return drive(lanes, rows)[last]
        finally:
            lanes.min_bucket = BUCKET

    if any(
        not torch.equal(alone, at(length, crowd))
        for length in {capacity, round_up(capacity // 2, BUCKET)}
    ):
        return False
    reach = min(capacity - 1, expert.context or capacity, LONGEST)
    for positions in {reach // 4, reach // 2, 3 * reach // 4} - {0}:
        size = positions - STEPS
        if size < 1:
            continue
        rows = {last: make_row(expert, positions, size, lanes.device)}
        if not torch.equal(at(BUCKET, rows), at(capacity, rows)):
            return False
    return True


def invariance_failure(expert: Expert, lanes: Lanes) -> str | None:
    """Why a row's bits depend on more than the row, or None where no dependence was seen.

    Where they depend on the visible length alone, that length is fixed at the capacity for good.
    """
    if expert.routed and isinstance(lanes, RowSlotLanes):
        return "mixture-of-experts layers batch a varying number of rows per expert"
    row, mate, other = (make_row(expert, i, n, lanes.device) for i, n in enumerate(PROMPTS))
    last, middle = lanes.slots - 1, lanes.slots // 2
    crowd = {last: row, 0: mate, middle: other} if lanes.slots > 2 else {last: row}

    def together() -> Tensor:
        return drive(lanes, crowd)[last]

    first = drive(lanes, {0: row})[0]
    if not torch.equal(first, together()):
        return "a row's bits depend on its slot or its mates"
    if not isinstance(lanes, RowSlotLanes):
        return None
    capacity = lanes.cache.plan.capacity
    if not _length_free(expert, lanes, crowd, first):
        lanes.min_bucket = capacity
        first = drive(lanes, {0: row})[0]
        if not torch.equal(first, together()):
            return "a row's bits depend on its slot or its mates"
    least = padded_rows(1, expert.dtype)
    if lanes.slots > least:
        few = RowSlotLanes(expert, least, capacity - 1, lanes.device)
        few.min_bucket = lanes.min_bucket
        if not torch.equal(first, drive(few, {3: row})[3]):
            return "a row's bits depend on the number of slots"
    return None


def widths(expert: Expert, lanes: RowSlotLanes, *, exact: bool) -> tuple[int, ...]:
    """The numbers of rows that steps of these lanes may be computed for, ascending.

    All, half of them, half of those, each where a row then has the same logits: the same bits where
    ``exact``, those of a lone run's tolerance elsewhere.
    """
    row, mate, other = (make_row(expert, i, n, lanes.device) for i, n in enumerate(PROMPTS))
    last = lanes.slots - 1
    want = drive(lanes, {last: row})[last]
    half = expert.dtype != torch.float32
    found = [lanes.slots]
    while (width := padded_rows(found[0] // 2, expert.dtype)) < found[0]:
        found.insert(0, width)
    good = []
    for width in found[:-1]:
        lanes.widths = (width, lanes.slots)
        got = drive(lanes, {0: mate, 1: other, last: row})[last]
        if torch.equal(got, want) if exact else difference(got, want, half) is None:
            good.append(width)
    lanes.widths = (lanes.slots,)
    return (*good, lanes.slots)


def graphs_failure(expert: Expert, lanes: RowSlotLanes, make: Callable[[], Graph]) -> str | None:
    """Why captured steps of these lanes cannot be used, or None, with the lanes capturing.

    They have to be captured without an error and give the bits of steps that are launched one by
    one, in the capture's own step and in later ones, for other rows in other slots, from packets
    and from embeddings. Out of memory is raised: it says nothing about the model.
    """
    crowds = [
        {slot: make_row(expert, 10 * turn + slot, length, lanes.device) for slot, length in sizes}
        for turn, sizes in enumerate(
            [[(0, 5)], [(lanes.slots - 1, 9), (0, 2)], [(lanes.slots // 2, 3)]]
        )
    ]
    widths, lanes.widths = lanes.widths, (lanes.slots,)
    launched = [drive(lanes, crowd) for crowd in crowds]
    lanes.graphs = make
    try:
        for crowd, want in zip(crowds, launched, strict=True):
            for packets in (True, False):
                got = drive(lanes, crowd, packets=packets)
                if any(not torch.equal(got[slot], want[slot]) for slot in crowd):
                    raise RuntimeError("a replayed step has other bits than a launched one")
    except Exception as error:
        lanes.launch()
        lanes.widths = widths
        if out_of_memory(error):
            raise
        return f"{type(error).__name__}: {one_line(error)}"
    return None
