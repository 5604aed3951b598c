"""Driving the core's session: one use of an ensemble at a time, step by step."""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dlmom_rs import _core
from dlmom_rs.controller import Controller
from dlmom_rs.knobs import as_json
from dlmom_rs.results import Result, StepEvent, event_of, result_of

if TYPE_CHECKING:
    from dlmom_rs._core import BeliefPacket, CancelToken
    from dlmom_rs.parts import CompressorLike, ConsensusLike, ControllerFactory


class Turnstile:
    """Lets one use at a time through, in the process that loaded the ensemble."""

    def __init__(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._use = ""

    def check(self) -> None:
        """RuntimeError in a forked child, where torch's threads and devices do not work."""
        if os.getpid() != self._process:
            raise RuntimeError(
                "this ensemble was loaded in another process: after os.fork() the child must load "
                "its own (or start processes with multiprocessing's 'spawn')"
            )

    def enter(self, use: str) -> None:
        """RuntimeError where something else is under way."""
        self.check()
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                f"the ensemble is busy with {self._use}: it does one thing at a time. Close or "
                "exhaust a stream first, and give every thread an ensemble of its own"
            )
        self._use = use

    def leave(self) -> None:
        """The use is over."""
        self._lock.release()


@dataclass(frozen=True)
class Parts:
    """A user's own parts."""

    controller: ControllerFactory | None = None
    consensus: ConsensusLike | None = None
    compressor: CompressorLike | None = None
    compress_every: int = 16

    def check(self) -> None:
        """TypeError for a class where an object is due and the other way round."""
        make: Any = self.controller
        if isinstance(make, Controller) or make is Controller:
            raise TypeError(
                "controller: the built-in one is set by config={'controller': {...}}; give a class "
                "with observe(entropy, mode)"
            )
        if make is not None and not callable(make):
            raise TypeError(
                f"controller: {type(make).__name__} cannot be called; give a class, or a function "
                "without arguments, because every sample gets a controller of its own"
            )
        for what, part in (("consensus", self.consensus), ("compressor", self.compressor)):
            if isinstance(part, type):
                raise TypeError(f"{what}: {part.__name__} is a class; give an object of it")
        if not isinstance(self.compress_every, int) or self.compress_every < 1:
            raise _core.ConfigError(f"compress_every: {self.compress_every!r} is not at least 1")


class Running:
    """A session with the ensemble held for it; close it, or use it as a context manager."""

    def __init__(
        self,
        engine: Any,
        turnstile: Turnstile,
        *,
        use: str,
        config: Mapping[str, Any],
        jobs: Sequence[Mapping[str, Any]],
        rows: int,
        parts: Parts,
        cancel: CancelToken | None,
    ) -> None:
        parts.check()
        turnstile.enter(use)
        self._engine = engine
        self._turnstile = turnstile
        self._session: _core.Session | None = None
        self._open = True
        try:
            engine.set_compressor(parts.compressor)
            self._session = _core.Session(
                engine,
                as_json(config),
                json.dumps(jobs),
                max_failures=1,
                rows=rows,
                controller=parts.controller,
                consensus=parts.consensus,
                compress_every=None if parts.compressor is None else parts.compress_every,
                cancel=cancel,
            )
        except BaseException:
            self.close()
            raise

    def turn(
        self, events: bool
    ) -> tuple[
        bool,
        list[tuple[str, BeliefPacket | None]],
        list[tuple[str, list[tuple[int, BeliefPacket]]]],
    ]:
        """One step of every running sample; see ``_core.Session.turn``."""
        self._turnstile.check()
        if self._session is None:
            raise RuntimeError("the session is closed")
        return self._session.turn(events)

    def stats(self) -> dict[str, float]:
        """What has been done so far; see ``_core.Session.stats``."""
        if self._session is None:
            raise RuntimeError("the session is closed")
        return self._session.stats()

    def close(self) -> None:
        """Free the lanes and let others use the ensemble. Harmless when called twice."""
        if not self._open:
            return
        self._open = False
        try:
            if self._session is not None:
                self._session.close()
        finally:
            self._session = None
            self._engine.set_compressor(None)
            self._turnstile.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(Iterator[StepEvent]):
    """The steps of one sample as they happen, and its :attr:`result` after the last.

    The ensemble belongs to the stream until the sample has finished or the stream is closed, by
    :meth:`close`, by leaving a ``with`` block, or by being dropped. Whatever a step raises ends it.
    """

    def __init__(
        self,
        running: Running,
        model: Mapping[str, Any],
        trace: bool,
    ) -> None:
        self._running: Running | None = running
        self._model = model
        self._trace = trace
        self._agent = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ready: deque[StepEvent] = deque()
        self._result: Result | None = None
        self._turning = threading.Lock()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StepEvent:
        with self._alone():
            while not self._ready:
                if self._running is None:
                    raise StopIteration
                try:
                    self._turn(self._running)
                except BaseException:
                    self._end()
                    raise
            return self._ready.popleft()

    @property
    def result(self) -> Result:
        """The result, once the sample has finished.

        Raises RuntimeError before that, and for a stream that was closed or failed.
        """
        if self._result is None:
            how = "has not finished" if self._running is not None else "ended early"
            raise RuntimeError(f"the stream {how}: it has no result")
        return self._result

    def close(self) -> None:
        """Stop here and free the ensemble. Harmless when called twice.

        Raises RuntimeError while a step is under way, in another thread or below this call; a
        :class:`dlmom_rs.CancelToken` stops that.
        """
        with self._alone():
            self._ready.clear()
            self._end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # At the interpreter's end the engine's modules may be gone before the stream is.
        with contextlib.suppress(Exception):
            self._end()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._turning.acquire(blocking=False):
            raise RuntimeError("a step of the stream is under way")
        try:
            yield
        finally:
            self._turning.release()

    def _end(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()

    def _turn(self, running: Running) -> None:
        more, events, finished = running.turn(True)
        steps = [(json.loads(event), packet) for event, packet in events]
        texts = [self._text(event) for event, _ in steps]
        if finished and texts:
            texts[-1] += self._decoder.decode(b"", final=True)
        self._ready.extend(
            event_of(event, packet, text)
            for (event, packet), text in zip(steps, texts, strict=True)
        )
        for outcome, packets in finished:
            self._result = result_of(json.loads(outcome), packets, self._model, self._trace)
        if finished or not more:
            self._end()

    def _text(self, event: Mapping[str, Any]) -> str:
        """What a step prints. Agents of a chain do not share characters."""
        if event["agent"] != self._agent:
            self._agent = event["agent"]
            self._decoder.reset()
        return self._decoder.decode(bytes(event["printed"]))
