"""Consensus on device logits: torch against float64 and Rust, Triton in its interpreter.

Triton reads ``TRITON_INTERPRET`` when it is imported, so a child process runs this file as a script
and answers over pipes.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dlmom_rs import _core, kernels
from dlmom_rs import consensus as reference
from dlmom_rs.kernels import torch_ref
from dlmom_rs.kernels.readout import Readout, check

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [F32, BF16, F16]
OPERATORS = ["ties", "mean", "arith"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# The oracle: one row at a time, float64, NumPy.


@dataclass
class Expected:
    """One row; ``values`` and ``scale`` say how far apart two tokens' merged values are."""

    finite: list[bool]
    entropies: list[float]
    agreed: bool
    entropy: float
    ids: list[int]
    probs: list[float]
    mass: float
    role_mass: float
    targets: list[float]
    agent_targets: list[list[float]]
    values: np.ndarray
    scale: np.ndarray
    merged: np.ndarray


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.logaddexp.reduce(z)


def entropy(log_p: np.ndarray) -> float:
    p = np.exp(log_p)
    return -math.fsum(p[p > 0] * log_p[p > 0])


def merge(
    wide: list[np.ndarray], centred: np.ndarray, operator: str, theta: float, eps: float
) -> np.ndarray:
    """Logits and centred logits, [K, V] -> [V] in float64."""
    if len(centred) == 1:
        return centred[0]
    if operator == "mean":
        return centred.mean(0)
    if operator == "arith":
        # The mean that the largest logit lost is taken for that of all.
        logs = [
            v + (z.max() - v[z.argmax()] - np.logaddexp.reduce(z))
            for z, v in zip(wide, centred, strict=True)
        ]
        return np.logaddexp.reduce(logs) - math.log(len(centred))
    kept = centred * (np.abs(centred) >= np.float32(theta))
    elected = np.sign(np.sign(kept).sum(0))
    agree = (np.sign(kept) == elected) & (elected != 0)
    return (kept * agree).sum(0) / (np.maximum(agree.sum(0), 1) + float(np.float32(eps)))


def expect(
    rows: list[np.ndarray],
    operator: str,
    k: int,
    *,
    theta: float = 0.1,
    eps: float = 1e-6,
    role: tuple[int, ...] = (),
    targets: tuple[int, ...] = (),
) -> Expected | list[bool]:
    """What one row reads as; flags alone where it failed. ``rows`` are K float32 arrays [V]."""
    finite = [bool(np.isfinite(z).all()) for z in rows]
    if not all(finite):
        return finite
    wide = [z.astype(np.float64) for z in rows]
    with np.errstate(over="ignore"):
        centred = np.array([np.float32(z - math.fsum(z) / len(z)) for z in wide], np.float64)
        finite = [bool(np.isfinite(v).all()) for v in centred]
        if not all(finite):
            return finite
        values = merge(wide, centred, operator, theta, eps)
        merged = np.float32(values)
    if not np.isfinite(merged).all():
        return [False] * len(rows)
    log_p = log_softmax(merged.astype(np.float64))
    vocab, best = len(merged), np.lexsort((np.arange(len(merged)), -merged))[:k]
    p = np.exp(log_p[best])
    probs = np.float32(p / p.sum()) if k else np.empty(0, np.float32)
    order = np.lexsort((best, -probs))
    own = [log_softmax(z) for z in wide]
    scale = np.abs(centred).max(0)
    if operator == "arith":
        scale = np.maximum(scale, np.abs(own).max(0))

    def at(logs: np.ndarray) -> list[float]:
        return [float(logs[t]) if 0 <= t < vocab else -math.inf for t in targets]

    return Expected(
        finite=finite,
        entropies=[entropy(logs) for logs in own],
        agreed=len({int(np.argmax(z)) for z in wide}) == 1,
        entropy=entropy(log_p),
        ids=best[order].tolist(),
        probs=probs[order].tolist(),
        mass=min(math.fsum(p), 1.0),
        role_mass=math.fsum(np.exp(log_p[sorted({r for r in role if 0 <= r < vocab})])),
        targets=at(log_p),
        agent_targets=[at(logs) for logs in own],
        values=values,
        scale=scale,
        merged=merged,
    )


@dataclass(frozen=True)
class Tolerance:
    """``value`` relative to what was merged, ``prob`` relative, the others absolute.

    ``log`` is of what follows from merged values, which are float32.
    """

    value: float
    entropy: float
    prob: float
    log: float


#: Float64 throughout.
EXACT = Tolerance(value=1.2e-7, entropy=1e-9, prob=2e-7, log=1e-6)
#: Exponentials of rows in float32, the rest in float64.
FUSED = Tolerance(value=1.3e-7, entropy=1e-6, prob=1e-6, log=1.5e-6)
#: Nothing but float32.
NARROW = Tolerance(value=1e-6, entropy=3e-6, prob=1e-5, log=1e-5)


def compare(got: Readout, row: int, want: Expected | list[bool], tolerance: Tolerance) -> None:
    """Hold one row of a readout to the oracle's."""
    if isinstance(want, list):
        assert got.finite[row].tolist() == want
        for field in fields(got):
            value = getattr(got, field.name)
            if field.name != "finite" and value is not None:
                assert not value[row].any(), field.name
        return
    assert got.finite[row].tolist() == want.finite
    assert got.agreed[row].item() == want.agreed
    # What a merged value may be off by is a factor of probabilities.
    off = 2 * tolerance.value * float(want.scale.max())
    prob, log = tolerance.prob + off, tolerance.log + off
    assert got.entropies[row].tolist() == pytest.approx(want.entropies, abs=tolerance.entropy)
    assert got.merged_entropy[row].item() == pytest.approx(want.entropy, abs=log)
    assert got.mass[row].item() == pytest.approx(want.mass, rel=prob)
    assert got.role_mass[row].item() == pytest.approx(want.role_mass, rel=prob, abs=1e-37)
    for logs, want_logs in [
        (got.target_logprobs[row], want.targets),
        *zip(got.agent_target_logprobs[row], want.agent_targets, strict=True),
    ]:
        assert logs.tolist() == pytest.approx(want_logs, abs=log)
    assert got.merged is not None
    assert got.best[row].item() == got.merged[row].argmax().item()
    gap = np.abs(got.merged[row].double().numpy() - want.values)
    assert (gap <= tolerance.value * want.scale + 1e-44).all()

    ids, probs = got.ids[row].tolist(), got.probs[row].tolist()
    assert len(set(ids)) == len(ids) == len(want.ids)
    assert probs == pytest.approx(want.probs, rel=prob, abs=1e-37)
    assert sorted(zip(probs, ids, strict=True), key=lambda e: (-e[0], e[1])) == list(
        zip(probs, ids, strict=True)
    )
    for a, b, p in zip(ids, want.ids, want.probs, strict=True):
        if a != b:
            # Only what is as good as equal, or was rounded to one probability, may change places.
            scale = max(want.scale[a], want.scale[b])
            apart = abs(want.values[a] - want.values[b])
            assert apart <= 1e-6 * scale + 1e-37 or apart <= prob or p < 1e-37


# Rows that are hard.

KINDS = ["normal", "coarse", "constant", "denormal", "wide", "spiky", "cancel"]


def make(seed: int, kind: str, shape: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """K tensors [B, V] of the shape (K, B, V)."""
    experts, batch, vocab = shape
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 3, shape)
    if kind == "coarse":
        z = np.round(z / 2) * 2
    elif kind == "constant":
        z = np.broadcast_to(rng.normal(0, 3, (experts, batch, 1)), z.shape)
    elif kind == "denormal":
        z *= 1e-40 if dtype != F16 else 1e-7
    elif kind == "wide":
        z *= 1e3
    elif kind == "spiky":
        z[..., rng.integers(vocab)] = 60
    elif kind == "cancel":
        z[1:] = -z[:1]
    return [torch.from_numpy(np.array(rows)).to(dtype) for rows in z]


def poison(rows: list[Tensor], seed: int, values: tuple[float, ...]) -> None:
    rng = np.random.default_rng(seed)
    for value in values:
        z = rows[rng.integers(len(rows))]
        z[rng.integers(z.shape[0]), rng.integers(z.shape[1])] = value


@dataclass
class Case:
    """A call, and what it should answer."""

    rows: list[Tensor]
    operator: str
    k: int
    theta: float = 0.1
    role: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()

    def keywords(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "theta": self.theta,
            "role": torch.tensor(self.role, dtype=torch.int64),
            "targets": torch.tensor(self.targets, dtype=torch.int64),
            "keep_merged": True,
        }

    def expected(self, row: int) -> Expected | list[bool]:
        arrays = [z[row].float().numpy() for z in self.rows]
        k = min(self.k, self.rows[0].shape[1])
        return expect(
            arrays, self.operator, k, theta=self.theta, role=self.role, targets=self.targets
        )

    def run(self, wide: torch.dtype = torch.float64) -> Readout:
        keywords = {"eps": 1e-6, **self.keywords()}
        return torch_ref.read(check(self.rows, self.operator, **keywords), wide)

    def compare(self, got: Readout, tolerance: Tolerance) -> None:
        for row in range(self.rows[0].shape[0]):
            compare(got, row, self.expected(row), tolerance)


BAD = [math.nan, math.inf, -math.inf]


@st.composite
def cases(draw: st.DrawFn, most: int = 700, batch: int = 3) -> Case:
    experts, vocab = draw(st.integers(1, 4)), draw(st.integers(2, most))
    seed = draw(st.integers(0, 2**32 - 1))
    kind, dtype = draw(st.sampled_from(KINDS)), draw(st.sampled_from(DTYPES))
    rows = make(seed, kind, (experts, draw(st.integers(1, batch)), vocab), dtype)
    if draw(st.integers(0, 3)) == 0:
        poison(rows, seed, tuple(draw(st.lists(st.sampled_from(BAD), min_size=1, max_size=2))))
    ids = st.integers(-2, vocab + 2)
    return Case(
        rows,
        draw(st.sampled_from(OPERATORS)),
        k=draw(st.one_of(st.integers(0, 8), st.integers(0, most + 50))),
        theta=draw(st.sampled_from([0.0, 0.1, 2.0])),
        role=tuple(draw(st.lists(ids, max_size=4))),
        targets=tuple(draw(st.lists(ids, max_size=20))),
    )


# Torch.


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_torch_is_the_oracle(case: Case) -> None:
    case.compare(case.run(), EXACT)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_float32_alone_is_close(case: Case) -> None:
    case.compare(case.run(F32), NARROW)


def in_order(merged: np.ndarray, k: int) -> list[int]:
    """The reference's ids of a merged row, by another route than its own."""
    log_p = log_softmax(merged.astype(np.float64))
    best = np.lexsort((np.arange(len(merged)), -merged))[:k]
    p = np.exp(log_p[best])
    return best[np.lexsort((best, -np.float32(p / p.sum())))].tolist()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases())
def test_merged_rows_are_those_of_rust(case: Case) -> None:
    got = case.run()
    assert got.merged is not None
    for row in range(case.rows[0].shape[0]):
        rows = [z[row].float() for z in case.rows]
        options = {"theta": case.theta} if case.operator == "ties" and len(rows) > 1 else {}
        if not got.finite[row].all():
            with pytest.raises(ValueError, match="NaN or Inf"):
                reference(rows, method=case.operator, **options)
            continue
        want = reference(rows, method=case.operator, **options)
        if case.operator == "arith":
            # Its logarithms and exponentials are the platform's.
            apart = (got.merged[row].view(torch.int32) - want.view(torch.int32)).abs()
            close = (got.merged[row] - want).abs() <= 1e-15
            assert ((apart <= 1) | close).all()
        else:
            assert torch.equal(got.merged[row], want)
            assert got.ids[row].tolist() == in_order(want.numpy(), case.k)
        spec = json.dumps({"method": case.operator, **options})
        data = torch.stack(rows).numpy().astype("<f4").tobytes()
        _, entropies, merged_entropy = _core.consensus_core(data, len(want), spec, 0)
        assert got.entropies[row].tolist() == pytest.approx(entropies, abs=1e-9)
        assert got.merged_entropy[row].item() == pytest.approx(merged_entropy, abs=1e-9)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_large_rows(operator: str, dtype: torch.dtype) -> None:
    rows = make(5, "normal", (3, 2, 20_000), dtype)
    case = Case(rows, operator, k=50, role=(7, 19_999), targets=(0, 123))
    got = case.run()
    case.compare(got, EXACT)
    case.compare(case.run(F32), NARROW)
    if operator != "arith":
        assert got.merged is not None
        for row in range(2):
            want = reference([z[row] for z in rows], method=operator)
            assert torch.equal(got.merged[row], want)
            assert got.ids[row].tolist() == in_order(want.numpy(), 50)


def test_pairs_of_float32_centre_almost_like_float64() -> None:
    z = torch.randn(8, 50_000, generator=torch.Generator().manual_seed(1)) * 4 - 3
    wide, narrow = (torch_ref._centre(z, dtype) for dtype in (torch.float64, F32))
    assert (wide != narrow).float().mean() < 1e-5


def test_means_of_huge_values_do_not_overflow() -> None:
    z = torch.tensor([[3e38, 2.9e38, 3e38], [3e38, -3e38, 1.0]])
    for wide in (torch.float64, F32):
        v = torch_ref._centre(z, wide)
        want = z.double() - z.double().mean(1, keepdim=True)
        assert torch.allclose(v.double(), want, rtol=1e-6, atol=1e30)


def test_sums_are_in_the_order_of_the_reference() -> None:
    rng = np.random.default_rng(0)
    z = (rng.normal(size=(2, 2_500)) * 10.0 ** rng.integers(-12, 12, (2, 2_500))).astype(np.float32)
    for row, got in zip(z, torch_ref._blocked_sum(torch.from_numpy(z)).tolist(), strict=True):
        want = 0.0
        for start in range(0, 2_500, 1024):
            block = row[start : start + 1024].tolist()
            lanes = []
            for lane in range(16):
                total = 0.0
                for value in block[lane::16]:
                    total += value
                lanes.append(total)
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [lanes[i] + lanes[i + half] for i in range(half)]
            want += lanes[0]
        assert got == want


def test_rounding_of_a_mean_is_that_of_the_reference() -> None:
    # What large values leave when they cancel depends on the order in which they are added.
    rng = np.random.default_rng(1)
    large = rng.normal(0, 1e8, 1_000)
    z = rng.permutation(np.concatenate([large, -large, rng.normal(0, 1e-5, 500)]))
    row = torch.from_numpy(z.astype(np.float32))
    got = torch_ref.consensus([row[None]], k=1, keep_merged=True)
    assert got.merged is not None
    assert torch.equal(got.merged[0], reference(row[None]))


def edges(run: Callable[..., Readout]) -> None:
    """Entries of exactly theta are kept, and zeros of both signs are equal."""
    rows = [torch.tensor([[0.5, -0.5, 0.25, -0.25]]), torch.tensor([[-0.25, -0.5, 0.5, 0.25]])]
    got = run(rows, "ties", k=4, theta=0.5, keep_merged=True)
    assert got.merged is not None
    assert torch.equal(got.merged[0], reference([z[0] for z in rows], method="ties", theta=0.5))
    assert got.merged[0, 0] > 0.4
    assert got.ids[0, :2].tolist() == [0, 2]
    zeros = torch.zeros(1, 300)
    zeros[0, ::2] = -0.0
    assert run([zeros], "ties", k=9).ids[0].tolist() == list(range(9))


def test_edges() -> None:
    edges(torch_ref.consensus)


# The order of lists.


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.integers(1, 900),
    k=st.integers(0, 900),
    step=st.sampled_from([0.0, 0.5, 4.0]),
)
def test_top_k_breaks_ties_by_id(seed: int, vocab: int, k: int, step: float) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(0, 2, (2, vocab)).astype(np.float32)
    if step:
        z = np.round(z / np.float32(step)) * np.float32(step)
    z[0, rng.integers(vocab)] = np.inf
    z[1, rng.integers(vocab)] = -np.inf
    k = min(k, vocab)
    values, ids = torch_ref.top_k(torch.from_numpy(z), k)
    for row in range(2):
        want = sorted(range(vocab), key=lambda j: (-z[row, j], j))[:k]
        assert ids[row].tolist() == want
        assert values[row].tolist() == z[row, want].tolist()


@pytest.mark.parametrize("vocab", [64 * 40, 64 * 40 + 1, 64 * 40 - 1])
def test_zeros_of_both_signs_are_equal(vocab: int) -> None:
    z = torch.zeros(1, vocab)
    z[0, ::3] = -0.0
    assert torch_ref.top_k(z, 20)[1][0].tolist() == list(range(20))
    z[0, vocab - 1] = 1.0
    assert torch_ref.top_k(z, 3)[1][0].tolist() == [vocab - 1, 0, 1]


def test_distinct_values_are_those_of_torch() -> None:
    z = torch.randperm(30_000, generator=torch.Generator().manual_seed(0)).float()[None]
    values, ids = torch_ref.top_k(z, 64)
    want = z.topk(64)
    assert torch.equal(values, want.values)
    assert torch.equal(ids, want.indices)


# Failures, independence, arguments.


def failures(run: Callable[[list[Tensor], str], Readout]) -> None:
    top = float(np.finfo(np.float32).max)
    fine = [1.0, 2.0, 0.0, -1.0]
    table: list[tuple[str, list[list[float]], list[bool]]] = [
        ("ties", [fine, [1.0, math.nan, 0.0, 0.0]], [True, False]),
        ("ties", [[math.inf, 0.0, 0.0, 0.0], fine], [False, True]),
        ("mean", [[-math.inf, 0.0, 0.0, 0.0], [math.nan, 0.0, 0.0, 0.0]], [False, False]),
        # Overflows when centred; whoever does not is still well.
        ("ties", [[top, -top, -top, -top], fine], [False, True]),
        # Raw failures hide those of centring.
        ("ties", [[top, -top, -top, -top], [math.nan, 0.0, 0.0, 0.0]], [True, False]),
        # Only the merged row overflows.
        ("arith", [[3e38, -3e38, 0.0, 0.0], [3e38, -3e38, 0.0, 0.0]], [False, False]),
        ("ties", [[3e38, -3e38, 0.0, 0.0], [3e38, -3e38, 0.0, 0.0]], [True, True]),
    ]
    for operator, experts, flags in table:
        # A good row beside it.
        rows = [torch.tensor([z, fine]) for z in experts]
        got = run(rows, operator)
        assert got.finite.tolist() == [flags, [True, True]]
        want = expect([np.array(z, np.float32) for z in experts], operator, 3)
        assert (want if isinstance(want, list) else want.finite) == flags
        if not all(flags):
            compare(got, 0, want, EXACT)
        assert got.ids[1].tolist() == [1, 0, 2]
        alone = run([z[1:] for z in rows], operator)
        for field in fields(got):
            a, b = getattr(got, field.name), getattr(alone, field.name)
            assert a is None or torch.equal(a[1], b[0]), field.name


def test_failures_are_flags_of_their_row() -> None:
    failures(lambda rows, operator: torch_ref.consensus(rows, operator, k=3))


def test_rows_do_not_depend_on_their_mates() -> None:
    rows = make(3, "normal", (3, 6, 500), BF16)
    whole = torch_ref.consensus(rows, k=40)
    for row in range(6):
        alone = torch_ref.consensus([z[row : row + 1] for z in rows], k=40)
        for field in fields(alone):
            a, b = getattr(alone, field.name), getattr(whole, field.name)
            assert a is None or torch.equal(a[0], b[row]), field.name


def test_widths() -> None:
    rows = make(0, "coarse", (2, 2, 130), F32)
    everything = torch_ref.consensus(rows, k=-1)
    assert everything.ids.sort(1).values.tolist() == [list(range(130))] * 2
    assert everything.mass.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    assert torch.equal(everything.ids, torch_ref.consensus(rows, k=500).ids)
    nothing = torch_ref.consensus(rows, k=0)
    assert nothing.ids.shape == nothing.probs.shape == (2, 0)
    assert nothing.mass.tolist() == [0.0, 0.0]
    assert nothing.finite.all()
    assert torch.equal(nothing.best, everything.best)
    empty = torch_ref.consensus([z[:0] for z in rows], k=3)
    assert empty.ids.shape == (0, 3)
    assert empty.finite.shape == (0, 2)


def test_slices_dtypes_and_gradients() -> None:
    wide = torch.randn(2, 200, requires_grad=True)
    rows = [wide[:, :150], torch.randn(150, 2).T.to(BF16)]
    got = torch_ref.consensus(rows, k=5)
    want = torch_ref.consensus([wide[:, :150].detach().clone(), rows[1].float()], k=5)
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.probs, want.probs)
    assert not got.probs.requires_grad
    assert torch.equal(torch_ref.consensus(rows, "geo", k=5).ids,
                       torch_ref.consensus(rows, "mean", k=5).ids)  # fmt: skip


def test_targets_of_each_row() -> None:
    rows = make(0, "normal", (2, 2, 50), F32)
    each = torch.tensor([[3, 4], [5, 60]], dtype=torch.int32)
    got = torch_ref.consensus(rows, k=1, targets=each)
    for row in range(2):
        alone = torch_ref.consensus([z[row : row + 1] for z in rows], k=1, targets=each[row])
        assert torch.equal(got.target_logprobs[row], alone.target_logprobs[0])
        assert torch.equal(got.agent_target_logprobs[row], alone.agent_target_logprobs[0])


def test_one_copy_to_the_host() -> None:
    got = torch_ref.consensus(
        make(0, "normal", (3, 2, 77), F32), k=7, targets=torch.tensor([1, 2]), keep_merged=True
    )
    host = got.to_host()
    assert host.merged is None
    for field in fields(got):
        a, b = getattr(got, field.name), getattr(host, field.name)
        assert field.name == "merged" or (a.dtype == b.dtype and torch.equal(a, b))


@pytest.mark.parametrize("operator", OPERATORS)
def test_the_host_never_waits(operator: str) -> None:
    # Whatever reads a value of a meta tensor raises.
    rows = [torch.empty(4, 5_000, dtype=BF16, device="meta") for _ in range(3)]
    ids = torch.empty(2, dtype=torch.int64, device="meta")
    got = torch_ref.consensus(rows, operator, k=50, role=ids, targets=ids, keep_merged=True)
    assert got.ids.shape == got.probs.shape == (4, 50)
    assert got.agent_target_logprobs.shape == (4, 3, 2)


def test_wrong_arguments() -> None:
    z = torch.zeros(2, 5)
    ids = torch.tensor([1])

    def fails(kind: type[Exception], words: str, *args: Any, **keywords: Any) -> None:
        with pytest.raises(kind, match=words):
            torch_ref.consensus(*args, **{"k": 1, **keywords})

    fails(ValueError, "unknown operator 'median'; known: arith, geo, mean, ties", [z], "median")
    fails(ValueError, "no logits", [])
    fails(ValueError, r"expert 1 have shape \[2, 4\]", [z, torch.zeros(2, 4)])
    fails(ValueError, r"shape \[5\]", [z[0]])
    fails(ValueError, r"shape \[2, 0\]", [z[:, :0]])
    fails(TypeError, "expert 0 are torch.int64", [z.long()])
    fails(ValueError, "expert 1 are on meta", [z, z.to("meta")])
    fails(ValueError, "k is -2", [z], k=-2)
    fails(ValueError, "theta is nan", [z], theta=math.nan)
    fails(ValueError, "eps is -1", [z], eps=-1.0)
    fails(TypeError, "role are torch.float32", [z], role=ids.float())
    fails(ValueError, r"role has shape \[1, 1\]", [z], role=ids[None])
    fails(ValueError, r"targets have shape \[3, 1\]", [z], targets=ids.expand(3, 1))
    fails(ValueError, "targets are on meta", [z], targets=ids.to("meta"))


# The choice.

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton cannot be imported")


def test_torch_is_chosen_off_the_gpu() -> None:
    for device in ("cpu", "mps", torch.device("meta")):
        assert kernels.choose(device, BF16) is torch_ref.consensus
    assert kernels.choose("cuda", torch.float64) is torch_ref.consensus
    assert kernels.choose("cuda:1", F32, "torch") is torch_ref.consensus


@needs_triton
def test_triton_is_chosen_on_the_gpu() -> None:
    from dlmom_rs.kernels import triton_kernels

    for dtype in DTYPES:
        assert kernels.choose("cuda:0", dtype) is triton_kernels.consensus
    assert kernels.choose("cpu", F32, "triton") is triton_kernels.consensus
    with pytest.raises(ValueError, match=r"run on CUDA and HIP devices, not on cpu"):
        triton_kernels.consensus([torch.zeros(1, 4)], k=1)
    with pytest.raises(TypeError, match=r"expert 0 are torch\.float64"):
        triton_kernels.consensus([torch.zeros(1, 4, dtype=torch.float64)], k=1)


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "dlmom_rs.kernels.triton_kernels", raising=False)
    monkeypatch.delattr(kernels, "triton_kernels", raising=False)
    assert kernels.choose("cuda", F32) is torch_ref.consensus
    with pytest.raises(ImportError, match=r"triton kernels need triton, .*pip install triton"):
        kernels.choose("cuda", F32, "triton")


def test_unknown_kernels() -> None:
    with pytest.raises(ValueError, match=r"unknown kernels 'cuda'; known: torch, triton"):
        kernels.choose("cpu", F32, "cuda")
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        kernels.choose("cuda", torch.float64, "triton")


# Triton.


KERNELS = ("_stats_kernel", "_merge_kernel", "_select_kernel")


class Child:
    """This file, run as a script in which Triton interprets."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )

    def __call__(self, task: str, *args: Any, **keywords: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        pickle.dump((task, args, keywords), self.process.stdin)
        self.process.stdin.flush()
        good, answer = pickle.load(self.process.stdout)
        if not good:
            pytest.fail(answer)
        return answer

    def consensus(
        self, rows: list[Tensor], operator: str, chunk: int = 2048, **keywords: Any
    ) -> Readout:
        answer = self("consensus", rows, operator, chunk, **keywords)
        return Readout(**answer)


def serve() -> None:
    import traceback

    torch.set_num_threads(1)
    tasks = {"consensus": serve_consensus, "shifted": serve_shifted}
    pipe = os.fdopen(os.dup(1), "wb")
    # Whatever prints must not get among the answers.
    os.dup2(2, 1)
    while True:
        try:
            task, args, keywords = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            # The interpreter computes in NumPy what a device computes silently.
            with np.errstate(all="ignore"):
                answer = (True, tasks[task](*args, **keywords))
        except Exception:
            answer = (False, traceback.format_exc())
        pickle.dump(answer, pipe)
        pipe.flush()


def serve_consensus(
    rows: list[Tensor], operator: str, chunk: int, **keywords: Any
) -> dict[str, Tensor | None]:
    from dlmom_rs.kernels import triton_kernels

    request = check(rows, operator, **{"theta": 0.1, "eps": 1e-6, "role": None, "targets": None,
                                       "keep_merged": False, **keywords})  # fmt: skip
    got = triton_kernels.read(request, chunk)
    return {field.name: getattr(got, field.name) for field in fields(got)}


def serve_shifted(partials: Tensor) -> tuple[float, float, float]:
    """Adds up partials [3, n] (max, sum e, sum d e) with the kernels' own rule."""
    # The interpreter looks names up in the module, not around the function.
    global _whole, tl  # noqa: PLW0603
    import triton
    import triton.language as tl

    from dlmom_rs.kernels.triton_kernels import _whole

    @triton.jit
    def kernel(partials, out, n, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        largest, total, weighted = _whole(partials, n, WIDTH)
        tl.store(out, largest)
        tl.store(out + 1, total)
        tl.store(out + 2, weighted)

    out = torch.zeros(3, dtype=torch.float64)
    n = partials.shape[1]
    kernel[(1,)](partials, out, n, WIDTH=triton.next_power_of_2(n))
    a, b, c = out.tolist()
    return a, b, c


def serve_compilation() -> None:
    """Compile what a call launches, for devices that need not be there."""
    import triton
    from triton.backends import backends
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dlmom_rs.kernels import triton_kernels

    targets = {"nvidia": GPUTarget("cuda", 90, 32), "amd": GPUTarget("hip", "gfx1151", 32)}
    names = {F32: "fp32", BF16: "bf16", torch.float64: "fp64", torch.int8: "i8"}
    names |= {torch.int32: "i32", torch.int64: "i64"}

    def of(value: object) -> Any:
        if isinstance(value, Tensor):
            return "*" + names[value.dtype]
        if isinstance(value, tuple):
            return tuple(map(of, value))
        return "fp32" if isinstance(value, float) else "i32"

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Callable[..., None]:
            return self.compile

        def compile(self, *args: object, **constants: Any) -> None:
            known = self.kernel.arg_names
            signature = dict(zip(known, map(of, args), strict=False))
            values = {n: v for n, v in constants.items() if n in known}
            source = ASTSource(
                fn=self.kernel,
                signature=signature | dict.fromkeys(values, "constexpr"),
                constexprs={(known.index(n),): v for n, v in values.items()},
            )
            options = {n: v for n, v in constants.items() if n not in known}
            for backend in targets.keys() & backends.keys():
                binary = triton.compile(source, target=targets[backend], options=options)
                print(backend, self.kernel.__name__, list(binary.asm)[-1])

    for name in KERNELS:
        setattr(triton_kernels, name, Recorder(getattr(triton_kernels, name)))
    ids = torch.zeros(2, dtype=torch.int64)
    for operator, dtypes in [("mean", [BF16]), ("ties", [F32, BF16]), ("arith", [BF16] * 3)]:
        rows = [torch.zeros(2, 151_936, dtype=dtype) for dtype in dtypes]
        keywords = {"k": 50, "theta": 0.1, "eps": 1e-6, "role": ids, "targets": ids}
        request = check(rows, operator, **keywords, keep_merged=operator == "ties")
        triton_kernels.read(request, triton_kernels.CHUNK)


@needs_triton
def test_triton_compiles_without_a_gpu(tmp_path: Path) -> None:
    # The interpreter takes much that the compiler does not.
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "error", __file__, "compile"],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(KERNELS) <= set(done.stdout.split())


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Child]:
    if not HAS_TRITON:
        pytest.skip("triton cannot be imported")
    child = Child()
    yield child
    assert child.process.stdin is not None
    assert child.process.stdout is not None
    child.process.stdin.close()
    child.process.wait(30)
    child.process.stdout.close()


def test_triton_is_the_oracle(interpreted: Child) -> None:
    @settings(max_examples=25, deadline=None, derandomize=True)
    @given(case=cases(most=300, batch=2), chunk=st.sampled_from([64, 256, 2048]))
    def check_case(case: Case, chunk: int) -> None:
        # What the interpreter takes a second for adds nothing here.
        case.k = min(case.k, 20) if case.k <= 128 else case.k
        got = interpreted.consensus(case.rows, case.operator, chunk, **case.keywords())
        case.compare(got, FUSED)
        if case.operator != "arith":
            torch_got = case.run()
            assert torch.equal(got.merged, torch_got.merged)
            assert torch.equal(got.ids, torch_got.ids)

    check_case()


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_triton_on_large_rows(interpreted: Child, dtype: torch.dtype) -> None:
    rows = make(11, "normal", (2, 1, 20_000), dtype)
    case = Case(rows, "ties", k=50, role=(5, 5, 9), targets=(1, 19_999, 20_000))
    got = interpreted.consensus(rows, "ties", **case.keywords())
    case.compare(got, FUSED)
    want = case.run()
    assert torch.equal(got.merged, want.merged)
    assert torch.equal(got.ids, want.ids)
    assert torch.allclose(got.entropies, want.entropies, rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [0, 1, 128, 129])
def test_triton_widths(interpreted: Child, k: int) -> None:
    rows = make(2, "coarse", (2, 1, 5_000), F16)
    got = interpreted.consensus(rows, "mean", k=k)
    want = torch_ref.consensus(rows, "mean", k=k)
    assert got.merged is None
    assert torch.equal(got.ids, want.ids)
    assert torch.equal(got.best, want.best)
    assert torch.allclose(got.probs, want.probs, rtol=1e-6, atol=0)


def test_triton_reads_slices_and_mixed_dtypes(interpreted: Child) -> None:
    rows = [
        make(0, "normal", (1, 2, 200), F32)[0][:, :150],
        make(1, "normal", (1, 2, 150), BF16)[0],
    ]
    each = torch.tensor([[3, 4], [5, 149]])
    got = interpreted.consensus(rows, "ties", k=9, targets=each, keep_merged=True)
    want = torch_ref.consensus(rows, "ties", k=9, targets=each, keep_merged=True)
    assert torch.equal(got.merged, want.merged)
    assert torch.equal(got.ids, want.ids)
    assert torch.allclose(got.target_logprobs, want.target_logprobs, rtol=0, atol=1e-6)
    assert torch.allclose(got.agent_target_logprobs, want.agent_target_logprobs, atol=1e-6)


def test_triton_failures_are_flags_of_their_row(interpreted: Child) -> None:
    failures(lambda rows, operator: interpreted.consensus(rows, operator, 64, k=3))


def test_triton_edges(interpreted: Child) -> None:
    edges(interpreted.consensus)


def test_triton_merges_far_below_its_bound(interpreted: Child) -> None:
    # Experts that contradict each other leave nothing near their own maxima.
    z = torch.linspace(-300, 300, 256)[None]
    case = Case([z, -z, z.flip(1) * 0.5], "ties", k=8)
    case.compare(interpreted.consensus(case.rows, "ties", 64, **case.keywords()), FUSED)


def test_triton_sums_partials(interpreted: Child) -> None:
    rng = np.random.default_rng(4)
    for parts, scale in itertools.product((1, 3, 8), (0.1, 5.0, 200.0)):
        chunks = [rng.normal(rng.normal(0, scale), scale, 50) for _ in range(parts)]
        partials = []
        for x in chunks:
            d = x - x.max()
            partials.append([x.max(), np.exp(d).sum(), (d * np.exp(d)).sum()])
        largest, total, weighted = interpreted(
            "shifted", torch.tensor(partials, dtype=torch.float64).T.contiguous()
        )
        x = np.concatenate(chunks)
        d = x - x.max()
        assert largest == x.max()
        assert total == pytest.approx(np.exp(d).sum(), rel=1e-12)
        assert weighted == pytest.approx((d * np.exp(d)).sum(), rel=1e-12, abs=1e-300)


if __name__ == "__main__":
    if sys.argv[1:2] == ["compile"]:
        serve_compilation()
    else:
        serve()
