"""Consensus by itself, on arrays."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, overload

from dlmom_rs import _core
from dlmom_rs.knobs import as_json, nearest, unknown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

_METHODS = ("arith", "best", "geo", "mean", "mixture", "poe", "ties")
_OPTIONS = {
    "theta", "eps", "center", "reference", "trim", "elect", "tie", "spectral", "weights",
    "calibrate", "temperatures", "gate",
}  # fmt: skip
Method: TypeAlias = Literal["arith", "best", "geo", "mean", "mixture", "poe", "ties"]


@overload
def consensus(
    logits: Tensor | Sequence[Tensor], *, method: Method = "ties", seed: int = 0, **options: Any
) -> Tensor: ...
@overload
def consensus(
    logits: npt.ArrayLike, *, method: Method = "ties", seed: int = 0, **options: Any
) -> npt.NDArray[np.float32]: ...
def consensus(logits: Any, *, method: Method = "ties", seed: int = 0, **options: Any) -> Any:
    """Merge K experts' logits into one row of preferences, as the loop does.

    ``logits`` is [K, V], or a list of K arrays [V]: numpy arrays of any real dtype, or torch
    tensors of any float dtype and device. They are read as float32 and every row is centred,
    ``v = z - mean(z)``. The answer is [V] float32, a numpy array, or for tensors a CPU tensor
    (without a gradient). One expert's is its centred row.

    ``ties`` sets entries below ``theta`` (0.1) in absolute value to 0, elects the sign of the
    majority at each token, and divides the sum of those that agree by their number plus ``eps``
    (1e-6); a tie of signs is 0 (DL-MoM paper, Appendix C). ``mean`` (``geo``) is the logarithmic
    opinion pool, ``arith`` the linear one, ``poe`` the product of experts, ``best`` the surest
    expert, ``mixture`` one drawn by its weight from ``seed``. ``options`` are the other fields of
    ``consensus`` in a suites file: ``center``, ``reference``, ``trim``, ``elect``, ``tie``,
    ``spectral``, ``weights``, ``calibrate``, ``temperatures``, ``gate``; see docs/consensus.md.

    Raises ValueError for other shapes and for NaN or Inf, TypeError for other dtypes, and
    :class:`dlmom_rs.ConfigError` for an unknown ``method`` or option, and for one that is out of
    range or reaches nothing beside the others.
    """
    if method not in _METHODS:
        raise _core.ConfigError(
            f"consensus: unknown method {method!r}; {nearest(str(method), _METHODS)}"
        )
    spec: dict[str, Any] = {"method": method}
    for name, value in options.items():
        if name not in _OPTIONS:
            raise unknown(f"consensus.{name}", _OPTIONS)
        if isinstance(value, Real) and not math.isfinite(value):
            raise _core.ConfigError(
                f"consensus: {name} is {value}; it must be a finite number of at least 0"
            )
        spec[name] = float(value) if isinstance(value, Real) and name in ("theta", "eps") else value
    torch = sys.modules.get("torch")
    if torch is not None and _are_tensors(logits, torch.Tensor):
        rows = _tensor_rows(logits, torch)
        data, vocab = rows.numpy().astype("<f4", copy=False).tobytes(), rows.shape[1]
        merged, _, _ = _core.consensus_core(data, vocab, as_json(spec), seed)
        return torch.frombuffer(bytearray(merged), dtype=torch.float32)
    import numpy as np

    array = _array_rows(logits)
    merged, _, _ = _core.consensus_core(array.tobytes(), array.shape[1], as_json(spec), seed)
    return np.frombuffer(merged, dtype="<f4").astype(np.float32)


def _are_tensors(logits: Any, tensor: type) -> bool:
    if isinstance(logits, tensor):
        return True
    return (
        isinstance(logits, list | tuple)
        and len(logits) > 0
        and all(isinstance(row, tensor) for row in logits)
    )


def _check_shape(shape: Sequence[int]) -> None:
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"logits have shape {list(shape)}; [K, V] is needed, both at least 1")


def _check_lengths(lengths: Sequence[Sequence[int]]) -> None:
    for index, shape in enumerate(lengths):
        if len(shape) != 1:
            raise ValueError(f"logits of expert {index} have shape {list(shape)}; [V] is needed")
        if shape != lengths[0]:
            raise ValueError(
                f"logits of expert {index} have {shape[0]} entries, those of expert 0 "
                f"{lengths[0][0]}"
            )


def _tensor_rows(logits: Any, torch: Any) -> Any:
    """Float32 CPU tensor [K, V]."""
    if not isinstance(logits, torch.Tensor):
        _check_lengths([tuple(row.shape) for row in logits])
        logits = torch.stack([row.detach().to("cpu", torch.float32) for row in logits])
    if not logits.is_floating_point():
        raise TypeError(f"logits are {logits.dtype}; a float dtype is needed")
    _check_shape(logits.shape)
    return logits.detach().to("cpu", torch.float32).contiguous()


def _array_rows(logits: Any) -> npt.NDArray[np.float32]:
    """Little-endian float32 array [K, V]."""
    import numpy as np

    if isinstance(logits, list | tuple):
        rows = [np.asarray(row) for row in logits]
        _check_lengths([row.shape for row in rows])
        logits = np.stack(rows) if rows else np.empty((0, 0), np.float32)
    array = np.asarray(logits)
    # Extension types, such as bfloat16, are of kind V and convert; raw bytes are np.void.
    if array.dtype.kind not in "fiuV" or array.dtype.type is np.void:
        raise TypeError(f"logits are {array.dtype}; a float dtype is needed")
    _check_shape(array.shape)
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(array.astype("<f4"))
