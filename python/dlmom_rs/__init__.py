"""Deep-Latent Mixture of Models: frozen language models that reason together in latent space.

=====================  =============================================================================
``DeepLatentMoM``      an ensemble: ``from_pretrained``, ``generate``, ``stream``, ``run``
``Result``             what came out of a prompt: text, counts, bytes, packets, trace
``Stream``             the steps of a sample as they happen
``StepEvent``          one of them
``CancelToken``        stops a call from another thread, which raises ``Cancelled``
``BeliefPacket``       a sparse next-token distribution, with its wire format
``Transcript``         the packets of a sample in order, with theirs
``Controller``         the mode controller by itself: ``observe``, ``replay``
``Decision``           what it decides
``consensus``          merges logits [K, V] of numpy or torch
``ControllerLike``     what a user's own controller looks like
``ConsensusLike``      the same of a consensus
``CompressorLike``     the same of a compressor of key-value caches
``read_run``           a run folder as a polars data frame
``RunResult``          a finished run
``DlmomError``         base of the errors: ``BackendError``, ``Cancelled``, ``ConfigError``,
                       ``PacketError``, ``ProtocolError``, ``RunDataError``, ``RunFailed``,
                       ``RunRefused``
=====================  =============================================================================

Importing this package loads neither torch nor transformers nor polars nor numpy; each is imported
by the function that needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlmom_rs._core import (
        BackendError,
        BeliefPacket,
        Cancelled,
        CancelToken,
        ConfigError,
        Decision,
        DlmomError,
        PacketError,
        ProtocolError,
        RunDataError,
        Transcript,
        __version__,
    )
    from dlmom_rs.api import DeepLatentMoM, RunFailed, RunRefused
    from dlmom_rs.controller import Controller
    from dlmom_rs.merging import consensus
    from dlmom_rs.parts import CompressorLike, ConsensusLike, ControllerLike
    from dlmom_rs.results import Result, RunResult, StepEvent
    from dlmom_rs.sessions import Stream
    from dlmom_rs.tables import read_run

_HOMES = {
    "dlmom_rs._core": (
        "BackendError BeliefPacket CancelToken Cancelled ConfigError Decision DlmomError "
        "PacketError ProtocolError RunDataError Transcript __version__"
    ),
    "dlmom_rs.api": "DeepLatentMoM RunFailed RunRefused",
    "dlmom_rs.controller": "Controller",
    "dlmom_rs.merging": "consensus",
    "dlmom_rs.parts": "CompressorLike ConsensusLike ControllerLike",
    "dlmom_rs.results": "Result RunResult StepEvent",
    "dlmom_rs.sessions": "Stream",
    "dlmom_rs.tables": "read_run",
}
_LAZY = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "BackendError",
    "BeliefPacket",
    "CancelToken",
    "Cancelled",
    "CompressorLike",
    "ConfigError",
    "ConsensusLike",
    "Controller",
    "ControllerLike",
    "Decision",
    "DeepLatentMoM",
    "DlmomError",
    "PacketError",
    "ProtocolError",
    "Result",
    "RunDataError",
    "RunFailed",
    "RunRefused",
    "RunResult",
    "StepEvent",
    "Stream",
    "Transcript",
    "__version__",
    "consensus",
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
