"""Consensus where the logits are: what an advance is asked to read, and what it answers.

The loop names the rows that :mod:`dlmom_rs.kernels` can read. Their logits never leave the device;
of each, a readout of a few hundred bytes does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dlmom_rs import kernels
from dlmom_rs.kernels.readout import Readout

from .device import there
from .errors import ModelError
from .experts import one_line
from .graphs import Graph
from .packets import Call

#: Names that :func:`choose` takes.
NAMES = ("auto", "rust", *kernels.NAMES)
#: Rows read in one call of consensus: (slots, agents, operator, theta, eps, k, role, targets).
#: ``targets`` are those of each slot, lists of any lengths; for the rest see
#: :func:`dlmom_rs.kernels.torch_ref.consensus`.
RawRead = tuple[list[int], list[int], str, float, float, int, list[int], list[list[int]]]
#: The fields of FIELDS as bytes, row-major, for the slots of one RawRead in its order.
RawReadout = tuple[bytes, ...]
#: Fields of a Readout that cross to the host, and their types there. Targets that a slot has fewer
#: of than another have -inf at the end.
FIELDS = {
    "finite": "u1",
    "entropies": "<f8",
    "agreed": "u1",
    "merged_entropy": "<f8",
    "best": "<u4",
    "ids": "<u4",
    "probs": "<f4",
    "mass": "<f4",
    "role_mass": "<f4",
    "target_logprobs": "<f8",
    "agent_target_logprobs": "<f8",
}


@dataclass(frozen=True)
class Reader:
    """The kernels in use, ``name``, and their ``consensus`` function."""

    name: str
    consensus: Callable[..., Readout]

    def launch(
        self, read: RawRead, logits: dict[int, Logits], device: torch.device
    ) -> Callable[[], RawReadout]:
        """Launch a read of the agents' logits; what waits for it.

        Logits that are elsewhere are copied to ``device``. ValueError and TypeError as of the
        ``consensus`` function.
        """
        slots, agents, operator, theta, eps, k, role, targets = read
        readout = self.consensus(
            [there(logits[agent].of(slots), device) for agent in agents],
            operator,
            k=k,
            theta=theta,
            eps=eps,
            role=_on(device, role) if role else None,
            targets=_rectangle(targets, device),
        )
        return lambda: _packed(readout.to_host())


class CapturedReads:
    """Reads of captured steps, captured themselves: consensus of all rows where graphs leave them.

    Rows of slots that are not asked for are read as well and left out: the launches of a few rows
    are those of all.
    """

    def __init__(self, reader: Reader, graphs: Callable[[], Graph], device: torch.device) -> None:
        self._reader = reader
        self._graphs = graphs
        self._device = device
        self._captured: dict[Any, tuple[Graph, Readout, list[Tensor]]] = {}

    def launch(self, read: RawRead, outputs: list[Tensor]) -> Callable[[], RawReadout]:
        """:meth:`Reader.launch` of rows without targets, of outputs [slots, V] of graphs."""
        slots, _, operator, theta, eps, k, role, _ = read
        places = tuple((output.data_ptr(), *output.shape) for output in outputs)
        key = (operator, theta, eps, k, tuple(role), places)
        held = self._captured.get(key)
        if held is None:
            # Kept for as long as the graph, which knows nothing but where they are.
            kept = [*outputs, *([_on(self._device, role)] if role else [])]
            made: list[Readout] = []

            def work() -> Tensor:
                of_role = kept[-1] if role else None
                readout = self._reader.consensus(
                    outputs, operator, k=k, theta=theta, eps=eps, role=of_role
                )
                made.append(readout)
                return readout.flat()

            graph = self._graphs()
            graph.capture(work)
            held = self._captured[key] = (graph, made[-1], kept)
        graph, shapes, _ = held
        flat = graph.replay()

        def wait() -> RawReadout:
            host = shapes.opened(flat.cpu())
            return _packed(replace(host, **{name: getattr(host, name)[slots] for name in FIELDS}))

        return wait


def choose(name: str | None, device: torch.device, dtype: torch.dtype) -> Reader | None:
    """The reader of a name out of NAMES, tried on one small row; None for ``rust``.

    ``rust`` means that logits are copied to the host and read there. "auto", like None, is
    :func:`dlmom_rs.kernels.choose` on CUDA and HIP, where torch stands in with a warning for
    kernels that do not run, and ``rust`` elsewhere. ModelError for another name, and for kernels
    asked for by name that cannot run on this device in this dtype.
    """
    if name not in (None, *NAMES):
        raise ModelError(f"unknown kernel {name!r}: expected one of {', '.join(NAMES)}")
    named = None if name in (None, "auto") else name
    if named == "rust" or (named is None and device.type != "cuda"):
        return None
    try:
        return _tried(named, device, dtype)
    except Exception as error:
        if named is not None:
            raise ModelError(f"kernel {named!r} cannot be used: {one_line(error)}") from error
        warnings.warn(
            f"consensus runs in torch, more slowly: the fused kernels failed: {one_line(error)}",
            stacklevel=3,
        )
        return _tried("torch", device, dtype)


def _tried(name: str | None, device: torch.device, dtype: torch.dtype) -> Reader:
    """The kernels of a name, None for the device's own; whatever running them raises."""
    consensus = kernels.choose(device, dtype, name)
    row = torch.zeros(1, 64, dtype=dtype, device=device)
    consensus([row, row], k=8).to_host()
    if name is None:
        known = (n for n in kernels.NAMES if kernels.choose(device, dtype, n) is consensus)
        name = next(known)
    return Reader(name, consensus)


class Logits:
    """One agent's logits of one advance, by slot, where the forward left them."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[Tensor, int]] = {}

    def add(self, slots: Sequence[int], logits: Tensor, rows: Sequence[int] | None = None) -> None:
        """Take in logits [*, V] of slots: ``rows`` of them, or the first in order."""
        rows = range(len(slots)) if rows is None else rows
        self._places.update((slot, (logits, row)) for slot, row in zip(slots, rows, strict=True))

    def of(self, slots: Sequence[int]) -> Tensor:
        """Rows [len(slots), V] of slots, a view where they lie one behind the other."""
        places = [self._places[slot] for slot in slots]
        whole, first = places[0]
        if all(part is whole and at == first + i for i, (part, at) in enumerate(places)):
            return whole[first : first + len(places)]
        return torch.stack([part[at] for part, at in places])


def check_reads(reads: Iterable[RawRead], calls: Sequence[Call]) -> set[int]:
    """The slots that are read; ValueError for a slot read twice or not fed, and uneven lists."""
    fed = {call.agent: {slot for slot, _ in call.appended()} for call in calls}
    read: set[int] = set()
    for slots, agents, _, _, _, _, _, targets in reads:
        if not slots or not agents or len(targets) != len(slots):
            raise ValueError(
                f"a read of {len(slots)} slots, {len(agents)} agents and {len(targets)} lists of "
                "targets; one slot, one agent and a list for every slot are needed"
            )
        for slot in slots:
            if slot in read:
                raise ValueError(f"slot {slot} is read twice")
            read.add(slot)
            missing = [agent for agent in agents if slot not in fed.get(agent, ())]
            if missing:
                raise ValueError(f"slot {slot} of agent {missing[0]} is read but not fed")
    return read


def _rectangle(lists: list[list[int]], device: torch.device) -> Tensor | None:
    """int64 [rows, longest], filled up with -1, which is no token; None where all are empty."""
    width = max(map(len, lists))
    if width == 0:
        return None
    filled = [ids + [-1] * (width - len(ids)) for ids in lists]
    return _on(device, filled)


def _on(device: torch.device, ids: list[int] | list[list[int]]) -> Tensor:
    return there(torch.tensor(ids, dtype=torch.int64), device)


def _packed(host: Readout) -> RawReadout:
    return tuple(
        getattr(host, name).numpy().astype(code, copy=False).tobytes()
        for name, code in FIELDS.items()
    )
