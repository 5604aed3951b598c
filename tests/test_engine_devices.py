"""Engines whose models are not on the CPU, or on several devices, without any such device.

The emulation (``elsewhere.py``) refuses operators whose tensors are on different devices, so that
what gives the CPU's results has moved everything it needs, and nothing by accident.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from dlmom_rs.api import DeepLatentMoM
from dlmom_rs.engine import backend
from dlmom_rs.engine.backend import Engine
from dlmom_rs.engine.device import parse_devices
from dlmom_rs.engine.errors import ModelError
from dlmom_rs.engine.testing import (
    SIZES,
    advance,
    encode_packets,
    load,
    prefill,
    printed,
    save_model,
    span,
    step,
)

from .elsewhere import Elsewhere, devices

FAMILIES: dict[str, transformers.PreTrainedConfig] = {
    "qwen2": transformers.Qwen2Config(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=16),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=16, pad_token_id=None
    ),
}
HIDDEN = SIZES["hidden_size"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("devices")
    made = {name: save_model(root / name, config) for name, config in FAMILIES.items()}
    made["other"] = save_model(root / "other", FAMILIES["qwen2"], seed=1)
    return made


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with devices(monkeypatch):
        yield


class Halve:
    def compress(self, keys: Tensor, values: Tensor, **_: int) -> tuple[Tensor, Tensor]:
        return keys / 2, values


def story(engine: Engine, agents: int) -> list[Tensor]:
    """All that an engine is asked for, once; every logit and vector that came of it."""
    found: list[Tensor] = []

    def note(*logits: Tensor) -> None:
        for x in logits:
            assert type(x) is Tensor
            assert x.device.type == "cpu"
            found.append(x.clone())

    engine.open([(slot, agent, 90) for slot in (0, 3, 20) for agent in range(agents)])
    for agent in range(agents):
        note(prefill(engine, 0, printed(range(30)), agent))
        note(prefill(engine, 3, printed(range(30)), agent))  # copied
        note(prefill(engine, 20, [[(5, 0.5), (6, 0.5)], [(9, 1.0)]], agent, hidden=True))
    calls = []
    for agent in range(agents):
        raw = step({0: [(1, 0.75), (2, 0.25)], 3: [(4, 1.0)]})
        vector = bytearray(np.linspace(-1, 1, HIDDEN, dtype="<f4").tobytes())
        payloads = [("embed", [1], vector)]
        calls.append((agent, [span(20, printed([7, 8]))], (*raw[:4], payloads), [0]))
    for spans, steps in engine.advance(calls):
        assert spans is not None
        assert steps is not None
        note(*spans, *steps)
    for agent in range(agents):
        for ridge in (False, True):
            states = engine.hidden([(0, agent)], ridge)[0]
            found.append(torch.frombuffer(bytearray(states), dtype=torch.float32))
        engine.fork((0, agent), (7, agent), 25)
        engine.truncate((3, agent), 10)
    engine.set_compressor(Halve())
    engine.compress([(7, agent) for agent in range(agents)])
    for agent in range(agents):
        note(
            *advance(engine, {slot: [(slot, 0.5), (3, 0.5)] for slot in (7, 3, 20)}, agent).values()
        )
        ids, probs, k = encode_packets([[(1, 0.5), (2, 0.5)]])
        mixture = engine.embed_packets(engine._agents[agent], ids, probs, 1, k)[0]
        found.append(torch.frombuffer(bytearray(mixture), dtype=torch.float32))
    assert engine.memory()["copied_positions"] > 0
    engine.close([0, 3, 7, 20])
    return found


def assert_same(found: list[Tensor], want: list[Tensor]) -> None:
    """Not to the bit: torch takes other kernels where a tensor does not say that it is on a CPU."""
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_of_a_model_is_on_its_device(folders: dict[str, Path], family: str, attn: str) -> None:
    options: dict[str, Any] = {"slots": 32, "attn": attn, "fast": True}
    want = story(load(folders[family], agents=[0, 0], **options), 2)
    engine = load(folders[family], agents=[0, 0], device="there:0", **options)
    assert engine.info()["device"] == "there:0"
    assert engine.info()["models"][0]["path"] == "row_slot"
    assert isinstance(engine._experts[0].model.get_input_embeddings().weight, Elsewhere)
    assert_same(story(engine, 2), want)


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kinds", ["there:0,there:1", "cpu,there:1", "there:1,cpu"])
def test_experts_are_on_several_devices(folders: dict[str, Path], kinds: str) -> None:
    options: dict[str, Any] = {"slots": 32, "attn": "sdpa", "fast": True}
    pair = (folders["qwen2"], folders["other"])
    want = story(load(*pair, **options), 2)
    engine = load(*pair, device=kinds, **options)
    assert engine.info()["device"] == kinds.replace(",", ", ")
    assert_same(story(engine, 2), want)


@pytest.mark.usefixtures("there")
def test_what_a_cpu_computes_itself_is_launched_last(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(folders["qwen2"], folders["other"], device="cpu,there:0", fast=True)
    order = []
    forward = Engine._forward

    def noted(self: Engine, call: Any) -> Any:
        order.append(call.agent)
        return forward(self, call)

    monkeypatch.setattr(Engine, "_forward", noted)
    engine.open([(0, 0, 20), (0, 1, 20)])
    answers = engine.advance([(agent, [span(0, printed([1, 2]))], None, []) for agent in (0, 1)])
    assert order == [1, 0]
    alone = [prefill_alone(folders[name]) for name in ("qwen2", "other")]
    for (spans, _), want in zip(answers, alone, strict=True):
        assert spans is not None
        torch.testing.assert_close(spans[0], want)


def prefill_alone(folder: Path) -> Tensor:
    engine = load(folder, fast=True)
    engine.open([(0, 0, 20)])
    return prefill(engine, 0, printed([1, 2]))


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kinds", ["there:0", "there:0,there:1", "there:1,cpu"])
def test_consensus_is_on_the_first_models_device(
    folders: dict[str, Path], kinds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits of the others come there; what is read of them is what one device reads."""
    pair = (folders["qwen2"], folders["other"])

    def read(engine: Engine) -> list[bytes]:
        engine.open([(slot, agent, 20) for slot in (0, 1) for agent in (0, 1)])
        for slot in (0, 1):
            for agent in (0, 1):
                prefill(engine, slot, printed([slot + 1, 2]), agent)
        rows = step({0: [(1, 0.5), (2, 0.5)], 1: [(3, 1.0)]})
        reads = [([0, 1], [0, 1], "ties", 0.1, 1e-9, 8, [257], [[5, 6], [7]])]
        answers, readouts = engine.advance([(0, [], rows, []), (1, [], rows, [])], reads)
        assert [steps for _, steps in answers] == [None, None]
        return list(readouts[0])

    want = read(load(*pair, kernel="torch", fast=True, attn="sdpa"))
    engine = load(*pair, device=kinds, kernel="torch", fast=True, attn="sdpa")
    assert engine.info()["consensus_kernel"] == "torch"
    assert engine._home == torch.device("maia", int(kinds[6]))
    waited = []
    forward, packed = Engine._forward, backend.Reader.launch

    def noted(self: Any, *args: Any) -> Any:
        waited.append(len(launched))
        return packed(self, *args)

    launched = []

    def counted(self: Engine, call: Any) -> Any:
        launched.append(call.agent)
        return forward(self, call)

    monkeypatch.setattr(Engine, "_forward", counted)
    monkeypatch.setattr(backend.Reader, "launch", noted)
    assert read(engine) == want
    # Both agents' steps before anything is read.
    assert waited == [6]


@pytest.mark.usefixtures("there")
@pytest.mark.parametrize("kernel", ["rust", "torch"])
def test_the_loop_runs_on_several_devices(folders: dict[str, Path], kernel: str) -> None:
    """Prompts, latent and printed steps, consensus: what an ensemble on the CPU says."""
    pair = [str(folders["qwen2"]), str(folders["other"])]
    prompts = ["the thing in the", "a bear", "in"]

    def said(device: str | list[str]) -> list[tuple[str, int, list[int]]]:
        ensemble = DeepLatentMoM.from_pretrained(
            pair, device=device, dtype="fp32", batch_size=20, attention="sdpa", kernel=kernel
        )
        assert ensemble.info["consensus_kernel"] == kernel
        config = {"max_steps": 24, "answer_reserve": 8, "controller": {"alpha": 0.9}}
        results = ensemble.generate(prompts, config=config)
        return [(r.text, r.latent_steps, r.tokens) for r in results]

    want = said("cpu")
    assert any(latent for _, latent, _ in want)
    assert any(text for text, _, _ in want)
    assert said(["there:0", "there:1"]) == want
    assert said("there:2") == want


@pytest.mark.usefixtures("there")
def test_the_emulation_refuses_tensors_of_two_devices() -> None:
    a, b = (torch.ones(2, device=torch.device("maia", i)) for i in (0, 1))
    for left, right in ((a, b), (a, torch.ones(2)), (torch.ones(2), b)):
        with pytest.raises(RuntimeError, match="tensors on"):
            left + right
    with pytest.raises(RuntimeError, match="tensors on"):
        a[0:1] = b[0:1]
    assert torch.equal((a + a.to(a.device)).to("cpu"), torch.full((2,), 2.0))
    assert torch.equal(b.to("cpu").to(a.device).to("cpu"), torch.ones(2))


@pytest.mark.parametrize(
    ("names", "count", "reason"),
    [
        ("cpu,cpu", 3, "2 devices for 3 models"),
        ("cpu,gpu", 2, "unknown device 'gpu'"),
        ("cpu:1", 1, "unknown device 'cpu:1'"),
        ("cuda:", 1, "unknown device 'cuda:'"),
        ("cuda:x", 1, "unknown device 'cuda:x'"),
        ("", 1, "unknown device ''"),
    ],
)
def test_devices_that_cannot_be_used(names: str, count: int, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        parse_devices(names, count)


def test_one_device_for_all_or_one_for_each() -> None:
    cpu = torch.device("cpu")
    assert parse_devices("cpu", 3) == ([cpu] * 3, "cpu")
    assert parse_devices("cpu, cpu", 2) == ([cpu] * 2, "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_numbered_gpu_that_is_not_there() -> None:
    kind = "hip" if torch.version.hip else "cuda"
    with pytest.raises(ModelError, match=f"device '{kind}' is not available: torch sees no GPU"):
        parse_devices(f"{kind}:1,cpu", 2)
