"""Consensus where the logits are, in the loop: against consensus on the host, on the CPU."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dlmom_rs import DeepLatentMoM, Result, _core, kernels
from dlmom_rs.engine import backend, reads
from dlmom_rs.engine.errors import ModelError
from dlmom_rs.engine.reads import FIELDS, RawRead, RawReadout, Reader
from dlmom_rs.engine.testing import Engine, printed, span, step

EXPERTS = ["zoo:tiny-math", "zoo:tiny-general"]
QUESTIONS = [
    "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have?",
    "What is 5 plus 6?",
    "Ann has 9 pens. She loses 2. How many are left?",
]
LATENT: dict[str, Any] = {
    "controller": {"alpha": 0.1, "alpha_unit": "nats"},
    "max_steps": 40,
    "answer_reserve": 8,
}
SAMPLED = {"temperature": 0.8, "top_k": 0, "top_p": 0.95, "min_p": 0.0}


def load(experts: list[str], kernel: str | None, topology: str = "lockstep") -> DeepLatentMoM:
    return DeepLatentMoM.from_pretrained(
        experts,
        device="cpu",
        dtype="fp32",
        batch_size=3,
        max_len=160,
        threads=1,
        topology=topology,
        kernel=kernel,
    )


@pytest.fixture(scope="module")
def host() -> DeepLatentMoM:
    return load(EXPERTS, None)


@pytest.fixture(scope="module")
def device() -> DeepLatentMoM:
    return load(EXPERTS, "torch")


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of logits that went to the host, one number for every call that copies."""
    rows: list[int] = []
    original = backend._readout

    def readout(logits: Tensor, vocab: int) -> Tensor:
        rows.append(logits.shape[0])
        return original(logits, vocab)

    monkeypatch.setattr(backend, "_readout", readout)
    return rows


def answers(model: DeepLatentMoM, config: dict[str, Any], seed: int = 0) -> list[Result]:
    results = model.generate(QUESTIONS, config=config, seed=seed, trace=True)
    assert isinstance(results, list)
    return results


def assert_same(ours: list[Result], theirs: list[Result]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.trace is not None
        assert b.trace is not None
        assert a.tokens == b.tokens
        assert (a.text, a.stop, a.error, a.agreement) == (b.text, b.stop, b.error, b.agreement)
        for name in ("mode", "reason", "token", "top_ids", "agent"):
            assert a.trace[name] == b.trace[name], name
        for name in ("entropy", "expert_entropy", "merged_entropy", "mass"):
            assert np.asarray(a.trace[name], float) == pytest.approx(
                np.asarray(b.trace[name], float), abs=1e-6, nan_ok=True
            ), name
        for (at, packet), (other_at, other) in zip(a.packets, b.packets, strict=True):
            assert (at, packet.ids) == (other_at, other.ids)
            assert packet.probs == pytest.approx(other.probs, abs=1e-6)


def test_the_kernel_in_use_is_told(host: DeepLatentMoM, device: DeepLatentMoM) -> None:
    assert host.info["consensus_kernel"] == "rust"
    assert device.info["consensus_kernel"] == "torch"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"consensus": {"theta": 1.5, "eps": 0.5}},
        {"consensus": {"method": "mean"}},
        {"consensus": {"method": "arith"}},
        {"k": 7, "controller": {"gate": "always_latent"}},
    ],
)
def test_plain_rows_are_read_alike_and_stay_on_the_device(
    host: DeepLatentMoM, device: DeepLatentMoM, copied: list[int], changes: dict[str, Any]
) -> None:
    config = {**LATENT, **changes}
    expected = answers(host, config)
    assert any(result.latent_steps > 0 for result in expected)
    assert sum(copied) > 0
    copied.clear()
    assert_same(answers(device, config), expected)
    assert sum(copied) == 0


@pytest.mark.parametrize(
    ("experts", "topology", "changes"),
    [
        (EXPERTS[:1], "lockstep", {}),
        # The slots whose hidden states are kept are those whose logits stay.
        (EXPERTS[:1], "lockstep", {"link": {"message": "hidden"}}),
        (EXPERTS, "sequential", {}),
    ],
    ids=["one expert", "hidden states", "sequential"],
)
def test_one_moving_agent_is_read_alike(
    copied: list[int], experts: list[str], topology: str, changes: dict[str, Any]
) -> None:
    config = {**LATENT, **changes}
    expected = answers(load(experts, None, topology), config)
    model = load(experts, "torch", topology)
    copied.clear()
    assert_same(answers(model, config), expected)
    assert sum(copied) == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": SAMPLED},
        {"sampling": {"repetition_penalty": 1.3}},
        {"k": 200},
        {"consensus": {"method": "poe"}},
        {"consensus": {"weights": [1.0, 2.0]}},
        {"consensus": {"calibrate": "zscore"}},
        {"consensus": {"elect": "mass"}},
        {"consensus": {"gate": {"max_p": 0.9}}},
        {"link": {"support": "packet"}},
    ],
)
def test_other_rows_are_read_on_the_host(
    host: DeepLatentMoM, device: DeepLatentMoM, copied: list[int], changes: dict[str, Any]
) -> None:
    config = {**LATENT, **changes}
    expected = answers(host, config, seed=5)
    copied.clear()
    found = answers(device, config, seed=5)
    assert sum(copied) > 0
    same = [dataclasses.replace(result, latency_s=0.0) for result in found]
    assert same == [dataclasses.replace(result, latency_s=0.0) for result in expected]


def test_a_consensus_of_a_users_own_is_asked_on_the_host(
    host: DeepLatentMoM, device: DeepLatentMoM
) -> None:
    class Second:
        def merge(self, rows: np.ndarray) -> np.ndarray:
            return rows[1]

    ours, theirs = (
        model.generate(QUESTIONS[0], config=LATENT, consensus=Second()) for model in (device, host)
    )
    assert ours == theirs


def test_the_engine_keeps_the_backend_contract(device: DeepLatentMoM) -> None:
    _core.conformance(device._engine, 2e-4)


def test_a_lane_with_nan_is_named_and_the_others_go_on(
    host: DeepLatentMoM, device: DeepLatentMoM, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = answers(host, LATENT)
    results = []
    for model in (host, device):
        lanes = model._engine._lanes[1]
        original, calls = lanes.step, 0

        def broken(slots: list[int], x: Tensor, original: Any = original) -> Tensor:
            nonlocal calls
            calls += 1
            logits = original(slots, x).clone()
            if calls == 3:
                logits[slots.index(1), 5] = torch.nan
            return logits

        with monkeypatch.context() as patch:
            patch.setattr(lanes, "step", broken)
            results.append(answers(model, LATENT))
    theirs, ours = results
    assert_same([ours[0], ours[2]], [clean[0], clean[2]])
    assert ours[1].stop == theirs[1].stop == "nan_inf"
    assert ours[1].error == theirs[1].error
    assert "tiny-general" in str(ours[1].error)


# The engine by itself.


@pytest.fixture
def engine(device: DeepLatentMoM) -> Iterator[Engine]:
    """Slots 0 to 2 of both agents hold three positions."""
    engine = device._engine
    engine.open([(slot, agent, 32) for slot in range(3) for agent in range(2)])
    engine.advance(calls(spans=(0, 1, 2)))
    yield engine
    engine.close([0, 1, 2])


def calls(spans: tuple[int, ...] = (), steps: tuple[int, ...] = ()) -> list[Any]:
    """Both agents take in three tokens in every span, and one in every step."""
    return [
        (
            agent,
            [span(slot, printed([slot + 1, 7, 9])) for slot in spans],
            step({slot: [(slot + 20, 1.0)] for slot in steps}) if steps else None,
            [],
        )
        for agent in range(2)
    ]


def read(slots: list[int], *targets: list[int], agents: tuple[int, ...] = (0, 1)) -> RawRead:
    given = list(targets) or [[] for _ in slots]
    return slots, list(agents), "ties", 0.1, 1e-6, 5, [3, 3, 9], given


def fields(raw: RawReadout) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(part, code)
        for (name, code), part in zip(FIELDS.items(), raw, strict=True)
    }


def test_some_rows_are_read_and_the_others_returned(engine: Engine) -> None:
    whole = engine.advance(calls(spans=(2,), steps=(0, 1)))
    for slot in range(3):
        for agent in range(2):
            engine.truncate((slot, agent), 3)
    asked = [read([2, 0], [4, 5, 6], [8]), read([1], agents=(1,))]
    left, readouts = engine.advance(calls(spans=(2,), steps=(0, 1)), asked[:1])
    for (spans, steps), (_, all_steps) in zip(left, whole, strict=True):
        assert spans is None
        assert steps is not None
        assert all_steps is not None
        assert torch.equal(steps, all_steps[1:])
    (found,) = map(fields, readouts)
    rows = [
        torch.stack([spans[0], steps[0]])
        for spans, steps in whole
        if spans is not None and steps is not None
    ]
    expected = kernels.choose("cpu", torch.float32, "torch")(
        rows,
        k=5,
        role=torch.tensor([3, 3, 9]),
        targets=torch.tensor([[4, 5, 6], [8, -1, -1]]),
    )
    for name in FIELDS:
        assert found[name].tolist() == getattr(expected, name).flatten().tolist(), name


def test_a_read_that_fails_moves_no_lane(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("the device fell off the bus")

    monkeypatch.setattr(engine, "_reader", Reader("torch", lost))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="off the bus"):
        engine.advance(calls(steps=(0, 1)), [read([0, 1])])
    assert {engine.length(slot, agent) for slot in range(3) for agent in range(2)} == {3}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ([read([0]), read([0])], "slot 0 is read twice"),
        ([read([2])], "slot 2 of agent 0 is read but not fed"),
        ([read([0], agents=(0, 5))], "slot 0 of agent 5 is read but not fed"),
        ([read([0, 1], [4])], "2 slots, 2 agents and 1 lists"),
        ([read([0], agents=())], "1 slots, 0 agents"),
    ],
)
def test_malformed_reads_are_refused(engine: Engine, asked: list[RawRead], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        engine.advance(calls(steps=(0, 1)), asked)
    assert engine.length(0, 0) == 3


def test_an_engine_that_reads_on_the_host_reads_nothing(host: DeepLatentMoM) -> None:
    with pytest.raises(ValueError, match="consensus runs on the host"):
        host._engine.advance([], [read([0])])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda raw: raw[:-1],
        lambda raw: (*raw[:1], raw[1][:-8], *raw[2:]),
        lambda raw: tuple(part.decode("latin1") for part in raw),
    ],
    ids=["a field short", "a value short", "text"],
)
def test_what_is_no_readout_is_refused(
    device: DeepLatentMoM, monkeypatch: pytest.MonkeyPatch, spoil: Any
) -> None:
    original = device._engine.advance

    def advance(given: Any, asked: Any = None) -> Any:
        if asked is None:
            return original(given)
        left, raws = original(given, asked)
        return left, [spoil(raw) for raw in raws]

    monkeypatch.setattr(device._engine, "advance", advance)
    with pytest.raises(TypeError, match="a readout of"):
        device.generate(QUESTIONS[0], config=LATENT)


# Which kernels.


def choose(name: str | None, kind: str = "cpu") -> Reader | None:
    return reads.choose(name, torch.device(kind), torch.float32)


def test_names_are_taken_or_refused() -> None:
    assert choose(None) is choose("auto") is choose("rust") is choose(None, "mps") is None
    assert choose("rust", "cuda") is None
    named = choose("torch")
    assert named is not None
    assert named.name == "torch"
    with pytest.raises(ModelError, match="'fast': expected one of auto, rust, torch, triton"):
        load(EXPERTS[:1], "fast")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="triton runs anywhere then")
def test_kernels_that_cannot_run_here_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="kernel 'triton' cannot be used: "):
        choose("triton")


def test_torch_stands_in_for_kernels_that_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    original = reads._tried

    def tried(name: str | None, _: torch.device, dtype: torch.dtype) -> Reader:
        if name is None:
            raise RuntimeError("Failed to find C compiler")
        return original(name, torch.device("cpu"), dtype)

    monkeypatch.setattr(reads, "_tried", tried)
    with pytest.warns(UserWarning, match=r"runs in torch, more slowly: .* C compiler"):
        found = choose(None, "cuda")
    assert found is not None
    assert found.name == "torch"


def test_triton_reads_what_rust_reads() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["triton"]


def main() -> None:
    """A few tokens of one sample on both engines; triton read its environment when imported."""
    config = {**LATENT, "max_steps": 4, "answer_reserve": 0}
    host, device = load(EXPERTS, "rust"), load(EXPERTS, "triton")
    pair = []
    for model in (device, host):
        result = model.generate(QUESTIONS[1], config=config, trace=True)
        assert isinstance(result, Result)
        pair.append([result])
    assert_same(*pair)
    print(device.info["consensus_kernel"])


if __name__ == "__main__":
    main()
