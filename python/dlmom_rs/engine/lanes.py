"""The lanes of one agent: one key-value history per slot, each with its own position.

Two kinds behind one interface. ``RowSlotLanes`` puts every slot in one forward; ``PerRowLanes``
forwards one row at a time on a cache of its own, for families the shared batch cannot serve.
Positions advance only when a forward has succeeded. Callers run inside ``torch.inference_mode``.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .cache import BUCKET, RowSlotCache, round_up
from .device import there
from .embed import embed_in_place
from .experts import Expert
from .graphs import Graph
from .packets import Entries
from .prompts import Fed, Pairs


@dataclass(frozen=True, slots=True)
class Places:
    """Some distinct slots, in an order, and the rows of a forward that are theirs."""

    at: NDArray[np.int64]
    #: The rows, as an index of arrays and of tensors.
    where: NDArray[np.int64]
    rows: Tensor
    #: The first row, where they follow one another; None where they do not.
    first: int | None
    #: Rows that a step of theirs is computed for.
    width: int


class Lanes(ABC):
    """The lanes of one agent, by slot. A slot without a lane is closed."""

    def __init__(self, expert: Expert, slots: int, device: torch.device) -> None:
        self.expert = expert
        self.slots = slots
        self.device = device
        #: Positions held and positions held at most, by slot; a closed lane may hold none.
        self.lengths = np.zeros(slots, np.int64)
        self.limits = np.zeros(slots, np.int64)
        accepted = inspect.signature(expert.model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._cache_keyword = expert.cache_keyword
        #: Hidden states of last positions, [hidden] each, of the slots that keep theirs.
        self.hidden: dict[int, Tensor] = {}
        self._takes_positions = "position_ids" in accepted
        #: What lanes were fed since they were opened, where it was whole token spans alone.
        self.fed: dict[int, Fed] = {}
        self._named: tuple[list[int], Places] | None = None
        #: Positions that all lanes of the last ``places`` can still take in; None: count again.
        self._room: int | None = None

    def length(self, slot: int) -> int:
        """The positions of an open lane; ValueError where it is closed."""
        self._check_open(slot)
        return int(self.lengths[slot])

    def have_room(self, slots: list[int]) -> bool:
        """Whether these lanes are all open and can take in one position more."""
        at = self.places(slots).at
        if self._room is None:
            self._room = int((self.limits[at] - self.lengths[at]).min())
        return self._room > 0

    def places(self, slots: list[int]) -> Places:
        """Where slots are; the same object as before where they are the same as before."""
        if self._named is None or self._named[0] != slots:
            self._named = (list(slots), self._find(np.array(slots, dtype=np.int64)))
            self._room = None
        return self._named[1]

    def _find(self, at: NDArray[np.int64]) -> Places:
        """Slots whose rows are where they are."""
        return self._placed(at, at, self.slots)

    def _placed(self, at: NDArray[np.int64], where: NDArray[np.int64], width: int) -> Places:
        first = int(where[0])
        follow = bool((where == np.arange(first, first + len(where))).all())
        rows = there(torch.from_numpy(where), self.device)
        return Places(at, where, rows, first if follow else None, width)

    def open(self, slot: int, limit: int) -> None:
        """Start an empty lane of at most ``limit`` positions, whatever the slot held before."""
        self.close(slot)
        self.limits[slot] = limit
        self._room = None
        self.fed[slot] = ()

    def close(self, slot: int) -> None:
        """Forget a slot's lane and its history; a closed slot is left alone."""
        self.hidden.pop(slot, None)
        self.fed.pop(slot, None)
        if self.limits[slot]:
            self.limits[slot] = 0
            self._move(slot, 0)
            self._drop(slot, 0)

    def truncate(self, slot: int, length: int) -> None:
        """Cut a lane to its first ``length`` positions; ValueError if it holds fewer."""
        held = self.length(slot)
        if not 0 <= length <= held:
            raise ValueError(f"cannot cut slot {slot} to {length}: it holds {held}")
        if length < held:
            self.hidden.pop(slot, None)
            self.fed.pop(slot, None)
        self._move(slot, length)
        self._drop(slot, length)

    def fork(self, source: "Lanes", src: int, dst: int, upto: int | None) -> None:
        """Make slot ``dst`` a copy of the first ``upto`` positions of ``source``'s slot ``src``.

        An open ``dst`` keeps its limit, a closed one is opened with the source's. ValueError where
        the source holds fewer positions, or the copy would exceed the limit.
        """
        held = source.length(src)
        length = held if upto is None else upto
        if not 0 <= length <= held:
            raise ValueError(f"cannot fork {length} positions of slot {src}: {held} held")
        if source is self and src == dst:
            self.truncate(dst, length)
            return
        limit = int(self.limits[dst] or source.limits[src])
        if length > limit:
            raise ValueError(
                f"cannot fork {length} positions into slot {dst}: its limit is {limit}"
            )
        state = source.hidden.get(src) if length == held else None
        self.open(dst, limit)
        self._copy(source, src, dst, length)
        self._move(dst, length)
        self.fed.pop(dst, None)
        if state is not None:
            self.hidden[dst] = state

    def save(self) -> NDArray[np.int64]:
        """The positions of all lanes, for ``restore``."""
        return self.lengths.copy()

    def restore(self, saved: NDArray[np.int64], slots: Iterable[int]) -> None:
        """Put some lanes back to saved positions, whatever a broken forward left behind."""
        for slot in slots:
            self._move(slot, int(saved[slot]))
            self.fed.pop(slot, None)
            self._drop(slot, int(saved[slot]))

    def extend(self, slot: int, pairs: Pairs) -> None:
        """Append keys and values, by layer, that a span of the same model left in another lane."""
        self._check_open(slot)
        self._append(slot, pairs)
        self._move(slot, int(self.lengths[slot]) + pairs[0][0].shape[1])

    def _move(self, slot: int, length: int) -> None:
        self.lengths[slot] = length
        self._room = None

    def _check_open(self, slot: int) -> None:
        if not self.limits[slot]:
            raise ValueError(f"slot {slot} has no open lane")

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
    def _append(self, slot: int, pairs: Pairs) -> None:
        """Write keys and values by layer, [heads, n, size], behind what a slot holds."""

    @abstractmethod
    def _copy(self, source: "Lanes", src: int, dst: int, length: int) -> None:
        """Copy history into an empty slot."""


class Given:
    """What a step is given, kept from step to step: on the host, and where the forward finds it.

    One piece of memory, so that it takes one copy to a device; on a CPU both are the same. It holds
    where every row reads and writes [2, slots], and its packet, ``ids`` and ``probs`` [slots, k].
    """

    def __init__(self, slots: int, k: int, device: torch.device) -> None:
        host = torch.zeros(16 * slots + 12 * slots * k, dtype=torch.uint8)
        self._host = host
        self._there = host if device.type == "cpu" else host.to(device)
        self._cuts = (16 * slots, 16 * slots + 8 * slots * k)
        self._shape = (slots, k)
        self._places: Places | None = None
        where, ids, probs = self._parts(host)
        self._where, self._ids, self._probs = where.numpy(), ids.numpy(), probs.numpy()
        where, self.ids, self.probs = self._parts(self._there)
        queries, self.writes = where
        self._positions, self._queries = queries[:, None], queries.view(-1, 1, 1, 1)
        self._asked: dict[int, tuple[Tensor, Tensor]] = {}

    def _parts(self, memory: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, second = self._cuts
        return (
            memory[:first].view(torch.int64).view(2, -1),
            memory[first:second].view(torch.int64).view(self._shape),
            memory[second:].view(torch.float32).view(self._shape),
        )

    def take(
        self, places: Places, lengths: NDArray[np.int64], packets: Entries | None, scratch: int
    ) -> None:
        """Take in a step of some lanes; the other rows are dummies that write to ``scratch``."""
        if places is not self._places:
            self._where[0] = 0
            self._where[1] = scratch
            # An ordinary token, because a zero vector is no model's input.
            self._ids[:] = 0
            self._probs[:] = 0.0
            self._probs[:, :1] = 1.0
            self._places = places
        self._where[:, places.where] = lengths
        if packets is not None:
            self._ids[places.where] = packets.ids
            self._probs[places.where] = packets.probs
        if self._there is not self._host:
            self._there.copy_(self._host, non_blocking=self._there.device.type == "cuda")

    def asked(self, width: int) -> tuple[Tensor, Tensor]:
        """Positions [width, 1] of the first rows, and the same as queries [width, 1, 1, 1]."""
        found = self._asked.get(width)
        if found is None:
            found = self._asked[width] = self._positions[:width], self._queries[:width]
        return found


class RowSlotLanes(Lanes):
    """Lanes in one row-slot cache; a step is one forward over its first rows.

    Rows that do not step are dummies: they attend to position 0 only and write to the last position
    of the capacity, which no query ever sees, so a waiting lane stays as it is.

    Where ``widths`` has more than one number, a lane is put into the first free row when it is
    opened, and moved to a lower one where its step can then be computed for fewer rows: a batch
    that runs empty, or never was full, costs what it holds. Otherwise its row is its slot.
    """

    def __init__(self, expert: Expert, slots: int, max_len: int, device: torch.device) -> None:
        super().__init__(expert, slots, device)
        capacity = round_up(max_len + 1, BUCKET)
        self.cache = RowSlotCache(expert.family.layers, slots, capacity, device)
        #: The least visible length; raised to the capacity where bits depend on the bucket.
        self.min_bucket = BUCKET
        #: Numbers of rows that steps may be computed for, ascending, the last all of them. Set
        #: while no lane is open.
        self.widths: tuple[int, ...] = (slots,)
        #: The row of every open lane, and which rows are taken.
        self._row = np.arange(slots)
        self._taken = np.zeros(slots, np.bool_)
        self._masks = expert.mask_plan()
        self._keys = torch.arange(capacity, device=device)
        self._visible: dict[int, Tensor] = {}
        self._written = np.zeros(slots, np.int64)
        #: What steps are given, by entries of a packet; 0 for steps that are given embeddings.
        self._given: dict[int, Given] = {}
        #: The slots of the last step given embeddings: which rows of the inputs are not dummies.
        self._stepping: Places | None = None
        self._inputs: Tensor | None = None
        self._idle: Tensor | None = None
        #: Makes what steps are captured with; None where every step is launched anew.
        self.graphs: Callable[[], Graph] | None = None
        #: By visible length and entries of a packet.
        self._captured: dict[tuple[int, int], Graph] = {}
        #: Logits [slots, head rows] of the last step, if a graph left them.
        self.replayed: Tensor | None = None

    def row(self, slot: int) -> int:
        """The row of a slot's lane."""
        return int(self._row[slot])

    def open(self, slot: int, limit: int) -> None:
        super().open(slot, limit)
        row = slot if len(self.widths) == 1 else int(np.argmin(self._taken))
        self._row[slot] = row
        self._taken[row] = True
        self._named = None

    def close(self, slot: int) -> None:
        held = bool(self.limits[slot])
        super().close(slot)
        if held:
            self._taken[self._row[slot]] = False
            self._named = None

    def _find(self, at: NDArray[np.int64]) -> Places:
        if len(self.widths) > 1 and bool(self.limits[at].all()):
            self._draw_together(at)
        where = self._row[at]
        need = int(where.max()) + 1
        return self._placed(at, where, next(width for width in self.widths if width >= need))

    def _draw_together(self, at: NDArray[np.int64]) -> None:
        """Move lanes that step into free rows, where fewer rows hold them all then."""
        for width in self.widths:
            beyond = at[self._row[at] >= width]
            free = np.flatnonzero(~self._taken[:width])
            if len(beyond) <= len(free):
                for slot, row in zip(beyond.tolist(), free.tolist(), strict=False):
                    self._shift(slot, row)
                return

    @torch.inference_mode()  # places are asked for outside of it, too
    def _shift(self, slot: int, row: int) -> None:
        old, length = self.row(slot), int(self.lengths[slot])
        self.cache.copy_lane(self.cache, old, row, length)
        self._written[row] = length
        self.cache.zero(old, 0, int(self._written[old]))
        self._written[old] = 0
        self._taken[old], self._taken[row] = False, True
        self._row[slot] = row

    def span(self, slot: int, x: Tensor) -> Tensor:
        start = self.length(slot)
        stop = start + x.shape[0]
        row = self.row(slot)
        plan = self.cache.plan
        queries = self._keys[start:stop]
        mask = self._masks.build(queries.view(1, 1, -1, 1), self._keys[:stop])
        self._written[row] = max(int(self._written[row]), stop)
        plan.span_row, plan.span_start = row, start
        try:
            logits = self._logits(
                x[None],
                self.cache,
                attention_mask=mask,
                position_ids=queries[None],
            )
        finally:
            plan.span_row = None
        self._move(slot, stop)
        return logits[0]

    def step(self, slots: list[int], x: Tensor) -> Tensor:
        places = self.places(slots)
        inputs = self._batch(places, x)
        logits = self._run(places, None, lambda _: inputs)
        if places.first is not None:
            return logits[places.first : places.first + len(slots)]
        return logits.index_select(0, places.rows)

    def step_packets(self, slots: list[int], packets: Entries) -> Tensor:
        """:meth:`step` with the packets' embeddings, which are part of what is captured.

        Logits [width, head rows] of all rows, a slot's at its :meth:`row`: what is captured next
        takes them where they are.
        """

        def inputs(given: Given) -> Tensor:
            x = embed_in_place(self.expert.embeddings, given.ids, given.probs)
            return x[: places.width, None]

        places = self.places(slots)
        return self._run(places, packets, inputs)

    def _run(
        self, places: Places, packets: Entries | None, inputs: Callable[[Given], Tensor]
    ) -> Tensor:
        plan = self.cache.plan
        at, where = places.at, places.where
        k = 0 if packets is None else packets.ids.shape[1]
        given = self._given.get(k)
        if given is None:
            given = self._given[k] = Given(self.slots, k, self.device)
        lengths = self.lengths[at]
        given.take(places, lengths, packets, plan.scratch)
        longest = int(lengths.max()) + 1
        self._written[where] = np.maximum(self._written[where], lengths + 1)
        bucket = min(plan.capacity, max(self.min_bucket, round_up(longest, BUCKET)))
        self.replayed = None
        # Hidden states are noted by a hook, which a replay does not call.
        if self.graphs is None or self.expert.captured is not None:
            logits = self._forward(given, inputs(given), bucket, places.width)
        else:
            graph = self._captured.get((bucket, k))
            if graph is None:
                graph = self.graphs()
                graph.capture(lambda: self._forward(given, inputs(given), bucket, self.slots))
                self._captured[bucket, k] = graph
            logits = self.replayed = graph.replay()
        self.lengths[at] = lengths + 1
        if self._room is not None:
            self._room -= 1
        return logits

    def launch(self) -> None:
        """Launch steps anew from now on, and free what was captured."""
        self.graphs = None
        self._captured.clear()

    def _forward(self, given: Given, inputs: Tensor, bucket: int, width: int) -> Tensor:
        """Logits [width, head rows] of inputs [width, 1, h] at the positions that are given."""
        plan = self.cache.plan
        plan.bucket, plan.width = bucket, width
        plan.write_at(given.writes)
        positions, queries = given.asked(width)
        keys = self._visible.get(bucket)
        if keys is None:
            keys = self._visible[bucket] = self._keys[:bucket]
        return self._logits(
            inputs,
            self.cache,
            attention_mask=self._masks.build(queries, keys),
            position_ids=positions,
        )

    def _batch(self, places: Places, x: Tensor) -> Tensor:
        """Inputs of a step's rows: ``x`` [r, hidden] at places, dummies elsewhere: [width, 1, h].

        Dummies are fed an ordinary token, because a zero vector is no model's input. Where steps
        are captured, always the same memory.
        """
        if self.graphs is None and x.shape[0] == places.width and places.first == 0:
            self._stepping = places
            return x[:, None]
        if self._idle is None or self._inputs is None:
            token = torch.zeros(1, dtype=torch.int64, device=self.device)
            self._idle = self.expert.embeddings(token)
            self._inputs = self._idle.repeat(self.slots, 1)
        elif places is not self._stepping:
            self._inputs.copy_(self._idle.expand_as(self._inputs))
        self._stepping = places
        return self._inputs.index_copy_(0, places.rows, x)[: places.width, None]

    def allocate_like(self, other: "RowSlotLanes") -> None:
        """Allocate now what a first forward would, with the shapes another agent's lanes have."""
        self.cache.allocate_like(other.cache)

    def layers_written(self) -> bool:
        """Whether every layer has stored something: a model that ignores its cache fails this."""
        return all(layer.is_initialized for layer in self.cache.rows)

    def views(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        return self.cache.lane_views(self.row(slot), self.length(slot))

    def position_bytes(self) -> int:
        return self.cache.nbytes() // (self.slots * self.cache.plan.capacity)

    def nbytes(self) -> int:
        return self.cache.nbytes()

    def _drop(self, slot: int, length: int) -> None:
        row = self.row(slot)
        self.cache.zero(row, length, int(self._written[row]))
        self._written[row] = min(int(self._written[row]), length)

    def _append(self, slot: int, pairs: Pairs) -> None:
        start, row = int(self.lengths[slot]), self.row(slot)
        stop = start + pairs[0][0].shape[1]
        self._written[row] = max(int(self._written[row]), stop)
        for layer, (keys, values) in zip(self.cache.rows, pairs, strict=True):
            if not layer.is_initialized:
                layer.allocate(keys[None], values[None])
            assert layer.keys is not None
            assert layer.values is not None
            layer.keys[row, :, start:stop] = keys
            layer.values[row, :, start:stop] = values

    def _copy(self, source: Lanes, src: int, dst: int, length: int) -> None:
        assert isinstance(source, RowSlotLanes)
        row = self.row(dst)
        self._written[row] = length
        self.cache.copy_lane(source.cache, source.row(src), row, length)


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
        start = self.length(slot)
        stop = start + x.shape[0]
        for module in self._rotary:
            _reset_rotary(module)
        positions = torch.arange(start, stop, device=self.device)[None]
        extra: dict[str, Any] = {"position_ids": positions} if self._takes_positions else {}
        logits = self._logits(x[None], self._caches[slot], **extra)
        self._move(slot, stop)
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
        cache, length = self._caches[slot], self.length(slot)
        return len(cache.layers) == self.expert.family.layers and all(
            isinstance(layer, DynamicLayer)
            and layer.keys is not None
            and layer.keys.shape[-2] == length
            for layer in cache.layers
        )

    def views(self, slot: int) -> list[tuple[Tensor, Tensor]]:
        self._check_open(slot)
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
        if not self.limits[slot]:
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

    def _append(self, slot: int, pairs: Pairs) -> None:
        for i, (keys, values) in enumerate(pairs):
            self._caches[slot].update(keys[None].clone(), values[None].clone(), i)

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
