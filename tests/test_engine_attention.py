"""Attention in blocks of keys: right, and the same bits however far a row could see."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dlmom_rs.engine.attention import blocked_attention
from dlmom_rs.engine.cache import BUCKET

SHAPES = [
    # rows, heads, kv heads, size of keys, size of values
    (16, 5, 1, 32, 32),
    (8, 4, 2, 32, 32),
    (3, 6, 6, 24, 40),
    (1, 14, 2, 64, 64),
]


def made(
    shape: tuple[int, int, int, int, int], n: int, seed: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, heads, kv, d, dv = shape
    draw = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw).to(dtype)

    lengths = torch.randint(1, 180, (rows,), generator=draw)
    return normal(rows, heads, 1, d), normal(rows, kv, n, d), normal(rows, kv, n, dv), lengths


def oracle(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> np.ndarray:
    """Softmax attention in float64, one row and head at a time: [rows, 1, heads, dv]."""
    rows, heads, _, d = q.shape
    group = heads // k.shape[1]
    out = np.zeros((rows, 1, heads, v.shape[3]))
    for row in range(rows):
        for head in range(heads):
            n = int(lengths[row])
            keys = k[row, head // group, :n].double().numpy()
            values = v[row, head // group, :n].double().numpy()
            scores = keys @ q[row, head, 0].double().numpy() / math.sqrt(d)
            weights = np.exp(scores - scores.max())
            out[row, 0, head] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_it_is_softmax_attention(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, bound: float
) -> None:
    q, k, v, lengths = made(shape, 4 * BUCKET, 1, dtype)
    visible = (torch.arange(4 * BUCKET) < lengths[:, None])[:, None, None]
    got = blocked_attention(q, k, v, visible, shape[3] ** -0.5)
    assert got.dtype == dtype
    assert np.abs(got.double().numpy() - oracle(q, k, v, lengths)).max() < bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_bits_do_not_depend_on_the_visible_length(
    shape: tuple[int, int, int, int, int], seed: int
) -> None:
    most = 16 * BUCKET
    q, k, v, lengths = made(shape, most, seed)
    found = [
        blocked_attention(
            q, k[:, :, :n], v[:, :, :n],
            (torch.arange(n) < lengths[:, None])[:, None, None], shape[3] ** -0.5,
        )
        for n in range(3 * BUCKET, most + 1, BUCKET)
    ]  # fmt: skip
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_not_visible_counts_for_nothing() -> None:
    q, k, v, lengths = made(SHAPES[0], 4 * BUCKET, 5)
    visible = (torch.arange(4 * BUCKET) < lengths[:, None])[:, None, None]
    before = blocked_attention(q, k, v, visible, 0.2)
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:] = 1e30
        v[row, :, length:] = -1e30
    assert torch.equal(before, blocked_attention(q, k, v, visible, 0.2))
