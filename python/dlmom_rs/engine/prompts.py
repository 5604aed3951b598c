"""Prompts that were forwarded before: their keys and values are copied, not computed again.

The cells and seeds of a run ask the same items, prompts begin with the same instructions, and
agents of one model may be asked the same. A span depends on nothing but what its lane was fed, so
a copy has the bits that a forward would give. Only lanes that were fed whole token spans and
nothing else take part: what was fed, span by span, is the key.
"""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .packets import Entries, Values

#: What a lane was fed since it was opened: the ids of each span, little-endian i64.
Fed = tuple[bytes, ...]
#: Keys and values by layer, [heads, positions, head_dim] each.
Pairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Kept:
    """What a span left: its keys and values, its last logits [head rows], and their bytes."""

    pairs: Pairs
    logits: Tensor
    nbytes: int


class Prompts:
    """Spans of one model, the latest used ones in at most ``budget`` bytes."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        #: Positions that were copied so far.
        self.copied = 0
        self._kept: OrderedDict[Fed, Kept] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def find(self, fed: Fed) -> Kept | None:
        """The last span of a lane that was fed this, if it is kept."""
        kept = self._kept.get(fed)
        if kept is not None:
            self._kept.move_to_end(fed)
        return kept

    def keep(self, fed: Fed, pairs: Pairs, logits: Tensor) -> None:
        """Keep copies of a span's keys, values and logits, if they fit into the budget at all."""
        nbytes = logits.nbytes + sum(keys.nbytes + values.nbytes for keys, values in pairs)
        if nbytes > self.budget or fed in self._kept:
            return
        while self.nbytes + nbytes > self.budget:
            _, oldest = self._kept.popitem(last=False)
            self.nbytes -= oldest.nbytes
        copies = [(keys.clone(), values.clone()) for keys, values in pairs]
        self._kept[fed] = Kept(copies, logits.clone(), nbytes)
        self.nbytes += nbytes

    def stop(self) -> bool:
        """Forget everything and keep nothing from now on; whether there was anything."""
        held = bool(self._kept)
        self._kept.clear()
        self.nbytes = self.budget = 0
        return held


def tokens(feed: Entries | Values) -> bytes | None:
    """The ids of a feed that is whole tokens, little-endian i64; None for anything else."""
    if isinstance(feed, Values) or feed.ids.shape[1] != 1 or not bool((feed.probs == 1.0).all()):
        return None
    return np.ascontiguousarray(feed.ids).tobytes()
