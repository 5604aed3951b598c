"""The lanes of one agent: one key-value history per slot, each with its own position.

Two kinds behind one interface. ``RowSlotLanes`` puts every slot in one forward; ``PerRowLanes``
forwards one row at a time on a cache of its own, for families the shared batch cannot serve.
Positions advance only when a forward has succeeded. Callers run inside ``torch.inference_mode``.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .cache import BUCKET, RowSlotCache, round_up
from .experts import Expert


@dataclass
class Lane:
    """One open lane: the positions it holds, and the most it may hold."""

    length: int
    limit: int


class Lanes(ABC):
    """The lanes of one agent, by slot. A slot without a lane is closed."""

    def __init__(self, expert: Expert, slots: int, device: torch.device) -> None:
        self.expert = expert
        self.slots = slots
        self.device = device
        self.lanes: dict[int, Lane] = {}
        accepted = inspect.signature(expert.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache_keyword = expert.cache_keyword
        #: Hidden states of last positions, [hidden] each, of the slots that keep theirs.
        self.hidden: dict[int, Tensor] = {}
        self._takes_positions = "position_ids" in accepted

    def get(self, slot: int) -> Lane:
        """The open lane of a slot; ValueError where it is closed."""
        lane = self.lanes.get(slot)
        if lane is None:
            raise ValueError(f"slot {slot} has no open lane")
        return lane

    def open(self, slot: int, limit: int) -> None:
        """Start an empty lane of at most ``limit`` positions, whatever the slot held before."""
        self.close(slot)
        self.lanes[slot] = Lane(0, limit)

    def close(self, slot: int) -> None:
        """Forget a slot's lane and its history; a closed slot is left alone."""
        lane = self.lanes.pop(slot, None)
        self.hidden.pop(slot, None)
        if lane is not None:
            self._drop(slot, 0)

    def truncate(self, slot: int, length: int) -> None:
        """Cut a lane to its first ``length`` positions; ValueError if it holds fewer."""
        lane = self.get(slot)
        if not 0 <= length <= lane.length:
            raise ValueError(f"cannot cut slot {slot} to {length}: it holds {lane.length}")
        if length < lane.length:
            self.hidden.pop(slot, None)
        lane.length = length
        self._drop(slot, length)

    def fork(self, source: "Lanes", src: int, dst: int, upto: int | None) -> None:
        """Make slot ``dst`` a copy of the first ``upto`` positions of ``source``'s slot ``src``.

        An open ``dst`` keeps its limit, a closed one is opened with the source's. ValueError where
        the source holds fewer positions, or the copy would exceed the limit.
        """
        origin = source.get(src)
        length = origin.length if upto is None else upto
        if not 0 <= length <= origin.length:
            raise ValueError(f"cannot fork {length} positions of slot {src}: {origin.length} held")
        if source is self and src == dst:
            self.truncate(dst, length)
            return
        held = self.lanes.get(dst)
        limit = origin.limit if held is None else held.limit
        if length > limit:
            raise ValueError(
                f"cannot fork {length} positions into slot {dst}: its limit is {limit}"
            )
        state = source.hidden.get(src) if length == origin.length else None
        self.open(dst, limit)
        self._copy(source, src, dst, length)
        self.lanes[dst].length = length
        if state is not None:
            self.hidden[dst] = state

    def save(self, slots: Iterable[int]) -> dict[int, int]:
        """The positions of some lanes, for ``restore``."""
        return {slot: self.get(slot).length for slot in slots}

    def restore(self, saved: dict[int, int]) -> None:
        """Put lanes back to saved positions, whatever a broken forward left behind."""
        for slot, length in saved.items():
            self.lanes[slot].length = length
        for slot, length in saved.items():
            self._drop(slot, length)

    def _logits(self, x: Tensor, cache: Cache, **kwargs: Any) -> Tensor:
        """Last-position logits: ``x`` [n, m, hidden] -> [n, rows of the head]."""
        kwargs[self._cache_keyword] = cache
        out = self.expert.model(inputs_embeds=x, use_cache=True, **self._last_only, **kwargs)
        logits: Tensor = out.logits[:, -1]
        return logits

    @abstractmethod
    def span(self, slot: int, x: Tensor) -> Tensor:
        """Append ``x`` [n, hidden] to one lane, alone; its last logits [head rows]."""

    @abstractmethod
    def step(self, slots: list[int], x: Tensor) -> Tensor:
        """Append ``x`` [r, hidden], one position to each of r distinct lanes; [r, head rows]."""

    @abstractmethod
    def views(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values a lane holds, by layer: views [heads, positions, head_dim] to write to.

        ValueError for a closed lane.
        """

    @abstractmethod
    def position_bytes(self) -> int:
        """Bytes of keys and values of one position, over all layers; 0 before a first forward."""

    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of keys and values held."""

    @abstractmethod
    def _drop(self, slot: int, length: int) -> None:
        """Erase what a slot holds from position ``length`` on, NaN included."""

    @abstractmethod
    def _copy(self, source: "Lanes", src: int, dst: int, length: int) -> None:
        """Copy history into an empty slot."""


class RowSlotLanes(Lanes):
    """Lanes in one row-slot cache; a step is one forward over all slots.

    Rows that do not step are dummies: they attend to position 0 only and write to the last position
    of the capacity, which no query ever sees, so a waiting lane stays as it is.
    """

    def __init__(self, expert: Expert, slots: int, max_len: int, device: torch.device) -> None:
        super().__init__(expert, slots, device)
        capacity = round_up(max_len + 1, BUCKET)
        self.cache = RowSlotCache(expert.family.layers, slots, capacity, device)
        #: The least visible length; raised to the capacity where bits depend on the bucket.
        self.min_bucket = BUCKET
        self._masks = expert.mask_plan()
        self._keys = torch.arange(capacity, device=device)
        self._written = [0] * slots
        #: What dummy rows are fed: an ordinary token, because a zero vector is no model's input.
        self._idle: Tensor | None = None

    def span(self, slot: int, x: Tensor) -> Tensor:
        lane = self.get(slot)
        start, stop = lane.length, lane.length + x.shape[0]
        plan = self.cache.plan
        queries = self._keys[start:stop]
        mask = self._masks.build(queries.view(1, 1, -1, 1), self._keys[:stop])
        self._written[slot] = max(self._written[slot], stop)
        plan.span_slot, plan.span_start = slot, start
        try:
            logits = self._logits(
                x[None],
                self.cache,
                attention_mask=mask,
                position_ids=queries[None],
            )
        finally:
            plan.span_slot = None
        lane.length = stop
        return logits[0]

    def step(self, slots: list[int], x: Tensor) -> Tensor:
        plan = self.cache.plan
        positions = np.zeros(self.slots, dtype=np.int64)
        writes = np.full(self.slots, plan.scratch, dtype=np.int64)
        lanes = [self.get(slot) for slot in slots]
        for slot, lane in zip(slots, lanes, strict=True):
            positions[slot] = writes[slot] = lane.length
            self._written[slot] = max(self._written[slot], lane.length + 1)
        plan.write_at(torch.from_numpy(writes).to(self.device))
        longest = int(positions.max()) + 1
        plan.bucket = min(plan.capacity, max(self.min_bucket, round_up(longest, BUCKET)))
        queries = torch.from_numpy(positions).to(self.device)
        mask = self._masks.build(queries.view(-1, 1, 1, 1), self._keys[: plan.bucket])
        rows = torch.tensor(slots, dtype=torch.int64, device=self.device)
        logits = self._logits(
            self._batch(rows, x),
            self.cache,
            attention_mask=mask,
            position_ids=queries[:, None],
        )
        picked = logits.index_select(0, rows)
        for lane in lanes:
            lane.length += 1
        return picked

    def _batch(self, rows: Tensor, x: Tensor) -> Tensor:
        """Inputs of every slot: ``x`` [r, hidden] at ``rows``, dummies elsewhere: [slots, 1, h]."""
        if self._idle is None:
            first = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._idle = self.expert.embeddings(first)
        batch = self._idle.repeat(self.slots, 1)
        return batch.index_copy_(0, rows, x)[:, None]

    def allocate_like(self, other: "RowSlotLanes") -> None:
        """Allocate now what a first forward would, with the shapes another agent's lanes have."""
        self.cache.allocate_like(other.cache)

    def layers_written(self) -> bool:
        """Whether every layer has stored something: a model that ignores its cache fails this."""
        return all(layer.is_initialized for layer in self.cache.rows)

    def views(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        return self.cache.lane_views(slot, self.get(slot).length)

    def position_bytes(self) -> int:
        return self.cache.nbytes() // (self.slots * self.cache.plan.capacity)

    def nbytes(self) -> int:
        return self.cache.nbytes()

    def _drop(self, slot: int, length: int) -> None:
        self.cache.zero(slot, length, self._written[slot])
        self._written[slot] = min(self._written[slot], length)

    def _copy(self, source: Lanes, src: int, dst: int, length: int) -> None:
        assert isinstance(source, RowSlotLanes)
        self._written[dst] = length
        self.cache.copy_lane(source.cache, src, dst, length)


class PerRowLanes(Lanes):
    """A ``DynamicCache`` per lane, forwarded at batch 1 with the model's own masks: slow, right."""

    def __init__(self, expert: Expert, slots: int, device: torch.device) -> None:
        super().__init__(expert, slots, device)
        # Without a config every layer keeps its whole history, so any lane can be cut; the model
        # still applies its windows through the masks it makes.
        self._caches: dict[int, DynamicCache] = {}
        self._position_bytes = 0
        self._rotary = [
            m for m in expert.model.modules() if _is_dynamic(getattr(m, "rope_type", None))
        ]

    def open(self, slot: int, limit: int) -> None:
        super().open(slot, limit)
        self._caches[slot] = DynamicCache()

    def span(self, slot: int, x: Tensor) -> Tensor:
        lane = self.get(slot)
        start, stop = lane.length, lane.length + x.shape[0]
        for module in self._rotary:
            _reset_rotary(module)
        positions = torch.arange(start, stop, device=self.device)[None]
        extra: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        logits = self._logits(x[None], self._caches[slot], **extra)
        lane.length = stop
        if not self._position_bytes:
            views = self.views(slot)
            held = sum(keys.nbytes + values.nbytes for keys, values in views)
            self._position_bytes = held // stop
        return logits[0]

    def position_bytes(self) -> int:
        return self._position_bytes

    def step(self, slots: list[int], x: Tensor) -> Tensor:
        return torch.stack([self.span(slot, x[i : i + 1]) for i, slot in enumerate(slots)])

    def layers_written(self, slot: int) -> bool:
        """Whether every layer of a lane holds exactly the lane's positions."""
        cache, lane = self._caches[slot], self.get(slot)
        return len(cache.layers) == self.expert.family.layers and all(
            isinstance(layer, DynamicLayer)
            and layer.keys is not None
            and layer.keys.shape[-2] == lane.length
            for layer in cache.layers
        )

    def views(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        self.get(slot)
        pairs = []
        for layer in self._caches[slot].layers:
            if isinstance(layer, DynamicLayer) and layer.keys is not None:
                assert layer.values is not None
                pairs.append((layer.keys[0], layer.values[0]))
        return pairs

    def nbytes(self) -> int:
        stores = [
            store
            for cache in self._caches.values()
            for layer in cache.layers
            for store in (getattr(layer, "keys", None), getattr(layer, "values", None))
        ]
        return sum(store.nbytes for store in stores if store is not None)

    def _drop(self, slot: int, length: int) -> None:
        if slot not in self.lanes:
            self._caches.pop(slot, None)
            return
        if length == 0:
            self._caches[slot] = DynamicCache()
            return
        # Not ``crop``: after a broken forward the layers differ in length.
        for layer in self._caches[slot].layers:
            if isinstance(layer, DynamicLayer) and layer.keys is not None:
                assert layer.values is not None
                layer.keys = layer.keys[..., :length, :]
                layer.values = layer.values[..., :length, :]

    def _copy(self, source: Lanes, src: int, dst: int, length: int) -> None:
        assert isinstance(source, PerRowLanes)
        cache = DynamicCache()
        if length:
            for i, layer in enumerate(source._caches[src].layers):
                assert isinstance(layer, DynamicLayer)
                assert layer.keys is not None
                assert layer.values is not None
                keys, values = layer.keys[..., :length, :], layer.values[..., :length, :]
                cache.update(keys.clone(), values.clone(), i)
        self._caches[dst] = cache


def _is_dynamic(kind: Any) -> bool:
    """Whether a rotary module's type (or one of its layer types') is ``dynamic``."""
    return kind == "dynamic" or (isinstance(kind, dict) and "dynamic" in kind.values())


def _reset_rotary(module: Any) -> None:
    """Forget the longest position a ``dynamic`` rotary module has seen.

    It keeps its frequencies from one forward to the next; another lane's would leak into this one.
    The next forward derives them afresh from its own longest position, as a lone run would.
    """
    kinds = module.rope_type
    prefixes = (
        [""]
        if isinstance(kinds, str)
        else [f"{layer}_" for layer, kind in kinds.items() if kind == "dynamic"]
    )
    for prefix in prefixes:
        original = getattr(module, f"{prefix}original_inv_freq")
        module.register_buffer(f"{prefix}inv_freq", original, persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
