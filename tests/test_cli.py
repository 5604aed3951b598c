"""The command line as a user meets it: help, exit statuses, one clear line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Done

Call = Callable[..., Done]

RUN = ["run", "--suite", "A1", "--bench", "tinygsm", "--device", "cpu", "--display", "none"]


def one_line(done: Done, status: int = 2) -> str:
    """The single line on standard error of a command that ended with ``status``."""
    assert done.status == status, done
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    return lines[0]


def test_help_imports_no_heavy_library() -> None:
    code = (
        "import sys\n"
        "from dlmom_rs import _core\n"
        "assert _core.main(['dlmom-rs', '--help']) == 0\n"
        "assert _core.main(['dlmom-rs', 'run', '--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'polars', 'numpy', 'matplotlib', 'rich', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--suite" in done.stdout


@pytest.mark.parametrize("command", [["dlmom-rs"], ["dlmom"], [sys.executable, "-m", "dlmom_rs"]])
def test_every_entry_point_is_the_same_command(command: list[str]) -> None:
    if len(command) == 1:
        command = [str(Path(sys.executable).parent / command[0])]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("dlmom-rs 0.")
    wrong = subprocess.run([*command, "walk"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2


def test_no_arguments_shows_the_help_and_fails(dlmom: Call) -> None:
    done = dlmom()
    assert done.status == 2
    assert "Usage:" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "A9"], ["unknown suite", "A9", "A1, A2, A3, A4"]),
        (["--only", "A1.9"], ["A1.9", "did you mean"]),
        (["--bench", "tinygsn"], ["unknown bench", "did you mean", "tinygsm"]),
        (["--bench", "gsm8k"], ["gsm8k:PATH"]),
        (["--bench", "gsm8k:/no/such/file.jsonl"], ["/no/such/file.jsonl", "cannot read"]),
        (["--dtype", "int3"], ["int3", "possible values"]),
        (["--device", "tpu"], ["'tpu'", "give auto, cpu, cuda, hip or mps"]),
        (["--device", "cpu:1"], ["'cpu:1'", "cuda:1"]),
        (["--device", "cpu,cpu,cpu"], ["3 devices for 2 models", "one for each"]),
        (["--batch-size", "0"], ["--batch-size", "auto"]),
        (["--batch-size", "many"], ["--batch-size", "auto"]),
        (["--alpha", "NaN"], ["alpha", "NaN"]),
        (["--alpha=-1"], ["alpha", "-1"]),
        (["--alpha-unit", "bits"], ["alpha-unit", "normalized"]),
        (["--max-steps", "0"], ["max-steps", "0"]),
        (["--max-switches", "-2"], ["max-switches", "-2"]),
        (["--limit", "0"], ["--limit"]),
        (["--seeds", "1", "1"], ["--seeds", "twice"]),
        (["--seeds", "x"], ["--seeds"]),
        (["--max-handoffs", "2"], ["--max-handoffs", "--topology sequential"]),
        (["--suite", "A4"], ["A4", "not built yet"]),
        (["--fast", "--deterministic"], ["--fast", "--deterministic"]),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(
    dlmom: Call, tmp_path: Path, arguments: list[str], words: list[str]
) -> None:
    base = [*RUN, "--experts", "zoo:tiny-math", "zoo:tiny-general", "--out", tmp_path / "o"]
    # A later flag replaces an earlier one; lists are given once.
    for flag in ("--suite", "--bench", "--device"):
        if flag in arguments:
            at = base.index(flag)
            del base[at : at + 2]
    line = one_line(dlmom(*base, *arguments))
    for word in words:
        assert word in line, line
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", [":2:", "malformed JSON"]),
        ("[1]", [":2:"]),
        ('{"question": "a"}', [":2:", "answer"]),
        ('{"question": 3, "answer": "#### 1"}', [":2:", "question"]),
        ('{"question": "a", "answer": "1"}', [":2:", "####"]),
        ('{"question": "q", "answer": "#### 1"}', [":2:", "already used on line 1"]),
    ],
)
def test_a_bad_bench_row_is_named_by_file_and_line(
    dlmom: Call, tmp_path: Path, row: str, words: list[str]
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "q", "answer": "#### 1"}\n' + row + "\n", encoding="utf-8")
    done = dlmom(
        "run", "--suite", "A1", "--model", "zoo:tiny-math", "--bench", f"gsm8k:{data}",
        "--out", tmp_path / "o",
    )  # fmt: skip
    line = one_line(done)
    for word in [str(data), *words]:
        assert word.lower() in line.lower(), line


def test_an_empty_bench_is_refused(dlmom: Call, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("", encoding="utf-8")
    done = dlmom(
        "run", "--suite", "A1", "--model", "zoo:tiny-math", "--bench", f"gsm8k:{data}",
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert str(data) in one_line(done)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("defaults: {alpha: 0.6\n", []),
        ("suites:\n  B1:\n    - {id: B1.1, gait: trend}\n", ["gait"]),
        ("suites:\n  B1:\n    - {id: B1.1, gate: trend}\n", ["B1.1", "w"]),
        ("suites:\n  B1:\n    - {id: B1.1, k: 0}\n", ["B1.1", "k"]),
        ("suites:\n  B1:\n    - {id: B1.1, cap: -2}\n", ["B1.1", "cap"]),
        ("suites:\n  B1:\n    - {id: B1.1, soft_mode: gumbel, tau: 0}\n", ["B1.1", "tau"]),
        ("suites:\n  B1:\n    - {id: B1.1}\n    - {id: B1.1}\n", ["B1.1"]),
    ],
)
def test_a_bad_suites_file_is_named_with_its_cell(
    dlmom: Call, tmp_path: Path, text: str, words: list[str]
) -> None:
    file = tmp_path / "suites.yaml"
    file.write_text(text, encoding="utf-8")
    done = dlmom(
        "run", "--config", file, "--suite", "B1", "--model", "zoo:tiny-math", "--bench", "tinygsm",
        "--out", tmp_path / "o",
    )  # fmt: skip
    line = one_line(done)
    for word in [str(file), *words]:
        assert word in line, line


def test_bad_models_and_devices_are_one_line(dlmom: Call, tmp_path: Path) -> None:
    out = tmp_path / "o"
    missing = dlmom(*RUN, "--model", tmp_path / "nowhere", "--out", out)
    assert "nowhere" in one_line(missing)
    unknown = dlmom(*RUN, "--model", "zoo:tiny-meth", "--out", out)
    assert "tiny-math" in one_line(unknown)
    (tmp_path / "empty").mkdir()
    assert "config.json" in one_line(dlmom(*RUN, "--model", tmp_path / "empty", "--out", out))
    import torch

    if torch.version.hip is None:
        hip = [word if word != "cpu" else "hip" for word in RUN]
        line = one_line(dlmom(*hip, "--model", "zoo:tiny-math", "--out", out))
        assert "ROCm" in line
    assert not out.exists()


def test_a_packet_larger_than_the_vocabulary_is_refused(dlmom: Call, tmp_path: Path) -> None:
    file = tmp_path / "suites.yaml"
    file.write_text("suites:\n  B1:\n    - {id: B1.1, k: 4000}\n", encoding="utf-8")
    done = dlmom(
        "run", "--config", file, "--suite", "B1", "--model", "zoo:tiny-math", "--bench", "tinygsm",
        "--out", tmp_path / "o", "--device", "cpu", "--display", "none",
    )  # fmt: skip
    line = one_line(done)
    assert "B1.1" in line
    assert "4000" in line


def test_missing_folders_of_aggregate_and_plot(dlmom: Call, tmp_path: Path) -> None:
    assert "nowhere" in one_line(dlmom("aggregate", tmp_path / "nowhere"))
    assert "nowhere" in one_line(dlmom("plot", tmp_path / "nowhere"))
    (tmp_path / "bare").mkdir()
    assert "bare" in one_line(dlmom("aggregate", tmp_path / "bare"))


def test_an_output_that_is_a_file_is_refused(dlmom: Call, tmp_path: Path) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    assert "not a folder" in one_line(dlmom(*RUN, "--model", "zoo:tiny-math", "--out", file))
    assert file.read_text() == "mine"


def test_dry_run_says_what_would_run_and_writes_nothing(dlmom: Call, tmp_path: Path) -> None:
    done = dlmom(
        "run", "--suite", "A1", "A2", "A3", "--experts", "zoo:tiny-math", "zoo:tiny-general",
        "--only", "A1.1", "A1.2", "A2.1", "A3.1", "--bench", "tinygsm", "--limit", 50, "--seeds",
        0, 1, 2, "--out", tmp_path / "o", "--dry-run",
    )  # fmt: skip
    assert done.status == 0, done.err
    assert "same as REF" in done.out
    assert "skipped" in done.out
    # REF and A2.1 draw nothing and run once; A1.2 runs with three seeds.
    assert f"{50 + 50 + 150} samples" in done.out
    assert not (tmp_path / "o").exists()


def test_only_the_binding_leaf_depends_on_pyo3() -> None:
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text(encoding="utf-8"))
    needs: dict[str, list[str]] = {
        package["name"]: [word.split()[0] for word in package.get("dependencies", [])]
        for package in lock["package"]
    }

    def closure(name: str) -> set[str]:
        seen: set[str] = set()
        todo = [name]
        while todo:
            current = todo.pop()
            if current not in seen:
                seen.add(current)
                todo.extend(needs.get(current, []))
        return seen

    ours = [name for name in needs if name.startswith("dlmom-")]
    assert len(ours) >= 7
    for name in ours:
        assert ("pyo3" in closure(name)) == (name == "dlmom-py"), name


def test_the_stub_names_what_the_module_has() -> None:
    from dlmom_rs import _core

    stub = (ROOT / "python" / "dlmom_rs" / "_core.pyi").read_text(encoding="utf-8")
    for name in dir(_core):
        if not name.startswith("__") or name == "__version__":
            assert name in stub, name


def test_events_of_the_log_display_are_json(dlmom: Call, tmp_path: Path) -> None:
    arguments = [word if word != "none" else "log" for word in RUN]
    done = dlmom(
        *arguments, "--only", "REF", "--model", "zoo:tiny-math", "--limit", 3, "--max-steps", 8,
        "--out", tmp_path / "o",
    )  # fmt: skip
    assert done.status == 0, done.err
    events: list[dict[str, Any]] = [json.loads(line) for line in done.err.splitlines()]
    assert [e["event"] for e in events if e["event"] != "progress"] == [
        "cell_started",
        "cell_finished",
    ]
    assert events[-1]["data"]["done"] == 3
