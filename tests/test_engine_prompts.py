"""Prompts that are asked again are copied, with the bits a forward would give."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PhiConfig, PreTrainedConfig, Qwen2Config

from dlmom_rs.bench import models
from dlmom_rs.engine.backend import Engine
from dlmom_rs.engine.packets import Entries, Values
from dlmom_rs.engine.prompts import Prompts, tokens
from dlmom_rs.engine.testing import advance, load, prefill, printed, save_model, span

FIRST = [5, 6, 7, 8]
REST = [9, 10, 11]


SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
}
QWEN2 = Qwen2Config(**SIZES, num_key_value_heads=2)
#: A family that runs one row at a time.
PHI = PhiConfig(**SIZES)


@pytest.fixture(params=[QWEN2, PHI], ids=["row slots", "one row at a time"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config: PreTrainedConfig = request.param
    return save_model(tmp_path / "model", config)


@pytest.fixture
def qwen(tmp_path: Path) -> Path:
    return save_model(tmp_path / "qwen", QWEN2)


def copied(engine: Engine) -> int:
    return engine.memory()["copied_positions"]


def spans(engine: Engine, slot: int, parts: Sequence[Sequence[int]], agent: int = 0) -> Tensor:
    """Feed a lane whole spans; the logits of the last."""
    engine.open([(slot, agent, 60)])
    for part in parts:
        logits = prefill(engine, slot, printed(part), agent)
    return logits


def follow(engine: Engine, slot: int, agent: int = 0) -> list[Tensor]:
    """Logits of three steps behind a prompt."""
    rows = ([(3, 0.5), (4, 0.5)], [(8, 1.0)], [(1, 0.75), (2, 0.25)])
    return [advance(engine, {slot: row}, agent)[slot].clone() for row in rows]


def test_a_copied_prompt_has_the_bits_of_a_computed_one(folder: Path) -> None:
    engine = load(folder, agents=[0, 0])
    computed = spans(engine, 1, [FIRST, REST]).clone()
    after = follow(engine, 1)
    assert copied(engine) == 0
    for slot, agent in ((4, 0), (4, 1), (1, 0)):
        again = spans(engine, slot, [FIRST, REST], agent)
        assert torch.equal(again, computed)
        assert engine.length(slot, agent) == 7
        assert all(map(torch.equal, follow(engine, slot, agent), after))
    assert copied(engine) == 3 * 7
    # A shared beginning is copied, what follows it is computed.
    other = spans(engine, 2, [FIRST, [12, 13]])
    assert copied(engine) == 3 * 7 + 4
    fresh = load(folder)
    assert torch.equal(spans(fresh, 0, [FIRST, [12, 13]]), other)
    assert all(map(torch.equal, follow(fresh, 0), follow(engine, 2)))


def test_only_equal_lanes_are_copied_from(qwen: Path) -> None:
    engine = load(qwen)
    spans(engine, 0, [FIRST, REST])
    # The same tokens cut elsewhere are other forwards.
    spans(engine, 1, [[*FIRST, *REST]])
    spans(engine, 2, [REST])
    # What follows a step, a mixture or a cut is not a prompt.
    spans(engine, 3, [[1, 2]])
    advance(engine, {3: [(5, 1.0)]})
    prefill(engine, 3, printed(REST))
    engine.open([(4, 0, 60)])
    prefill(engine, 4, [[(5, 0.5), (6, 0.5)], [(7, 1.0)]])
    prefill(engine, 4, printed(REST))
    assert copied(engine) == 0
    spans(engine, 5, [FIRST])
    assert copied(engine) == 4
    engine.truncate((5, 0), 2)
    prefill(engine, 5, printed(REST))
    engine.fork((0, 0), (6, 0), 4)
    prefill(engine, 6, printed(REST))
    assert copied(engine) == 4


def test_kept_hidden_states_are_computed(qwen: Path) -> None:
    engine = load(qwen)
    spans(engine, 0, [FIRST])
    engine.open([(1, 0, 60)])
    prefill(engine, 1, printed(FIRST), hidden=True)
    assert copied(engine) == 0
    assert len(engine.hidden([(1, 0)], False)[0]) == 4 * 32


def test_a_compressed_lane_is_not_copied_from(qwen: Path) -> None:
    class Zero:
        def compress(self, keys: Tensor, values: Tensor, **_: int) -> tuple[Tensor, Tensor]:
            return torch.zeros_like(keys), torch.zeros_like(values)

    engine = load(qwen)
    spans(engine, 0, [FIRST])
    plain = follow(engine, 0)
    engine.set_compressor(Zero())
    spans(engine, 1, [FIRST])
    engine.compress([(1, 0)])
    prefill(engine, 1, printed(REST))
    assert copied(engine) == 4
    spans(engine, 2, [FIRST])
    assert all(map(torch.equal, follow(engine, 2), plain))
    assert not torch.equal(spans(engine, 3, [FIRST, REST]), prefill_of(engine, 1))


def prefill_of(engine: Engine, slot: int) -> Tensor:
    """The first step behind what a lane holds."""
    return advance(engine, {slot: [(1, 1.0)]})[slot]


def test_a_failed_advance_keeps_nothing_of_a_lane(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(qwen, agents=[0, 0])
    engine.open([(0, 0, 60), (0, 1, 60)])
    calls = [(agent, [span(0, printed(FIRST))], None, []) for agent in (0, 1)]

    def broken(*_: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(engine._lanes[1], "extend", broken)
        with pytest.raises(RuntimeError, match="no"):
            engine.advance(calls)
    assert engine.length(0, 0) == 0
    engine.open([(0, 0, 60), (0, 1, 60)])
    first, second = (spans for spans, _ in engine.advance(calls))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)


def test_memory_is_given_back_where_it_is_needed(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(qwen)
    spans(engine, 0, [FIRST])
    held = engine.memory()["kv_bytes"]
    lanes = engine._lanes[0]
    run = lanes.span
    failures = [MemoryError("full"), MemoryError("still full"), MemoryError("still full")]

    def short(slot: int, x: Tensor) -> Tensor:
        if failures:
            raise failures.pop()
        return run(slot, x)

    monkeypatch.setattr(lanes, "span", short)
    engine.open([(1, 0, 60)])
    with pytest.raises(MemoryError):
        prefill(engine, 1, printed(REST))
    assert engine.memory()["kv_bytes"] < held
    # Nothing is kept any more, so a call that fails twice is not tried a third time.
    failures.clear()
    spans(engine, 0, [FIRST])
    spans(engine, 2, [FIRST])
    assert copied(engine) == 0
    # Lanes that are reserved anew keep prompts again, and one failure is made good.
    engine.reserve(8, 128)
    spans(engine, 0, [FIRST])
    run = engine._lanes[0].span
    monkeypatch.setattr(engine._lanes[0], "span", short)
    failures.append(MemoryError("full"))
    engine.open([(1, 0, 60)])
    logits = prefill(engine, 1, printed(REST))
    assert not failures
    assert torch.equal(logits, spans(load(qwen), 0, [REST]))


def test_the_budget_holds_and_the_latest_stay() -> None:
    pair = (torch.ones(1, 4, 8), torch.ones(1, 4, 8))
    logits = torch.zeros(16)
    one = 2 * pair[0].nbytes + logits.nbytes
    prompts = Prompts(2 * one + 1)
    for name in (b"a", b"b"):
        prompts.keep((name,), [pair], logits)
    assert prompts.find((b"a",)) is not None
    prompts.keep((b"c",), [pair], logits)
    assert [prompts.find((name,)) is not None for name in (b"a", b"b", b"c")] == [True, False, True]
    assert prompts.nbytes == 2 * one
    prompts.keep((b"big",), [pair] * 3, logits)
    assert (len(prompts), prompts.nbytes) == (2, 2 * one)
    pair[0].zero_()
    kept = prompts.find((b"c",))
    assert kept is not None
    assert bool(kept.pairs[0][0].all())
    assert prompts.stop()
    assert not prompts.stop()
    prompts.keep((b"d",), [pair], logits)
    assert (len(prompts), prompts.nbytes) == (0, 0)


def test_tokens_are_what_is_certain() -> None:
    ids = np.array([[3], [4]])
    sure, unsure = np.ones((2, 1), np.float32), np.array([[1.0], [0.5]], np.float32)
    assert tokens(Entries(ids, sure)) == ids.astype("<i8").tobytes()
    assert tokens(Entries(ids, unsure)) is None
    assert tokens(Entries(np.array([[3, 4]]), np.array([[1.0, 0.0]], np.float32))) is None
    assert tokens(Values("embed", sure)) is None


def test_instructions_are_forwarded_once_for_all_questions(tmp_path: Path) -> None:
    """The loop cuts prompts behind what they have in common, and the engine copies that."""
    folder = save_model(tmp_path / "chat", QWEN2, chat=True)
    ensemble = models.ensemble([str(folder)], 8)
    system = {"role": "system", "content": "Add, subtract, and say what is left. " * 3}
    sources = [
        {"kind": "chat", "messages": [system, {"role": "user", "content": f"{word} apples?"}]}
        for word in ("some", "no", "ten")
    ]
    ids = [ensemble._engine.encode(0, source) for source in sources]
    shared = next(i for i, row in enumerate(zip(*ids, strict=False)) if len(set(row)) > 1)
    assert shared > 64
    config = models.loop_config(ensemble, gate="always_explicit", max_steps=4, answer_reserve=0)
    stats = models.run(ensemble, sources, config, 3)
    assert stats["prompt_positions"] == sum(map(len, ids))
    assert stats["copied_positions"] == 2 * shared
