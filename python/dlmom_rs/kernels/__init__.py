"""Consensus on logits that stay on their device.

Two implementations of one function: :func:`torch_ref.consensus`, in plain torch on any device, and
:func:`triton_kernels.consensus`, fused, on CUDA and HIP. Both give a :class:`readout.Readout` and
are held to the Rust reference, ``dlmom_core::read_row``. Importing this package costs nothing:
torch comes in with :func:`choose`, triton where it is chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from .readout import Readout

#: Names that :func:`choose` takes.
NAMES = ("torch", "triton")


def choose(
    device: torch.device | str, dtype: torch.dtype, name: str | None = None
) -> Callable[..., Readout]:
    """The ``consensus`` function for logits of this device and dtype.

    Without a ``name`` that is triton's on CUDA and HIP devices, where triton can be imported and
    the dtype is float32, bfloat16 or float16; torch's everywhere else. ``name`` ("torch", "triton")
    overrides it: ImportError then where triton cannot be imported, ValueError for another name and
    for a dtype that the named one does not read.
    """
    import torch

    if name is not None and name not in NAMES:
        raise ValueError(f"unknown kernels {name!r}; known: {', '.join(NAMES)}")
    fused = dtype in (torch.float32, torch.bfloat16, torch.float16)
    if name == "triton" and not fused:
        raise ValueError(f"triton kernels read float32, bfloat16 and float16, not {dtype}")
    # HIP devices call themselves cuda.
    if name == "triton" or (name is None and fused and torch.device(device).type == "cuda"):
        try:
            from . import triton_kernels

            return triton_kernels.consensus
        except ImportError:
            if name is not None:
                raise
    from . import torch_ref

    return torch_ref.consensus
