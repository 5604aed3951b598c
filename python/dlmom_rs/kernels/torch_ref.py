"""Consensus in plain torch, on any device.

Where float64 exists, centring, merging and every exponential and sum are float64, and the merged
row is rounded to float32 where ``dlmom_core::read_row`` rounds it: on a CPU merged rows of ``ties``
and ``mean`` equal the reference's bit for bit, elsewhere up to the last bit of a float64 mean.
Without float64 (MPS) means are pairs of float32 and the rest is float32; merged values are then
within a few units in the last place of what was merged, so that ids differ only between values
about as close.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .readout import Readout, Request, check

#: Width of the blocks whose maxima are ranked first.
BLOCK = 64


def consensus(
    rows: Sequence[Tensor],
    operator: str = "ties",
    *,
    k: int,
    theta: float = 0.1,
    eps: float = 1e-6,
    role: Tensor | None = None,
    targets: Tensor | None = None,
    keep_merged: bool = False,
) -> Readout:
    """Merge K experts' logits, row by row, and read the merged distribution out.

    ``rows`` are K tensors [B, V] of float dtypes on one device, read as float32; slices of wider
    tensors are fine. Every row is centred, ``v = z - mean(z)``, then merged: ``ties`` of the DL-MoM
    paper (Appendix C) with its ``theta`` and ``eps``, ``mean`` (``geo``), ``arith``. One expert's
    merged row is its centred one. ``k`` is the width of the packets, -1 for all of V. ``role`` [R]
    are ids whose merged probability is summed: repeated ones count once, those outside the
    vocabulary not at all. ``targets``, [T] for all rows or [B, T], are ids whose log-probabilities
    are wanted. Both are int32 or int64 on the logits' device. ``keep_merged`` asks for the row.

    NaN and Inf are flags of their row, see :class:`~dlmom_rs.kernels.readout.Readout`. A row's
    results do not depend on the other rows. The host does not wait for the device. Raises
    ValueError for shapes, devices and numbers, TypeError for dtypes.
    """
    request = check(
        rows,
        operator,
        k=k,
        theta=theta,
        eps=eps,
        role=role,
        targets=targets,
        keep_merged=keep_merged,
    )
    return read(request, wide_dtype(request.device))


def wide_dtype(device: torch.device) -> torch.dtype:
    """float64, or float32 where the device has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class _Stats(NamedTuple):
    """Of B rows, fields [B, 1]: maximum (float32), its first place, ``ln Z`` and entropy (wide)."""

    max: Tensor
    best: Tensor
    log_z: Tensor
    entropy: Tensor


def read(request: Request, wide: torch.dtype) -> Readout:
    """:func:`consensus` in float64 or float32, whatever the device has."""
    rows, raw = [], []
    for logits in request.rows:
        z = logits.float()
        finite = z.isfinite().all(1)
        raw.append(finite)
        # A failed row has values that can be computed with, and are thrown away.
        rows.append(torch.where(finite[:, None], z, 0.0))
    finite = torch.stack(raw, 1)
    stats = [_stats(z, wide) for z in rows]
    centred = [_centre(z, wide) for z in rows]
    # The reference looks at centred rows only where all raw ones are finite.
    in_range = torch.stack([v.isfinite().all(1) for v in centred], 1)
    finite = torch.where(finite.all(1, keepdim=True), in_range, finite)
    merged = _merge(request, centred, stats, wide)
    usable = finite.all(1, keepdim=True) & merged.isfinite().all(1, keepdim=True)
    finite = finite & (usable | ~finite.all(1, keepdim=True))
    merged = torch.where(usable, merged, 0.0)
    whole = _stats(merged, wide)

    ids, probs, mass = packet(merged, whole.log_z, request.top)
    best = torch.cat([s.best for s in stats], 1)
    target_logs = _logs_at(merged, whole.log_z, request.targets)
    agent_logs = torch.stack(
        [_logs_at(z, s.log_z, request.targets) for z, s in zip(rows, stats, strict=True)], 1
    )
    return Readout(
        finite=finite,
        entropies=torch.where(usable, torch.cat([s.entropy for s in stats], 1), 0.0),
        agreed=usable[:, 0] & (best == best[:, :1]).all(1),
        merged_entropy=torch.where(usable, whole.entropy, 0.0)[:, 0],
        best=torch.where(usable, whole.best, 0)[:, 0],
        ids=torch.where(usable, ids, 0),
        probs=torch.where(usable, probs, 0.0),
        mass=torch.where(usable[:, 0], mass, 0.0),
        role_mass=torch.where(usable[:, 0], _role_mass(merged, whole.log_z, request.role), 0.0),
        target_logprobs=torch.where(usable, target_logs, 0.0),
        agent_target_logprobs=torch.where(usable[:, :, None], agent_logs, 0.0),
        merged=merged if request.keep_merged else None,
    )


def _stats(z: Tensor, wide: torch.dtype) -> _Stats:
    """Of finite float32 rows [B, V]."""
    largest = z.amax(1, keepdim=True)
    # torch.argmax promises the first of several maxima, but not on every device.
    places = torch.arange(z.shape[1], dtype=torch.int32, device=z.device)
    best = torch.where(z == largest, places, z.shape[1]).amin(1, keepdim=True)
    shifted = z.to(wide) - largest
    if wide == torch.float32:
        # The whole range of float32 is twice what a difference can be.
        shifted = shifted.clamp_(min=-120.0)
    weights = shifted.exp()
    total = weights.sum(1, keepdim=True)
    weighted = weights.mul_(shifted).sum(1, keepdim=True)
    log_total = total.log()
    return _Stats(
        max=largest,
        best=best,
        log_z=largest + log_total,
        entropy=(log_total - weighted / total).clamp(min=0.0),
    )


def _centre(z: Tensor, wide: torch.dtype) -> Tensor:
    """``f32(f64(z) - mean)`` of finite float32 rows [B, V], as exactly as ``wide`` allows."""
    if wide == torch.float64:
        total = _blocked_sum(z) if z.device.type == "cpu" else z.sum(1, dtype=wide)
        return (z.to(wide) - (total / z.shape[1])[:, None]).float()
    mean, rest = _compensated_mean(z)
    high, low = _two_sum(z, -mean)
    return high + (low - rest)


def _blocked_sum(z: Tensor) -> Tensor:
    """Sums of float32 rows [B, V] in float64, in the order of ``dlmom_core::block_sum``.

    Blocks of 1,024 values, in each 16 lanes that are added up one after another and then in pairs;
    the blocks in order. Zeros that fill the last block change nothing.
    """
    lanes = F.pad(z, (0, -z.shape[1] % 1024)).unflatten(1, (-1, 64, 16))
    sums = torch.zeros_like(lanes[:, :, 0], dtype=torch.float64)
    for group in lanes.unbind(2):
        sums += group
    for width in (8, 4, 2, 1):
        sums = sums[..., :width] + sums[..., width:]
    return sums[..., 0].cumsum(1)[:, -1]


def _two_sum(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The rounded sum and what rounding took from it (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _compensated_mean(z: Tensor) -> tuple[Tensor, Tensor]:
    """Means of float32 rows [B, V] as unevaluated sums of two float32, both [B, 1]."""
    # Sums of huge values would overflow, those of ordinary ones must not underflow.
    largest = z.abs().amax(1, keepdim=True)
    scale = torch.ones_like(largest).masked_fill(largest > 1e30, 2.0**-30)
    high = z * scale
    low = torch.zeros_like(high)
    while high.shape[1] > 1:
        half = (high.shape[1] + 1) // 2
        spare = (0, 2 * half - high.shape[1])
        low = low[:, :half] + F.pad(low[:, half:], spare)
        high, lost = _two_sum(high[:, :half], F.pad(high[:, half:], spare))
        low = low + lost
    high, low = _two_sum(high, low)
    count = float(z.shape[1])
    mean = high / count
    # What mean * count rounds away (Dekker); V has fewer than 24 bits.
    product = mean * count
    split = mean * 4097.0
    upper = split - (split - mean)
    lower = mean - upper
    count_upper = math.floor(count / 4096.0) * 4096.0
    count_lower = count - count_upper
    lost = upper * count_upper - product
    lost = ((lost + upper * count_lower) + lower * count_upper) + lower * count_lower
    rest = ((high - product) - lost + low) / count
    return mean / scale, rest / scale


def _merge(
    request: Request, centred: list[Tensor], stats: list[_Stats], wide: torch.dtype
) -> Tensor:
    """The merged rows, float32 [B, V]."""
    if len(centred) == 1:
        return centred[0]
    if request.operator == "ties":
        return _ties(centred, request.theta, request.eps, wide)
    if request.operator == "mean":
        total = centred[0].to(wide)
        for v in centred[1:]:
            total = total + v
        return (total / len(centred)).float()
    share = math.log(1.0 / len(centred))
    terms = []
    for v, s in zip(centred, stats, strict=True):
        # What the largest value lost to centring stands for the mean, as in the reference.
        offset = s.max.to(wide) - v.gather(1, s.best.long())
        terms.append((v.to(wide) + offset - s.log_z) + share)
    largest = terms[0]
    for term in terms[1:]:
        largest = torch.maximum(largest, term)
    total = torch.zeros_like(largest)
    for term in terms:
        total += (term - largest).exp()
    return (largest + total.log()).float()


def _ties(centred: list[Tensor], theta: float, eps: float, wide: torch.dtype) -> Tensor:
    """Trim, elect by the count of signs, and average those that agree."""
    above = torch.zeros_like(centred[0], dtype=torch.int16)
    below = torch.zeros_like(above)
    sum_above = torch.zeros_like(centred[0], dtype=wide)
    sum_below = torch.zeros_like(sum_above)
    for v in centred:
        kept = torch.where(v.abs() < theta, 0.0, v)
        above += kept > 0
        below += kept < 0
        sum_above += kept.clamp(min=0.0)
        sum_below += kept.clamp(max=0.0)
    positive = above > below
    count = torch.maximum(above, below).clamp_(min=1).to(wide) + eps
    agreed = (torch.where(positive, sum_above, sum_below) / count).float()
    return torch.where(above == below, 0.0, agreed)


def order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that sort descending as (value descending, id ascending) does.

    ``values`` float32 without NaN, ``ids`` int64 in [0, 2^32). Distinct ids give distinct keys, so
    that any selection from them has one answer; -0 and 0 are equal.
    """
    bits = (values + 0.0).view(torch.int32)
    # Negative floats order backwards as integers.
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.long() * 2**32 + (2**32 - 1 - ids)


def top_k(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row under the project's order: value descending, then id ascending.

    ``values`` float32 [B, V] without NaN, k at most V. Returns values [B, k] and ids int64 [B, k].
    Blocks of 64 are ranked by their maxima, by the same order; an entry outside the k best blocks
    has k entries before it, so only those are looked at.
    """
    batch, vocab = values.shape
    if k * BLOCK >= vocab:
        ids = torch.arange(vocab, device=values.device).expand(batch, vocab)
        place = order_keys(values, ids).topk(k, dim=1).indices
        return values.gather(1, place), place
    whole = vocab // BLOCK
    maxima = values[:, : whole * BLOCK].unflatten(1, (whole, BLOCK)).amax(2)
    if whole * BLOCK < vocab:
        maxima = torch.cat([maxima, values[:, whole * BLOCK :].amax(1, keepdim=True)], 1)
    blocks = torch.arange(maxima.shape[1], device=values.device)
    blocks = order_keys(maxima, blocks).topk(k, dim=1, sorted=False).indices
    ids = blocks[:, :, None] * BLOCK + torch.arange(BLOCK, device=values.device)
    ids = ids.flatten(1)
    inside = ids < vocab
    candidates = values.gather(1, ids.clamp(max=vocab - 1))
    keys = order_keys(candidates, ids)
    place = torch.where(inside, keys, torch.iinfo(torch.int64).min).topk(k, dim=1).indices
    return candidates.gather(1, place), ids.gather(1, place)


def packet(merged: Tensor, log_z: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids int32 [B, k], probabilities float32 [B, k] and mass float32 [B] of finite merged rows.

    ``log_z`` wide [B, 1].
    """
    values, ids = top_k(merged, k)
    weights = (values.to(log_z.dtype) - log_z).exp()
    mass = weights.sum(1, keepdim=True)
    probs = (weights / mass).float()
    # Distinct logits may round to one probability; the order is that of the probabilities.
    place = order_keys(probs, ids).topk(k, dim=1).indices
    return (
        ids.gather(1, place).to(torch.int32),
        probs.gather(1, place),
        mass[:, 0].clamp(max=1.0).float(),
    )


def _role_mass(merged: Tensor, log_z: Tensor, role: Tensor) -> Tensor:
    """float32 [B]."""
    repeated = (role[:, None] == role).tril(-1).any(1)
    counted = ~repeated & (role >= 0) & (role < merged.shape[1])
    logs = merged[:, role.clamp(0, merged.shape[1] - 1)].to(log_z.dtype) - log_z
    mass = torch.where(counted, logs.exp(), 0.0).sum(1)
    return mass.clamp(max=1.0).float()


def _logs_at(z: Tensor, log_z: Tensor, ids: Tensor) -> Tensor:
    """``ln p`` of ids [B, T] under rows [B, V]; -inf outside the vocabulary."""
    inside = (ids >= 0) & (ids < z.shape[1])
    logs = z.gather(1, ids.clamp(0, z.shape[1] - 1)).to(log_z.dtype) - log_z
    return torch.where(inside, logs, -torch.inf)
