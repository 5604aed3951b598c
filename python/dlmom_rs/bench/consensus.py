"""Consensus on CPU tensors, against the paper's Appendix C in torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import cycle

import torch
from torch import Tensor

from dlmom_rs import _core

from .timing import Entry, in_turns

#: The vocabulary of Qwen2.5.
VOCAB = 151_936
K = 50
THETA = 0.1
SPEC = json.dumps({"method": "ties", "theta": THETA})


def logits(experts: int, rows: int, dtype: torch.dtype, seed: int, vocab: int = VOCAB) -> Tensor:
    """Logits [experts, rows, vocab] like those of language models: what the experts share, noise
    of each, and a few tokens far above."""
    draws = torch.Generator().manual_seed(seed)
    shared = torch.randn(rows, vocab, generator=draws) * 2
    peaks = torch.randint(vocab, (rows, 24), generator=draws)
    shared.scatter_add_(1, peaks, 6 + 6 * torch.rand(rows, 24, generator=draws))
    own = torch.randn(experts, rows, vocab, generator=draws)
    return (shared + own).to(dtype)


def appendix_c(stacked: Tensor, theta: float = THETA, k: int = K) -> tuple[Tensor, ...]:
    """What Appendix C of the paper computes of logits [experts, rows, vocab], operation by
    operation: entropies, TIES, softmax, top-k."""
    probs = torch.softmax(stacked, -1)
    entropy = -(probs * torch.log(probs + 1e-9)).sum(-1) / math.log(stacked.shape[-1])
    centred = stacked - stacked.mean(-1, keepdim=True)
    trimmed = torch.where(centred.abs() < theta, torch.zeros_like(centred), centred)
    elected = torch.sign(torch.sign(trimmed).sum(0))
    agrees = torch.sign(trimmed) == elected
    merged = (trimmed * agrees).sum(0) / (agrees.sum(0) + 1e-9)
    mixed = torch.softmax(merged, -1)
    top = torch.topk(mixed, k, -1)
    return entropy, top.indices, top.values / top.values.sum(-1, keepdim=True)


def entries(rounds: int, threads: int) -> Iterator[Entry]:
    """f32 and bf16, 1 to 3 experts, 1 and 8 rows; inputs rotate, so that none stays in a cache."""
    torch.set_num_threads(threads)
    fused = _core.Kernel(threads)
    for dtype in (torch.float32, torch.bfloat16):
        for experts in (2, 3):
            for rows in (1, 8):
                inputs = [logits(experts, rows, dtype, seed) for seed in range(4)]
                theirs, ours = cycle(inputs), cycle([list(x.unbind(0)) for x in inputs])

                def paper(turns: cycle[Tensor] = theirs) -> object:
                    return appendix_c(next(turns))

                def kernel(turns: cycle[list[Tensor]] = ours) -> object:
                    return fused.read(next(turns), K, SPEC)

                found = in_turns({"ours": kernel, "baseline": paper}, rounds=rounds)
                yield Entry(
                    f"consensus K={experts} B={rows} {str(dtype).removeprefix('torch.')}",
                    1e3 * found["ours"],
                    1e3 * found["baseline"],
                    "ms",
                    "Appendix C in torch",
                    facts={"vocab": VOCAB, "threads": threads, "tier": fused.tier},
                )
