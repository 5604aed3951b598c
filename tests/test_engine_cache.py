"""Lanes: rows are independent of their mates, exactly; and what close, fork, truncate and failures
leave behind."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import DynamicCache

from dlmom_rs.engine import backend, selftest, testing
from dlmom_rs.engine.backend import Engine
from dlmom_rs.engine.cache import RowSlotLayer
from dlmom_rs.engine.embed import embed
from dlmom_rs.engine.lanes import RowSlotLanes
from dlmom_rs.engine.masks import Mask, MaskPlan
from dlmom_rs.engine.testing import (
    Packet,
    advance,
    encode_packets,
    load,
    prefill,
    printed,
    save_model,
    span,
    step,
)

VOCAB = 266
SIZES = {**testing.SIZES, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
#: Bit equality was measured on this kind of processor; kernels elsewhere may order sums otherwise.
exact = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"), reason="bit equality is only claimed for x86-64"
)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "qwen2"
    return save_model(folder, transformers.Qwen2Config(**SIZES))


@pytest.fixture(scope="module")
def engine(qwen: Path) -> Engine:
    return load(qwen, max_len=120)


def soft(rng: np.random.Generator, k: int = 5) -> Packet:
    """A packet of ``k`` entries with float32 probabilities that sum to about 1."""
    weights = np.sort(rng.dirichlet(np.ones(k)).astype(np.float32))[::-1]
    return [(int(t), float(p)) for t, p in zip(rng.permutation(VOCAB)[:k], weights, strict=True)]


def draw(rng: np.random.Generator, *, mixed: bool) -> Packet:
    return soft(rng) if mixed else [(int(rng.integers(VOCAB)), 1.0)]


def same(left: dict[int, Tensor], right: dict[int, Tensor]) -> bool:
    return all(torch.equal(left[slot], right[slot]) for slot in left)


@dataclass
class Life:
    """One lane's history: the packets of each forward, and the logits the engine gave."""

    soft: bool
    feeds: list[list[Packet]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def alone(engine: Engine, life: Life) -> list[Tensor]:
    """The same packets on transformers' own cache and masks, one row at a time."""
    expert = engine._experts[0]
    cache = DynamicCache(config=expert.model.config)
    out = []
    with torch.inference_mode():
        for packets in life.feeds:
            ids, probs, k = encode_packets(packets)
            x = embed(
                expert.embeddings,
                np.frombuffer(ids, "<i8").reshape(-1, k),
                np.frombuffer(probs, "<f4").reshape(-1, k),
                torch.device("cpu"),
            )
            logits = expert.model(
                inputs_embeds=x[None], use_cache=True, **{expert.cache_keyword: cache}
            )
            out.append(logits.logits[0, -1, :VOCAB])
    return out


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=8),
    steps=st.integers(1, 8),
    refill=st.integers(0, 8),
)
def test_ragged_rows_equal_lone_rows(
    engine: Engine, seed: int, lengths: list[int], steps: int, refill: int
) -> None:
    rng = np.random.default_rng(seed)
    slots = [int(s) for s in rng.permutation(8)[: len(lengths)]]
    lives: list[Life] = []
    current: dict[int, Life] = {}

    def start(slot: int, length: int) -> None:
        life = Life(soft=bool(rng.integers(2)))
        engine.close([slot])
        engine.open([(slot, 0, 60)])
        life.feeds.append([draw(rng, mixed=False) for _ in range(length)])
        life.logits.append(prefill(engine, slot, life.feeds[0]))
        current[slot] = life
        lives.append(life)

    for slot, length in zip(slots, lengths, strict=True):
        start(slot, length)
    for index in range(steps):
        if index == refill:
            start(slots[0], int(rng.integers(1, 20)))
        moving = [slot for slot in slots if rng.random() < 0.8] or slots
        rows = {slot: draw(rng, mixed=current[slot].soft and index % 3 != 0) for slot in moving}
        for slot, logits in advance(engine, rows).items():
            current[slot].feeds.append([rows[slot]])
            current[slot].logits.append(logits)
    # A transcript handed over mid-run is a span at a position above 0.
    life = current[slots[-1]]
    life.feeds.append([draw(rng, mixed=life.soft) for _ in range(3)])
    life.logits.append(prefill(engine, slots[-1], life.feeds[-1]))
    engine.close(slots)
    for life in lives:
        bound = 1e-4 if life.soft else 4e-6
        for got, want in zip(life.logits, alone(engine, life), strict=True):
            assert got.shape == (VOCAB,)
            assert float((got - want).abs().max()) <= bound * float(want.abs().max())


def target_run(folder: Path, dtype: str, case: tuple[int, int, int, int]) -> Tensor:
    """One fixed row's logits in a crowd: ``case`` = (slots, its slot, max_len, mates' seed)."""
    slots, slot, max_len, seed = case
    engine = load(folder, dtype=dtype, slots=slots, max_len=max_len)
    info = engine.info()
    assert info["bit_invariant"], info["bit_invariance_reason"]
    row, rng = np.random.default_rng(7), np.random.default_rng(seed)
    mates = [s for s in range(slots) if s != slot and seed and rng.random() < 0.7]
    order = [int(s) for s in rng.permutation([slot, *mates])]
    engine.open([(s, 0, max_len) for s in order])
    out: list[Tensor] = []
    for s in order:
        if s == slot:
            out.append(prefill(engine, s, [draw(row, mixed=False) for _ in range(11)]))
        else:
            length = int(rng.integers(1, max_len - 12))
            prefill(engine, s, [draw(rng, mixed=False) for _ in range(length)])
    for index in range(8):
        mine = draw(row, mixed=index % 2 == 1)
        if index == 4 and mates:  # a refill mid-run
            engine.close([mates[0]])
            engine.open([(mates[0], 0, max_len)])
            prefill(engine, mates[0], [draw(rng, mixed=False) for _ in range(3)])
        moving = [slot, *(s for s in mates if rng.random() < 0.8)]
        rows = {
            int(s): mine if s == slot else draw(rng, mixed=bool(rng.integers(2)))
            for s in rng.permutation(moving)
        }
        out.append(advance(engine, rows)[slot])
    return torch.stack(out)


FAMILIES = {
    "qwen2": transformers.Qwen2Config(**SIZES),
    "llama": transformers.LlamaConfig(**{**SIZES, "hidden_size": 72, "num_attention_heads": 6}),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=8),
}


@exact
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_bits_depend_on_nothing_but_the_row(tmp_path: Path, family: str, dtype: str) -> None:
    folder = save_model(tmp_path / family, FAMILIES[family])
    reference = target_run(folder, dtype, (1, 0, 40, 0))
    # Other slots, orders, mates, refills, slot counts, capacities, and so visible lengths.
    for case in ((8, 5, 40, 1), (13, 12, 100, 2), (16, 9, 200, 3), (32, 31, 160, 4)):
        assert torch.equal(reference, target_run(folder, dtype, case)), case


@exact
def test_k_padding_and_order_within_a_call_change_nothing(engine: Engine) -> None:
    rng = np.random.default_rng(3)
    packets = {0: soft(rng, 4), 1: soft(rng, 7), 2: [(9, 1.0)]}
    results = []
    for k, order in ((7, [0, 1, 2]), (16, [2, 0, 1]), (50, [1, 2, 0])):
        engine.open([(slot, 0, 20) for slot in packets])
        for slot in order:
            prefill(engine, slot, printed([5, 6, slot]))
        rows = {slot: packets[slot] for slot in order}
        logits = engine.advance([(0, [], step(rows, k), [])])[0][1]
        assert logits is not None
        assert (logits.dtype, logits.shape) == (torch.float32, (3, VOCAB))
        assert logits.stride(1) == 1
        results.append(dict(zip(order, logits, strict=True)))
        engine.close(list(packets))
    assert same(results[0], results[1])
    assert same(results[0], results[2])


def test_waiting_lanes_are_untouched_even_when_full(engine: Engine) -> None:
    """Rows that wait while others step keep their keys and values, at their limit too."""
    prompts = {0: list(range(119)), 3: [4, 5]}
    engine.open([(0, 0, 120), (3, 0, 120)])
    for slot, ids in prompts.items():
        prefill(engine, slot, printed(ids))
    kept = [layer.keys[0, :, :119].clone() for layer in rows_of(engine)]
    for token in range(20):
        advance(engine, {3: [(token, 1.0)]})
    full = advance(engine, {0: [(7, 1.0)]})[0]
    assert engine.length(0, 0) == 120
    for token in range(3):
        advance(engine, {3: [(token, 1.0)]})
    for layer, keys in zip(rows_of(engine), kept, strict=True):
        assert torch.equal(layer.keys[0, :, :119], keys)
    engine.truncate((0, 0), 119)
    assert torch.equal(full, advance(engine, {0: [(7, 1.0)]})[0])
    engine.close([0, 3])


def test_sets_of_slots_that_change_from_step_to_step(engine: Engine) -> None:
    """Inputs and positions are kept between steps; nothing of another set stays in them."""
    lanes = {slot: [slot + 1, slot + 2] for slot in range(engine.info()["slots"])}
    everyone = list(lanes)
    sets = [everyone, [2, 0], [5], [0, 1, 2], everyone, [2, 0], [6, 7], everyone[::-1], [5]]

    def run(only: int | None) -> dict[int, list[Tensor]]:
        found: dict[int, list[Tensor]] = {slot: [] for slot in lanes}
        chosen = everyone if only is None else [only]
        engine.open([(slot, 0, 40) for slot in chosen])
        for slot in chosen:
            prefill(engine, slot, printed(lanes[slot]))
        for turn, slots in enumerate(sets):
            rows: dict[int, Packet] = {
                slot: [(3 * turn + slot, 0.5), (7, 0.5)] for slot in slots if slot in chosen
            }
            if rows:
                for slot, logits in advance(engine, rows).items():
                    found[slot].append(logits.clone())
        engine.close(chosen)
        return found

    together = run(None)
    for slot in (0, 2, 5, 7):
        alone = run(slot)[slot]
        assert len(alone) > 2
        assert all(torch.equal(a, b) for a, b in zip(together[slot], alone, strict=True))


MOVES = st.one_of(
    st.tuples(st.just("step"), st.sets(st.integers(0, 2), min_size=1)),
    st.tuples(st.just("prompt"), st.integers(0, 2), st.integers(1, 4)),
    st.tuples(st.just("cut"), st.integers(0, 2), st.integers(0, 3)),
    st.tuples(st.just("fork"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("open"), st.integers(0, 2), st.integers(1, 5)),
    st.tuples(st.just("close"), st.integers(0, 2)),
)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(MOVES, max_size=12))
@example([("open", 0, 5), ("step", {0}), ("prompt", 0, 4)])
@example([("open", 0, 5), ("step", {0}), ("open", 0, 1), ("step", {0})])
@example([("open", 0, 5), ("open", 1, 5), ("prompt", 1, 5), ("step", {0}), ("fork", 1, 0)])
def test_the_room_of_lanes_is_that_of_a_plain_count(
    engine: Engine, moves: list[tuple[Any, ...]]
) -> None:
    """A step is refused exactly where a lane is full or closed, whatever the lanes went through."""
    engine.close([0, 1, 2])
    held: dict[int, tuple[int, int]] = {}  # positions and limit of the open lanes

    def full(slot: int, more: int = 1) -> bool:
        length, limit = held.get(slot, (0, 0))
        return length + more > limit

    def expect(refused: bool, call: Callable[[], object]) -> bool:
        if refused:
            with pytest.raises(ValueError, match=r"do not fit|no open lane|cannot|limit"):
                call()
        else:
            call()
        return not refused

    def step_of(slots: list[int]) -> Callable[[], object]:
        return lambda: advance(engine, {slot: [(slot, 0.5), (3, 0.5)] for slot in slots})

    for kind, at, *more in [*moves, ("step", {0}), ("step", {0, 1})]:
        if kind == "step":
            if expect(any(full(slot) for slot in at), step_of(sorted(at))):
                held.update({slot: (held[slot][0] + 1, held[slot][1]) for slot in at})
        elif kind == "open":
            engine.open([(at, 0, more[0])])
            held[at] = (0, more[0])
        elif kind == "close":
            engine.close([at])
            held.pop(at, None)
        elif kind == "prompt":
            ids = printed(range(more[0]))
            # One position is a step of one.
            if expect(full(at, more[0]), partial(prefill, engine, at, ids)):
                held[at] = (held[at][0] + more[0], held[at][1])
        elif kind == "cut":
            refused = at not in held or more[0] > held[at][0]
            if expect(refused, partial(engine.truncate, (at, 0), more[0])):
                held[at] = (more[0], held[at][1])
        else:
            to, (length, limit) = more[0], held.get(at, (0, 0))
            room = held.get(to, (0, limit))[1]
            if expect(
                at not in held or length > room, partial(engine.fork, (at, 0), (to, 0), None)
            ):
                held[to] = (length, room)
        for slot, (length, _) in held.items():
            assert engine.length(slot, 0) == length
    engine.close([0, 1, 2])


def rows_of(engine: Engine, agent: int = 0) -> list[Any]:
    lanes = engine._lanes[agent]
    assert isinstance(lanes, RowSlotLanes)
    return lanes.cache.rows


@pytest.mark.parametrize("how", ["close", "reopen", "truncate"])
def test_nan_in_a_lane_stays_there_and_goes_with_it(qwen: Path, how: str) -> None:
    # One bucket only, so that the position where waiting rows write is within view.
    engine = load(qwen, max_len=60)
    nan: Packet = [(8, float("nan")), (9, 0.5)]

    def run(first: Packet) -> dict[int, Tensor]:
        engine.open([(slot, 0, 60) for slot in (0, 1)])
        for slot, start in ((0, first), (1, [(8, 1.0)])):
            prefill(engine, slot, [start, *printed([9, 10])])
        return advance(engine, {0: [(1, 1.0)], 1: [(2, 1.0)]})

    clean = run([(8, 1.0)])
    after = advance(engine, {1: [(3, 1.0)]})[1]
    assert bool(run(nan)[0].isnan().all())
    broken = advance(engine, {0: [(1, 1.0)], 1: [(3, 1.0)]})
    assert bool(broken[0].isnan().all())
    assert torch.equal(broken[1], after)
    # While row 0 waits, what it writes aside is NaN as well.
    advance(engine, {1: [(3, 1.0)]})
    assert bool(rows_of(engine)[1].keys[0, :, -1].isnan().all())
    if how == "close":
        engine.close([0])
    elif how == "truncate":
        engine.truncate((0, 0), 0)
        prefill(engine, 0, printed([8, 9, 10]))
        assert torch.equal(advance(engine, {0: [(1, 1.0)]})[0], clean[0])
    assert same(clean, run([(8, 1.0)]))
    engine.close([0, 1])


def test_every_agent_is_launched_before_anything_is_waited_for(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(qwen, agents=[0, 0])
    engine.open([(0, 0, 20), (0, 1, 20)])
    done: list[str] = []

    def noted(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            done.append(name)
            return function(*given)

        return call

    monkeypatch.setattr(RowSlotLanes, "step", noted("launch", RowSlotLanes.step))
    monkeypatch.setattr(backend, "_readout", noted("wait", backend._readout))
    rows = step({0: [(1, 1.0)]})
    engine.advance([(0, [], rows, []), (1, [], rows, [])])
    assert done == ["launch", "launch", "wait", "wait"]


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["second agent", "second layer"])
def test_a_failed_advance_leaves_every_lane_where_it_was(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], where: str
) -> None:
    engine = load(qwen, agents=[0, 0], max_len=60)

    def fail(*_: object, **__: object) -> None:
        raise error("broken on purpose")

    def calls(token: int) -> list[Any]:
        span_of = [span(2, printed([token, 4, 5]))]
        return [
            (a, span_of, step({0: [(token, 1.0)], 1: [(token + 1, 0.6), (2, 0.4)]}), [])
            for a in (0, 1)
        ]

    def start() -> None:
        engine.close([0, 1, 2])
        engine.open([(slot, agent, 30) for slot in (0, 1, 2) for agent in (0, 1)])
        for slot in (0, 1, 2):
            for agent in (0, 1):
                prefill(engine, slot, printed([slot, agent, 3]), agent)

    start()
    want = engine.advance(calls(7))
    start()
    with monkeypatch.context() as patch:
        if where == "second agent":
            patch.setattr(engine._lanes[1], "step", fail)
        else:
            patch.setattr(engine._experts[0].model.model.layers[1], "forward", fail)
        with pytest.raises(error, match="on purpose"):
            engine.advance(calls(99))
    assert [engine.length(s, a) for s in (0, 1, 2) for a in (0, 1)] == [3] * 6
    for (spans, steps), (want_spans, want_steps) in zip(
        engine.advance(calls(7)), want, strict=True
    ):
        assert torch.equal(spans, want_spans)
        assert steps is not None
        assert want_steps is not None
        assert torch.equal(steps, want_steps)


def test_fork_and_truncate_are_exact(qwen: Path) -> None:
    engine = load(qwen, agents=[0, 0], max_len=60)
    engine.open([(0, 0, 40), (5, 1, 30)])
    prefill(engine, 0, printed(range(10)))
    inputs: list[Packet] = [[(3, 1.0)], [(4, 0.75), (9, 0.25)], [(5, 1.0)]]
    first = [advance(engine, {0: packet})[0] for packet in inputs]
    engine.fork((0, 0), (5, 1), 10)  # another agent of the same model, another slot, open already
    engine.fork((0, 0), (2, 0), None)  # closed: opened with the source's limit
    assert engine.length(5, 1) == 10
    assert engine.length(2, 0) == 13
    forked = [advance(engine, {5: packet}, agent=1)[5] for packet in inputs]
    engine.truncate((0, 0), 10)
    replayed = [advance(engine, {0: packet})[0] for packet in inputs]
    for a, b, c in zip(first, forked, replayed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert same(advance(engine, {2: [(6, 1.0)]}), {2: advance(engine, {0: [(6, 1.0)]})[0]})
    prefill(engine, 0, printed(range(25)))
    with pytest.raises(ValueError, match="limit is 30"):
        engine.fork((0, 0), (5, 1), None)
    with pytest.raises(ValueError, match="cannot cut slot 5"):
        engine.truncate((5, 1), 99)


def test_fork_needs_one_model(qwen: Path) -> None:
    engine = load(qwen, qwen, max_len=30)
    engine.open([(0, 0, 20), (0, 1, 20)])
    prefill(engine, 0, printed([1, 2]))
    with pytest.raises(ValueError, match="their models differ"):
        engine.fork((0, 0), (0, 1), None)


def test_calls_are_checked_before_anything_moves(engine: Engine) -> None:
    engine.open([(0, 0, 6), (1, 0, 20)])
    prefill(engine, 0, printed([1, 2, 3, 4, 5]))
    prefill(engine, 1, printed([1]))
    ids, probs, k = encode_packets([[(1, 1.0)]])
    bad = {
        "do not fit": (0, [span(1, printed([1])), span(0, printed([1, 2]))], None, []),
        "appears twice": (0, [span(1, printed([1]))], step({1: [(1, 1.0)]}), []),
        "outside the vocabulary": (0, [], step({0: [(1, 1.0)], 1: [(VOCAB, 1.0)]}), []),
        "no open lane": (0, [], step({1: [(1, 1.0)], 2: [(1, 1.0)]}), []),
        "outside 0..": (0, [], step({1: [(1, 1.0)], 99: [(1, 1.0)]}), []),
        "token -1 is outside": (0, [], step({1: [(-1, 1.0)]}), []),
        "need 16 bytes of ids": (0, [(1, ids, probs, 2, k, None)], None, []),
        "at least one row": (0, [(1, ids, probs, 0, k, None)], None, []),
        "agent 4 is outside": (4, [], None, []),
    }
    for message, call in bad.items():
        with pytest.raises(ValueError, match=message):
            engine.advance([call])
    with pytest.raises(ValueError, match="two calls"):
        engine.advance([(0, [], None, []), (0, [], None, [])])
    assert (engine.length(0, 0), engine.length(1, 0)) == (5, 1)
    advance(engine, {0: [(1, 1.0)]})
    with pytest.raises(ValueError, match="1 more do not fit"):
        advance(engine, {0: [(1, 1.0)], 1: [(1, 1.0)]})
    assert (engine.length(0, 0), engine.length(1, 0)) == (6, 1)
    for lane, message in (((0, 0, 121), "longest lane is 120"), ((0, 0, 0), "0 positions")):
        with pytest.raises(ValueError, match=message):
            engine.open([lane])
    assert engine.advance([]) == []
    engine.close([0, 1])


def leaky(_: MaskPlan, queries: Tensor, keys: Tensor) -> Mask:
    """A mask that lets a query see the position after it."""
    return keys <= queries + 1


def test_the_self_test_notices_a_wrong_mask(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MaskPlan, "build", leaky)
    model = load(qwen).info()["models"][0]
    assert model["path"] == "per_row"
    assert "row-slot self-test failed" in model["path_reason"]


def test_the_self_test_notices_rows_that_touch(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A leak of one part in ten million between mates is too small for tolerances, not for bits."""
    batch = RowSlotLanes._batch

    def mixed(self: RowSlotLanes, rows: Tensor, x: Tensor) -> Tensor:
        full = batch(self, rows, x)
        return full + 1e-7 * full.mean(0, keepdim=True)

    monkeypatch.setattr(RowSlotLanes, "_batch", mixed)
    info = load(qwen).info()
    assert info["models"][0]["path"] == "row_slot"
    assert not info["bit_invariant"]
    assert "slot or its mates" in info["bit_invariance_reason"]


def test_a_visible_length_that_matters_is_fixed_for_good(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(qwen, max_len=300)
    lanes = engine._lanes[0]
    assert isinstance(lanes, RowSlotLanes)
    original = RowSlotLanes._logits

    def shifted(self: RowSlotLanes, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        logits = original(self, x, *args, **kwargs)
        return logits if x.shape[1] > 1 else logits + 1e-6 * self.cache.plan.bucket

    monkeypatch.setattr(RowSlotLanes, "_logits", shifted)
    with torch.inference_mode():
        assert selftest.invariance_failure(engine._experts[0], lanes) is None
    assert lanes.min_bucket == lanes.cache.plan.capacity


def no_memory(*_: object) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")


def test_memory_and_reserve(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(qwen, slots=3, max_len=60)
    assert engine.info()["slots"] == 16  # float32 takes 16 rows at least
    before = engine.memory()
    # 2 layers x keys and values x 16 rows x 2 heads x 64 positions x 16 numbers x 4 bytes
    assert before["kv_bytes"] == 2 * 2 * 16 * 2 * 64 * 16 * 4
    assert before["device_bytes"] == 0
    assert before["peak_rss_bytes"] > 10**7
    engine.open([(0, 0, 60)])
    engine.reserve(20, 200)
    assert (engine.info()["slots"], engine.info()["max_len"]) == (24, 200)
    with pytest.raises(ValueError, match="no open lane"):
        engine.length(0, 0)
    with monkeypatch.context() as patch:
        patch.setattr(RowSlotLayer, "allocate", no_memory)
        with pytest.raises(MemoryError, match="4 slots of 60 positions do not fit"):
            engine.reserve(4, 60)
    with pytest.raises(ValueError, match="no lanes are reserved"):
        engine.open([(0, 0, 10)])
    engine.reserve(1, 20)
    engine.open([(0, 0, 20)])
    assert load(qwen, slots=3, dtype="bf16").info()["slots"] == 8
