"""What consensus is asked for, and what it answers."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

#: Operators over whole rows; ``geo`` is another name of ``mean``.
OPERATORS = ("arith", "geo", "mean", "ties")


@dataclass(frozen=True, eq=False)
class Readout:
    """What the loop needs of B rows, on the device of their logits.

    "Wide" is float64, float32 on devices that have no float64. k is the width asked for, at most V.
    A row in which ``finite`` is not true of every expert has failed: all else of it is 0.
    """

    #: bool [B, K]: all logits of the expert, also when centred, are finite. All are false where
    #: only the merged row is not.
    finite: Tensor
    #: wide [B, K]: entropy of each expert's own softmax, in nats.
    entropies: Tensor
    #: bool [B]: all experts have the same most probable token, of several the first.
    agreed: Tensor
    #: wide [B]: entropy of the merged distribution, in nats.
    merged_entropy: Tensor
    #: int32 [B]: id of the largest merged logit, of several the first: what a greedy draw takes.
    #: ``ids[:, 0]`` is another one where two logits round to one probability.
    best: Tensor
    #: int32 [B, k]: most probable ids, by ``probs`` descending, then id ascending.
    ids: Tensor
    #: float32 [B, k]: their probabilities, renormalised to sum 1.
    probs: Tensor
    #: float32 [B]: their merged probability before renormalising, in (0, 1]; 0 for k = 0.
    mass: Tensor
    #: float32 [B]: merged probability of the role ids, in [0, 1].
    role_mass: Tensor
    #: wide [B, T]: ``ln p`` of the targets in the merged distribution, -inf outside the vocabulary.
    target_logprobs: Tensor
    #: wide [B, K, T]: the same in each expert's own softmax.
    agent_target_logprobs: Tensor
    #: float32 [B, V]: the merged preferences, in logits; only where asked for.
    merged: Tensor | None

    def to_host(self) -> Readout:
        """The same on the CPU, by one copy of everything but ``merged``, which is left out.

        This waits for the device; nothing else here does.
        """
        return self.opened(self.flat().cpu())

    def flat(self) -> Tensor:
        """uint8: everything but ``merged``, one after the other, on the device."""
        parts = [getattr(self, name) for name in self._order()]
        return torch.cat([part.contiguous().view(-1).view(torch.uint8) for part in parts])

    def opened(self, flat: Tensor) -> Readout:
        """What :meth:`flat` made of a readout of the same shapes, as views of it."""
        at, parts = 0, {}
        for name in self._order():
            tensor = getattr(self, name)
            end = at + tensor.numel() * tensor.element_size()
            parts[name] = flat[at:end].view(tensor.dtype).view(tensor.shape)
            at = end
        return replace(self, merged=None, **parts)

    def _order(self) -> list[str]:
        """Widest first, so that every part of a buffer is aligned to its own dtype."""
        names = [f.name for f in fields(self) if f.name != "merged"]
        return sorted(names, key=lambda name: -getattr(self, name).element_size())


@dataclass(frozen=True, eq=False)
class Request:
    """Arguments of a ``consensus`` function that were found good."""

    #: K tensors [B, V] whose last stride is 1.
    rows: list[Tensor]
    #: "ties", "mean" or "arith".
    operator: str
    #: Entries of the packet, at most V.
    top: int
    #: Both rounded to float32, as the reference holds them.
    theta: float
    eps: float
    #: int64 [R].
    role: Tensor
    #: int64 [B, T].
    targets: Tensor
    keep_merged: bool

    @property
    def batch(self) -> int:
        """Rows B."""
        return self.rows[0].shape[0]

    @property
    def vocab(self) -> int:
        """Tokens V."""
        return self.rows[0].shape[1]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.rows[0].device


def check(
    rows: Sequence[Tensor],
    operator: str,
    *,
    k: int,
    theta: float,
    eps: float,
    role: Tensor | None,
    targets: Tensor | None,
    keep_merged: bool,
) -> Request:
    """Check the arguments of :func:`torch_ref.consensus` from shapes and dtypes alone.

    Raises ValueError for shapes, devices and numbers, TypeError for dtypes.
    """
    if operator not in OPERATORS:
        raise ValueError(f"unknown operator {operator!r}; known: {', '.join(OPERATORS)}")
    if not rows:
        raise ValueError("no logits; one tensor [B, V] per expert is needed")
    shape, device = rows[0].shape, rows[0].device
    for index, z in enumerate(rows):
        if z.dim() != 2 or z.shape[1] == 0 or z.shape != shape:
            raise ValueError(
                f"logits of expert {index} have shape {list(z.shape)}; [B, V] with V at least 1 is "
                "needed, the same of every expert"
            )
        if not z.is_floating_point():
            raise TypeError(f"logits of expert {index} are {z.dtype}; a float dtype is needed")
        if z.device != device:
            raise ValueError(f"logits of expert {index} are on {z.device}, of expert 0 on {device}")
    if k < -1:
        raise ValueError(f"k is {k}; it must be at least 0, or -1 for the whole vocabulary")
    for name, value in (("theta", theta), ("eps", eps)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} is {value}; it must be a finite number of at least 0")
    none = torch.empty(0, dtype=torch.int64, device=device)
    role, targets = none if role is None else role, none if targets is None else targets
    for name, ids in (("role", role), ("targets", targets)):
        if ids.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{name} are {ids.dtype}; int32 or int64 is needed")
        if ids.device != device:
            raise ValueError(f"{name} are on {ids.device}, the logits on {device}")
    if role.dim() != 1:
        raise ValueError(f"role has shape {list(role.shape)}; [R] is needed")
    if targets.dim() not in (1, 2) or (targets.dim() == 2 and targets.shape[0] != shape[0]):
        raise ValueError(f"targets have shape {list(targets.shape)}; [T] or [B, T] is needed")
    targets = targets.to(torch.int64).contiguous()
    return Request(
        rows=[z if z.stride(1) == 1 else z.contiguous() for z in (z.detach() for z in rows)],
        operator="mean" if operator == "geo" else operator,
        top=shape[1] if k == -1 else min(k, shape[1]),
        theta=ctypes.c_float(theta).value,
        eps=ctypes.c_float(eps).value,
        role=role.to(torch.int64).contiguous(),
        targets=targets.expand(shape[0], targets.shape[-1]),
        keep_merged=keep_merged,
    )
