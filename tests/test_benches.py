"""Benchmarks of code and of choices through the command line."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Done, rows_of

Call = Callable[..., Done]

DATA = ROOT / "python" / "dlmom_rs" / "data"


def shipped(name: str) -> list[dict[str, Any]]:
    lines = (DATA / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def command(bench: str, out: Path, *more: object) -> list[object]:
    return [
        "run", "--suite", "A1", "--only", "REF", "--bench", bench, "--model", "zoo:tiny-math",
        "--device", "cpu", "--dtype", "fp32", "--threads", 1, "--batch-size", 8, "--max-steps", 96,
        "--display", "none", "--out", out, *more,
    ]  # fmt: skip


def rows(dlmom: Call, bench: str, out: Path, *more: object) -> list[dict[str, Any]]:
    done = dlmom(*command(bench, out, *more))
    assert done.status == 0, done.err
    return list(rows_of(out, "REF").values())


def test_tinymc_rows_hold_letters_or_a_failure(dlmom: Call, tmp_path: Path) -> None:
    source = {row["id"]: row for row in shipped("tinymc")}
    found = rows(dlmom, "tinymc", tmp_path / "run", "--limit", 6)
    assert len(found) == 6
    for row in found:
        assert row["bench"] == "tinymc"
        assert row["gold"] == source[row["item_id"]]["answerKey"]
        for answer in (row["answer"], row["answer_flexible"]):
            assert answer is None or answer in ("A", "B", "C", "D")
        assert (row["answer_flexible"] is None) == (row["failure"] is not None)
        assert row["correct"] == (row["answer"] == row["gold"])
        assert row["correct_flexible"] == (row["answer_flexible"] == row["gold"])


def test_tinycode_rows_hold_the_program_that_was_judged(dlmom: Call, tmp_path: Path) -> None:
    source = {row["task_id"]: row for row in shipped("tinycode")}
    found = rows(dlmom, "tinycode", tmp_path / "run", "--limit", 6)
    assert len(found) == 6
    for row in found:
        assert row["bench"] == "tinycode"
        item = source[row["item_id"]]
        assert row["gold"] == item["canonical_solution"]
        assert row["answer"] == row["answer_flexible"]
        assert (row["answer"] is None) == (row["failure"] is not None)
        if row["answer"] is not None:
            assert f"def {item['entry_point']}(" in row["answer"]
            assert row["failure"] is None
        assert not row["correct"] or row["answer"] is not None
    manifest = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"3\.\d+\.\d+", manifest["context"]["python"])


def test_code_is_run_with_a_word_of_warning(dlmom: Call, tmp_path: Path) -> None:
    done = dlmom(*command("tinycode", tmp_path / "code", "--limit", 1))
    assert "not in a sandbox" in done.err
    done = dlmom(*command("tinymc", tmp_path / "choice", "--limit", 1))
    assert "sandbox" not in done.err


@pytest.mark.skipif(sys.platform == "win32", reason="code is judged on Unix only")
def test_a_run_of_code_resumes_to_the_same_rows(dlmom: Call, tmp_path: Path) -> None:
    whole = rows(dlmom, "tinycode", tmp_path / "whole", "--limit", 4)
    out = tmp_path / "cut"
    rows(dlmom, "tinycode", out, "--limit", 4)
    raw = out / "raw" / "REF.jsonl"
    lines = raw.read_text(encoding="utf-8").splitlines(keepends=True)
    raw.write_text("".join(lines[:2]), encoding="utf-8")
    again = rows(dlmom, "tinycode", out, "--limit", 4, "--resume")

    def by_id(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return sorted(found, key=lambda row: str(row["item_id"]))

    assert by_id(again) == by_id(whole)


@pytest.mark.parametrize(
    ("bench", "schema"),
    [("humaneval", "HumanEval"), ("arc", "ARC")],
)
def test_public_benches_need_a_path_and_name_faults(
    dlmom: Call, tmp_path: Path, bench: str, schema: str
) -> None:
    done = dlmom(*command(bench, tmp_path / "run"))
    assert done.status == 2
    assert f"{bench}:PATH" in done.err
    assert schema in done.err
    file = tmp_path / "rows.jsonl"
    file.write_text('\n{"id": 1}\n', encoding="utf-8")
    done = dlmom(*command(f"{bench}:{file}", tmp_path / "run"))
    assert done.status == 2
    assert f"{file}:2: field `" in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_rows_in_the_public_layouts_run(dlmom: Call, tmp_path: Path) -> None:
    for bench, name in (("humaneval", "tinycode"), ("arc", "tinymc")):
        file = tmp_path / f"{bench}.jsonl"
        # Labels that are no letters: what is shown and graded goes by position.
        items = shipped(name)[:2]
        for item in items:
            if bench == "arc":
                at = item["choices"]["label"].index(item["answerKey"])
                item["choices"]["label"] = ["1", "2", "3", "4"]
                item["answerKey"] = str(at + 1)
        file.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        found = rows(dlmom, f"{bench}:{file}", tmp_path / bench)
        assert [row["bench"] for row in found] == [bench, bench]
        assert bench != "arc" or all(row["gold"] in "ABCD" for row in found)


def test_what_is_shipped_has_the_public_layouts() -> None:
    for row in shipped("tinycode"):
        space: dict[str, Any] = {}
        exec(row["prompt"] + row["canonical_solution"] + "\n" + row["test"], space)
        space["check"](space[row["entry_point"]])
    for row in shipped("tinymc"):
        assert row["answerKey"] in row["choices"]["label"]
        assert len(set(row["choices"]["text"])) == len(row["choices"]["text"])
