"""Attention of steps: right, and the same bits however far a row could see."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from dlmom_rs import _core
from dlmom_rs.engine.attention import attention, blocked_attention
from dlmom_rs.engine.cache import BUCKET

SHAPES = [
    # rows, heads, kv heads, size of keys, size of values
    (16, 5, 1, 32, 32),
    (8, 4, 2, 32, 32),
    (3, 6, 6, 24, 40),
    (1, 14, 2, 64, 64),
]


Attend = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


@pytest.fixture(params=[attention, blocked_attention], ids=["core", "torch"])
def attend(request: pytest.FixtureRequest) -> Attend:
    """The core's kernel, and what takes over where rows see positions with gaps between them."""
    function: Attend = request.param
    return function


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
    attend: Attend, shape: tuple[int, int, int, int, int], dtype: torch.dtype, bound: float
) -> None:
    q, k, v, lengths = made(shape, 4 * BUCKET, 1, dtype)
    visible = (torch.arange(4 * BUCKET) < lengths[:, None])[:, None, None]
    got = attend(q, k, v, visible, shape[3] ** -0.5)
    assert got.dtype == dtype
    assert np.abs(got.double().numpy() - oracle(q, k, v, lengths)).max() < bound


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(3))
def test_bits_do_not_depend_on_the_visible_length(
    attend: Attend, shape: tuple[int, int, int, int, int], seed: int
) -> None:
    most = 16 * BUCKET
    q, k, v, lengths = made(shape, most, seed)
    found = [
        attend(
            q, k[:, :, :n], v[:, :, :n],
            (torch.arange(n) < lengths[:, None])[:, None, None], shape[3] ** -0.5,
        )
        for n in range(3 * BUCKET, most + 1, BUCKET)
    ]  # fmt: skip
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_what_is_not_visible_counts_for_nothing(attend: Attend) -> None:
    q, k, v, lengths = made(SHAPES[0], 4 * BUCKET, 5)
    visible = (torch.arange(4 * BUCKET) < lengths[:, None])[:, None, None]
    before = attend(q, k, v, visible, 0.2)
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:] = 1e30
        v[row, :, length:] = -1e30
    assert torch.equal(before, attend(q, k, v, visible, 0.2))


def test_only_the_core_ignores_what_is_not_visible_whatever_it_is() -> None:
    q, k, v, lengths = made(SHAPES[0], 4 * BUCKET, 5)
    visible = (torch.arange(4 * BUCKET) < lengths[:, None])[:, None, None]
    before = attention(q, k, v, visible, 0.2)
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:] = torch.nan
        v[row, :, length:] = torch.inf
    assert torch.equal(before, attention(q, k, v, visible, 0.2))
    k[3, :, 0] = torch.nan
    broken = attention(q, k, v, visible, 0.2)
    assert bool(broken[3].isnan().all())
    assert torch.equal(broken[:3], before[:3])
    assert torch.equal(broken[4:], before[4:])


def test_windows_are_ranges_and_gaps_are_left_to_torch() -> None:
    q, k, v, lengths = made(SHAPES[1], 4 * BUCKET, 9)
    keys = torch.arange(4 * BUCKET)
    window = (keys < lengths[:, None]) & (keys >= lengths[:, None] - 20)
    cut = [(int(end) - min(20, int(end)), int(end)) for end in lengths]
    got = attention(q, k, v, window[:, None, None], 0.3)
    for row, (start, end) in enumerate(cut):
        alone = attention(
            q[row : row + 1], k[row : row + 1, :, start:end], v[row : row + 1, :, start:end],
            torch.ones(1, 1, 1, end - start, dtype=torch.bool), 0.3,
        )  # fmt: skip
        assert torch.equal(got[row], alone[0])
    holes = torch.ones(8, 1, 1, 4 * BUCKET, dtype=torch.bool)
    holes[2, ..., 7] = False
    expected = blocked_attention(q, k, v, holes, 0.3)
    assert torch.equal(attention(q, k, v, holes, 0.3), expected)


def test_neither_threads_nor_strides_change_a_bit() -> None:
    q, k, v, lengths = made((16, 8, 2, 64, 48), 4 * BUCKET, 3)
    visible = (torch.arange(4 * BUCKET) < lengths[:, None])[:, None, None]
    found = []
    for threads in (1, 2):
        for turned in (False, True):
            out = torch.full((16, 8, 48), torch.nan)
            given = [
                x.transpose(1, 2).contiguous().transpose(1, 2) if turned else x for x in (q, k, v)
            ]
            assert _core.Kernel(threads).attend(*given, visible, out, 0.125)
            found.append(out)
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_tensors_that_do_not_fit_are_refused() -> None:
    q, k, v, lengths = made(SHAPES[1], BUCKET, 2)
    visible = torch.ones(8, 1, 1, BUCKET, dtype=torch.bool)
    out = torch.empty(8, 4, 32)
    kernel = _core.Kernel()
    assert kernel.attend(q, k, v, visible, out, 0.3)
    for error, given in (
        (TypeError, (q.double(), k, v, visible, out)),
        (TypeError, (q[0], k, v, visible, out)),
        (TypeError, (q, k.transpose(2, 3), v, visible, out)),
        (TypeError, (q, k, v, visible.float(), out)),
        (TypeError, (q, k, v, visible, out.to(torch.bfloat16))),
        (TypeError, (q, k, v, visible, out.transpose(0, 1))),
        (ValueError, (q, k[:4], v, visible, out)),
        (ValueError, (q, k, v, visible, torch.empty(8, 4, 31))),
        (ValueError, (q, k[:, :, :9], v[:, :, :9], visible, out)),
        (ValueError, (q.to(torch.bfloat16), k, v, visible, out)),
    ):
        with pytest.raises(error):
            kernel.attend(*given, 0.3)
    assert int(lengths.min()) > 0


def test_what_the_core_does_not_take_is_left_to_torch() -> None:
    q, k, v, lengths = made(SHAPES[1], 4 * BUCKET, 6)
    visible = (torch.arange(4 * BUCKET) < lengths[:, None])[:, None, None]
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    for given in (
        (q.double(), k.double(), v.double()),
        (q.to(torch.bfloat16), k, v),
        (q, turned, v),
    ):
        got = attention(*given, visible, 0.3)
        assert torch.equal(got, blocked_attention(*given, visible, 0.3))
    # On another device nothing is read from here.
    there = attention(q.to("meta"), k.to("meta"), v.to("meta"), visible.to("meta"), 0.3)
    assert (there.device.type, there.shape) == ("meta", (8, 1, 4, 32))
