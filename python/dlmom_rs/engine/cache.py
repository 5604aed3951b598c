"""The row-slot cache: one preallocated [slots, heads, length, size] pair of tensors per layer.

Every row has its own position. A step writes one key and value per row at that row's position and
attends over the first ``bucket`` positions under a mask; a span (a prompt, a transcript) writes one
slot at its exact length. Rows of different lengths therefore share one forward, and a row's result
does not depend on its mates.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

#: Visible lengths are multiples of this. Even, because odd lengths change float32 results, and a
#: multiple of the vector width, so that masked tails are whole vectors.
BUCKET = 64
#: Rows of a forward come in multiples of this where bits must not depend on them: matrix kernels
#: treat full blocks of eight rows alike, and the remainder differently.
ROW_BLOCK = 8
#: The least number of rows in float32. MKL multiplies 8 rows by a transposed weight of 192 or more
#: inputs in another order than 16 and more rows, which agree with each other (measured: 16 to 96).
MIN_ROWS_F32 = 16


def padded_rows(slots: int, dtype: torch.dtype) -> int:
    """Rows to run for ``slots`` wanted, so that a row's bits do not depend on their number."""
    least = MIN_ROWS_F32 if dtype == torch.float32 else ROW_BLOCK
    return max(least, round_up(slots, ROW_BLOCK))


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


class SlotPlan:
    """What the layers of one cache share: the sizes, and what the forward in progress writes where.

    The last position of the capacity is never visible to a query: rows that do not take part in a
    step write there.
    """

    def __init__(self, slots: int, capacity: int, device: torch.device) -> None:
        self.slots = slots
        self.capacity = capacity
        self.device = device
        self._starts: dict[int, Tensor] = {}
        self._targets: dict[int, Tensor] = {}
        self._writes = torch.zeros(slots, 1, dtype=torch.int64, device=device)
        self.bucket = BUCKET
        #: Rows of the step.
        self.width = slots
        self.span_row: int | None = None
        self.span_start = 0

    @property
    def scratch(self) -> int:
        """The position that idle rows write to."""
        return self.capacity - 1

    def write_at(self, positions: Tensor) -> None:
        """Set where the rows of a step find the positions to write to: [slots] int64."""
        self._writes = positions[:, None]
        self._targets.clear()

    def targets(self, heads: int) -> Tensor:
        """The rows of a store seen as [slots * heads * capacity, size] that the step writes.

        In the order of states [width, heads, 1, size]. ``index_copy_`` on that flat view is used
        because ``scatter_`` on a half-precision CPU tensor copies the whole store.
        """
        target = self._targets.get(heads)
        if target is None:
            start = self._starts.get(heads)
            if start is None:
                rows = torch.arange(self.slots * heads, device=self.device)
                start = self._starts[heads] = (rows * self.capacity).view(self.slots, heads)
            width = self.width
            target = self._targets[heads] = (start[:width] + self._writes[:width]).view(-1)
        return target


class RowSlotLayer(CacheLayerMixin):
    """One layer's keys and values; transformers calls only ``update`` when given masks and ids."""

    is_sliding = False
    is_compileable = False

    def __init__(self, plan: SlotPlan) -> None:
        super().__init__()
        self.plan = plan
        self._views: tuple[tuple[int, int], Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate from the shapes [*, heads, *, size] of the first keys and values."""
        self.allocate(key_states, value_states)

    def allocate(self, key_like: Tensor, value_like: Tensor) -> None:
        """Allocate zeroed storage shaped after another tensor's heads, size, dtype and device.

        Never ``empty``: a masked position still enters the product, and 0 x NaN is NaN.
        """
        plan = self.plan

        def make(like: Tensor) -> Tensor:
            return like.new_zeros((plan.slots, like.shape[1], plan.capacity, like.shape[3]))

        self.keys = make(key_like)
        self.values = make(value_like)
        self.dtype, self.device = key_like.dtype, key_like.device
        self._views = None
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the fresh keys and values; return those the queries attend over.

        A step: states [width, heads, 1, size] -> [width, heads, bucket, size] views.
        A span: states [1, heads, n, size] -> [1, heads, start + n, size].
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        plan = self.plan
        if plan.span_row is None:
            for store, states in ((self.keys, key_states), (self.values, value_states)):
                size = store.shape[3]
                target = plan.targets(store.shape[1])
                store.view(-1, size).index_copy_(0, target, states.reshape(-1, size))
            seen = (plan.width, plan.bucket)
            if self._views is None or self._views[0] != seen:
                width, bucket = seen
                self._views = (
                    seen,
                    self.keys[:width, :, :bucket],
                    self.values[:width, :, :bucket],
                )
            return self._views[1], self._views[2]
        row, start = plan.span_row, plan.span_start
        stop = start + key_states.shape[2]
        self.keys[row, :, start:stop] = key_states[0]
        self.values[row, :, start:stop] = value_states[0]
        if start == 0:
            return key_states, value_states
        # Copies, so that strides and alignment are the same whatever the row and the capacity.
        form = torch.contiguous_format
        return (
            self.keys[row : row + 1, :, :stop].clone(memory_format=form),
            self.values[row : row + 1, :, :stop].clone(memory_format=form),
        )

    def zero(self, row: int, start: int, stop: int) -> None:
        """Zero positions ``start..stop`` of a row, and its scratch position."""
        for store in (self.keys, self.values):
            if store is not None:
                store[row, :, start:stop] = 0
                store[row, :, self.plan.scratch] = 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not used: the caller passes 4-D masks."""
        raise NotImplementedError("the row-slot cache is driven with explicit masks")

    def get_seq_length(self) -> int:
        """Not used: the caller passes position ids."""
        raise NotImplementedError("the row-slot cache is driven with explicit positions")

    def get_max_length(self) -> int:
        """The capacity in positions."""
        return self.plan.capacity


class RowSlotCache(Cache):
    """The layers of one agent's lanes, sharing one plan."""

    def __init__(self, layers: int, slots: int, capacity: int, device: torch.device) -> None:
        self.plan = SlotPlan(slots, capacity, device)
        self.rows = [RowSlotLayer(self.plan) for _ in range(layers)]
        super().__init__(layers=list(self.rows))

    def allocate_like(self, other: "RowSlotCache") -> None:
        """Allocate every layer with the shapes of another cache of the same model."""
        for mine, theirs in zip(self.rows, other.rows, strict=True):
            if theirs.keys is not None and theirs.values is not None and not mine.is_initialized:
                mine.allocate(theirs.keys, theirs.values)

    def copy_lane(self, source: "RowSlotCache", src: int, dst: int, length: int) -> None:
        """Copy the first ``length`` positions of row ``src`` of ``source`` into row ``dst``."""
        self.allocate_like(source)
        for mine, theirs in zip(self.rows, source.rows, strict=True):
            for to, of in ((mine.keys, theirs.keys), (mine.values, theirs.values)):
                if to is not None and of is not None:
                    to[dst, :, :length] = of[src, :, :length]

    def lane_views(self, row: int, length: int) -> list[tuple[Tensor, Tensor]]:
        """The first ``length`` keys and values of a row, by layer: [heads, length, size]."""
        return [
            (layer.keys[row, :, :length], layer.values[row, :, :length])
            for layer in self.rows
            if layer.keys is not None and layer.values is not None
        ]

    def zero(self, row: int, start: int, stop: int) -> None:
        """Zero positions ``start..stop`` of a row in every layer."""
        for layer in self.rows:
            layer.zero(row, start, stop)

    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        stores = [s for layer in self.rows for s in (layer.keys, layer.values)]
        return sum(store.nbytes for store in stores if store is not None)
