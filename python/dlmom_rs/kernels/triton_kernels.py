"""Consensus in three Triton kernels: statistics, merge, select.

The merged row is never written unless it is asked for: the merge kernel leaves partial sums and
the maximum of every block of 64 tokens, and the select kernel merges the k best blocks again.
Logits are read twice, in their own dtype.

Means, centring and merging are float64, a handful of operations per logit, and the merged value is
rounded to float32 where the reference rounds it: ids and merged values are those of
``dlmom_core::read_row`` up to the last bit of a float64 mean. Exponentials of whole rows, and their
sums within a chunk, are float32; chunks are added in float64. With ``arith``, whose merged value is
a logarithm of such a sum, the last bit of a merged value may differ.

Under ``TRITON_INTERPRET=1``, set before triton is imported, everything runs on CPU tensors.
"""

# Kernels are compiled from their source, in which types and keywords have other meanings.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, import-untyped, import-not-found"
# ruff: noqa: PLR0917

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from . import torch_ref
from .readout import Readout, Request, check

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        "triton kernels need triton, which comes with torch for CUDA and HIP on Linux "
        f"(pip install triton): {error}"
    ) from error

#: Logits that one program of the first two kernels reads; a row's sums depend on it.
CHUNK = 2048
#: Widest packet that the select kernel takes from the k best blocks. Wider ones are selected in
#: torch, from a merged row that is written for them.
FUSED_TOP = 128
_BLOCK = torch_ref.BLOCK
#: Targets that the select kernel looks up at a time.
_TARGETS = 16


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
    """:func:`torch_ref.consensus`, for float32, bfloat16 and float16 on CUDA and HIP devices.

    Arguments, results and errors are the same, and TypeError for another dtype, ValueError for
    another device. "Wide" is float64.
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
    for index, z in enumerate(request.rows):
        if z.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise TypeError(
                f"logits of expert {index} are {z.dtype}; float32, bfloat16 or float16 is needed"
            )
    if request.device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise ValueError(f"triton kernels run on CUDA and HIP devices, not on {request.device}")
    return read(request, CHUNK)


def read(request: Request, chunk: int) -> Readout:
    """:func:`consensus` with another ``chunk``: a power of two, 64 or more."""
    batch, vocab, device = request.batch, request.vocab, request.device
    if batch == 0:
        return torch_ref.read(request, torch.float64)
    experts = len(request.rows)
    chunks = triton.cdiv(vocab, chunk)
    fused = request.top <= FUSED_TOP
    top = request.top if fused else 0

    def new(dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    partials = new(torch.float64, batch, experts, 5, chunks)
    places = new(torch.int32, batch, experts, 2, chunks)
    whole = new(torch.float64, batch, 3, chunks)
    whole_places = new(torch.int32, batch, 2, chunks)
    maxima = new(torch.float32, batch, chunks * chunk // _BLOCK)
    keep = request.keep_merged or not fused
    merged = new(torch.float32, batch, vocab) if keep else maxima
    readout = Readout(
        finite=new(torch.bool, batch, experts),
        entropies=new(torch.float64, batch, experts),
        agreed=new(torch.bool, batch),
        merged_entropy=new(torch.float64, batch),
        best=new(torch.int32, batch),
        ids=new(torch.int32, batch, top),
        probs=new(torch.float32, batch, top),
        mass=new(torch.float32, batch),
        role_mass=new(torch.float32, batch),
        target_logprobs=new(torch.float64, batch, request.targets.shape[1]),
        agent_target_logprobs=new(torch.float64, batch, experts, request.targets.shape[1]),
        merged=merged if keep else None,
    )
    log_z = new(torch.float64, batch)
    rows = tuple(request.rows)
    strides = tuple(z.stride(0) for z in rows)
    width = triton.next_power_of_2(chunks)
    blocks = maxima.shape[1]
    blocks_width = triton.next_power_of_2(blocks)
    top_width = triton.next_power_of_2(max(1, top))
    scratch = new(torch.int64, batch, top_width)
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        _stats_kernel[(chunks, batch, experts)](
            rows,
            strides,
            partials,
            places,
            vocab,
            chunks,
            EXPERTS=experts,
            CHUNK=chunk,
            enable_fp_fusion=False,
        )
        _merge_kernel[(chunks, batch)](
            rows,
            strides,
            partials,
            whole,
            whole_places,
            maxima,
            merged,
            vocab,
            chunks,
            request.theta,
            request.eps,
            OPERATOR=request.operator,
            EXPERTS=experts,
            CHUNK=chunk,
            WIDTH=width,
            BLOCK=_BLOCK,
            KEEP=keep,
            num_warps=8,
            enable_fp_fusion=False,
        )
        _select_kernel[(batch,)](
            rows,
            strides,
            partials,
            places,
            whole,
            whole_places,
            maxima,
            scratch,
            request.role,
            request.targets,
            request.targets.stride(0),
            request.targets.shape[1],
            readout.finite.view(torch.int8),
            readout.entropies,
            readout.agreed.view(torch.int8),
            readout.merged_entropy,
            log_z,
            readout.best,
            readout.ids,
            readout.probs,
            readout.mass,
            readout.role_mass,
            readout.target_logprobs,
            readout.agent_target_logprobs,
            vocab,
            chunks,
            request.theta,
            request.eps,
            OPERATOR=request.operator,
            EXPERTS=experts,
            WIDTH=width,
            BLOCK=_BLOCK,
            BLOCKS=blocks,
            BLOCKS_WIDTH=blocks_width,
            TOP=top,
            TOP_WIDTH=top_width,
            BEST_BLOCKS=min(top, blocks),
            BEST_WIDTH=min(top_width, blocks_width),
            LOG_IDS=max(vocab, blocks).bit_length(),
            ROLE=request.role.shape[0],
            ROLE_WIDTH=triton.next_power_of_2(max(2, request.role.shape[0])),
            TARGETS=_TARGETS,
            num_warps=8,
            enable_fp_fusion=False,
        )
    if not keep:
        return readout
    usable = readout.finite.all(1, keepdim=True)
    merged = torch.where(usable, merged, 0.0)
    if not fused:
        ids, probs, mass = torch_ref.packet(merged, log_z[:, None], request.top)
        readout = replace(
            readout,
            ids=torch.where(usable, ids, 0),
            probs=torch.where(usable, probs, 0.0),
            mass=torch.where(usable[:, 0], mass, 0.0),
        )
    return replace(readout, merged=merged if request.keep_merged else None)


@triton.jit
def _is_finite(x):
    # The bound is the largest float32; NaN is not below it either.
    return tl.abs(x) <= 3.4028234663852886e38


@triton.jit
def _partition(x, inside, largest):
    """``(sum e, sum d e)`` with ``d = x - largest`` and ``e = exp(d)``, float32."""
    # exp(-120) is 0, and what lies further below could not even be subtracted.
    d = tl.maximum(x - largest, -120.0)
    e = tl.where(inside, tl.exp(d), 0.0)
    return tl.sum(e), tl.sum(e * d)


@triton.jit
def _shifted(total, weighted, old, new):
    """A partial ``(sum e, sum d e)`` relative to ``old``, made relative to ``new >= old``."""
    shift = old - new
    scale = tl.exp(shift)
    return scale * total, scale * (weighted + shift * total)


@triton.jit
def _whole(partials, chunks, WIDTH: tl.constexpr):
    """Adds up the partials ``(max, sum e, sum d e)`` of a row's chunks: the same of the row."""
    at = tl.arange(0, WIDTH)
    inside = at < chunks
    # A chunk that is not there has the lowest maximum and weighs nothing.
    top = tl.load(partials + at, mask=inside, other=-1e300)
    total = tl.load(partials + chunks + at, mask=inside, other=0.0)
    weighted = tl.load(partials + 2 * chunks + at, mask=inside, other=0.0)
    largest = tl.max(top)
    total, weighted = _shifted(total, weighted, tl.where(inside, top, largest), largest)
    return largest, tl.sum(total), tl.sum(weighted)


@triton.jit
def _mean(partials, vocab, chunks, WIDTH: tl.constexpr):
    at = tl.arange(0, WIDTH)
    return tl.sum(tl.load(partials + 3 * chunks + at, mask=at < chunks, other=0.0)) / vocab


@triton.jit
def _stats_kernel(
    rows,
    strides,
    partials,
    places,
    vocab,
    chunks,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Partials of a chunk of one expert's row.

    ``partials`` f64 [B, K, 5, chunks]: max, sum e, sum d e, sum of the logits, min; ``places`` i32
    [B, K, 2, chunks]: first place of the maximum, whether all is finite.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    expert = tl.program_id(2)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab
    x = tl.zeros([CHUNK], dtype=tl.float32)
    for e in tl.static_range(EXPERTS):
        if expert == e:
            x = tl.load(rows[e] + row * strides[e] + ids, mask=inside, other=0.0).to(tl.float32)
    finite = _is_finite(x)
    x = tl.where(finite, x, 0.0)
    largest = tl.max(tl.where(inside, x, float("-inf")))
    total, weighted = _partition(x, inside, largest)
    out = partials + (row * EXPERTS + expert) * 5 * chunks + chunk
    tl.store(out, largest.to(tl.float64))
    tl.store(out + chunks, total.to(tl.float64))
    tl.store(out + 2 * chunks, weighted.to(tl.float64))
    tl.store(out + 3 * chunks, tl.sum(x.to(tl.float64)))
    tl.store(out + 4 * chunks, tl.min(tl.where(inside, x, float("inf"))).to(tl.float64))
    out = places + (row * EXPERTS + expert) * 2 * chunks + chunk
    tl.store(out, tl.min(tl.where(inside & (x == largest), ids, vocab)))
    tl.store(out + chunks, tl.min(finite.to(tl.int32)))


@triton.jit
def _merged(
    rows,
    strides,
    row,
    ids,
    inside,
    partials,
    vocab,
    chunks,
    theta,
    eps,
    OPERATOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Merged values, float32, at ``ids`` of a row; what is not ``inside`` merges logits of 0."""
    first = tl.zeros(ids.shape, dtype=tl.float64)
    second = tl.zeros(ids.shape, dtype=tl.float64)
    above = tl.zeros(ids.shape, dtype=tl.int32)
    below = tl.zeros(ids.shape, dtype=tl.int32)
    out = tl.zeros(ids.shape, dtype=tl.float32)
    for e in tl.static_range(EXPERTS):
        own = partials + (row * EXPERTS + e) * 5 * chunks
        mean = _mean(own, vocab, chunks, WIDTH)
        z = tl.load(rows[e] + row * strides[e] + ids, mask=inside, other=0.0)
        v = (z.to(tl.float32).to(tl.float64) - mean).to(tl.float32)
        if EXPERTS == 1:
            out = v
        elif OPERATOR == "ties":
            kept = tl.where(tl.abs(v) < theta, 0.0, v)
            above += (kept > 0).to(tl.int32)
            below += (kept < 0).to(tl.int32)
            first += tl.where(kept > 0, kept, 0.0).to(tl.float64)
            second += tl.where(kept < 0, kept, 0.0).to(tl.float64)
        elif OPERATOR == "mean":
            first += v.to(tl.float64)
        else:
            largest, total, _ = _whole(own, chunks, WIDTH)
            # What the largest value lost to centring stands for the mean, as in the reference.
            offset = largest - (largest - mean).to(tl.float32).to(tl.float64)
            term = v.to(tl.float64) + (offset - (largest + tl.log(total)))
            # `first` is the largest term so far, `out` the sum of exponentials relative to it.
            if e == 0:
                first = term
                out += 1.0
            else:
                gap = (term - first).to(tl.float32)
                drop = tl.exp(tl.maximum(-tl.abs(gap), -120.0))
                out = tl.where(gap > 0, out * drop + 1.0, out + drop)
                first = tl.maximum(first, term)
    if EXPERTS > 1:
        if OPERATOR == "ties":
            count = tl.maximum(tl.maximum(above, below), 1).to(tl.float64) + eps
            agreed = (tl.where(above > below, first, second) / count).to(tl.float32)
            out = tl.where(above == below, 0.0, agreed)
        elif OPERATOR == "mean":
            out = (first / EXPERTS).to(tl.float32)
        else:
            out = (first + tl.log(out / EXPERTS).to(tl.float64)).to(tl.float32)
    return out


@triton.jit
def _merge_kernel(
    rows,
    strides,
    partials,
    whole,
    whole_places,
    maxima,
    merged,
    vocab,
    chunks,
    theta,
    eps,
    OPERATOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Partials of a chunk of the merged row.

    ``whole`` f64 [B, 3, chunks]: max, sum e, sum d e; ``whole_places`` i32 [B, 2, chunks]: as of an
    expert; ``maxima`` f32 [B, chunks * CHUNK / BLOCK], -inf for blocks beyond the vocabulary.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = ids < vocab
    v = _merged(
        rows, strides, row, ids, inside, partials, vocab, chunks, theta, eps,
        OPERATOR, EXPERTS, WIDTH,
    )  # fmt: skip
    if KEEP:
        tl.store(merged + row * vocab + ids, v, mask=inside)
    finite = _is_finite(v)
    v = tl.where(inside, tl.where(finite, v, 0.0), float("-inf"))
    blocks: tl.constexpr = CHUNK // BLOCK
    at = (row * chunks + chunk) * blocks + tl.arange(0, blocks)
    tl.store(maxima + at, tl.max(tl.reshape(v, [blocks, BLOCK]), axis=1))
    largest = tl.max(v)
    total, weighted = _partition(v, inside, largest)
    out = whole_places + row * 2 * chunks + chunk
    tl.store(out, tl.min(tl.where(inside & (v == largest), ids, vocab)))
    tl.store(out + chunks, tl.min((finite | ~inside).to(tl.int32)))
    out = whole + row * 3 * chunks + chunk
    tl.store(out, largest.to(tl.float64))
    tl.store(out + chunks, total.to(tl.float64))
    tl.store(out + 2 * chunks, weighted.to(tl.float64))


@triton.jit
def _keys(values, ids, inside, LOG_IDS: tl.constexpr):
    """int64 keys that order as (value descending, id ascending) does; -1 where not ``inside``.

    The order of :func:`torch_ref.order_keys` in 32 + LOG_IDS bits without a sign. LOG_IDS <= 31.
    """
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    keys = (bits.to(tl.int64) + 0x80000000) << LOG_IDS
    keys = keys | ((1 << LOG_IDS) - 1 - ids.to(tl.int64))
    return tl.where(inside, keys, -1)


@triton.jit
def _ids_of(keys, LOG_IDS: tl.constexpr):
    return (1 << LOG_IDS) - 1 - (keys & ((1 << LOG_IDS) - 1))


@triton.jit
def _values_of(keys, LOG_IDS: tl.constexpr):
    bits = ((keys >> LOG_IDS) - 0x80000000).to(tl.int32)
    bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _largest(keys, count, scratch, LOG_IDS: tl.constexpr, WIDTH: tl.constexpr):
    """The ``count`` largest of distinct keys, in no particular order, then -1 up to WIDTH.

    There must be that many. Bisects for the smallest of them, bit by bit, and packs them through
    ``scratch``, int64 [WIDTH]. A sorting network of as many keys takes the compiler half a minute.
    """
    least = tl.full([], 0, tl.int64)
    bit = tl.full([], 1 << (31 + LOG_IDS), tl.int64)
    for _ in range(32 + LOG_IDS):
        trial = least | bit
        enough = tl.sum((keys >= trial).to(tl.int32)) >= count
        least = tl.where(enough, trial, least)
        bit = bit >> 1
    chosen = keys >= least
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    # What an earlier call left there has been read by every thread.
    tl.debug_barrier()
    tl.store(scratch + place, keys, mask=chosen & (place < WIDTH))
    tl.debug_barrier()
    at = tl.arange(0, WIDTH)
    return tl.load(scratch + at, mask=at < count, other=-1)


@triton.jit
def _log_z(largest, total):
    return largest + tl.log(total)


@triton.jit
def _entropy(total, weighted):
    return tl.maximum(tl.log(total) - weighted / total, 0.0)


@triton.jit
def _in_range(partials, vocab, chunks, WIDTH: tl.constexpr):
    """1 where an expert's centred logits are all finite: rounding is monotone, so the ends tell."""
    mean = _mean(partials, vocab, chunks, WIDTH)
    at = tl.arange(0, WIDTH)
    most = tl.max(tl.load(partials + at, mask=at < chunks, other=-1e300))
    least = tl.min(tl.load(partials + 4 * chunks + at, mask=at < chunks, other=1e300))
    most = _is_finite((most - mean).to(tl.float32))
    return (most & _is_finite((least - mean).to(tl.float32))).to(tl.int32)


@triton.jit
def _best(partials, places, vocab, chunks, WIDTH: tl.constexpr):
    """The first place of the largest logit, an expert's or merged."""
    at = tl.arange(0, WIDTH)
    top = tl.load(partials + at, mask=at < chunks, other=-1e300)
    place = tl.load(places + at, mask=at < chunks, other=0)
    return tl.min(tl.where((at < chunks) & (top == tl.max(top)), place, vocab))


@triton.jit
def _write_statistics(
    row,
    partials,
    places,
    whole_places,
    out_finite,
    out_entropies,
    out_agreed,
    vocab,
    chunks,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Flags and entropies of the experts; returns whether the row has not failed."""
    at = tl.arange(0, WIDTH)
    raw = tl.full([], 1, tl.int32)
    agreed = raw
    all_in_range = raw
    first = _best(partials + row * EXPERTS * 5 * chunks, places + row * EXPERTS * 2 * chunks,
                  vocab, chunks, WIDTH)  # fmt: skip
    for e in tl.static_range(EXPERTS):
        own = partials + (row * EXPERTS + e) * 5 * chunks
        places_own = places + (row * EXPERTS + e) * 2 * chunks
        finite = tl.load(places_own + chunks + at, mask=at < chunks, other=1)
        raw = tl.minimum(raw, tl.min(finite))
        all_in_range = tl.minimum(all_in_range, _in_range(own, vocab, chunks, WIDTH))
        same = _best(own, places_own, vocab, chunks, WIDTH) == first
        agreed = tl.minimum(agreed, same.to(tl.int32))
    finite = whole_places + (row * 2 + 1) * chunks
    merged = tl.min(tl.load(finite + at, mask=at < chunks, other=1))
    centred = tl.minimum(raw, all_in_range)
    usable = tl.minimum(centred, merged) > 0
    tl.store(out_agreed + row, tl.where(usable, agreed, 0).to(tl.int8))
    for e in tl.static_range(EXPERTS):
        own = partials + (row * EXPERTS + e) * 5 * chunks
        places_own = places + (row * EXPERTS + e) * 2 * chunks
        finite = tl.min(tl.load(places_own + chunks + at, mask=at < chunks, other=1))
        # Centred rows count only where all raw ones are finite, and the merged one after them.
        finite = tl.where(raw > 0, _in_range(own, vocab, chunks, WIDTH), finite)
        finite = tl.where(centred > 0, merged, finite)
        tl.store(out_finite + row * EXPERTS + e, finite.to(tl.int8))
        _, total, weighted = _whole(own, chunks, WIDTH)
        entropy = tl.where(usable, _entropy(total, weighted), 0.0)
        tl.store(out_entropies + row * EXPERTS + e, entropy)
    return usable


@triton.jit
def _role_mass(
    rows,
    strides,
    row,
    log_z,
    role,
    partials,
    vocab,
    chunks,
    theta,
    eps,
    OPERATOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROLE: tl.constexpr,
    ROLE_WIDTH: tl.constexpr,
):
    at = tl.arange(0, ROLE_WIDTH)
    ids = tl.load(role + at, mask=at < ROLE, other=-1)
    # A repeated id counts where it stands first.
    repeated = tl.zeros([ROLE_WIDTH], dtype=tl.int32)
    for i in range(ROLE):
        repeated += ((at > i) & (ids == tl.load(role + i))).to(tl.int32)
    inside = (ids >= 0) & (ids < vocab)
    v = _merged(
        rows, strides, row, ids, inside, partials, vocab, chunks, theta, eps,
        OPERATOR, EXPERTS, WIDTH,
    )  # fmt: skip
    weights = tl.exp(v.to(tl.float64) - log_z)
    return tl.sum(tl.where(inside & (repeated == 0), weights, 0.0))


@triton.jit
def _write_targets(
    rows,
    strides,
    row,
    usable,
    log_z,
    targets,
    targets_stride,
    targets_count,
    partials,
    out_targets,
    out_agent_targets,
    vocab,
    chunks,
    theta,
    eps,
    OPERATOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    TARGETS: tl.constexpr,
):
    for start in range(0, targets_count, TARGETS):
        at = start + tl.arange(0, TARGETS)
        ids = tl.load(targets + row * targets_stride + at, mask=at < targets_count, other=-1)
        inside = (ids >= 0) & (ids < vocab)
        v = _merged(
            rows, strides, row, ids, inside, partials, vocab, chunks, theta, eps,
            OPERATOR, EXPERTS, WIDTH,
        )  # fmt: skip
        logs = tl.where(inside, v.to(tl.float64) - log_z, float("-inf"))
        logs = tl.where(usable, logs, 0.0)
        tl.store(out_targets + row * targets_count + at, logs, mask=at < targets_count)
        for e in tl.static_range(EXPERTS):
            own = partials + (row * EXPERTS + e) * 5 * chunks
            largest, total, _ = _whole(own, chunks, WIDTH)
            z = tl.load(rows[e] + row * strides[e] + ids, mask=inside, other=0.0)
            logs = z.to(tl.float32).to(tl.float64) - _log_z(largest, total)
            logs = tl.where(usable, tl.where(inside, logs, float("-inf")), 0.0)
            out = out_agent_targets + (row * EXPERTS + e) * targets_count
            tl.store(out + at, logs, mask=at < targets_count)


@triton.jit
def _select_kernel(
    rows,
    strides,
    partials,
    places,
    whole,
    whole_places,
    maxima,
    scratch,
    role,
    targets,
    targets_stride,
    targets_count,
    out_finite,
    out_entropies,
    out_agreed,
    out_merged_entropy,
    out_log_z,
    out_best,
    out_ids,
    out_probs,
    out_mass,
    out_role_mass,
    out_targets,
    out_agent_targets,
    vocab,
    chunks,
    theta,
    eps,
    OPERATOR: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_WIDTH: tl.constexpr,
    TOP: tl.constexpr,
    TOP_WIDTH: tl.constexpr,
    BEST_BLOCKS: tl.constexpr,
    BEST_WIDTH: tl.constexpr,
    LOG_IDS: tl.constexpr,
    ROLE: tl.constexpr,
    ROLE_WIDTH: tl.constexpr,
    TARGETS: tl.constexpr,
):
    """One row's readout, in the fields of :class:`Readout`."""
    row = tl.program_id(0).to(tl.int64)
    usable = _write_statistics(
        row, partials, places, whole_places, out_finite, out_entropies, out_agreed, vocab, chunks,
        EXPERTS, WIDTH,
    )  # fmt: skip
    largest, total, weighted = _whole(whole + row * 3 * chunks, chunks, WIDTH)
    log_z = _log_z(largest, total)
    tl.store(out_merged_entropy + row, tl.where(usable, _entropy(total, weighted), 0.0))
    tl.store(out_log_z + row, log_z)
    best = _best(whole + row * 3 * chunks, whole_places + row * 2 * chunks, vocab, chunks, WIDTH)
    tl.store(out_best + row, tl.where(usable, best, 0))

    mass = tl.full([], 0.0, tl.float64)
    if TOP > 0:
        scratch += row * TOP_WIDTH
        at = tl.arange(0, BLOCKS_WIDTH)
        tops = tl.load(maxima + row * BLOCKS + at, mask=at < BLOCKS, other=0.0)
        keys = _keys(tops, at, at < BLOCKS, LOG_IDS)
        keys = _largest(keys, BEST_BLOCKS, scratch, LOG_IDS, BEST_WIDTH)
        ids = _ids_of(keys, LOG_IDS)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        ids = tl.reshape(tl.where(keys[:, None] >= 0, ids, vocab), [BEST_WIDTH * BLOCK])
        inside = ids < vocab
        v = _merged(
            rows, strides, row, ids, inside, partials, vocab, chunks, theta, eps,
            OPERATOR, EXPERTS, WIDTH,
        )  # fmt: skip
        keys = _largest(_keys(v, ids, inside, LOG_IDS), TOP, scratch, LOG_IDS, TOP_WIDTH)
        present = keys >= 0
        ids = _ids_of(keys, LOG_IDS)
        weights = tl.exp(_values_of(keys, LOG_IDS).to(tl.float64) - log_z)
        weights = tl.where(present, weights, 0.0)
        mass = tl.sum(weights)
        probs = (weights / mass).to(tl.float32)
        # Distinct logits may round to one probability; the order is that of the probabilities.
        keys = _keys(probs, ids, present, LOG_IDS)
        rank = tl.sum((keys[None, :] > keys[:, None]).to(tl.int32), axis=1)
        out = row * TOP + rank
        tl.store(out_ids + out, tl.where(usable, ids, 0).to(tl.int32), mask=present)
        tl.store(out_probs + out, tl.where(usable, probs, 0.0), mask=present)
    tl.store(out_mass + row, tl.where(usable, tl.minimum(mass, 1.0), 0.0).to(tl.float32))

    role_mass = tl.full([], 0.0, tl.float64)
    if ROLE > 0:
        role_mass = _role_mass(
            rows, strides, row, log_z, role, partials, vocab, chunks, theta, eps,
            OPERATOR, EXPERTS, WIDTH, ROLE, ROLE_WIDTH,
        )  # fmt: skip
        role_mass = tl.where(usable, tl.minimum(role_mass, 1.0), 0.0)
    tl.store(out_role_mass + row, role_mass.to(tl.float32))
    _write_targets(
        rows, strides, row, usable, log_z, targets, targets_stride, targets_count, partials,
        out_targets, out_agent_targets, vocab, chunks, theta, eps,
        OPERATOR, EXPERTS, WIDTH, TARGETS,
    )  # fmt: skip
