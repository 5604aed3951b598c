"""Belief packets to input embeddings: ``sum_i p_i E[id_i]``.

The idea is that of CIPHER (arXiv 2310.06272) and Soft Thinking (arXiv 2505.15778). What is added
here is an order of summation that depends on nothing but the entry's index, so that a row's bits
are the same whatever its batch mates and however far ``k`` is padded.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .device import there

#: Entries summed by one pairwise tree. A constant of the arithmetic: changing it changes bits.
TREE = 1024
#: Bound on the f32 elements alive in one block, so that a whole-vocabulary packet fits in memory.
BLOCK_ELEMENTS = 1 << 24


def one_hot_rows(probs: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Rows of ``probs`` [n, k] whose first entry is exactly 1 and whose others are exactly 0."""
    rows: NDArray[np.bool_] = probs[:, 0] == 1.0
    if probs.shape[1] > 1:
        rows &= ~probs[:, 1:].any(axis=1)
    return rows


def tree_sum(terms: Tensor) -> Tensor:
    """Sum ``terms`` [k, ...] over k, halving pairwise, in place; returns [...].

    Term i is added to term i + half, with half the largest power of two below what is left: the
    order of a tree over the next power of two with zeros for the terms that are not there. So zero
    padding changes nothing, and as only elementwise additions are used, no library's choice of
    reduction order enters.
    """
    count = terms.shape[0]
    while count > 1:
        half = 1 << (count - 1).bit_length() - 1
        terms[: count - half] += terms[half:count]
        count = half
    return terms[0]


def mixture(module: nn.Module, ids: Tensor, probs: Tensor) -> Tensor:
    """Mix embeddings: ``ids`` [n, k] int64, ``probs`` [n, k] f32 -> [n, h] f32.

    The table is read through the module, never its ``weight``: Gemma scales inside it.
    """
    blocks: list[Tensor] = []
    hidden = _table(module).shape[-1]
    rows_per_block = max(1, BLOCK_ELEMENTS // (min(ids.shape[1], TREE) * hidden))
    # Entries first: the halves of the tree are then contiguous.
    ids, weights = ids.t().contiguous(), probs.t().contiguous()[..., None]
    for start in range(0, ids.shape[1], rows_per_block):
        rows = slice(start, start + rows_per_block)
        total: Tensor | None = None
        for left in range(0, ids.shape[0], TREE):
            entries = slice(left, left + TREE)
            part = tree_sum(module(ids[entries, rows]).float() * weights[entries, rows])
            total = part if total is None else total + part
        assert total is not None
        # A sum of negative zeros is -0.0 alone but 0.0 once padded; adding 0.0 makes both 0.0.
        blocks.append(total + 0.0)
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def embed(
    module: nn.Module,
    ids: NDArray[np.int64],
    probs: NDArray[np.float32],
    device: torch.device,
) -> Tensor:
    """Input embeddings of packets: ``ids``, ``probs`` [n, k] on the host -> [n, h], module's dtype.

    A packet whose first probability is 1 and whose others are 0 gives exactly ``E[id]``. Others are
    accumulated in f32 and rounded to the model's dtype once.
    """
    table_ids = there(torch.from_numpy(ids), device)
    # What sampling and printing feed most: rows that are all mixtures, and tokens alone.
    certain = probs[:, 0] == 1.0
    if not certain.any():
        weights = there(torch.from_numpy(np.ascontiguousarray(probs, dtype=np.float32)), device)
        return mixture(module, table_ids, weights).to(_table(module).dtype)
    out: Tensor = module(table_ids[:, 0])
    soft = np.flatnonzero(~one_hot_rows(probs))
    if soft.size == 0:
        return out
    weights = there(torch.from_numpy(np.ascontiguousarray(probs[soft], dtype=np.float32)), device)
    rows = there(torch.from_numpy(soft), device)
    out = out.clone()
    out[rows] = mixture(module, table_ids[rows], weights).to(out.dtype)
    return out


def embed_in_place(module: nn.Module, ids: Tensor, probs: Tensor) -> Tensor:
    """:func:`embed` of packets that are where the table is, with no decision of the host.

    ``ids`` [n, k] int64, ``probs`` [n, k] f32 -> [n, h] in the module's dtype, with the same bits.
    """
    tokens: Tensor = module(ids[:, 0])
    certain = (probs[:, :1] == 1.0) & (probs[:, 1:] == 0.0).all(dim=1, keepdim=True)
    return torch.where(certain, tokens, mixture(module, ids, probs).to(tokens.dtype))


def _table(module: nn.Module) -> Tensor:
    """The table behind an embedding module: for its width and dtype, never for its values."""
    table = module.weight
    assert isinstance(table, Tensor)
    return table


def embed_dense(module: nn.Module, probs: NDArray[np.float32], device: torch.device) -> Tensor:
    """Input embeddings of whole-vocabulary distributions: [n, V] f32, id order -> [n, h].

    Row by row, so that a row's bits do not depend on how many there are.
    """
    ids = torch.arange(probs.shape[1], dtype=torch.int64, device=device)[None]
    rows = there(torch.from_numpy(np.ascontiguousarray(probs, dtype=np.float32)), device)
    return torch.cat([mixture(module, ids, row[None]) for row in rows]).to(_table(module).dtype)
