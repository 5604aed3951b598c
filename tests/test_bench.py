"""The benchmarks themselves: that they compare what they say, and fail where they must."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from dlmom_rs import _core
from dlmom_rs.bench import __main__ as command
from dlmom_rs.bench import consensus, models, step
from dlmom_rs.bench.timing import Entry, in_turns

ROOT = Path(__file__).parents[1]


def test_a_ratio_says_how_many_times_better_ours_is() -> None:
    assert Entry("a", 2.0, 6.0, "ms", "b").ratio == 3.0
    assert Entry("a", 6.0, 2.0, "samples/s", "b", more=True).ratio == 3.0
    assert Entry("a", 0.0, 2.0, "ms", "b").ratio == float("inf")
    assert Entry("a", 2.0, 6.0, "ms", "b").as_dict()["ratio"] == 3.0


def test_variants_take_turns_and_medians_are_of_one_call() -> None:
    now = 0.0
    calls: list[str] = []
    costs = {"quick": iter([9.0, 1.0, 1.0, 5.0, 5.0, 2.0, 2.0]), "slow": iter([9.0] + [7.0] * 6)}

    def work(name: str) -> None:
        nonlocal now
        calls.append(name)
        now += next(costs[name])

    found = in_turns(
        {name: lambda name=name: work(name) for name in costs},
        rounds=3,
        clock=lambda: now,
        inner=2,
    )
    # The first call of each is not measured.
    assert found == {"quick": 2.0, "slow": 7.0}
    assert calls[:2] == ["quick", "slow"]
    turns = [calls[i] for i in range(2, len(calls), 2)]
    assert turns == ["quick", "slow", "slow", "quick", "quick", "slow"]
    with pytest.raises(ValueError, match="positive"):
        in_turns({}, rounds=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_sides_of_the_consensus_benchmark_compute_the_same(dtype: torch.dtype) -> None:
    given = consensus.logits(3, 2, dtype, seed=1, vocab=2000)
    assert given.shape == (3, 2, 2000)
    # The paper's eps of 1e-9 is not ours; in half precision its sums are too coarse to compare.
    entropy, ids, probs = consensus.appendix_c(given.float(), k=10)
    read = _core.Kernel().read(list(given.unbind(0)), 10, consensus.SPEC)
    for row, (entropies, _, own_ids, own_probs, _) in enumerate(read):
        normal = [h / torch.log(torch.tensor(2000.0)).item() for h in entropies]
        assert normal == pytest.approx(entropy[:, row].tolist(), abs=1e-4)
        assert set(own_ids) == set(ids[row].tolist())
        assert sorted(own_probs) == pytest.approx(sorted(probs[row].tolist()), abs=1e-4)


def test_attention_is_measured_over_ragged_rows() -> None:
    entry = step._attention(rows=3, rounds=1)
    assert entry.facts == {"positions": 512 + 288 + 64, "longest": 512}
    assert entry.ours > 0
    assert entry.baseline > 0


def test_orchestration_is_what_is_left_of_a_step() -> None:
    entry = step._orchestration(rows=2, rounds=1)
    facts = entry.facts
    assert entry.ours > 0
    assert entry.baseline > 0
    left = entry.ours - entry.baseline - facts["consensus_us"]
    assert facts["orchestration_us"] == pytest.approx(left)
    assert facts["goal_us"] == 110


def test_a_run_that_ends_early_is_no_measurement(tmp_path: Path) -> None:
    pair = models.ensemble([str(models.tiny(tmp_path / "model"))] * 2, 2)
    sources = [models.tokens(8, salt) for salt in range(2)]
    step._loop(pair, sources, "always_latent", 5)()
    stats = models.run(pair, sources, models.loop_config(pair, max_steps=4, answer_reserve=0), 2)
    assert (stats["samples"], stats["steps"], stats["rows"]) == (2, 4, 8)
    assert stats["full_rows"] == 2 * stats["full_steps"]
    with pytest.raises(RuntimeError, match="rows in 900 steps"):
        step._loop(pair, sources, "always_explicit", 900)()


def fake(rounds: int, threads: int) -> Iterator[Entry]:
    yield Entry("one", 1.0, float(rounds), "ms", f"{threads} threads", facts={"seen": 0.5})


def test_the_command_prints_a_line_each_and_writes_what_it_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(command, "BENCHES", {"fake": fake})
    out = tmp_path / "found.json"
    assert command.main(["--json", str(out), "--rounds", "3", "--threads", "2"]) == 0
    line = capsys.readouterr().out
    assert "one" in line
    assert "3.00x" in line
    assert "seen 0.5" in line
    found = json.loads(out.read_text(encoding="utf-8"))
    assert (found["rounds"], found["threads"]) == (3, 2)
    assert found["environment"]["torch"] == torch.__version__
    (entry,) = found["entries"]
    assert (entry["bench"], entry["name"], entry["ratio"]) == ("fake", "one", 3.0)
    assert (entry["ours"], entry["baseline"], entry["against"]) == (1.0, 3.0, "2 threads")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--rounds", "0"], "0 is not at least 1"),
        (["--json", "/no/such/folder/x.json"], "/no/such/folder is no folder"),
    ],
)
def test_wrong_words_end_with_2(words: list[str], message: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dlmom_rs.bench", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr.strip().splitlines()[-1]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The gate with counts that it is told."""
    spec = importlib.util.spec_from_file_location("gate", ROOT / "benches" / "gate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recorded = tmp_path / "instructions.json"
    counts = dict.fromkeys(module.WORKS, 1000)
    recorded.write_text(json.dumps({"compiler": "here", "instructions": counts}), encoding="utf-8")
    monkeypatch.setattr(module, "RECORDED", recorded)
    monkeypatch.setattr(module, "compiler", lambda: "here")
    monkeypatch.setattr(module, "target_directory", lambda: tmp_path)
    monkeypatch.setattr(module.shutil, "which", lambda _: "/usr/bin/valgrind")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: None)
    monkeypatch.setattr(sys, "argv", ["gate.py"])
    return module


@pytest.mark.parametrize(("now", "status"), [(1000, 0), (900, 0), (1010, 0), (1011, 1)])
def test_a_count_may_grow_by_a_hundredth(
    gate: ModuleType, monkeypatch: pytest.MonkeyPatch, now: int, status: int
) -> None:
    monkeypatch.setattr(gate, "count", lambda *_: now)
    assert gate.main() == status


def test_counts_of_another_compiler_say_nothing(
    gate: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gate, "count", lambda *_: 1000)
    monkeypatch.setattr(gate, "compiler", lambda: "elsewhere")
    with pytest.raises(SystemExit) as ended:
        gate.main()
    assert ended.value.code == 2
    line = capsys.readouterr().err
    assert "of here, this is elsewhere" in line
    assert "--update" in line
    monkeypatch.setattr(sys, "argv", ["gate.py", "--update"])
    assert gate.main() == 0
    assert json.loads(gate.RECORDED.read_text(encoding="utf-8"))["compiler"] == "elsewhere"


def test_what_is_recorded_is_what_is_counted() -> None:
    recorded = json.loads((ROOT / "benches" / "instructions.json").read_text(encoding="utf-8"))
    assert set(recorded["instructions"]) == {
        "attention",
        "consensus",
        "packet",
        "controller",
        "round",
    }
    assert all(count > 0 for count in recorded["instructions"].values())
