"""Asking an ensemble from Python."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from dlmom_rs import _core
from dlmom_rs.knobs import as_json as _as_json
from dlmom_rs.knobs import changed
from dlmom_rs.results import Result, RunResult, StepEvent, result_of
from dlmom_rs.sessions import Parts, Running, Stream, Turnstile

if TYPE_CHECKING:
    from dlmom_rs._core import CancelToken
    from dlmom_rs.parts import CompressorLike, ConsensusLike, ControllerFactory

__all__ = [
    "DeepLatentMoM",
    "Prompt",
    "Result",
    "RunFailed",
    "RunRefused",
    "RunResult",
    "StepEvent",
    "Stream",
]

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]
"""A user's message, token ids, or a conversation of ``{"role", "content"}``."""


_RESERVE = 32
_OF_ALPHA = ("convergence_threshold", "slope_eps", "var_eps")


class RunFailed(_core.DlmomError):
    """A run ended with another exit status than 0; its own message is on standard error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"run ended with exit status {status}; standard error says why")
        self.status = status


class RunRefused(RunFailed, _core.ConfigError):
    """Exit status 2: an option or input of the run is wrong, and nothing was done."""


def _source(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"kind": "chat", "messages": [{"role": "user", "content": prompt}]}
    if isinstance(prompt, bytes | bytearray | Mapping):
        raise TypeError(
            f"a prompt is text, token ids or a list of messages, not {type(prompt).__name__}"
        )
    parts: list[Any] = list(prompt)
    if all(isinstance(part, Integral) for part in parts):
        return {"kind": "tokens", "ids": [int(part) for part in parts]}
    if not all(isinstance(part, Mapping) for part in parts):
        raise TypeError("a prompt is text, token ids or a list of messages, not a mixture")
    return {"kind": "chat", "messages": [dict(part) for part in parts]}


def _following(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that depend on other fields, as they are with ``changes``."""
    steps = changes.get("max_steps")
    if isinstance(steps, Integral):
        base["answer_reserve"] = min(_RESERVE, int(steps) // 4)
    controller = changes.get("controller")
    if isinstance(controller, Mapping) and "alpha" in controller:
        # The core derives these from alpha where they are not given.
        base["controller"].update(dict.fromkeys(_OF_ALPHA))
    link = changes.get("link")
    if isinstance(link, Mapping):
        if link.get("support") == "packet":
            base["link"]["message"] = "belief"  # consensus cannot merge embeddings
        if link.get("message") == "logits" and "k" not in changes:
            base["k"] = -1  # that is the whole vocabulary
    return base


class DeepLatentMoM:
    """An ensemble of frozen causal language models that reason together in latent space.

    It does one thing at a time: a second call from another thread, or while a stream is open,
    raises RuntimeError. So does every use in a forked child; load the ensemble there.
    """

    def __init__(
        self,
        engine: Any,
        experts: Sequence[str],
        rows: int,
        options: Mapping[str, Any] | None = None,
        seating: str | None = None,
    ) -> None:
        """Wrap a loaded engine; use :meth:`from_pretrained`."""
        self._seating = seating or _core.seating("lockstep", len(experts))
        self._engine = engine
        self._rows = rows
        self._options = dict(options or {})
        self._turnstile = Turnstile()
        self.experts = list(experts)

    @classmethod
    def from_pretrained(
        cls,
        experts: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        device: str | Sequence[str] = "auto",
        dtype: str = "bf16",
        batch_size: int = 8,
        max_len: int = 1024,
        threads: int | None = None,
        trust_remote_code: bool = False,
        deterministic: bool = False,
        fast: bool = False,
        attention: str | None = None,
        topology: str | os.PathLike[str] = "lockstep",
        kernel: str | None = None,
        graphs: bool = False,
    ) -> DeepLatentMoM:
        """Load experts: local folders, hub ids or ``zoo:NAME``, all of one vocabulary.

        ``batch_size`` rows of at most ``max_len`` positions (prompt and steps) run together. On a
        CPU a row's bits depend on neither its slot nor its mates unless ``fast`` gives that up.
        An expert named twice is loaded once and works as two.

        ``device`` is ``auto``, ``cpu``, ``cuda``, ``hip`` or ``mps``, with a number for one of
        several GPUs (``cuda:1``); a list names one for each expert, and those of several devices
        work at the same time.

        ``topology`` is who the agents are and how they meet: ``lockstep`` (every expert is one),
        another name of ``dlmom-rs list topologies`` (``sequential``: a Generalist thinks and hands
        over to a Specialist), or a file of that form. Roles prompt their agents with their own
        words, see ``dlmom-rs list prompts``.

        ``kernel`` is what consensus runs on: ``rust`` on the host, ``torch`` or ``triton`` where
        the logits are; without one, ``rust`` on CPUs and MPS, and on CUDA and HIP the fastest that
        runs. ``info["consensus_kernel"]`` says which; :meth:`run` has its own. ``graphs`` captures
        steps and replays them on CUDA and HIP; ``info["graphs"]`` says whether they are. It has
        been tested without a GPU only.

        Raises ``ModelError`` for a folder, device, dtype or kernel that cannot be used and
        ``WeightsError`` for NaN or Inf weights.
        """
        from dlmom_rs.engine.backend import Engine

        if isinstance(experts, str | os.PathLike):
            experts = [experts]
        names = [os.fspath(expert) for expert in experts]
        seating = _core.seating(os.fspath(topology), len(names))
        seats = [seat["expert"] for seat in json.loads(seating)["seats"]]
        idle = sorted(set(range(len(names))) - set(seats))
        if idle:
            raise _core.ConfigError(f"topology: {names[idle[0]]} is nobody's model")
        models = list(dict.fromkeys(names))
        device = device if isinstance(device, str) else ",".join(device)
        engine = Engine.load(
            models,
            [models.index(names[seat]) for seat in seats],
            device=device,
            dtype=dtype,
            slots=batch_size,
            max_len=max_len,
            threads=threads,
            trust_remote_code=trust_remote_code,
            deterministic=deterministic,
            fast=fast,
            attn=attention,
            kernel=kernel,
            graphs=graphs,
        )
        options = {
            "device": device,
            "dtype": dtype,
            "batch_size": batch_size,
            "threads": threads,
            "trust_remote_code": trust_remote_code,
            "deterministic": deterministic,
            "fast": fast,
            "attention": attention,
            "topology": os.fspath(topology),
        }
        return cls(engine, names, batch_size, options, seating)

    def __repr__(self) -> str:
        return f"DeepLatentMoM({self.experts!r})"

    @property
    def info(self) -> dict[str, Any]:
        """Facts about the loaded models, device and batch."""
        self._turnstile.check()
        information: dict[str, Any] = self._engine.info()
        return information

    def default_config(self, preset: str | None = None) -> dict[str, Any]:
        """The reference pipeline's loop configuration, a plain dictionary to change and pass on.

        Its parts: ``k`` (entries of a packet), ``link`` (``message``: embed, belief, logits or
        hidden; ``encoding``: f32, f16, bf16 or compact; ``support``: full or packet; ``align``),
        ``controller``, ``consensus``, ``noise``, ``filter``, ``sampling``, ``max_steps``,
        ``answer_reserve``, ``answer_cue``, ``triggers``, ``lock_text``, ``enter_signal``,
        ``exit_signal``, ``ranks``, ``topology``, ``controls``.

        ``preset`` is a published method's instead, by its name in ``dlmom-rs list presets``. A
        knob of it that names a token which a model lacks is left out, with a UserWarning. Raises
        ``ConfigError`` for an unknown preset and for one that needs another topology.
        """
        models = self.info["models"]
        text = _core.loop_config(self._seating, len(models) == 1, preset)
        found: dict[str, Any] = json.loads(text)
        config: dict[str, Any] = found["config"]
        config["k"] = min(config["k"], *(model["vocab"] for model in models))
        for name in found["where_known"]:
            known = config[name]
            token = known["text"] if isinstance(known, Mapping) else known
            source = {"kind": "text", "text": token}
            if any(len(self._engine.encode(at, source)) != 1 for at in range(len(models))):
                warnings.warn(
                    f"{preset}: {name} is left out: {token!r} is not one token", stacklevel=2
                )
                config[name] = None
        return config

    @overload
    def generate(
        self,
        prompts: str,
        *,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        trace: bool = False,
        controller: ControllerFactory | None = None,
        consensus: ConsensusLike | None = None,
        compressor: CompressorLike | None = None,
        compress_every: int = 16,
        cancel: CancelToken | None = None,
    ) -> Result: ...
    @overload
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        trace: bool = False,
        controller: ControllerFactory | None = None,
        consensus: ConsensusLike | None = None,
        compressor: CompressorLike | None = None,
        compress_every: int = 16,
        cancel: CancelToken | None = None,
    ) -> Result | list[Result]: ...
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        trace: bool = False,
        controller: ControllerFactory | None = None,
        consensus: ConsensusLike | None = None,
        compressor: CompressorLike | None = None,
        compress_every: int = 16,
        cancel: CancelToken | None = None,
    ) -> Result | list[Result]:
        """Answer one prompt, or several in one batch.

        A prompt is a user's message (``str``), a conversation (list of ``{"role", "content"}``)
        or token ids (list of ``int``); every expert gets the same. ``config`` changes fields of
        :meth:`default_config`, nested ones too: ``{"controller": {"alpha": 0.3, "alpha_unit":
        "nats"}}``. What follows from others by default still does: the trend gate's thresholds
        from ``alpha``, ``answer_reserve`` (a quarter, 32 at most) from ``max_steps``. Draws depend
        on ``seed`` and on the place of a prompt in the list, never on batch size. ``trace`` keeps
        the record of every step.

        ``controller`` (a class or function that makes one per sample), ``consensus`` and
        ``compressor`` are a user's own parts, see :mod:`dlmom_rs.parts`; ``compressor`` works on a
        lane after its prompt and whenever it has grown by ``compress_every`` positions.
        ``cancel`` may be set from another thread.

        A prompt that cannot be run gives a result with an ``error``. Raises ``ConfigError`` naming
        a field that is unknown or out of range, :class:`dlmom_rs.Cancelled`, RuntimeError where
        the ensemble is in use or was loaded before a fork, and whatever a model or part raised,
        the same object, with a note saying where.
        """
        many = not isinstance(prompts, str | bytes | bytearray | Mapping) and not (
            len(prompts) > 0 and isinstance(prompts[0], Integral | Mapping)
        )
        items: list[Prompt] = list(prompts) if many else [prompts]  # type: ignore[arg-type, list-item]
        model = self.info["models"][0]
        parts = Parts(controller, consensus, compressor, compress_every)
        results: dict[str, Result] = {}
        running = self._start(
            "generate()", items, config=config, seed=seed, parts=parts, cancel=cancel
        )
        with running:
            more = True
            while more:
                more, _, finished = running.turn(False)
                for text, packets in finished:
                    outcome = json.loads(text)
                    item = outcome["key"]["item_id"]
                    results[item] = result_of(outcome, packets, model, trace)
        ordered = [results[str(index)] for index in range(len(items))]
        return ordered if many else ordered[0]

    def stream(
        self,
        prompt: Prompt,
        *,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        trace: bool = False,
        controller: ControllerFactory | None = None,
        consensus: ConsensusLike | None = None,
        compressor: CompressorLike | None = None,
        compress_every: int = 16,
        cancel: CancelToken | None = None,
    ) -> Stream:
        """Answer one prompt step by step.

        Iterating gives a :class:`dlmom_rs.StepEvent` for every step; after the last,
        :attr:`Stream.result` is what :meth:`generate` would have answered. The ensemble is the
        stream's until it has finished or is closed, also by a ``with`` block or by dropping it.

        Arguments and errors are those of :meth:`generate`; what is wrong with the arguments is
        raised here, the rest by the step it happens in.
        """
        parts = Parts(controller, consensus, compressor, compress_every)
        model = self.info["models"][0]
        running = self._start(
            "a stream", [prompt], config=config, seed=seed, parts=parts, cancel=cancel
        )
        return Stream(running, model, trace)

    def run(
        self,
        *,
        suite: str | Sequence[str] = (),
        bench: str,
        out: str | os.PathLike[str],
        **options: Any,
    ) -> RunResult:
        """Run ablation suites over a benchmark with these experts, as ``dlmom-rs run`` does.

        ``options`` are the command's, with underscores: ``limit=20``, ``seeds=[0, 1]``,
        ``alpha_unit="nats"``, ``resume=True``, ``display="none"``; None and False leave one out.
        Device, dtype, threads and batch size are the ensemble's where they are not given.
        The models are loaded a second time, beside those of the ensemble, because a run reserves
        lanes of its own; messages and the table go to the process's standard streams.

        Raises :class:`RunFailed` with the exit status, :class:`RunRefused` (a ``ConfigError``) for
        a wrong option or input, KeyboardInterrupt for an interrupted run, which ``resume=True``
        continues.
        """
        taken = {"experts", "model", "backend"} & set(options)
        if taken:
            raise TypeError(f"run() has no option {min(taken)!r}: it runs this ensemble")
        words = ["dlmom-rs", "run"]
        suites = [suite] if isinstance(suite, str) else list(suite)
        given: dict[str, Any] = {
            "experts": self.experts,
            "suite": suites or None,
            "bench": bench,
            "out": os.fspath(out),
            **self._options,
            **options,
        }
        for name, value in given.items():
            if value is None or value is False:
                continue
            words.append("--" + name.replace("_", "-"))
            if value is not True:
                values = value if isinstance(value, list | tuple) else [value]
                words.extend(map(str, values))
        self._turnstile.enter("run()")
        try:
            # What was printed before must not come after what the run prints.
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            status = _core.main(words)
        finally:
            self._turnstile.leave()
        if status == 130:
            raise KeyboardInterrupt
        if status != 0:
            raise RunRefused(status) if status == 2 else RunFailed(status)
        return RunResult(Path(out))

    def _start(
        self,
        use: str,
        prompts: Sequence[Prompt],
        *,
        config: Mapping[str, Any] | None,
        seed: int,
        parts: Parts,
        cancel: CancelToken | None,
    ) -> Running:
        if isinstance(seed, bool) or not isinstance(seed, Integral) or not 0 <= seed < 1 << 64:
            raise _core.ConfigError(f"seed: {seed!r} is not a whole number of 64 bits")
        jobs = [
            {
                "key": {"item_id": str(index), "seed": int(seed), "sample": 0},
                "prompts": json.loads(_core.role_prompts(self._seating, _as_json(_source(prompt)))),
                "trace": True,  # with it come the packets
            }
            for index, prompt in enumerate(prompts)
        ]
        merged = changed(_following(self.default_config(), config or {}), config or {})
        return Running(
            self._engine,
            self._turnstile,
            use=use,
            config=merged,
            jobs=jobs,
            rows=self._rows,
            parts=parts,
            cancel=cancel,
        )
