"""Which path each family takes, and that it gives a lone run's logits past its window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.cache_utils import DynamicCache

from dlmom_rs.engine.backend import Engine
from dlmom_rs.engine.errors import ModelError
from dlmom_rs.engine.testing import advance, load, prefill, printed, save_model

NO_IDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BASE: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    **NO_IDS,
}
MOE: dict[str, Any] = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def config(name: str) -> transformers.PreTrainedConfig:
    """A tiny config of a family; windows are 8 positions, so the tests go past them."""
    t = transformers
    match name:
        case "llama":
            return t.LlamaConfig(**BASE)
        case "llama-yarn":
            rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
            rope["original_max_position_embeddings"] = 32
            return t.LlamaConfig(**BASE, rope_parameters=rope)
        case "llama-dynamic":
            rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
            return t.LlamaConfig(**{**BASE, "max_position_embeddings": 24}, rope_parameters=rope)
        case "qwen2":
            return t.Qwen2Config(**BASE)
        case "qwen2-sliding":
            return t.Qwen2Config(
                **BASE, use_sliding_window=True, sliding_window=8, max_window_layers=1
            )
        case "qwen3":
            return t.Qwen3Config(**BASE, head_dim=16)
        case "qwen3_moe":
            return t.Qwen3MoeConfig(**BASE, **MOE)
        case "mistral":
            return t.MistralConfig(**BASE, sliding_window=8)
        case "phi3":
            return t.Phi3Config(**BASE, sliding_window=8)
        case "gemma2":
            return t.Gemma2Config(**BASE, head_dim=16, sliding_window=8)
        case "gemma3":
            types = ["sliding_attention", "full_attention"]
            return t.Gemma3TextConfig(**BASE, head_dim=16, sliding_window=8, layer_types=types)
        case "gpt2":
            return t.GPT2Config(
                vocab_size=272, n_embd=64, n_layer=2, n_head=4, n_positions=128,
                initializer_range=0.1, **NO_IDS,
            )  # fmt: skip
        case "bloom":
            return t.BloomConfig(
                vocab_size=272, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.1, **NO_IDS
            )
        case "stablelm":
            return t.StableLmConfig(**BASE)
        case "mamba2":
            return t.Mamba2Config(
                vocab_size=272, hidden_size=32, num_hidden_layers=2, state_size=8, num_heads=4,
                head_dim=16, n_groups=2, **NO_IDS,
            )  # fmt: skip
        case "llama4":
            return t.Llama4TextConfig(
                **BASE, head_dim=16, num_local_experts=2, num_experts_per_tok=1,
                intermediate_size_mlp=64, attention_chunk_size=8,
            )  # fmt: skip
        case "lfm2":
            return t.Lfm2Config(**BASE, full_attn_idxs=[1])
    raise AssertionError(name)


def alone(engine: Engine, ids: list[int], steps: list[int]) -> Tensor:
    """Greedy-free reference: fed tokens on transformers' own cache, masks and positions."""
    expert = engine._experts[0]
    model = expert.model
    cache = DynamicCache(config=model.config)
    taken = {expert.cache_keyword: cache}
    out = []
    with torch.inference_mode():
        for tokens in (ids, *([token] for token in steps)):
            logits = model(torch.tensor([tokens]), use_cache=True, **taken).logits
            out.append(logits[0, -1, :266])
    return torch.stack(out)


@pytest.mark.parametrize(
    ("name", "path", "attention"),
    [
        ("llama", "row_slot", "blocks"),
        ("llama-yarn", "row_slot", "blocks"),
        ("llama-dynamic", "per_row", "sdpa"),
        ("qwen2", "row_slot", "blocks"),
        ("qwen2-sliding", "row_slot", "blocks"),
        ("qwen3", "row_slot", "blocks"),
        ("qwen3_moe", "row_slot", "blocks"),
        ("mistral", "row_slot", "blocks"),
        ("phi3", "row_slot", "blocks"),
        ("gemma2", "row_slot", "eager"),
        ("gemma3", "row_slot", "blocks"),
        ("gpt2", "row_slot", "blocks"),
        ("bloom", "per_row", "eager"),
        ("stablelm", "per_row", "sdpa"),
    ],
)
def test_path(tmp_path: Path, name: str, path: str, attention: str) -> None:
    folder = save_model(tmp_path / name, config(name))
    engine = load(folder, max_len=128)
    model = engine.info()["models"][0]
    assert (model["path"], model["attention"]) == (path, attention)
    assert (model["path_reason"] is None) == (path == "row_slot")
    # A short row beside one past every window; with "dynamic", past the trained length too.
    long = 20 if name == "llama-dynamic" else 70
    rows = {4: [(7 * i) % 266 for i in range(long)], 1: [9, 8, 7]}
    steps = [3, 200, 41]
    limit = 24 if name == "llama-dynamic" else 100
    engine.open([(slot, 0, limit) for slot in rows])
    got = {slot: [prefill(engine, slot, printed(ids))] for slot, ids in rows.items()}
    for token in steps:
        for slot, logits in advance(engine, {slot: [(token, 1.0)] for slot in rows}).items():
            got[slot].append(logits)
    for slot, ids in rows.items():
        want = alone(engine, ids, steps)
        assert float((torch.stack(got[slot]) - want).abs().max()) <= 1e-5 * float(want.abs().max())
    if path == "per_row":  # the same powers as the shared batch
        engine.open([(2, 0, limit)])
        engine.fork((1, 0), (2, 0), 3)
        assert torch.equal(advance(engine, {2: [(3, 1.0)]})[2], got[1][1])
        engine.truncate((1, 0), 4)
        assert torch.equal(advance(engine, {1: [(200, 1.0)]})[1], got[1][2])
        engine.close([1])
        assert engine.memory()["kv_bytes"] > 0
    if name == "qwen3_moe":
        assert not engine.info()["bit_invariant"]
        assert "mixture-of-experts" in engine.info()["bit_invariance_reason"]
    else:
        assert engine.info()["bit_invariant"], engine.info()["bit_invariance_reason"]


def test_dynamic_rotary_does_not_carry_one_lane_into_another(tmp_path: Path) -> None:
    """Its module remembers the longest position; past the trained length that moves short rows."""
    # A context the engine allows to be left, as a model with a stretched one would state it.
    cfg = config("llama-dynamic")
    engine = load(save_model(tmp_path / "dynamic", cfg), max_len=60)
    engine._experts[0].context = 60
    engine.reserve(8, 60)
    rows = {0: list(range(50)), 1: list(range(30))}
    engine.open([(slot, 0, 60) for slot in rows])
    got = {slot: [prefill(engine, slot, printed(ids))] for slot, ids in rows.items()}
    for token in (5, 6):
        for slot, logits in advance(engine, {slot: [(token, 1.0)] for slot in rows}).items():
            got[slot].append(logits)
    for slot, ids in rows.items():
        # A fresh engine each: the reference has the same memory.
        fresh = load(tmp_path / "dynamic", max_len=24)
        want = alone(fresh, ids, [5, 6])
        assert float((torch.stack(got[slot]) - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", ["mamba2", "llama4", "lfm2"])
def test_refused(tmp_path: Path, name: str) -> None:
    folder = save_model(tmp_path / name, config(name))
    with pytest.raises(ModelError, match="are not supported") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_eager_where_sdpa_is_asked_of_a_family_without_it(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "gemma2", config("gemma2"))
    with pytest.raises(ModelError, match="no sdpa attention"):
        load(folder, attn="sdpa")
    llama = save_model(tmp_path / "llama", config("llama"))
    info = load(llama, attn="eager").info()
    assert info["models"][0]["attention"] == "eager"
    assert info["models"][0]["path"] == "row_slot"
    assert info["bit_invariant"]
    for attention in ("sdpa", "blocks"):
        assert load(llama, attn=attention).info()["models"][0]["attention"] == attention
    # The faster one on a CPU, where nobody asks for equal bits as well.
    fast = load(llama, fast=True).info()
    assert fast["models"][0]["attention"] == "blocks"
    assert not fast["bit_invariant"]
    with pytest.raises(ModelError, match="no blocks attention"):
        load(folder, attn="blocks")
    with pytest.raises(ModelError, match="no blocks attention"):
        load(save_model(tmp_path / "stablelm", config("stablelm")), attn="blocks")
    with pytest.raises(ModelError, match="unknown attention 'flash'"):
        load(llama, attn="flash")
