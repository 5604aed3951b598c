"""Captured steps, without a GPU: a capture is emulated by the operators it recorded.

A CUDA graph replays kernels on the addresses they were launched with. The emulation records every
operator with its very tensors and does the same again, into the very tensors it returned. A step
that took anything from the host, or put results elsewhere, gives other bits when it is replayed.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedConfig,
    Qwen2Config,
)

from dlmom_rs.engine import testing
from dlmom_rs.engine.backend import Engine
from dlmom_rs.engine.errors import ModelError
from dlmom_rs.engine.lanes import Given, RowSlotLanes
from dlmom_rs.engine.reads import RawRead
from dlmom_rs.engine.testing import (
    Packet,
    advance,
    load,
    prefill,
    printed,
    save_model,
    span,
    step,
)
from dlmom_rs.kernels.readout import Readout

SIZES = {**testing.SIZES, "hidden_size": 32, "intermediate_size": 64}
FAMILIES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=16),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=16, pad_token_id=None),
}


#: Operators whose results the host waits for.
WAITING = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero.default,
)


class Recorded:
    """A ``Graph`` of recorded operators."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self._ops: list[tuple[Any, Any, Any, Any]] = []
        self._output: Tensor | None = None
        self.replays = 0

    def capture(self, work: Callable[[], Tensor]) -> None:
        work()
        ops = self._ops

        class Recording(TorchDispatchMode):
            def __torch_dispatch__(
                self, op: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                if op in WAITING:
                    raise RuntimeError("a captured step waits for a value on the host")
                out = op(*args, **(kwargs or {}))
                ops.append((op, args, kwargs or {}, out))
                return out

        with Recording():
            self._output = work()

    def replay(self) -> Tensor:
        assert self._output is not None
        self.replays += 1
        with _disable_current_modes():
            self._again()
        return self._output

    def _again(self) -> None:
        for op, args, kwargs, out in self._ops:
            given = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            again = op(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                # Views, and what was written in place, are where they were.
                if isinstance(old, Tensor) and storage(old) not in given:
                    old.copy_(new)


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def capture(engine: Engine) -> None:
    """Capture the steps of a CPU engine, through the self-test that a GPU's go through."""
    engine._graphs = lambda _: Recorded
    engine.reserve(engine.info()["slots"], engine.info()["max_len"])


def story(engine: Engine, agents: int) -> list[Tensor]:
    """Prompts, refills, waiting rows and several visible lengths; every step's logits."""
    found: list[Tensor] = []

    def go(rows: dict[int, Packet]) -> None:
        for agent in range(agents):
            found.extend(logits.clone() for logits in advance(engine, rows, agent).values())

    everyone = range(engine.info()["slots"])
    engine.open([(slot, agent, 150) for slot in everyone for agent in range(agents)])
    for slot in everyone:
        for agent in range(agents):
            prefill(engine, slot, printed(range(1, 4 + 3 * slot)), agent)
    for turn in range(4):
        go({slot: [(turn + slot, 0.5), (7, 0.5)] for slot in (1, 3)})
        go({slot: [(turn + slot, 1.0)] for slot in everyone})
    engine.close([3])
    engine.open([(3, agent, 150) for agent in range(agents)])
    for agent in range(agents):
        prefill(engine, 3, printed([n % 250 for n in range(1, 126)]), agent)
    for turn in range(6):
        go({3: [(turn, 0.75), (9, 0.25)], 0: [(turn + 1, 1.0)]})
    engine.close(list(everyone))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options", [{"attn": "sdpa"}, {"attn": "eager"}, {"dtype": "bf16", "attn": "sdpa"}]
)
def test_replayed_steps_have_the_bits_of_launched_ones(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    folder = save_model(tmp_path / family, FAMILIES[family])
    engine = load(folder, agents=[0, 0], max_len=150, **options)
    launched = story(engine, 2)
    Recorded.made = 0
    capture(engine)
    assert engine.info()["graphs"] is True
    made = Recorded.made
    assert made > 0
    replayed = story(engine, 2)
    assert len(launched) == len(replayed)
    assert all(map(torch.equal, launched, replayed))
    # A graph for every visible length of either agent, and no more the second time.
    assert Recorded.made > made
    made = Recorded.made
    assert all(map(torch.equal, launched, story(engine, 2)))
    assert Recorded.made == made


def test_all_of_a_step_is_one_graph(tmp_path: Path) -> None:
    """Soft embedding, mask and forward: outside of the graph only views of its result are made."""
    engine = load(save_model(tmp_path / "model", FAMILIES["qwen2"]), max_len=150, attn="sdpa")
    capture(engine)
    rows: dict[int, Packet] = {slot: [(slot, 0.5), (7, 0.5)] for slot in range(4)}

    def second_step() -> tuple[dict[int, Tensor], list[str]]:
        engine.open([(slot, 0, 100) for slot in rows])
        for slot in rows:
            prefill(engine, slot, printed([1, 2, slot]))
        advance(engine, rows)
        with Launches() as launches:
            return advance(engine, rows), launches.names

    mixed, launched = second_step()
    assert set(launched) <= {"view", "slice", "alias", "detach", "unbind"}
    engine._graphs = None
    engine.reserve(8, 150)
    again, launched = second_step()
    assert "embedding" in launched
    assert len(launched) > 50
    assert all(torch.equal(mixed[slot], again[slot]) for slot in rows)


class Launches(TorchDispatchMode):
    """Notes the operators that are launched, outside of graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(op.overloadpacket.__name__)
        return op(*args, **(kwargs or {}))


def reads_story(engine: Engine) -> tuple[list[Any], list[str]]:
    """Steps of two agents whose rows are read where they are: all of them, some, in another order,
    by other operators, one agent's alone, with targets, with one prompt among them; what was read,
    and what was launched besides graphs where all was captured before."""
    found: list[Any] = []
    engine.open([(slot, agent, 100) for slot in range(4) for agent in (0, 1)])
    for slot in range(4):
        for agent in (0, 1):
            prefill(engine, slot, printed([1, 2, slot]), agent)

    def go(slots: list[int], reads: list[RawRead], prompt: int | None = None) -> None:
        steps = step({slot: [(slot + 1, 0.5), (7, 0.5)] for slot in slots})
        spans = [] if prompt is None else [span(prompt, printed([3, 4]))]
        answers, readouts = engine.advance([(a, spans, steps, []) for a in (0, 1)], reads)
        for of_spans, of_steps in answers:
            found.extend(x.clone() for x in (of_spans, of_steps) if x is not None)
        found.append(readouts)

    def read(slots: list[int], *, agents: tuple[int, ...] = (0, 1), **options: Any) -> RawRead:
        targets = options.get("targets", [[]] * len(slots))
        role = options.get("role", [257, 258])
        operator = options.get("operator", "ties")
        return (slots, list(agents), operator, 0.1, 1e-6, options.get("k", 8), role, targets)

    for _ in range(3):
        go([0, 1, 2, 3], [read([0, 1, 2, 3])])
        go([3, 0, 1], [read([1])])
        go([0, 1, 3], [read([3, 0, 1])])
        go([0, 1, 2, 3], [read([3, 1])])
        go([1, 3], [read([3]), read([1], operator="mean", k=5, role=[])])
        go([0, 2], [read([2, 0], agents=(1,))])
    go([0, 1], [read([0, 1], targets=[[5], [6, 7]])])
    go([0, 1], [read([0, 2, 1])], prompt=2)
    with Launches() as launches:
        # Slots that do not follow one another: nothing of them is copied to be read.
        go([0, 1, 3], [read([3, 0, 1])])
        go([3, 1], [read([3]), read([1], operator="mean", k=5, role=[])])
    engine.close(list(range(4)))
    return found, launches.names


def test_reads_of_captured_steps_are_captured(tmp_path: Path) -> None:
    folders = [
        save_model(tmp_path / name, FAMILIES["qwen2"], seed=seed)
        for seed, name in enumerate(("one", "other"))
    ]
    engine = load(*folders, max_len=150, attn="sdpa", kernel="torch")
    launched, many = reads_story(engine)
    assert "exp" in many
    capture(engine)
    replayed, few = reads_story(engine)
    assert len(launched) == len(replayed)
    for a, b in zip(launched, replayed, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    # Views, the copy to the host, and what becomes of it there.
    views = {"view", "slice", "alias", "detach", "unbind"}
    host = {"_to_copy", "to", "index", "lift_fresh", "resolve_conj", "resolve_neg"}
    assert set(few) <= views | host
    reads = engine._captured_reads
    assert reads is not None
    # One for each operator, k, role and place of logits.
    made = len(reads._captured)
    reads_story(engine)
    assert len(reads._captured) == made


def test_reads_that_cannot_be_captured_are_launched_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_model(tmp_path / "model", FAMILIES["qwen2"])
    engine = load(folder, agents=[0, 0], max_len=150, attn="sdpa", kernel="torch")
    launched, _ = reads_story(engine)
    flat = Readout.flat

    def waits(self: Readout) -> Tensor:
        assert int(self.ids.sum()) >= 0
        return flat(self)

    def stale(self: Readout) -> Tensor:
        return torch.from_numpy(flat(self).numpy().copy())

    for broken, reason in ((waits, "waits for a value"), (stale, "differs from a launched one")):
        with monkeypatch.context() as patch:
            patch.setattr(Readout, "flat", broken)
            with pytest.warns(UserWarning, match=f"consensus is not captured: .*{reason}"):
                capture(engine)
        assert engine.info()["graphs"] is True
        assert engine._captured_reads is None
        for a, b in zip(launched, reads_story(engine)[0], strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_step_that_keeps_hidden_states_is_launched(tmp_path: Path) -> None:
    engine = load(save_model(tmp_path / "model", FAMILIES["qwen2"]), attn="sdpa")
    capture(engine)
    states = []
    for hidden in ((), (0,)):
        engine.open([(0, 0, 60)])
        prefill(engine, 0, printed([1, 2, 3]))
        logits = advance(engine, {0: [(4, 1.0)]}, hidden=hidden)[0]
        states.append(logits.clone())
    assert torch.equal(states[0], states[1])
    assert len(engine.hidden([(0, 0)], False)[0]) == 4 * 32


def test_what_cannot_be_captured_is_launched_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(save_model(tmp_path / "model", FAMILIES["qwen2"]), max_len=150, attn="sdpa")
    launched = story(engine, 1)

    def stale(self: RowSlotLanes, given: Given, inputs: Tensor, *sizes: int) -> Tensor:
        """Where to write, from the host: right in the capture's own step, and never again."""
        given.writes = torch.from_numpy(given._where[1].copy())
        return run(self, given, inputs, *sizes)

    def waits(self: RowSlotLanes, given: Given, inputs: Tensor, *sizes: int) -> Tensor:
        assert float(inputs.sum()) < 1e9
        return run(self, given, inputs, *sizes)

    run = RowSlotLanes._forward
    for broken, reason in ((waits, "waits for a value"), (stale, "other bits than a launched one")):
        with monkeypatch.context() as patch:
            patch.setattr(RowSlotLanes, "_forward", broken)
            with pytest.warns(UserWarning, match=f"not captured: RuntimeError: .*{reason}"):
                capture(engine)
            assert engine.info()["graphs"] is False
            if broken is waits:
                assert all(map(torch.equal, launched, story(engine, 1)))

    class Elsewhere(Recorded):
        """A graph whose results are those of its capture for ever."""

        def replay(self) -> Tensor:
            assert self._output is not None
            return self._output

    engine._graphs = lambda _: Elsewhere
    with pytest.warns(UserWarning, match="other bits than a launched one"):
        engine.reserve(8, 150)
    assert engine.info()["graphs"] is False
    lanes = engine._lanes[0]
    assert isinstance(lanes, RowSlotLanes)
    assert not lanes._captured, "what was captured is freed"
    assert all(map(torch.equal, launched, story(engine, 1)))


def test_out_of_memory_is_no_reason_to_launch(tmp_path: Path) -> None:
    engine = load(save_model(tmp_path / "model", FAMILIES["qwen2"]), attn="sdpa")

    class Full(Recorded):
        def capture(self, work: Callable[[], Tensor]) -> None:
            work()
            raise MemoryError("no room for a graph")

    engine._graphs = lambda _: Full
    with pytest.raises(MemoryError, match="no room for a graph"):
        engine.reserve(8, 128)


def test_captured_steps_are_computed_for_all_rows(tmp_path: Path) -> None:
    """A graph of every number of rows would be captured for launches that it is to save."""
    engine = load(save_model(tmp_path / "model", FAMILIES["qwen2"]), slots=40, attn="sdpa")
    lanes = engine._lanes[0]
    assert isinstance(lanes, RowSlotLanes)
    assert lanes.widths == (16, 24, 40)
    capture(engine)
    captured = engine._lanes[0]
    assert isinstance(captured, RowSlotLanes)
    assert captured.graphs is not None
    assert captured.widths == (40,)


def test_rows_forwarded_one_at_a_time_are_not_captured(tmp_path: Path) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    engine = load(save_model(tmp_path / "phi", PhiConfig(**sizes)))
    with pytest.warns(UserWarning, match="one at a time"):
        capture(engine)
    assert engine.info()["graphs"] is False


def test_a_cpu_has_no_graphs(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", FAMILIES["qwen2"])
    with pytest.raises(ModelError, match="graphs need CUDA or HIP"):
        load(folder, graphs=True)
    assert load(folder).info()["graphs"] is False
