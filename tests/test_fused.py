"""The fused kernel on tensors, against float64 and on every instruction set there is."""

import json

import numpy as np
import pytest
import torch

from dlmom_rs import _core

SPEC = {"method": "ties", "theta": 0.1}


def spec(**changes: object) -> str:
    return json.dumps({**SPEC, **changes})


def logits(experts: int, rows: int, vocab: int, dtype: torch.dtype) -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(experts * 1000 + vocab)
    shared = torch.randn(rows, vocab, generator=draws) * 3
    return [(shared + torch.randn(rows, vocab, generator=draws)).to(dtype) for _ in range(experts)]


def oracle(row: list[np.ndarray], theta: float) -> tuple[list[float], float, np.ndarray]:
    """Entropies by definition, and the paper's TIES with Python's sums."""
    entropies = []
    centred = []
    for z in row:
        p = np.exp(z - z.max())
        p /= p.sum()
        entropies.append(float(-(p * np.log(np.maximum(p, 1e-300))).sum()))
        centred.append(z - z.mean())
    kept = np.array(centred)
    kept[np.abs(kept) < theta] = 0.0
    sign = np.sign(np.sign(kept).sum(axis=0))
    agree = (np.sign(kept) == sign) & (sign != 0)
    merged = (kept * agree).sum(axis=0) / np.maximum(agree.sum(axis=0), 1)
    q = np.exp(merged - merged.max())
    q /= q.sum()
    entropy = float(-(q * np.log(np.maximum(q, 1e-300))).sum())
    return entropies, entropy, q


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("experts", "rows", "vocab"), [(2, 3, 491), (3, 2, 5003), (1, 1, 2)])
def test_readouts_are_those_of_float64(
    dtype: torch.dtype, experts: int, rows: int, vocab: int
) -> None:
    given = logits(experts, rows, vocab, dtype)
    read = _core.Kernel().read(given, 10, spec(eps=0.0))
    assert len(read) == rows
    for index, (entropies, merged, ids, probs, mass) in enumerate(read):
        values = [z[index].double().numpy() for z in given]
        expected, entropy, q = oracle(values, 0.1)
        if experts == 1:
            z = values[0]
            q = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            entropy = expected[0]
        assert entropies == pytest.approx(expected, abs=1e-6)
        assert merged == pytest.approx(entropy, abs=1e-6)
        top = np.sort(q)[::-1][: len(ids)]
        assert q[ids] == pytest.approx(top, rel=1e-6)
        assert probs == pytest.approx(top / top.sum(), rel=1e-5)
        assert mass == pytest.approx(top.sum(), rel=1e-6)


def test_every_tier_gives_the_same_bits_on_any_number_of_threads() -> None:
    given = logits(3, 4, 40_003, torch.bfloat16)
    expected = _core.Kernel(1, "generic").read(given, 50, spec())
    seen = 0
    for tier in ("generic", "avx2", "avx512"):
        for threads in (1, 2, 3):
            try:
                kernel = _core.Kernel(threads, tier)
            except ValueError as error:
                assert "no " + tier in str(error)  # noqa: PT017
                continue
            assert kernel.tier == tier
            assert kernel.read(given, 50, spec()) == expected
            seen += 1
    assert seen >= 3


def test_rows_may_lie_apart() -> None:
    whole = logits(2, 4, 600, torch.float32)
    cut = [z[:, :491] for z in whole]
    assert not cut[0].is_contiguous()
    copied = [z.contiguous() for z in cut]
    kernel = _core.Kernel()
    assert kernel.read(cut, 5, spec()) == kernel.read(copied, 5, spec())


def test_a_row_that_is_not_finite_has_no_ids() -> None:
    given = logits(2, 2, 100, torch.float32)
    given[1][1, 7] = float("inf")
    first, second = _core.Kernel().read(given, 5, spec())
    assert len(first[2]) == 5
    assert second[2] == []


def test_what_cannot_be_read_is_refused() -> None:
    kernel = _core.Kernel()
    good = logits(1, 1, 20, torch.float32)[0]
    for bad in (good.double(), good.to(torch.int32), good.repeat(1, 2)[:, ::2], good[0]):
        with pytest.raises((TypeError, ValueError)):
            kernel.read([bad], 5, spec())
    with pytest.raises(TypeError, match=r"shape \[1, 20\]"):
        kernel.read([good, good[:, :-1]], 5, spec())
    with pytest.raises(_core.ConfigError, match="consensus"):
        kernel.read([good], 5, spec(method="median"))
    with pytest.raises(ValueError, match='unknown tier "sse"'):
        _core.Kernel(1, "sse")
    assert kernel.read([], 5, spec()) == []
