"""Steps of few lanes are computed for few rows, and nobody can tell from the logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from dlmom_rs.engine.backend import Engine
from dlmom_rs.engine.lanes import Given, RowSlotLanes
from dlmom_rs.engine.testing import SIZES, Packet, advance, load, prefill, printed, save_model

SLOTS = 40
#: Halves of 40 in multiples of 8, from 16 on in float32.
WIDTHS = {"fp32": (16, 24, SLOTS), "bf16": (8, 16, 24, SLOTS)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(
        tmp_path_factory.mktemp("widths") / "model", transformers.Qwen2Config(**SIZES)
    )


def lanes_of(engine: Engine, agent: int = 0) -> RowSlotLanes:
    lanes = engine._lanes[agent]
    assert isinstance(lanes, RowSlotLanes)
    return lanes


def packet(rng: np.random.Generator) -> Packet:
    if rng.random() < 0.5:
        return [(int(rng.integers(266)), 1.0)]
    first, second = rng.permutation(266)[:2]
    return [(int(first), 0.75), (int(second), 0.25)]


def story(engine: Engine, turns: int = 24) -> tuple[list[Tensor], list[int]]:
    """A batch that runs empty, with lanes that wait, come, are cut and copied; the logits of every
    row and step, a hidden state, and the rows that each step was computed for."""
    rng = np.random.Generator(np.random.PCG64(7))
    lanes = lanes_of(engine)
    found: list[Tensor] = []
    widths: list[int] = []
    held: dict[int, int] = {}

    def begin(slot: int) -> None:
        engine.open([(slot, 0, 100)])
        held[slot] = int(rng.integers(2, 9))
        found.append(prefill(engine, slot, printed(rng.integers(0, 266, held[slot]).tolist())))

    for slot in rng.permutation(SLOTS).tolist():
        begin(slot)
    for turn in range(turns):
        moving = [slot for slot in rng.permutation(list(held)).tolist() if rng.random() < 0.9]
        moving = moving or list(held)
        hidden = moving[:1]
        step = advance(engine, {slot: packet(rng) for slot in moving}, hidden=hidden)
        found += [step[slot].clone() for slot in moving]
        found.append(
            torch.frombuffer(
                bytearray(engine.hidden([(hidden[0], 0)], False)[0]), dtype=torch.uint8
            )
        )
        widths.append(lanes.places(moving).width)
        for slot in moving:
            held[slot] += 1
        for slot in rng.permutation(list(held)).tolist()[: 4 if len(held) > 6 else 0]:
            engine.close([slot])
            del held[slot]
        some, other = rng.permutation(list(held)).tolist()[:2]
        engine.truncate((some, 0), held[some] - 1)
        held[some] -= 1
        if turn % 5 == 0:
            engine.fork((some, 0), (other, 0), None)
            held[other] = held[some]
        if turn % 4 == 1:
            begin(next(slot for slot in rng.permutation(SLOTS).tolist() if slot not in held))
    for slot, length in held.items():
        assert engine.length(slot, 0) == length
    engine.close(list(held))
    return found, widths


@pytest.mark.parametrize("attn", [None, "sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_rows_of_a_step_are_no_part_of_its_result(
    folder: Path, dtype: str, attn: str | None
) -> None:
    engine = load(folder, dtype=dtype, slots=SLOTS, max_len=100, attn=attn)
    if attn is not None and not engine.info()["bit_invariant"]:
        pytest.skip(f"{attn}: {engine.info()['bit_invariance_reason']}")
    lanes = lanes_of(engine)
    assert lanes.widths == WIDTHS[dtype]
    narrow, used = story(engine)
    assert sorted(set(used)) == list(WIDTHS[dtype])
    assert used[-1] == WIDTHS[dtype][0]
    lanes.widths = (SLOTS,)
    wide, all_rows = story(engine)
    assert set(all_rows) == {SLOTS}
    assert len(narrow) == len(wide)
    assert all(map(torch.equal, narrow, wide))


def test_a_lone_lane_is_computed_for_the_fewest_rows_whatever_its_slot(folder: Path) -> None:
    engine = load(folder, slots=SLOTS)
    engine.open([(SLOTS - 1, 0, 20)])
    prefill(engine, SLOTS - 1, printed([1, 2, 3]))
    advance(engine, {SLOTS - 1: [(4, 1.0)]})
    assert lanes_of(engine).places([SLOTS - 1]).width == 16
    assert lanes_of(engine).row(SLOTS - 1) == 0


def test_a_row_that_was_left_holds_nothing(folder: Path) -> None:
    """NaN of a lane goes with it when it moves, and is gone when it is closed."""
    engine = load(folder, slots=SLOTS)
    lanes = lanes_of(engine)

    def lone(slot: int) -> Tensor:
        engine.open([(slot, 0, 20)])
        prefill(engine, slot, printed([5, 6]))
        return advance(engine, {slot: [(7, 0.5), (8, 0.5)]})[slot].clone()

    clean = lone(0)
    for slot in range(1, SLOTS):
        lone(slot)
    last = SLOTS - 1
    old = lanes.row(last)
    for keys, values in lanes.views(last):
        with torch.inference_mode():
            keys.fill_(torch.nan)
            values.fill_(torch.nan)
    engine.close(list(range(8, last)))
    assert advance(engine, {last: [(1, 1.0)]})[last].isnan().all()
    assert lanes.row(last) < 16 <= old
    assert not any(layer.keys[old].isnan().any() for layer in lanes.cache.rows)
    engine.close([last])
    assert not any(layer.values.isnan().any() for layer in lanes.cache.rows)
    assert torch.equal(lone(last), clean)


def test_a_number_of_rows_that_changes_bits_is_not_used(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RowSlotLanes._forward

    def off(self: RowSlotLanes, given: Given, inputs: Tensor, bucket: int, width: int) -> Tensor:
        logits = run(self, given, inputs, bucket, width)
        return logits * (1 + 1e-6) if width == 24 else logits

    monkeypatch.setattr(RowSlotLanes, "_forward", off)
    engine = load(folder, slots=SLOTS)
    assert engine.info()["bit_invariant"]
    assert lanes_of(engine).widths == (16, SLOTS)
    # Where bits may differ, a millionth is no difference; a tenth is one.
    fast = load(folder, slots=SLOTS, fast=True)
    assert lanes_of(fast).widths == (16, 24, SLOTS)
    monkeypatch.setattr(
        RowSlotLanes,
        "_forward",
        lambda self, given, inputs, bucket, width: (
            run(self, given, inputs, bucket, width) * (1 + 0.1 * (width == 24))
        ),
    )
    fast.reserve(SLOTS, 64)
    assert lanes_of(fast).widths == (16, SLOTS)


def test_agents_of_one_model_share_what_was_found(folder: Path) -> None:
    engine = load(folder, agents=[0, 0], slots=SLOTS)
    assert lanes_of(engine, 0).widths == lanes_of(engine, 1).widths == (16, 24, SLOTS)
