"""Hidden states that lanes keep, and their alignment with the input embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from dlmom_rs.engine.align import RIDGE, Aligner
from dlmom_rs.engine.backend import Engine
from dlmom_rs.engine.testing import advance, load, prefill, printed, save_model

VOCAB = 266
PROMPT = [5, 9, 200, 31]


def config(kind: str, **more: Any) -> transformers.PreTrainedConfig:
    sizes: dict[str, Any] = {
        "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
        "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": 263, "pad_token_id": None,
        **more,
    }  # fmt: skip
    if kind == "stablelm":  # served one row at a time
        return transformers.StableLmConfig(**sizes)
    return transformers.LlamaConfig(**sizes)


@pytest.fixture(scope="module", params=["llama", "stablelm"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    kind = str(request.param)
    folder = tmp_path_factory.mktemp("hidden") / kind
    save_model(folder, config(kind, tie_word_embeddings=False))
    return load(folder, agents=[0, 0])


def vectors(engine: Engine, lanes: list[tuple[int, int]], ridge: bool) -> np.ndarray:
    data, width = engine.hidden(lanes, ridge)
    return np.frombuffer(data, "<f4").reshape(len(lanes), width)


def states(engine: Engine, ids: list[int]) -> np.ndarray:
    """What transformers says: hidden states after the final norm, [len(ids), hidden]."""
    model = engine._experts[0].model
    with torch.inference_mode():
        out = model(torch.tensor([ids]), output_hidden_states=True)
    return out.hidden_states[-1][0].double().numpy()


def aligned(engine: Engine, state: np.ndarray, ridge: bool) -> np.ndarray:
    """The paper's alignment in float64, one vector at a time."""
    model = engine._experts[0].model
    e = model.get_input_embeddings().weight[:VOCAB].double().numpy()
    u = model.get_output_embeddings().weight[:VOCAB].double().numpy()
    if ridge:
        # The least-squares problem with the ridge as extra rows, not the normal equations.
        stacked = np.vstack([u, np.sqrt(RIDGE) * np.eye(u.shape[1])])
        target = np.vstack([e, np.zeros((u.shape[1], e.shape[1]))])
        state = state @ np.linalg.lstsq(stacked, target, rcond=None)[0]
    return state * np.linalg.norm(e, axis=1).mean() / np.linalg.norm(state)


@pytest.mark.parametrize("ridge", [False, True])
def test_spans_and_steps_keep_the_states_that_were_asked_for(engine: Engine, ridge: bool) -> None:
    engine.open([(slot, 0, 20) for slot in (0, 3, 5)])
    for slot, ids in ((0, PROMPT), (3, PROMPT[:2]), (5, PROMPT)):
        prefill(engine, slot, printed(ids), hidden=slot != 5)
    for slot, ids in ((0, PROMPT), (3, PROMPT[:2])):
        want = aligned(engine, states(engine, ids)[-1], ridge)
        np.testing.assert_allclose(vectors(engine, [(slot, 0)], ridge)[0], want, atol=2e-6)
    with pytest.raises(ValueError, match="slot 5 of agent 0 keeps no hidden state"):
        engine.hidden([(5, 0)], ridge)
    advance(engine, {slot: [(7, 1.0)] for slot in (5, 0, 3)}, hidden=[5, 3])
    for slot, ids in ((5, [*PROMPT, 7]), (3, [*PROMPT[:2], 7])):
        want = aligned(engine, states(engine, ids)[-1], ridge)
        np.testing.assert_allclose(vectors(engine, [(slot, 0)], ridge)[0], want, atol=2e-6)
    with pytest.raises(ValueError, match="keeps no hidden state"):
        engine.hidden([(0, 0)], ridge)
    together = vectors(engine, [(3, 0), (5, 0)], ridge)
    assert np.array_equal(together[1:], vectors(engine, [(5, 0)], ridge))


def test_a_state_goes_with_its_lane(engine: Engine) -> None:
    engine.open([(0, 0, 20), (1, 0, 20)])
    prefill(engine, 0, printed(PROMPT), hidden=True)
    kept = vectors(engine, [(0, 0)], True)
    engine.fork((0, 0), (1, 1), None)
    assert np.array_equal(vectors(engine, [(1, 1)], True), kept)
    engine.fork((0, 0), (2, 1), 2)
    engine.truncate((1, 1), 3)
    engine.open([(0, 0, 20)])
    for lane in ((2, 1), (1, 1), (0, 0)):
        with pytest.raises(ValueError, match="keeps no hidden state"):
            engine.hidden([lane], True)


def test_a_failed_call_leaves_states_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.open([(0, 0, 20)])
    prefill(engine, 0, printed(PROMPT), hidden=True)
    kept = vectors(engine, [(0, 0)], True)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no forward")

    monkeypatch.setattr(type(engine._lanes[0]), "_logits", broken)
    with pytest.raises(RuntimeError, match="no forward"):
        advance(engine, {0: [(7, 1.0)]}, hidden=[0])
    assert np.array_equal(vectors(engine, [(0, 0)], True), kept)


def test_states_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    folders = [save_model(tmp_path / str(i), config("llama"), seed=i) for i in range(2)]
    engine = load(*folders)
    engine.open([(0, 0, 20), (0, 1, 20)])
    for agent in (0, 1):
        prefill(engine, 0, printed(PROMPT), agent, hidden=True)
    with pytest.raises(ValueError, match="several models"):
        engine.hidden([(0, 0), (0, 1)], True)
    with pytest.raises(ValueError, match="no lanes"):
        engine.hidden([], True)


def test_tied_embeddings_make_the_alignment_the_identity(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "tied", config("llama", tie_word_embeddings=True))
    engine = load(folder)
    expert = engine._experts[0]
    ridge = Aligner(expert.model, expert.embeddings, VOCAB).ridge
    assert torch.allclose(ridge, torch.eye(32, dtype=ridge.dtype), atol=1e-4)
    engine.open([(0, 0, 20)])
    prefill(engine, 0, printed(PROMPT), hidden=True)
    by_ridge, as_is = (vectors(engine, [(0, 0)], r) for r in (True, False))
    np.testing.assert_allclose(by_ridge, as_is, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ridge", [False, True])
def test_aligned_states_have_the_mean_norm_of_the_embeddings(engine: Engine, ridge: bool) -> None:
    expert = engine._experts[0]
    weight = expert.embeddings.weight
    assert isinstance(weight, torch.Tensor)
    mean = float(weight[:VOCAB].double().norm(dim=1).mean())
    aligner = Aligner(expert.model, expert.embeddings, VOCAB)
    draw = torch.Generator().manual_seed(1)
    found = torch.randn(5, 32, generator=draw)
    for scale in (1.0, 100.0):  # the length of a state says nothing
        norms = aligner(found * scale, ridge).norm(dim=1)
        assert torch.allclose(norms, torch.full((5,), mean), rtol=1e-5)
    assert float(aligner(torch.zeros(1, 32), ridge).abs().max()) == 0.0


def test_bytes_of_a_position(engine: Engine) -> None:
    # 2 layers, keys and values, 1 head of 16, float32.
    assert engine.info()["models"][0]["kv_bytes_per_position"] == 2 * 2 * 16 * 4
