"""What comes out of an ensemble."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dlmom_rs._core import BeliefPacket, Transcript

if TYPE_CHECKING:
    import polars as pl

    from dlmom_rs.parts import Mode


@dataclass(frozen=True)
class Result:
    """What came out of one prompt. Results are equal where everything but the time is."""

    text: str
    """Printed text; in a chain, that of the agent that answered."""
    tokens: list[int]
    """Printed token ids; an end token is neither printed nor counted."""
    stop: str
    """How it ended: ``eos``, ``budget``, ``context``, or with an ``error``: ``nan_inf``,
    ``prompt``, ``backend``, ``handoffs`` (none was left, and somebody should have taken over)."""
    explicit_tokens: int
    """Printed tokens."""
    latent_steps: int
    """Steps whose input was a mixture."""
    latent_segments: list[int]
    """Lengths of the latent segments, in order."""
    switches: int
    """Changes of mode."""
    injected_tokens: int
    """Tokens of injected texts, fed and not counted as printed."""
    handoffs: list[dict[str, Any]]
    """Where control passed from one agent of a chain to another, in order: ``step``, ``from``,
    ``to``, ``trigger``, ``payload``, ``positions``, ``bytes``."""
    prompt_tokens: list[int]
    """Prompt tokens, by expert."""
    forward_tokens: list[int]
    """Positions forwarded, prompt included, by expert."""
    uplink_bytes: int
    """Bytes the experts sent to consensus."""
    downlink_bytes: int
    """Bytes consensus sent to the experts."""
    entropy: dict[str, float]
    """``mean``, ``min`` and ``max`` over steps of the mean of the experts' entropies divided by
    ``ln V``, in [0, 1]."""
    topk_mass: float | None
    """Mean mass of the packets before renormalisation; None without latent steps."""
    noise_kl: float | None
    """Mean KL of filter, noise and control in nats; None without latent steps, and where what was
    fed has tokens that the packet lacks."""
    noise_js: float | None
    """Mean Jensen-Shannon divergence of the same, nats; None without latent steps."""
    agreement: float | None
    """Share of steps in which the experts have one most probable token; None for one expert."""
    latency_s: float = field(compare=False)
    """Seconds from admission to the last step."""
    vocab: int
    """Number of tokens that ids index."""
    fingerprint: int = field(repr=False)
    """Fingerprint of the vocabulary, 64 bits."""
    error: str | None = None
    """Detail of a failure, one line."""
    trace: dict[str, list[Any]] | None = field(default=None, repr=False)
    """Where asked for, the record of every step: columns of equal length, by the names of
    :class:`StepEvent`'s fields."""
    packets: list[tuple[int, BeliefPacket]] = field(default_factory=list, repr=False)
    """The packets of the latent steps as the experts took them in, each with its step."""

    @property
    def total_steps(self) -> int:
        """Latent and explicit steps together."""
        return self.explicit_tokens + self.latent_steps

    def transcript(self) -> Transcript:
        """The packets as one message, which has a wire format: ``transcript().to_bytes()``."""
        return Transcript(self.packets, vocab=self.vocab, fingerprint=self.fingerprint)


@dataclass(frozen=True, slots=True)
class StepEvent:
    """One step of a sample, as it happens."""

    step: int
    """Its number, from 0."""
    mode: Mode
    """``latent`` or ``explicit``."""
    reason: str
    """Why, by the name recorded in traces."""
    switched: bool
    """Whether the mode differs from the last step's; never true of the first."""
    entropy: float
    """Mean of the experts' entropies divided by ``ln V``, in [0, 1]."""
    observed: float
    """The same in the controller's ``alpha_unit``."""
    expert_entropy: list[float]
    """Every expert's entropy in nats."""
    merged_entropy: float
    """Entropy of the merged distribution in nats."""
    mass: float
    """Mass of the k most probable tokens of the merged distribution."""
    noise_kl: float | None
    """KL of filter, noise and control on the packet in nats; 0 in explicit steps, None where what
    was fed has tokens that the packet lacks."""
    noise_js: float
    """Jensen-Shannon divergence of the same, nats."""
    agent: int
    """Place of the agent in control, in a chain; 0 elsewhere."""
    token: int | None
    """The printed token; None in latent steps, for an end token, and where a text is injected."""
    injected_tokens: int
    """Tokens of an injected text, fed in place of a printed one."""
    text: str
    """What can be printed now. A character whose bytes are spread over tokens comes with its last,
    so the texts of all events join to :attr:`Result.text` (but for a character that a failure cut
    short); in a chain, those of the agent that answered."""
    top_ids: list[int]
    """Up to 5 most probable ids, of the packet in latent steps, else of the merged distribution."""
    top_probs: list[float]
    """Their probabilities, renormalised over the k most probable, after noise."""
    top_tokens: list[str]
    """Their text."""
    packet: BeliefPacket | None
    """The packet that the experts take in; None in explicit steps."""
    uplink_bytes: int
    """Bytes sent to consensus in this step."""
    downlink_bytes: int
    """Bytes sent to the experts in this step."""


@dataclass(frozen=True)
class RunResult:
    """A finished run."""

    path: Path
    """The run folder."""

    def __fspath__(self) -> str:
        return os.fspath(self.path)

    def read(
        self, table: Literal["raw", "cells", "tidy"] = "raw", *, text: bool = False
    ) -> pl.DataFrame:
        """The run as a data frame: :func:`dlmom_rs.read_run`."""
        from dlmom_rs.tables import read_run

        return read_run(self.path, table, text=text)


_OUTCOME = frozenset(Result.__dataclass_fields__) - {
    *("vocab", "fingerprint", "packets", "trace", "handoffs"),
}
_EVENT = frozenset(StepEvent.__dataclass_fields__) - {"text", "packet"}


def result_of(
    outcome: Mapping[str, Any],
    packets: list[tuple[int, BeliefPacket]],
    model: Mapping[str, Any],
    trace: bool,
) -> Result:
    """The result of the core's outcome; ``model`` is the engine's information on the first."""
    return Result(
        **{name: outcome[name] for name in _OUTCOME},
        handoffs=outcome["handoff_log"],
        vocab=model["vocab"],
        fingerprint=model["fingerprint"],
        trace=outcome["trace"] if trace else None,
        packets=packets,
    )


def event_of(event: Mapping[str, Any], packet: BeliefPacket | None, text: str) -> StepEvent:
    """The step of the core's event."""
    return StepEvent(**{name: event[name] for name in _EVENT}, packet=packet, text=text)
