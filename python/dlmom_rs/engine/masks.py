"""Attention masks of the row-slot cache, and how a family wants to be given them.

Facts from the modelling code of transformers 5: eager attention *adds* the mask to the scores, so
it wants a float mask of 0 and ``finfo.min``, while sdpa takes bool; and a single 4-D tensor is used
for sliding-window layers too, so families with ``layer_types`` must be given one mask per type.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

Mask = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class MaskPlan:
    """How the masks of one model are made.

    ``windows`` maps each layer type to its sliding window in positions, None for full attention.
    ``per_type`` says whether the model takes a dict by layer type or the one tensor of its only
    type. ``additive`` is True for eager attention.
    """

    windows: dict[str, int | None]
    per_type: bool
    additive: bool
    dtype: torch.dtype

    def build(self, queries: Tensor, keys: Tensor) -> Mask:
        """Masks for query positions ``queries`` [S, 1, n, 1] and key positions ``keys`` [L]."""
        causal = keys <= queries
        masks = {name: self._one(causal, queries, keys, w) for name, w in self.windows.items()}
        if self.per_type:
            return masks
        return next(iter(masks.values()))

    def _one(self, causal: Tensor, queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
        visible = causal if window is None else causal & (keys > queries - window)
        if not self.additive:
            return visible
        mask = torch.zeros(visible.shape, dtype=self.dtype, device=visible.device)
        return mask.masked_fill_(~visible, torch.finfo(self.dtype).min)
