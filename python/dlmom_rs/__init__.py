"""Deep-Latent Mixture of Models: frozen language models that reason together in latent space.

Importing this package loads neither torch nor transformers nor polars; each is imported by the
function that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlmom_rs._core import (
        BackendError,
        ConfigError,
        DlmomError,
        PacketError,
        ProtocolError,
        RunDataError,
    )
    from dlmom_rs.api import DeepLatentMoM, Result
    from dlmom_rs.tables import read_run

_LAZY = {
    "BackendError": "dlmom_rs._core",
    "ConfigError": "dlmom_rs._core",
    "DeepLatentMoM": "dlmom_rs.api",
    "DlmomError": "dlmom_rs._core",
    "PacketError": "dlmom_rs._core",
    "ProtocolError": "dlmom_rs._core",
    "Result": "dlmom_rs.api",
    "RunDataError": "dlmom_rs._core",
    "read_run": "dlmom_rs.tables",
    "__version__": "dlmom_rs._core",
}

__all__ = [
    "BackendError",
    "ConfigError",
    "DeepLatentMoM",
    "DlmomError",
    "PacketError",
    "ProtocolError",
    "Result",
    "RunDataError",
    "__version__",
    "read_run",
]


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(module), name)


def __dir__() -> list[str]:
    return sorted(__all__)
