"""Asking an ensemble from Python."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dlmom_rs import _core

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Result:
    """What came out of one prompt.

    Counts are steps or tokens, entropies are normalised by ``ln V`` and lie in ``[0, 1]``,
    ``topk_mass`` is the mean mass of the packet before renormalisation, ``noise_kl`` is in nats.
    """

    text: str
    tokens: list[int]
    stop: str
    explicit_tokens: int
    latent_steps: int
    latent_segments: list[int]
    switches: int
    prompt_tokens: list[int]
    forward_tokens: list[int]
    uplink_bytes: int
    downlink_bytes: int
    entropy: dict[str, float]
    topk_mass: float | None
    noise_kl: float | None
    latency_s: float
    error: str | None = None
    trace: dict[str, list[Any]] | None = field(default=None, repr=False)

    @property
    def total_steps(self) -> int:
        """Latent and explicit steps together."""
        return self.explicit_tokens + self.latent_steps


def _source(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"kind": "chat", "messages": [{"role": "user", "content": prompt}]}
    if all(isinstance(part, int) for part in prompt):
        return {"kind": "tokens", "ids": list(prompt)}
    return {"kind": "chat", "messages": [dict(part) for part in prompt]}  # type: ignore[arg-type]


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        inner = merged.get(key)
        # A tagged choice (noise, consensus) is replaced whole: its fields depend on the tag.
        tagged = isinstance(inner, dict) and ("kind" in inner or "method" in inner)
        if isinstance(inner, dict) and isinstance(value, Mapping) and not tagged:
            merged[key] = _merge(inner, value)
        else:
            merged[key] = value
    return merged


class DeepLatentMoM:
    """An ensemble of frozen causal language models that reason together in latent space."""

    def __init__(self, engine: Any, experts: Sequence[str], slots: int, max_len: int) -> None:
        self._engine = engine
        self._slots = slots
        self._max_len = max_len
        self.experts = list(experts)

    @classmethod
    def from_pretrained(
        cls,
        experts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        device: str = "auto",
        dtype: str = "bf16",
        batch_size: int = 8,
        max_len: int = 1024,
        threads: int | None = None,
        trust_remote_code: bool = False,
        deterministic: bool = False,
        fast: bool = False,
        attention: str | None = None,
    ) -> DeepLatentMoM:
        """Load experts: local folders, hub ids or ``zoo:NAME``, all of one vocabulary.

        ``batch_size`` rows of at most ``max_len`` positions (prompt and steps) run together. On a
        CPU a row's bits depend on neither its slot nor its mates unless ``fast`` gives that up.

        Raises ``ModelError`` for a folder, device or dtype that cannot be used and
        ``WeightsError`` for NaN or Inf weights.
        """
        from dlmom_rs.engine.backend import Engine

        if isinstance(experts, str | os.PathLike):
            experts = [experts]
        names = [os.fspath(expert) for expert in experts]
        models = list(dict.fromkeys(names))
        engine = Engine.load(
            models,
            [models.index(name) for name in names],
            device=device,
            dtype=dtype,
            slots=batch_size,
            max_len=max_len,
            threads=threads,
            trust_remote_code=trust_remote_code,
            deterministic=deterministic,
            fast=fast,
            attn=attention,
        )
        return cls(engine, names, batch_size, max_len)

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the loaded models, device and batch."""
        return self._engine.info()

    def default_config(self) -> dict[str, Any]:
        """The reference pipeline's loop configuration, a plain dictionary to change and pass on."""
        config: dict[str, Any] = json.loads(_core.loop_config(len(self.experts)))
        vocab = min(model["vocab"] for model in self._engine.info()["models"])
        config["k"] = min(config["k"], vocab)
        return config

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        trace: bool = False,
    ) -> Result | list[Result]:
        """Answer one prompt, or several in one batch.

        A prompt is a user's message (``str``), a conversation (list of ``{"role", "content"}``)
        or token ids (list of ``int``); every expert gets the same. ``config`` changes fields of
        :meth:`default_config`, nested ones too: ``{"controller": {"alpha": 0.3, "alpha_unit":
        "nats"}}``. Draws depend on ``seed`` and on the place of a prompt in the list, never on
        batch size.

        Raises ``ConfigError`` naming a field that is unknown or out of range, and whatever a model
        raised, with a note saying where.
        """
        many = not isinstance(prompts, str) and not (
            len(prompts) > 0 and isinstance(prompts[0], int | Mapping)
        )
        items: list[Prompt] = list(prompts) if many else [prompts]  # type: ignore[arg-type, list-item]
        jobs = [
            {
                "key": {"item_id": str(index), "seed": seed, "sample": 0},
                "prompts": [_source(prompt)] * len(self.experts),
                "trace": trace,
            }
            for index, prompt in enumerate(items)
        ]
        merged = _merge(self.default_config(), config or {})
        answer = _core.generate(self._engine, json.dumps(merged), json.dumps(jobs), 1, self._slots)
        outcomes = {o["key"]["item_id"]: o for o in json.loads(answer)}
        results = [_result(outcomes[str(index)]) for index in range(len(items))]
        return results if many else results[0]


def _result(outcome: dict[str, Any]) -> Result:
    names = Result.__dataclass_fields__
    return Result(**{key: value for key, value in outcome.items() if key in names})
