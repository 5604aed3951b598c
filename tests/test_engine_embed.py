"""Packets to embeddings: exact for one token, close to float64 for mixtures, blind to padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dlmom_rs.engine import embed as module
from dlmom_rs.engine.embed import embed, embed_in_place, one_hot_rows

CPU = torch.device("cpu")
ROWS = 300


def table(hidden: int, dtype: torch.dtype, seed: int = 0) -> nn.Embedding:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Embedding(ROWS, hidden).to(dtype).requires_grad_(False)


def packets(seed: int, n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(k, 0.3), n).astype(np.float32)
    return rng.integers(0, ROWS, (n, k)), -np.sort(-probs, axis=1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.lists(
        st.sampled_from(["mixed", "token", "almost", "elsewhere"]), min_size=1, max_size=6
    ),
    k=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_without_decisions_of_the_host_the_bits_are_the_same(
    seed: int, kinds: list[str], k: int, dtype: torch.dtype
) -> None:
    emb = table(20, dtype)
    ids, probs = packets(seed, len(kinds), k)
    for row, kind in enumerate(kinds):
        if kind != "mixed":
            probs[row] = 0.0
            probs[row, -1 if kind == "elsewhere" else 0] = 1.0
        if kind == "almost":
            probs[row, -1] = 1e-7
    got = embed_in_place(emb, torch.from_numpy(ids), torch.from_numpy(probs))
    assert torch.equal(got, embed(emb, ids, probs, CPU))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 6),
    k=st.integers(1, 70),
    hidden=st.sampled_from([8, 20, 63]),
    pad=st.integers(0, 70),
)
def test_mixtures(seed: int, n: int, k: int, hidden: int, pad: int) -> None:
    emb = table(hidden, torch.float32)
    ids, probs = packets(seed, n, k)
    got = embed(emb, ids, probs, CPU)
    weight = emb.weight.double().numpy()
    want = np.einsum("nk,nkh->nh", probs.astype(np.float64), weight[ids])
    # Each product rounds once, each of log2(k) additions once more.
    scale = np.einsum("nk,nkh->nh", probs.astype(np.float64), np.abs(weight[ids]))
    assert np.all(np.abs(got.numpy() - want) <= 8 * 2.0**-24 * scale + 1e-30)
    padded = embed(
        emb,
        np.concatenate([ids, np.repeat(ids[:, :1], pad, 1)], 1),
        np.concatenate([probs, np.zeros((n, pad), np.float32)], 1),
        CPU,
    )
    assert torch.equal(got, padded)
    for row in range(n):
        one = embed(emb, ids[row : row + 1], probs[row : row + 1], CPU)
        assert torch.equal(got[row : row + 1].view(torch.int32), one.view(torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 2, 9])
def test_one_token_is_exactly_its_row(dtype: torch.dtype, k: int) -> None:
    emb = table(20, dtype)
    emb.weight[5, 0] = -0.0
    ids = np.full((3, k), 5)
    ids[1] = 7
    probs = np.zeros((3, k), np.float32)
    probs[:, 0] = 1.0
    if k > 1:
        probs[2] = 1.0 / k  # a soft mate
    got = embed(emb, ids, probs, CPU)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(got[0].view(bits), emb.weight[5].view(bits))
    assert torch.equal(got[1].view(bits), emb.weight[7].view(bits))
    assert one_hot_rows(probs).tolist() == [True, True, k == 1]


def test_half_precision_rounds_once() -> None:
    emb = table(16, torch.bfloat16)
    ids, probs = packets(1, 4, 9)
    exact = embed(table(16, torch.bfloat16).float(), ids, probs, CPU)
    assert torch.equal(embed(emb, ids, probs, CPU), exact.to(torch.bfloat16))


def test_the_module_scales_where_the_family_does() -> None:
    """Gemma multiplies inside its embedding module; raw weight rows would be wrong."""
    config = transformers.Gemma3TextConfig(
        vocab_size=ROWS, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, pad_token_id=None,
    )  # fmt: skip
    emb = transformers.AutoModelForCausalLM.from_config(config).get_input_embeddings()
    ids, probs = packets(2, 3, 4)
    with torch.inference_mode():
        got = embed(emb, ids, probs, CPU)
        raw = (emb.weight[torch.from_numpy(ids)] * torch.from_numpy(probs)[..., None]).sum(1)
    assert torch.allclose(got, raw * 8.0, rtol=1e-5, atol=1e-7)


def test_whole_vocabulary_packets_are_summed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    emb = table(12, torch.float32)
    ids, probs = np.tile(np.arange(ROWS), (5, 1)), packets(4, 5, ROWS)[1]
    whole = embed(emb, ids, probs, CPU)
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 1)  # one row at a time: the same bits
    assert torch.equal(embed(emb, ids, probs, CPU), whole)
    monkeypatch.setattr(module, "TREE", 64)  # another order of summation: the same value
    assert torch.allclose(embed(emb, ids, probs, CPU), whole, rtol=0, atol=1e-6)


def test_nan_probabilities_stay_in_their_row() -> None:
    ids, probs = packets(3, 2, 4)
    clean = embed(table(8, torch.float32), ids, probs, CPU)
    probs[0, 1] = np.nan
    got = embed(table(8, torch.float32), ids, probs, CPU)
    assert bool(got[0].isnan().all())
    assert torch.equal(got[1], clean[1])
