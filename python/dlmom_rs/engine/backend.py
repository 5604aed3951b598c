"""The engine: several frozen models and their agents' lanes, behind the calls of the Rust loop.

The engine decides nothing. It loads models, keeps key-value lanes by (slot, agent), turns packets
into input embeddings, forwards them, and returns logits on the host, or what :mod:`.reads` makes
of them on the device. A lane's bits depend only on what was fed to that lane wherever
``info()["bit_invariant"]`` says so.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from .align import Aligner
from .cache import BUCKET, padded_rows
from .device import (
    device_bytes,
    out_of_memory,
    parse_devices,
    parse_dtype,
    peak_rss_bytes,
    physical_cores,
    there,
)
from .embed import embed, embed_dense
from .errors import ModelError
from .experts import Expert, load_expert, one_line
from .graphs import Graph, cuda_graphs
from .lanes import Lanes, PerRowLanes, RowSlotLanes
from .packets import NOBODY, Call, Entries, RawCall, Values, read_call, read_entries
from .prompts import Prompts, tokens
from .reads import CapturedReads, Logits, RawRead, RawReadout, Reader, check_reads, choose
from .selftest import graphs_failure, invariance_failure, reference_failure, widths

#: One agent's logits on the host: (span_logits [spans, V], step_logits [rows, V]), None for none.
Answer = tuple[Tensor | None, Tensor | None]


@dataclass(slots=True)
class Launched:
    """What one agent's forwards leave on the device.

    ``spans`` are the logits [head rows] of each span, ``step`` [*, head rows] those of the step, if
    there is one, of all rows where ``rows`` names those of its slots; ``states`` the hidden states
    that are kept, by slot.
    """

    spans: list[Tensor]
    step: Tensor | None
    rows: list[int] | None
    states: dict[int, Tensor]


class Engine:
    """Models, agents and lanes. Use ``Engine.load``; not safe for use from several threads."""

    def __init__(
        self,
        experts: list[Expert],
        agents: list[int],
        *,
        device_name: str,
        slots: int,
        max_len: int,
    ) -> None:
        self._experts = experts
        self._agents = agents
        #: Where consensus runs, unless it runs on the host.
        self._home = experts[0].device
        self._places = {expert.device for expert in experts}
        self._device_name = device_name
        self._slots = slots
        self._max_len = max_len
        self._reasons: list[str | None] = [None] * len(experts)
        self._position_bytes: dict[int, int] = {}
        self._bit_invariant = False
        self._bit_reason = ""
        self._lanes: list[Lanes] = []
        self._invariant = False
        self._compressor: Any | None = None
        self._aligners: dict[int, Aligner] = {}
        #: Reads rows on the device; None where all logits go to the host.
        self._reader: Reader | None = None
        #: Makes what one agent's steps are captured with; None where nothing is captured.
        self._graphs: Callable[[torch.device], Callable[[], Graph]] | None = None
        #: Reads captured steps where they are; None where nothing is captured or read here.
        self._captured_reads: CapturedReads | None = None
        #: Spans that may be copied, by model; those of agents of one model are the same.
        self._prompts: list[Prompts] = []
        # Entered at every step; making one anew costs more than entering it.
        self._frozen = torch.inference_mode()

    @staticmethod
    def load(
        experts: list[str],
        agents: list[int],
        *,
        device: str,
        dtype: str,
        slots: int,
        max_len: int,
        threads: int | None,
        trust_remote_code: bool,
        deterministic: bool,
        fast: bool,
        attn: str | None,
        kernel: str | None = None,
        graphs: bool = False,
    ) -> "Engine":
        """Load the models, choose each one's path, and test it.

        ``experts`` are model sources (folder, hub id, ``zoo:NAME``); ``agents[a]`` is the model of
        agent ``a``. ``device`` is one name for all, or one for each model, between commas: models
        of one device run one after the other, those of several at the same time. ``slots`` is the
        number of rows wanted, padded (to a multiple of 8, in float32 to 16 at least) where bits
        must not depend on it; ``max_len`` is the longest lane in positions. ``threads`` None means
        the physical cores. ``fast`` gives bit invariance up; ``deterministic`` asks for it on
        devices. ``kernel`` is what consensus runs on: ``rust`` on the host, ``torch`` or ``triton``
        on the first model's device, or ``auto`` (None), see :func:`.reads.choose`. ``graphs``
        captures steps, from packets to logits, and the consensus of captured steps, and replays
        them, on CUDA and HIP; where that cannot be, a warning says why and they are launched.

        Raises ModelError for anything wrong with a model, device, dtype or kernel, WeightsError for
        NaN or Inf weights, ValueError for other arguments.
        """
        if not experts or not agents:
            raise ValueError("an engine needs at least one model and one agent")
        if slots < 1 or max_len < 1:
            raise ValueError(f"slots and max_len must be positive, not {slots} and {max_len}")
        bad = [m for m in agents if not 0 <= m < len(experts)]
        if bad:
            raise ValueError(f"agents name model {bad[0]}, but there are {len(experts)} models")
        if threads is not None and threads < 1:
            raise ValueError(f"threads must be positive, not {threads}")
        torch_dtype = parse_dtype(dtype)
        devices, device_name = parse_devices(device, len(experts))
        torch.set_num_threads(threads or physical_cores())
        on_cpu = all(place.type == "cpu" for place in devices)
        if graphs and any(place.type != "cuda" for place in devices):
            raise ModelError(f"steps cannot be captured on {device_name}: graphs need CUDA or HIP")
        invariant = not fast and (on_cpu or deterministic)
        if invariant and not on_cpu:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        reader = choose(kernel, devices[0], torch_dtype)
        loaded = [
            load_expert(
                source,
                device=place,
                dtype=torch_dtype,
                trust_remote_code=trust_remote_code,
                attn=attn,
                blocks=place.type == "cpu",
            )
            for source, place in zip(experts, devices, strict=True)
        ]
        engine = Engine(
            loaded,
            list(agents),
            device_name=device_name,
            slots=slots,
            max_len=max_len,
        )
        engine._reader = reader
        engine._invariant = invariant
        engine._graphs = cuda_graphs if graphs else None
        if not invariant:
            engine._bit_reason = (
                "given up by the fast setting"
                if fast
                else f"not asked for on {device_name} (deterministic is off)"
            )
        engine.reserve(slots, max_len)
        return engine

    def reserve(self, slots: int, max_len: int) -> None:
        """Make room for ``slots`` rows of ``max_len`` positions, closing every lane.

        Chooses and tests every model's path again, because both depend on the shape of the batch.
        ValueError for sizes below 1. MemoryError where the lanes do not fit: nothing is reserved
        then, and a smaller reserve may be tried.
        """
        if slots < 1 or max_len < 1:
            raise ValueError(f"slots and max_len must be positive, not {slots} and {max_len}")
        self._slots = padded_rows(slots, self._experts[0].dtype) if self._invariant else slots
        self._max_len = max_len
        # Freed before the new ones are allocated.
        self._lanes = []
        self._prompts = []
        self._captured_reads = None
        with torch.inference_mode():
            try:
                self._prepare(self._invariant)
            except Exception as error:
                self._lanes = []
                if out_of_memory(error) and not isinstance(error, MemoryError):
                    raise MemoryError(
                        f"{slots} slots of {max_len} positions do not fit: {one_line(error)}"
                    ) from error
                raise

    def _prepare(self, invariant: bool) -> None:
        """Choose and test every model's path; make every agent's lanes."""
        templates: list[Lanes] = []
        reasons: list[str | None] = []
        failures: list[str] = []
        for expert in self._experts:
            lanes, reason = self._choose(expert)
            templates.append(lanes)
            reasons.append(reason)
            failure = invariance_failure(expert, lanes) if invariant else None
            if failure is not None:
                failures.append(f"{expert.name}: {failure}")
            if isinstance(lanes, RowSlotLanes):
                lanes.widths = widths(expert, lanes, exact=invariant and failure is None)
        self._reasons = reasons
        self._position_bytes = {i: lanes.position_bytes() for i, lanes in enumerate(templates)}
        self._bit_invariant = invariant and not failures
        if invariant:
            self._bit_reason = "; ".join(failures) or (
                "self-test passed: a row's bits depend on neither its slot, its mates, the number "
                f"of slots nor the visible length, at {torch.get_num_threads()} threads"
            )
        # An eighth of the lanes: enough for what is asked at about the same time.
        self._prompts = [
            Prompts(lanes.position_bytes() * self._capacity(expert) * max(1, self._slots // 8))
            for expert, lanes in zip(self._experts, templates, strict=True)
        ]
        if self._graphs is not None:
            self._capture(templates, self._graphs)
        taken: set[int] = set()
        for model in self._agents:
            template = templates[model]
            lanes = template
            if model in taken:
                lanes = self._make(self._experts[model], isinstance(template, RowSlotLanes))
                if isinstance(template, RowSlotLanes) and isinstance(lanes, RowSlotLanes):
                    lanes.allocate_like(template)
                    lanes.min_bucket = template.min_bucket
                    lanes.widths = template.widths
                    if template.graphs is not None and self._graphs is not None:
                        lanes.graphs = self._graphs(lanes.device)
            taken.add(model)
            self._lanes.append(lanes)

    def _capture(
        self, templates: list[Lanes], graphs: Callable[[torch.device], Callable[[], Graph]]
    ) -> None:
        """Let the lanes whose steps can be captured do so; a warning names the others."""
        for expert, lanes in zip(self._experts, templates, strict=True):
            reason: str | None = "its rows are forwarded one at a time"
            if isinstance(lanes, RowSlotLanes):
                reason = graphs_failure(expert, lanes, graphs(expert.device))
            if reason is not None:
                warnings.warn(f"{expert.name}: steps are not captured: {reason}", stacklevel=4)
        captured = any(isinstance(lanes, RowSlotLanes) and lanes.graphs for lanes in templates)
        if captured and self._reader is not None:
            self._captured_reads = self._try_reads(self._reader, graphs(self._home))

    def _try_reads(self, reader: Reader, make: Callable[[], Graph]) -> CapturedReads | None:
        """Reads that are captured, tried on made-up logits; a warning where they cannot be."""
        draws = torch.Generator().manual_seed(0)
        vocab = self._experts[0].vocabulary.size
        logits = torch.randn(2, self._slots, vocab, generator=draws)
        first, second = there(logits, self._home).to(self._experts[0].dtype)
        slots = list(range(0, self._slots, 2))
        read: RawRead = (slots, [0, 1], "ties", 0.1, 1e-6, min(8, vocab), [], [[]] * len(slots))
        launched = {agent: Logits() for agent in (0, 1)}
        captured = CapturedReads(reader, make, self._home)
        try:
            # Twice, of other logits the second time: a capture must not hold on to the first.
            for _ in range(2):
                for agent, rows in ((0, first), (1, second)):
                    launched[agent].add(range(self._slots), rows)
                want = reader.launch(read, launched, self._home)()
                if captured.launch(read, [first, second])() != want:
                    raise RuntimeError("a replayed read differs from a launched one")
                first.copy_(second.flip(0).clone())
        except Exception as error:
            if out_of_memory(error):
                raise
            warnings.warn(f"consensus is not captured: {one_line(error)}", stacklevel=5)
            return None
        return CapturedReads(reader, make, self._home)

    def _make(self, expert: Expert, row_slot: bool) -> Lanes:
        if not row_slot:
            return PerRowLanes(expert, self._slots, expert.device)
        return RowSlotLanes(expert, self._slots, self._capacity(expert), expert.device)

    def _capacity(self, expert: Expert) -> int:
        """The longest lane of a model: what was asked for, within its context."""
        return min(self._max_len, expert.context or self._max_len)

    def _choose(self, expert: Expert) -> tuple[Lanes, str | None]:
        """The lanes of a model's path, tested, and why they are not row-slot lanes."""
        reason = expert.family.reason
        if expert.family.row_slot:
            lanes = self._make(expert, True)
            reason = self._attempt(expert, lanes)
            if reason is None:
                return lanes, None
            reason = f"row-slot self-test failed: {reason}"
        lanes = self._make(expert, False)
        failure = self._attempt(expert, lanes)
        if failure is not None:
            raise ModelError(
                f"{expert.folder}: models of type {expert.model.config.model_type!r} are not "
                f"supported ({reason}; one row at a time: {failure})"
            )
        return lanes, reason

    @staticmethod
    def _attempt(expert: Expert, lanes: Lanes) -> str | None:
        """The reference self-test; an exception from the modelling code is a failure like others.

        Out of memory is not: it says nothing about the family.
        """
        try:
            return reference_failure(expert, lanes)
        except Exception as error:
            if out_of_memory(error):
                raise
            return f"{type(error).__name__}: {one_line(error)}"

    def info(self) -> dict[str, Any]:
        """What was loaded and how it runs; see the keys in DESIGN section 9 and the Rust side."""
        models = [
            expert.info(self._row_slot(i), self._reasons[i], self._position_bytes.get(i, 0))
            for i, expert in enumerate(self._experts)
        ]
        return {
            "models": models,
            "agents": list(self._agents),
            "device": self._device_name,
            "threads": torch.get_num_threads(),
            "slots": self._slots,
            "max_len": self._max_len,
            "consensus_kernel": "rust" if self._reader is None else self._reader.name,
            "graphs": bool(self._lanes)
            and all(isinstance(held, RowSlotLanes) and held.graphs for held in self._lanes),
            "bit_invariant": self._bit_invariant,
            "bit_invariance_reason": self._bit_reason,
            "fixed_length": any(
                isinstance(lanes, RowSlotLanes) and lanes.min_bucket > BUCKET
                for lanes in self._lanes
            ),
        }

    def _row_slot(self, model: int) -> bool:
        return self._experts[model].family.row_slot and self._reasons[model] is None

    def encode(self, model: int, source: dict[str, Any]) -> list[int]:
        """Ids of a prompt for a model's own tokenizer and chat template.

        ``source`` is ``{"kind": "chat", "messages": [{"role", "content"}...]}``,
        ``{"kind": "text", "text"}`` or ``{"kind": "tokens", "ids"}``. Raises ValueError, in one
        line, for an empty or malformed prompt and for one longer than the model's context.
        """
        expert = self._expert(model)
        ids = expert.vocabulary.encode(source)
        if expert.context is not None and len(ids) > expert.context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, {expert.name} has a context of {expert.context}"
            )
        return ids

    def open(self, lanes: list[tuple[int, int, int]]) -> None:
        """Start empty lanes ``(slot, agent, max_len)``, whatever those slots held.

        ValueError, before anything is opened, for a slot or agent there is not, and for a max_len
        beyond the engine's or the model's context.
        """
        for slot, agent, limit in lanes:
            expert = self._agent(agent).expert
            self._check_slot(slot)
            capacity = self._capacity(expert)
            if not 1 <= limit <= capacity:
                what = "the engine's longest lane"
                if capacity < self._max_len:
                    what = f"the context of {expert.name}"
                raise ValueError(f"a lane of {limit} positions was asked for; {what} is {capacity}")
        with torch.inference_mode():
            for slot, agent, limit in lanes:
                self._lanes[agent].open(slot, limit)

    def close(self, slots: list[int]) -> None:
        """Free these slots for every agent and zero what they held."""
        with torch.inference_mode():
            for slot in slots:
                self._check_slot(slot)
                for lanes in self._lanes:
                    lanes.close(slot)

    def fork(self, src: tuple[int, int], dst: tuple[int, int], upto: int | None) -> None:
        """Copy the first ``upto`` positions (None: all) of lane ``src`` into lane ``dst``.

        Lanes are (slot, agent). A closed ``dst`` is opened with the source's max_len. ValueError
        for lanes of different models, and where ``dst`` cannot hold that many positions.
        """
        source, target = self._agent(src[1]), self._agent(dst[1])
        self._check_slot(src[0])
        self._check_slot(dst[0])
        if self._agents[src[1]] != self._agents[dst[1]]:
            raise ValueError(
                f"cannot fork from agent {src[1]} to agent {dst[1]}: their models differ"
            )
        with torch.inference_mode():
            target.fork(source, src[0], dst[0], upto)

    def truncate(self, lane: tuple[int, int], length: int) -> None:
        """Cut a lane (slot, agent) back to its first ``length`` positions."""
        with torch.inference_mode():
            self._agent(lane[1]).truncate(lane[0], length)

    def length(self, slot: int, agent: int) -> int:
        """The positions a lane holds; ValueError for a closed one."""
        return self._agent(agent).length(slot)

    def memory(self) -> dict[str, int]:
        """Bytes in use. The device counts are 0 on a CPU, where all is resident memory.

        ``copied_positions`` are those of prompts that were copied from an earlier forward of the
        same tokens, since lanes were last reserved.
        """
        used = [device_bytes(place) for place in self._places]
        return {
            "device_bytes": sum(now for now, _ in used),
            "peak_device_bytes": sum(peak for _, peak in used),
            "peak_rss_bytes": peak_rss_bytes(),
            "kv_bytes": sum(held.nbytes() for held in self._lanes)
            + sum(prompts.nbytes for prompts in self._prompts),
            "copied_positions": sum(prompts.copied for prompts in self._prompts),
        }

    @overload
    def advance(self, calls: Iterable[RawCall], reads: None = None) -> list[Answer]: ...
    @overload
    def advance(
        self, calls: Iterable[RawCall], reads: Sequence[RawRead]
    ) -> tuple[list[Answer], list[RawReadout]]: ...
    def advance(
        self, calls: Iterable[RawCall], reads: Sequence[RawRead] | None = None
    ) -> list[Answer] | tuple[list[Answer], list[RawReadout]]:
        """Append positions to lanes and return their last logits.

        One call per agent that moves: ``(agent, spans, step, hidden)``. A span ``(slot, ids, probs,
        n, k, payload)`` appends n packets to one lane and is forwarded alone at its exact length;
        the step ``(slots, ids, probs, k, payloads)`` appends one packet to each of its slots in one
        forward. ids are little-endian i64, probs f32, row-major [n, k]; padding entries have
        probability 0 and a valid id. Payloads are embeddings or whole-vocabulary probabilities in
        place of packets, see ``packets.RawSpan`` and ``packets.RawStep``. The slots in ``hidden``
        keep the hidden state of their last position for :meth:`hidden`; the others of this call
        forget theirs.

        Returns per call ``(span_logits [spans, V], step_logits [rows, V])``, None where there is no
        row: on the host in the model's dtype, rows contiguous, the real vocabulary only, in the
        order given. A lane that produced NaN returns NaN in its row and leaves the others alone.

        ``reads`` names rows whose consensus runs on the device, see ``reads.RawRead``. The logits
        of their slots, of every agent, are then left out of what is returned, and a list of
        ``reads.RawReadout`` comes beside it, one for each read.

        Raises ValueError before anything is forwarded for malformed calls and reads, for reads
        where ``info()["consensus_kernel"]`` is rust, and for lanes that are closed or would outgrow
        their max_len. Whatever is raised, every lane is where it was.
        """
        calls = list(calls)
        parsed = []
        for raw in calls:
            expert = self._agent(raw[0]).expert
            parsed.append(read_call(raw, expert.vocabulary.size, expert.hidden))
        if len({call.agent for call in parsed}) != len(parsed):
            raise ValueError("an agent appears in two calls of one advance")
        for call in parsed:
            self._check_room(call)
        reader = self._reader
        if reads is not None and reader is None:
            raise ValueError("nothing is read here: consensus runs on the host")
        staying = check_reads(reads, parsed) if reads else NOBODY
        kept: dict[int, Logits] = {call.agent: Logits() for call in parsed} if staying else {}
        readouts: list[RawReadout] = []
        saved = [(call, self._lanes[call.agent].save()) for call in parsed]
        with self._frozen:
            try:
                # Every agent's forward is launched before anything waits for one. On a CPU a launch
                # is the work itself: beside devices, those come last.
                order = parsed if len(self._places) == 1 else sorted(parsed, key=self._on_cpu)
                ran = {call.agent: self._forward(call) for call in order}
                launched = [ran[call.agent] for call in parsed]
                answers: list[Answer] | None = [
                    self._leaving(call, found, staying, kept)
                    for call, found in zip(parsed, launched, strict=True)
                ]
                if reader is not None and reads is not None:
                    readouts = self._read(reader, reads, parsed, kept)
            except BaseException as error:
                for call, lengths in saved:
                    self._lanes[call.agent].restore(lengths, call.slots())
                if not (out_of_memory(error) and self._stop_keeping()):
                    raise
                answers = None
        if answers is None:
            # Their memory was needed elsewhere.
            return self.advance(calls, reads)
        for call, found in zip(parsed, launched, strict=True):
            held = self._lanes[call.agent].hidden
            if held:
                for slot in call.slots():
                    held.pop(slot, None)
            if found.states:
                held.update(found.states)
        return answers if reads is None else (answers, readouts)

    def _read(
        self,
        reader: Reader,
        reads: Sequence[RawRead],
        calls: Sequence[Call],
        kept: dict[int, Logits],
    ) -> list[RawReadout]:
        """Read rows where they are. Everything is launched before the host waits."""
        stepping = {call.agent: frozenset(call.step_slots) for call in calls}
        # Triton launches on the current device, whatever its arguments are on.
        with torch.cuda.device(self._home) if self._home.type == "cuda" else nullcontext():
            waiting = []
            for read in reads:
                outputs = self._replayed(read, stepping)
                if outputs is None or self._captured_reads is None:
                    waiting.append(reader.launch(read, kept, self._home))
                else:
                    waiting.append(self._captured_reads.launch(read, outputs))
            return [wait() for wait in waiting]

    def _replayed(self, read: RawRead, stepping: dict[int, frozenset[int]]) -> list[Tensor] | None:
        """The graphs' logits [slots, V] of a read's agents, where all its rows are among them."""
        slots, agents, *_, targets = read
        if any(targets):
            return None
        found = []
        for agent in agents:
            lanes = self._lanes[agent]
            held = lanes.replayed if isinstance(lanes, RowSlotLanes) else None
            if held is None or lanes.device != self._home or not stepping[agent].issuperset(slots):
                return None
            found.append(held[:, : lanes.expert.vocabulary.size])
        return found

    def _on_cpu(self, call: Call) -> bool:
        return self._lanes[call.agent].device.type == "cpu"

    def _forward(self, call: Call) -> Launched:
        """One agent's logits where its forwards leave them, and the hidden states it is to keep."""
        lanes = self._lanes[call.agent]
        expert = lanes.expert
        expert.captured = [] if call.hidden else None
        try:
            spans = [self._span(call, slot, feed) for slot, feed in call.spans]
            step: Tensor | None = None
            rows: list[int] | None = None
            if call.step is not None:
                if isinstance(lanes, RowSlotLanes) and lanes.graphs and not call.payloads:
                    step = lanes.step_packets(call.step_slots, call.step)
                    rows = [lanes.row(slot) for slot in call.step_slots]
                else:
                    x = self._inputs(expert, call.step)
                    for places, values in call.payloads:
                        at = there(torch.tensor(places, dtype=torch.int64), expert.device)
                        x = x.index_copy(0, at, self._inputs(expert, values))
                    step = lanes.step(call.step_slots, x)
                if lanes.fed:
                    for slot in call.step_slots:
                        lanes.fed.pop(slot, None)
            states = self._kept(call, expert.captured) if expert.captured else {}
        finally:
            expert.captured = None
        return Launched(spans, step, rows, states)

    def _span(self, call: Call, slot: int, feed: Entries | Values) -> Tensor:
        """A span's last logits, computed, or copied with its keys and values."""
        lanes = self._lanes[call.agent]
        before = lanes.fed.pop(slot, None)
        ids = None if before is None or call.hidden else tokens(feed)
        if before is None or ids is None:
            return lanes.span(slot, self._inputs(lanes.expert, feed))
        fed = (*before, ids)
        prompts = self._prompts[self._agents[call.agent]]
        kept = prompts.find(fed)
        if kept is not None:
            lanes.extend(slot, kept.pairs)
            prompts.copied += kept.pairs[0][0].shape[1]
            logits = kept.logits
        else:
            start = lanes.length(slot)
            logits = lanes.span(slot, self._inputs(lanes.expert, feed))
            pairs = [(keys[:, start:], values[:, start:]) for keys, values in lanes.views(slot)]
            prompts.keep(fed, pairs, logits)
        lanes.fed[slot] = fed
        return logits

    def _stop_keeping(self) -> bool:
        """Give back the memory of prompts for good; whether there was any."""
        return max([prompts.stop() for prompts in self._prompts], default=False)

    def _kept(self, call: Call, states: list[Tensor]) -> dict[int, Tensor]:
        """Hidden states by slot, from what the forwards of a call left, in order."""
        lanes = self._lanes[call.agent]
        kept: dict[int, Tensor] = {}
        found = iter(states)
        for slot, _ in call.spans:
            kept[slot] = next(found)[0]
        if isinstance(lanes, RowSlotLanes):
            rows = next(found) if call.step_slots else None
            for slot in call.step_slots:
                assert rows is not None
                kept[slot] = rows[lanes.row(slot)]
        else:
            for slot in call.step_slots:
                kept[slot] = next(found)[0]
        return {slot: state.clone() for slot, state in kept.items() if slot in call.hidden}

    def _leaving(
        self,
        call: Call,
        found: Launched,
        staying: AbstractSet[int],
        kept: dict[int, Logits],
    ) -> Answer:
        """One agent's logits on the host; those of the slots in ``staying`` go to ``kept``."""
        vocab = self._lanes[call.agent].expert.vocabulary.size
        of = kept.get(call.agent)
        spans: Tensor | None = None
        if found.spans:
            slots = [slot for slot, _ in call.spans]
            spans = _parted(slots, torch.stack(found.spans), vocab, staying, of)
        step = found.step
        if step is not None:
            step = _parted(call.step_slots, step, vocab, staying, of, rows=found.rows)
        return spans, step

    def hidden(self, lanes: list[tuple[int, int]], ridge: bool) -> tuple[bytes, int]:
        """Aligned hidden states of lanes (slot, agent) of one model, see :mod:`.align`.

        Returns the values [n, hidden], rounded to the model's dtype, as little-endian f32, and the
        width. ValueError for a lane that keeps none, and for lanes of several models.
        """
        if not lanes:
            raise ValueError("no lanes were named")
        models = {self._agents[agent] for _, agent in lanes if self._agent(agent)}
        if len(models) != 1:
            raise ValueError("hidden states of several models cannot be aligned at once")
        states = []
        for slot, agent in lanes:
            state = self._agent(agent).hidden.get(slot)
            if state is None:
                raise ValueError(f"slot {slot} of agent {agent} keeps no hidden state")
            states.append(state)
        model = models.pop()
        expert = self._experts[model]
        if model not in self._aligners:
            self._aligners[model] = Aligner(expert.model, expert.embeddings, expert.vocabulary.size)
        with torch.inference_mode():
            aligned = self._aligners[model](torch.stack(states), ridge)
            values = aligned.to(device="cpu", dtype=torch.float32).numpy()
        return values.astype("<f4").tobytes(), values.shape[1]

    def _inputs(self, expert: Expert, feed: Entries | Values) -> Tensor:
        """Input embeddings [n, hidden] of packets or of messages that are none."""
        if isinstance(feed, Entries):
            return embed(expert.embeddings, feed.ids, feed.probs, expert.device)
        if feed.kind == "dense":
            return embed_dense(expert.embeddings, feed.values, expert.device)
        return there(torch.from_numpy(feed.values), expert.device).to(expert.dtype)

    def embed_packets(
        self, model: int, ids: bytearray, probs: bytearray, n: int, k: int
    ) -> tuple[bytes, int]:
        """Mixture embeddings of packets [n, k] under a model's table, without forwarding anything.

        Returns the values [n, hidden], rounded to the model's dtype, as little-endian f32, and the
        width: what ``advance`` would compute from the same packets, bit for bit.
        """
        expert = self._expert(model)
        entries = read_entries(ids, probs, n, k, expert.vocabulary.size)
        with torch.inference_mode():
            x = embed(expert.embeddings, entries.ids, entries.probs, expert.device)
            values = x.to(device="cpu", dtype=torch.float32).numpy()
        return values.astype("<f4").tobytes(), values.shape[1]

    def set_compressor(self, compressor: Any | None) -> None:
        """The object whose ``compress(keys, values, *, layer, agent)`` works on caches; or None.

        It is given one lane's tensors of one layer, ``[heads, positions, head_dim]`` in the
        model's dtype, and answers with a pair of the same shapes.
        """
        if compressor is not None and not hasattr(compressor, "compress"):
            raise TypeError(
                f"compressor: {type(compressor).__name__} has no method "
                "compress(keys, values, *, layer, agent)"
            )
        self._compressor = compressor

    def compress(self, lanes: list[tuple[int, int]]) -> None:
        """Let the compressor rewrite what these lanes (slot, agent) hold; positions stay.

        ValueError without a compressor or for an answer of another shape; whatever the compressor
        raises comes through. Layers rewritten before stay so.
        """
        if self._compressor is None:
            raise ValueError("no KV compressor is set")
        with torch.inference_mode():
            for slot, agent in lanes:
                held = self._agent(agent)
                held.fed.pop(slot, None)
                for layer, (keys, values) in enumerate(held.views(slot)):
                    answer = self._compressor.compress(
                        keys.clone(), values.clone(), layer=layer, agent=agent
                    )
                    _replace(keys, values, answer, type(self._compressor).__name__)

    def _check_room(self, call: Call) -> None:
        lanes = self._lanes[call.agent]
        step = call.step_slots
        known = not step or (min(step) >= 0 and max(step) < self._slots)
        if known and not call.spans and lanes.have_room(step):
            return
        for slot, count in call.appended():
            self._check_slot(slot)
            held, limit = lanes.length(slot), int(lanes.limits[slot])
            if held + count > limit:
                raise ValueError(
                    f"slot {slot} of agent {call.agent} holds {held} of at most {limit} positions: "
                    f"{count} more do not fit"
                )

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self._slots:
            raise ValueError(f"slot {slot} is outside 0..{self._slots}")

    def _agent(self, agent: int) -> Lanes:
        if not 0 <= agent < len(self._agents):
            raise ValueError(f"agent {agent} is outside 0..{len(self._agents)}")
        if not self._lanes:
            raise ValueError("no lanes are reserved: the last reserve failed")
        return self._lanes[agent]

    def _expert(self, model: int) -> Expert:
        if not 0 <= model < len(self._experts):
            raise ValueError(f"model {model} is outside 0..{len(self._experts)}")
        return self._experts[model]


def _replace(keys: Tensor, values: Tensor, answer: Any, name: str) -> None:
    """Write a compressor's answer over one layer of a lane."""
    if not (isinstance(answer, tuple | list) and len(answer) == 2):
        raise ValueError(f"compressor {name}: answer with a pair (keys, values)")
    for what, held, new in (("keys", keys, answer[0]), ("values", values, answer[1])):
        if not isinstance(new, Tensor) or new.shape != held.shape:
            shape = list(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise ValueError(
                f"compressor {name}: {what} of shape {shape} for {list(held.shape)}; a compressor "
                "may change values, not the number of positions"
            )
        held.copy_(new.to(device=held.device, dtype=held.dtype))


def _parted(
    slots: list[int],
    logits: Tensor,
    vocab: int,
    staying: AbstractSet[int],
    kept: Logits | None,
    *,
    rows: list[int] | None = None,
) -> Tensor | None:
    """What of the slots' logits goes to the host: those not in ``staying``.

    The others go to ``kept``, where there are any. ``logits`` [n, head rows] are the slots', or
    those of all rows, of which ``rows`` are the slots'.
    """
    if kept is None or staying.isdisjoint(slots):
        return _readout(logits if rows is None else _chosen(logits, rows), vocab)
    kept.add(slots, logits[:, :vocab], rows)
    at = range(len(slots)) if rows is None else rows
    leaving = [row for row, slot in zip(at, slots, strict=True) if slot not in staying]
    return _readout(_chosen(logits, leaving), vocab) if leaving else None


def _chosen(logits: Tensor, rows: list[int]) -> Tensor:
    """Some rows of logits [*, V]; a view where they follow one another."""
    first = rows[0]
    follow = rows == list(range(first, first + len(rows)))
    return logits[first : first + len(rows)] if follow else logits[rows]


#: Types that are read where they are.
READ = (torch.float32, torch.bfloat16, torch.float16)


def _readout(logits: Tensor, vocab: int) -> Tensor:
    """Logits [n, head rows] on any device -> [n, vocab] on the host in their own dtype.

    On a CPU a view, in which rows may lie further apart than ``vocab``.
    """
    real = logits if logits.shape[1] == vocab else logits[:, :vocab]
    if real.is_cpu and real.dtype in READ:
        host = real
    else:
        host = real.to(device="cpu", dtype=real.dtype if real.dtype in READ else torch.float32)
    return host if host.stride(1) == 1 or vocab <= 1 else host.contiguous()
