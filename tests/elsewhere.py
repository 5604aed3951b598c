"""Devices for tests: their tensors lie on the CPU, say that they do not, and meet no others.

What runs on such a device and gives the CPU's results has moved everything that it needs there and
back. A mode that is entered stands in for the device; when it is left nothing of it remains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from transformers import AutoModelForCausalLM

from dlmom_rs.engine import device as names
from dlmom_rs.engine.errors import ModelError

#: A kind of device that torch has a name for, and no code.
KIND = "maia"


def is_elsewhere(device: Any) -> bool:
    return isinstance(device, torch.device) and device.type == KIND


def here(x: Any) -> Any:
    """The CPU's part of a tensor or a device."""
    if isinstance(x, Elsewhere):
        return x.raw
    return torch.device("cpu") if is_elsewhere(x) else x


class Elsewhere(Tensor):
    """A tensor of such a device: sizes and strides of its own, and the CPU's tensor."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor, device: torch.device) -> Elsewhere:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            raw.size(),
            strides=raw.stride(),
            storage_offset=raw.storage_offset(),
            dtype=raw.dtype,
            device=device,
        )
        assert isinstance(tensor, Elsewhere)
        tensor.raw = raw
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return run(op, args, kwargs or {})

    # What torch's bindings do under a guard of the device, which there is none of.
    def __getitem__(self, index: Any) -> Tensor:
        return Elsewhere(self.raw[tree_map(here, index)], self.device)

    def __setitem__(self, index: Any, value: Any) -> None:
        check("setitem", [self, *([value] if isinstance(value, Tensor) else [])])
        self.raw[tree_map(here, index)] = here(value)

    def copy_(self, source: Tensor, **_: bool) -> Tensor:  # type: ignore[override]
        self.raw.copy_(here(source))
        return self

    def contiguous(self, memory_format: Any = torch.contiguous_format) -> Tensor:
        same = self.raw.is_contiguous(memory_format=memory_format)
        return self if same else self.clone(memory_format=memory_format)

    def __invert__(self) -> Tensor:
        return torch.bitwise_not(self)

    def __bool__(self) -> bool:
        return bool(self.raw)

    def __int__(self) -> int:
        return int(self.raw)

    def __float__(self) -> float:
        return float(self.raw)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.raw!r} on {self.device}"


def check(name: str, tensors: list[Tensor]) -> None:
    """RuntimeError where tensors of several devices meet; numbers may be anywhere."""
    places = {str(x.device) for x in tensors if x.dim() or isinstance(x, Elsewhere)}
    if len(places) > 1:
        raise RuntimeError(f"{name}: tensors on {' and '.join(sorted(places))}")


def run(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One operator: on the CPU, with results where its arguments are."""
    name = op._schema.name
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    theirs = [x for x in tensors if isinstance(x, Elsewhere)]
    asked = kwargs.get("device")
    moves = name in ("aten::to", "aten::_to_copy", "aten::copy_")
    if moves:
        asked = next((x for x in args[1:] if isinstance(x, torch.device)), asked)
    else:
        check(name, tensors)
    out = op(*tree_map(here, args), **tree_map(here, kwargs))
    if moves:
        source = args[0]
        place = source.device if asked is None else torch.device(asked)
        if out is here(source):
            if place == source.device:
                return source
            out = out.clone()
        return Elsewhere(out, place) if is_elsewhere(place) else out
    place = theirs[0].device if theirs else asked

    def back(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        own = next((tensor for tensor in theirs if tensor.raw is x), None)
        return Elsewhere(x, place) if own is None else own

    return tree_map(back, out)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        theirs = any(isinstance(x, Elsewhere) for x in tree_leaves((args, kwargs)))
        if theirs or is_elsewhere(kwargs.get("device")):
            return run(op, args, kwargs)
        return op(*args, **kwargs)


@contextmanager
def devices(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Devices ``there:0``, ``there:1``... that engines can be loaded on."""
    of_torch, make, move = names.parse_device, torch.tensor, nn.Module.to

    def parse(name: str) -> tuple[torch.device, str]:
        kind, _, number = name.partition(":")
        if kind != "there":
            return of_torch(name)
        if not number.isdecimal():
            raise ModelError(f"unknown device {name!r}")
        return torch.device(KIND, int(number)), name

    def tensor(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        made = make(*args, **kwargs)
        return made if device is None else made.to(device)

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not args or not is_elsewhere(args[0]):
            return move(self, *args, **kwargs)
        for module in self.modules():
            # Not as parameters: those are made of storage, which these have none of.
            for store in (module._parameters, module._buffers):
                for name, held in store.items():
                    if held is not None:
                        store[name] = Elsewhere(held.detach().clone(), args[0])  # type: ignore[assignment]
        return self

    def load(*args: Any, **kwargs: Any) -> Any:
        # transformers leaves buffers uninitialised where torch's functions are not torch's own.
        with _disable_current_modes(), patch.context() as own:
            own.setattr(torch, "tensor", make)
            return of_transformers(*args, **kwargs)

    of_transformers = AutoModelForCausalLM.from_pretrained
    with patch.context() as inner, _Mode():
        inner.setattr(AutoModelForCausalLM, "from_pretrained", load)
        inner.setattr(names, "parse_device", parse)
        inner.setattr(torch, "tensor", tensor)
        inner.setattr(nn.Module, "to", to)
        yield
