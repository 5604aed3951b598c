"""``generate`` and ``show``: what a person sees, what a program reads, and odd input."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from .conftest import ROOT, Done

Call = Callable[..., Done]

QUESTION = (
    "A shop has 73 books. A truck brings 22 books. The shop sells 18 books. "
    "How many books does the shop have now?"
)
COMMON = ["--device", "cpu", "--threads", "1"]
THINKING = ["--alpha", "0.3", "--alpha-unit", "nats"]
PAIR = ["generate", "--experts", "zoo:tiny-math", "zoo:tiny-general", *COMMON]
SINGLE = ["generate", "--model", "zoo:tiny-math", *COMMON]


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def schema(name: str) -> Any:
    return json.loads((ROOT / "configs" / "schema" / name).read_text(encoding="utf-8"))


def error_line(done: Done, status: int = 2) -> str:
    assert done.status == status, done
    lines = done.err.strip().splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    return lines[0]


def answer(done: Done) -> dict[str, Any]:
    assert done.status == 0, done.err
    assert len(done.out.splitlines()) == 1
    parsed: dict[str, Any] = json.loads(done.out)
    jsonschema.validate(parsed, schema("answer.schema.json"))
    return parsed


def test_the_answer_is_streamed_as_plain_text(dlmom: Call) -> None:
    done = dlmom(*SINGLE, "--prompt", QUESTION)
    assert done.status == 0, done.err
    assert done.out == (
        "The shop has 73 + 22 = 95 books.\nThe shop has 95 - 18 = 77 books.\n#### 77\n"
    )
    assert done.err == ""


def test_json_is_one_object_of_its_schema(dlmom: Call) -> None:
    plain = answer(dlmom(*PAIR, "--prompt", QUESTION, "--json", *THINKING))
    assert plain["trace"] is None
    assert plain["latent_steps"] > 0
    assert plain["total_steps"] == plain["latent_steps"] + plain["explicit_tokens"]
    assert sum(plain["latent_segments"]) == plain["latent_steps"]
    traced = answer(dlmom(*PAIR, "--prompt", QUESTION, "--json", "--trace", *THINKING))
    steps = traced["trace"]["mode"]
    assert steps.count("latent") == traced["latent_steps"]
    volatile = {"trace", "latency_s"}
    assert {k: v for k, v in plain.items() if k not in volatile} == {
        k: v for k, v in traced.items() if k not in volatile
    }


def test_a_piped_trace_is_plain_lines_that_fit_80_columns(dlmom: Call) -> None:
    done = dlmom(*PAIR, "--prompt", QUESTION, "--trace", *THINKING)
    assert done.status == 0, done.err
    assert "\x1b" not in done.out
    lines = done.out.splitlines()
    steps = [line for line in lines if re.match(r" *\d+[ >](latent|explicit) ", line)]
    parsed = answer(dlmom(*PAIR, "--prompt", QUESTION, "--json", "--trace", *THINKING))
    modes = [line.split("  ")[0] for line in steps]
    assert len(modes) == len(parsed["trace"]["mode"])
    for line, mode, mass in zip(
        steps, parsed["trace"]["mode"], parsed["trace"]["mass"], strict=True
    ):
        assert mode in line
        assert f"{mass:.4f}" in line
        assert len(line) <= 80
    assert parsed["text"] in done.out


def test_a_terminal_gets_colours_and_no_line_is_wider_than_it() -> None:
    code = (
        "import sys; from dlmom_rs import _core; "
        f"sys.exit(_core.main(['dlmom-rs', *{[*SINGLE, *THINKING]!r}, '--trace', "
        "'--prompt', 'Tom has 12 cards. Tom buys 5 more cards. How many cards?']))"
    )
    main, child = pty.openpty()
    env = {**os.environ, "COLUMNS": "80", "TERM": "xterm-256color"}
    env.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=child, stderr=subprocess.PIPE, env=env
    )
    os.close(child)
    seen = b""
    while True:
        ready, _, _ = select.select([main], [], [], 60)
        try:
            part = os.read(main, 65536) if ready else b""
        except OSError:
            part = b""
        if not part:
            break
        seen += part
    os.close(main)
    assert process.wait(60) == 0, process.stderr.read() if process.stderr else ""
    if process.stderr:
        process.stderr.close()
    text = seen.decode()
    assert "\x1b[" in text
    bare = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert "latent" in bare or "explicit" in bare
    assert max(len(line.rstrip("\r\n")) for line in bare.splitlines()) <= 80


def test_saved_traces_are_lines_of_the_runs_schema(dlmom: Call, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    for _ in range(2):
        done = dlmom(*SINGLE, "--prompt", QUESTION, "--save-trace", path, *THINKING)
        assert done.status == 0, done.err
    lines = lines_of(path)
    assert len(lines) == 2
    for line in lines:
        jsonschema.validate(line, schema("trace-line.schema.json"))
    assert lines[0] == lines[1]


def test_a_conversation_goes_on_until_the_input_ends() -> None:
    code = (
        "import sys; from dlmom_rs import _core; "
        f"sys.exit(_core.main(['dlmom-rs', *{SINGLE!r}, '--chat', '--max-steps', '60']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        input=f"{QUESTION}\n\nTom has 12 cards. Tom buys 5 more cards. How many cards?\n",
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The shop has 73 + 22 = 95 books.\n")
    # The second turn was asked after the first, not instead of it.
    assert len(done.stdout.splitlines()) > 3


@pytest.mark.parametrize(
    ("flags", "differs"),
    [
        (["--gate", "always-latent", "--max-latent-steps", "6"], True),
        (["--gate", "always-explicit"], False),
        (["--gate", "trend", *THINKING], True),
        (["--message", "belief", "--k", "2", *THINKING], True),
        (["--message", "logits", *THINKING], True),
        (["--gumbel", "2.0", "--gate", "always-latent", "--max-latent-steps", "6"], True),
        (["--temperature", "1.5", "--seed", "3"], True),
    ],
)
def test_knobs_reach_the_loop(dlmom: Call, flags: list[str], differs: bool) -> None:
    base = answer(dlmom(*SINGLE, "--prompt", QUESTION, "--json"))
    changed = answer(dlmom(*SINGLE, "--prompt", QUESTION, "--json", *flags))
    assert base["config"] != changed["config"]
    same = all(base[key] == changed[key] for key in ("text", "latent_steps", "downlink_bytes"))
    assert same != differs


def test_messages_of_one_model_differ_in_bytes_only(dlmom: Call) -> None:
    runs = {
        message: answer(
            dlmom(*SINGLE, "--prompt", QUESTION, "--json", "--message", message, *THINKING)
        )
        for message in ("embed", "belief")
    }
    assert runs["embed"]["text"] == runs["belief"]["text"]
    assert runs["embed"]["latent_steps"] > 0
    assert runs["embed"]["downlink_bytes"] != runs["belief"]["downlink_bytes"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([*SINGLE, "--prompt", ""], "--prompt: the prompt is empty"),
        ([*SINGLE, "--prompt", " \n "], "--prompt: the prompt is empty"),
        ([*SINGLE], "--prompt"),
        ([*SINGLE, "--prompt", "word " * 3000], "tiny-math has a context of 1024"),
        (
            ["generate", "--model", "zoo:tiny-mth", "--prompt", "x"],
            "did you mean 'tiny-math'?",
        ),
        ([*SINGLE, "--prompt", "x", "--k", "9999"], "k: 9999 is outside"),
        ([*SINGLE, "--prompt", "x", "--alpha", "-1"], "--alpha"),
        ([*SINGLE, "--prompt", "x", "--gumbel", "0"], "tau"),
        ([*SINGLE, "--prompt", "x", "--message", "logits", "--k", "5"], "k: 5 with"),
        ([*PAIR, "--prompt", "x", "--message", "embed"], "embed needs agents of one model"),
        ([*SINGLE, "--prompt", "x", "--save-trace", "/nowhere/t.jsonl"], "--save-trace"),
    ],
)
def test_odd_input_is_one_clear_line(dlmom: Call, argv: list[str], expected: str) -> None:
    assert expected in error_line(dlmom(*argv))


def test_experts_of_two_vocabularies_are_refused(dlmom: Call) -> None:
    argv = ["generate", "--experts", "zoo:tiny-math", "zoo:tiny-llama", *COMMON, "--prompt", "x"]
    assert "different vocabularies" in error_line(dlmom(*argv))


@pytest.mark.parametrize("flags", [[], ["--trace"]])
def test_a_reader_that_goes_away_is_no_error(flags: list[str]) -> None:
    code = (
        "import sys; from dlmom_rs import _core; "
        f"sys.exit(_core.main(['dlmom-rs', *{SINGLE!r}, *{flags!r}, '--prompt', {QUESTION!r}]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(3)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) == 0, errors
    assert errors == b""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from dlmom_rs import _core

    out = tmp_path_factory.mktemp("runs") / "a3"
    argv = ["run", "--suite", "A3", "--only", "A3.1", "A3.2", "A3.5", "--model", "zoo:tiny-math"]
    argv += ["--bench", "tinygsm", "--limit", "6", "--traces", "2", "--out", str(out), *COMMON]
    assert _core.main(["dlmom-rs", *argv, *THINKING, "--display", "none"]) == 0
    return out


def test_show_prints_a_recorded_sample_as_generate_does(dlmom: Call, run: Path) -> None:
    rows = lines_of(run / "raw" / "A3.2.jsonl")
    traced = lines_of(run / "traces" / "A3.2.jsonl")
    item = traced[0]["item_id"]
    row = next(r for r in rows if r["item_id"] == item)
    done = dlmom("show", run, "A3.2", "--item", item[:10])
    assert done.status == 0, done.err
    assert f"A3.2, item {item}, seed 0, tinygsm" in done.out
    steps = re.findall(r"^ *\d+[ >](latent|explicit) ", done.out, re.MULTILINE)
    assert steps == traced[0]["mode"]
    assert row["text"] in done.out
    assert f"gold {row['gold']}" in done.out
    parsed = json.loads(dlmom("show", run, "A3.2", "--item", item, "--json").out)
    assert parsed["row"] == row
    assert parsed["trace"]["mode"] == traced[0]["mode"]


def test_show_follows_aliases_and_says_what_was_not_traced(dlmom: Call, run: Path) -> None:
    assert dlmom("show", run, "A3.1").out == dlmom("show", run, "REF").out
    rows = lines_of(run / "raw" / "REF.jsonl")
    traced = {line["item_id"] for line in lines_of(run / "traces" / "REF.jsonl")}
    other = next(r["item_id"] for r in rows if r["item_id"] not in traced)
    done = dlmom("show", run, "REF", "--item", other)
    assert done.status == 0
    assert "no steps were recorded for this sample" in done.out


def test_show_explains_what_is_not_there(dlmom: Call, run: Path, tmp_path: Path) -> None:
    assert "no run folder" in error_line(dlmom("show", tmp_path, "REF"))
    assert "there are: A3.2, A3.5, REF" in error_line(dlmom("show", run, "A3.7"))
    assert "no sample of item `zz`" in error_line(dlmom("show", run, "REF", "--item", "zz"))
    assert "with seed 9" in error_line(dlmom("show", run, "REF", "--item", "zz", "--seed", "9"))


def test_the_links_of_suite_a3_are_counted(run: Path) -> None:
    rows = {cell: lines_of(run / "raw" / f"{cell}.jsonl") for cell in ("A3.2", "A3.5")}
    for cell, header, entry in (("A3.2", 36, 8), ("A3.5", 36, 4)):
        for row in rows[cell]:
            k = 10 if cell == "A3.2" else 491
            message = header + entry * k
            token = 36 + 8
            assert row["downlink_bytes"] == (
                row["latent_steps"] * message + row["explicit_tokens"] * token
            )
            observed = sum(row["entropy_hist"])
            assert row["uplink_bytes"] == observed * 491 * 2
    assert any(row["latent_steps"] for row in rows["A3.2"])
