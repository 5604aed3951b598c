"""Attention whose sums do not depend on how far the shared batch can see.

A step of the row-slot cache attends over as many positions as its longest row needs, so a short
row sees masked positions behind its own. They weigh exactly 0, but a library's kernel adds the
others in an order that depends on how many there are, and so a row's last bits would depend on its
mates. Here every row's keys are taken in their own order, by the core's kernel, which leaves out
what a row does not see. What the core does not take is left to torch: keys in
blocks of ``BUCKET``, each reduced on its own, added along a tree in which blocks that are not there
count as zeros.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from dlmom_rs import _core

from .cache import BUCKET
from .embed import tree_sum

#: The name under which transformers knows it.
BLOCKS = "blocks"


@cache
def _kernel(threads: int) -> _core.Kernel:
    return _core.Kernel(threads)


#: Types that the core reads.
READ = (torch.float32, torch.bfloat16, torch.float16)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax attention of one query per row, accumulated in f32.

    Arguments and result as of :func:`blocked_attention`, which does what the core does not: rows
    that see positions with gaps between them, tensors that are not on the CPU, and mixed types.
    """
    ours = q.device.type == "cpu" and q.dtype in READ and k.dtype == v.dtype == q.dtype
    if ours and k.stride(3) == v.stride(3) == q.stride(3) == 1:
        out = torch.empty(q.shape[0], q.shape[1], v.shape[3], dtype=torch.float32)
        if _kernel(torch.get_num_threads()).attend(q, k, v, visible, out, scale):
            return out[:, None].to(q.dtype)
    return blocked_attention(q, k, v, visible, scale)


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Softmax attention of one query per row over whole blocks of keys, accumulated in f32.

    ``q`` [rows, heads, 1, d]; ``k`` [rows, kv_heads, n, d] and ``v`` [rows, kv_heads, n, dv] with n
    a multiple of ``BUCKET``; ``visible`` bool, [rows, 1, 1, n]. Returns [rows, 1, heads, dv] in
    q's dtype. A row must see at least one key.
    """
    rows, heads, _, d = q.shape
    kv_heads, n, dv = k.shape[1], k.shape[2], v.shape[3]
    groups, blocks = heads // kv_heads, n // BUCKET
    batch = rows * kv_heads * blocks
    keys = k.reshape(batch, BUCKET, d).float()
    values = v.reshape(batch, BUCKET, dv).float()
    queries = (q.float() * scale).view(rows * kv_heads, 1, groups, d)
    queries = queries.expand(-1, blocks, -1, -1).reshape(batch, groups, d)
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(rows, kv_heads, blocks, groups, BUCKET)
    scores.masked_fill_(~visible.reshape(rows, 1, blocks, 1, BUCKET), -torch.inf)
    weights = scores.sub_(scores.amax((2, 4), keepdim=True)).exp_()
    # Blocks first: the halves of the tree are then contiguous.
    total = tree_sum(weights.sum(-1).permute(2, 0, 1, 3).contiguous())
    mixed = torch.bmm(weights.view(batch, groups, BUCKET), values)
    mixed = mixed.view(rows, kv_heads, blocks, groups, dv).permute(2, 0, 1, 3, 4).contiguous()
    out = tree_sum(mixed) / total[..., None]
    return out.view(rows, 1, heads, dv).to(q.dtype)


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: blocks for steps, ``sdpa`` for spans and everything unusual."""
    plain = (
        query.shape[2] == 1
        and key.shape[2] % BUCKET == 0
        and attention_mask is not None
        and attention_mask.dtype == torch.bool
        and attention_mask.shape[1:3] == (1, 1)
        and kwargs.get("position_bias") is None
    )
    if not plain:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
    assert attention_mask is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attention(query, key, value, attention_mask, scale), None


def register() -> None:
    """Make ``attn_implementation="blocks"`` known to transformers; harmless when repeated."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(BLOCKS, _forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(BLOCKS, sdpa_mask)
