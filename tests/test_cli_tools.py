"""The commands that inspect: list, doctor, validate, replay, schema, completions, and the mock."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Done, rows_of

Call = Callable[..., Done]


def good(done: Done) -> str:
    """What a command that succeeded printed."""
    assert done.status == 0, done
    return done.out


def one_line(done: Done, status: int = 2) -> str:
    """The single line on standard error of a command that ended with ``status``."""
    assert done.status == status, done
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def mock_run(dlmom: Call, tmp_path: Path) -> Path:
    """A finished run of three cells on the mock, over items of a shipped benchmark."""
    out = tmp_path / "run"
    words = ["--suite", "A1", "A2", "--only", "A1.1", "A1.2", "A2.5", "--experts", "one", "two"]
    more = ["--bench", "tinygsm", "--limit", 4, "--alpha", 0.5, "--max-steps", 24]
    done = dlmom("run", "--backend", "mock", *words, *more, "--display", "none", "--out", out)
    good(done)
    assert done.err.startswith("note: --backend mock runs no model")
    return out


def test_the_mock_needs_no_model_and_says_what_it_is(mock_run: Path) -> None:
    manifest = json.loads((mock_run / "run.json").read_text(encoding="utf-8"))
    assert manifest["context"]["device"] == "mock"
    assert manifest["context"]["torch"] is None
    assert manifest["environment"] == {"backend": "mock"}
    assert [m["name"] for m in manifest["models"]] == ["mock-one", "mock-two"]
    assert len(rows_of(mock_run, "REF")) == 4


def test_a_mock_run_is_valid_and_replays(dlmom: Call, mock_run: Path) -> None:
    lines = good(dlmom("validate", mock_run)).splitlines()
    assert len(lines) == 5
    assert all(line.startswith("ok: ") for line in lines)
    assert "equal the recording" in good(dlmom("replay", mock_run))
    table = good(dlmom("replay", mock_run, "REF", "--alpha", 0.9))
    assert "| REF " in table
    assert "the entropies are the recorded ones" in table
    value = json.loads(good(dlmom("replay", mock_run, "--gate", "always-explicit", "--json")))
    assert {c["experiment"] for c in value["cells"]} == {"REF", "A1.2", "A2.5"}
    for cell in value["cells"]:
        assert cell["replayed"]["latent_coverage"] == 0
        assert cell["recorded"]["latent_coverage"] > 0


def test_faults_are_named_by_file_and_line(dlmom: Call, mock_run: Path) -> None:
    raw = mock_run / "raw" / "REF.jsonl"
    lines = raw.read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[1])
    row["total_steps"] += 1
    lines[1] = json.dumps(row)
    raw.write_text("\n".join([*lines, lines[0], '{"item']), encoding="utf-8")
    done = dlmom("validate", mock_run)
    assert done.status == 2
    assert f"{raw}:2: total_steps is " in done.out
    assert f"{raw}:5: item " in done.out
    assert "is already on line 1" in done.out
    assert f"{raw}:6: torn last line" in done.out
    assert done.err == "error: 3 problems\n"


def test_a_changed_trace_fails_the_replay(dlmom: Call, mock_run: Path) -> None:
    path = mock_run / "traces" / "REF.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    trace = json.loads(lines[0])
    step = trace["reason"].index("above_alpha")
    trace["observed"][step] = trace["entropy"][step] = 0.0
    path.write_text("\n".join([json.dumps(trace), *lines[1:], ""]), encoding="utf-8")
    done = dlmom("replay", mock_run)
    assert done.status == 1
    assert f"step {step}: recorded latent (above_alpha)" in done.out
    assert "differ from the recording" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["replay", "RUN", "A1.9"], ["unknown id `A1.9`", "did you mean `A1.1`"]),
        (["replay", "RUN/none"], ["no such run folder"]),
        (["replay", "RUN", "--gate", "trend"], ["REF", "w is missing"]),
        (["replay", "RUN", "--alpha-unit", "nats"], ["--alpha-unit", "give --alpha"]),
        (["replay", "RUN", "--gate", "slope"], ["slope", "possible values"]),
        (["list", "suites", "--suite", "A9"], ["unknown suite", "A9"]),
        (["list", "--config", "RUN/none.yaml"], ["none.yaml", "cannot read"]),
        (["schema", "rows"], ["unknown schema", "did you mean `row`"]),
        (["completions", "tcsh"], ["tcsh", "possible values"]),
    ],
)
def test_wrong_words_are_one_line(
    dlmom: Call, mock_run: Path, arguments: list[str], words: list[str]
) -> None:
    line = one_line(dlmom(*(a.replace("RUN", str(mock_run)) for a in arguments)))
    for word in words:
        assert word in line, line


def test_the_shipped_suites_are_valid_and_a_slip_is_placed(dlmom: Call, tmp_path: Path) -> None:
    assert "4 suites, 23 cells" in good(dlmom("validate", ROOT / "configs" / "suites.yaml"))
    path = tmp_path / "mine.yaml"
    path.write_text("suites:\n  S:\n    - {id: S1, alpah: 0.3}\n", encoding="utf-8")
    done = dlmom("validate", path)
    assert done.status == 2
    assert done.out.startswith(f"{path}:3:16: unknown key `alpah`; did you mean `alpha`?")


def test_packet_files_are_valid_or_cut_short(dlmom: Call, tmp_path: Path) -> None:
    from dlmom_rs import BeliefPacket

    packet = BeliefPacket([3, 1], [0.75, 0.25], mass=0.9, vocab=10)
    path = tmp_path / "packet.bin"
    path.write_bytes(packet.to_bytes())
    assert "1 packet" in good(dlmom("validate", path))
    path.write_bytes(packet.to_bytes()[:-2])
    done = dlmom("validate", path)
    assert done.status == 2
    assert "cut short" in done.out


def test_the_list_names_what_is_shipped(dlmom: Call) -> None:
    out = good(dlmom("list"))
    for word in ("A1.7", "gsm8k:PATH", "zoo:tiny-math", "latentmas", "panel"):
        assert word in out, out
    value = json.loads(good(dlmom("list", "--json")))
    assert set(value) == {
        *("suites", "experiments", "benches", "experts", "presets", "topologies", "prompts"),
    }
    assert "zoo:tiny-general" in {e["name"] for e in value["experts"]}
    skipped = json.loads(good(dlmom("list", "--json", "--agents", "several-models")))
    kinds = {e["id"]: e["kind"] for e in skipped["experiments"]}
    assert kinds["A3.1"] == "skip"
    assert kinds["A1.1"] == "alias"


def test_the_doctor_tries_the_devices(dlmom: Call) -> None:
    done = dlmom("doctor")
    assert done.status == 0, done
    for word in ("build", "libraries", "  torch ", "devices", "computes", "tinygsm", "500 rows"):
        assert word in done.out, done.out
    report = json.loads(good(dlmom("doctor", "--json")))["python"]
    cpu = report["devices"][0]
    assert cpu["device"] == "cpu"
    assert cpu["dtypes"]["fp32"] is None
    assert report["problems"] == []
    assert report["memory"]["available_bytes"] <= report["memory"]["total_bytes"]


def test_the_doctor_reports_what_is_missing_or_broken(
    dlmom: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dlmom_rs import environment

    real = environment._version

    def version(package: str) -> str | None:
        answers: dict[str, Any] = {"matplotlib": None, "safetensors": None, "numpy": "1.0"}
        return answers.get(package, real(package))

    monkeypatch.setattr(environment, "_version", version)
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = dlmom("doctor")
    assert done.status == 1, done
    assert "matplotlib" in done.out
    assert "for plot: pip install matplotlib" in done.out
    assert "safetensors is not installed" in done.out
    assert "numpy 1.0 is installed" in done.out
    assert "transformers cannot be imported" in done.out
    assert json.loads(dlmom("doctor", "--json").out)["python"]["problems"]


def test_schemas_and_completions_are_printed(dlmom: Call) -> None:
    names = good(dlmom("schema")).split()
    assert {"suites", "row", "experiment", "trace"} <= set(names)
    for name in names:
        assert "$schema" in json.loads(good(dlmom("schema", name)))
    committed = (ROOT / "configs" / "schema" / "raw-row.schema.json").read_text(encoding="utf-8")
    assert good(dlmom("schema", "row")) == committed
    for shell in ("bash", "zsh", "fish", "elvish", "powershell"):
        assert "replay" in good(dlmom("completions", shell))


def test_the_long_version_names_the_build(dlmom: Call) -> None:
    short = good(dlmom("-V"))
    assert len(short.splitlines()) == 1
    lines = good(dlmom("--version")).splitlines()
    assert lines[0] + "\n" == short
    facts = [line.split()[0] for line in lines[1:]]
    assert facts == ["profile", "target", "rustc", "commit", "features"]
