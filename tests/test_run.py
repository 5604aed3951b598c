"""`run` on the shipped experts: resumption, batch independence, honest bookkeeping."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from .conftest import Done, rows_of

Call = Callable[..., Done]

EXPERTS = ["--experts", "zoo:tiny-math", "zoo:tiny-general"]
# Nats at which the shipped experts think in latent mode now and then.
LATENT = ["--alpha-unit", "nats", "--alpha", "0.3"]


def command(out: Path, *more: object) -> list[str]:
    base = [
        "run", "--bench", "tinygsm", *EXPERTS, *LATENT, "--device", "cpu", "--threads", "1",
        "--max-steps", "160", "--display", "none", "--out", str(out),
    ]  # fmt: skip
    return [*base, *map(str, more)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of REF, a noise cell with two seeds, and a trend cell."""
    from dlmom_rs import _core

    out = tmp_path_factory.mktemp("runs") / "whole"
    arguments = command(
        out, "--suite", "A1", "A2", "--only", "A1.1", "A1.3", "A2.3", "--limit", 16, "--seeds", 0,
        1, "--dtype", "fp32", "--batch-size", 8,
    )  # fmt: skip
    assert _core.main(["dlmom-rs", *arguments]) == 0
    return out


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(whole, target)
    return target


def resume(out: Path, *more: object) -> list[str]:
    return command(
        out, "--suite", "A1", "A2", "--only", "A1.1", "A1.3", "A2.3", "--limit", 16, "--seeds", 0,
        1, "--dtype", "fp32", "--batch-size", 8, "--resume", *more,
    )  # fmt: skip


def test_the_folder_holds_what_the_design_says(whole: Path) -> None:
    manifest = json.loads((whole / "run.json").read_text())
    assert [m["name"] for m in manifest["models"]] == ["tiny-math", "tiny-general"]
    assert all(len(m["weights_sha256"]) == 64 for m in manifest["models"])
    assert manifest["notes"]["bit_invariant"] is True
    assert "self-test passed" in manifest["notes"]["bit_invariance"]
    assert manifest["environment"]["torch"]
    assert manifest["invocations"][0]["finished_at"] is not None
    kinds = {c["id"]: (c["kind"], c["alias_of"]) for c in manifest["cells"]}
    assert kinds == {
        "REF": ("run", None),
        "A1.1": ("alias", "REF"),
        "A1.3": ("run", None),
        "A2.3": ("run", None),
    }
    for cell in ("REF", "A1.3", "A2.3"):
        assert (whole / "configs" / f"{cell}.yaml").exists()
        assert (whole / "traces" / f"{cell}.jsonl").exists()
    assert not (whole / "raw" / "A1.1.jsonl").exists(), "an alias is not paid twice"
    alias = json.loads((whole / "summary" / "A1.1.json").read_text())
    assert alias["n"] == 16


def test_seeds_are_replicates_only_where_something_is_drawn(whole: Path) -> None:
    assert {key[1] for key in rows_of(whole, "REF")} == {0}
    noisy = rows_of(whole, "A1.3")
    assert {key[1] for key in noisy} == {0, 1}
    summary = json.loads((whole / "summary" / "REF.json").read_text())
    assert summary["seeds"] == "deterministic"
    latent = [k for k, row in noisy.items() if row["latent_steps"] > 0]
    assert latent, "the noise has something to act on"
    assert any(noisy[k]["noise_kl"] > 0 for k in latent)
    first = {k[0]: row["entropy"] for k, row in noisy.items() if k[1] == 0}
    second = {k[0]: row["entropy"] for k, row in noisy.items() if k[1] == 1}
    assert first != second


def test_cells_differ_and_latent_mode_is_used(whole: Path) -> None:
    for cell in ("REF", "A1.3", "A2.3"):
        summary = json.loads((whole / "summary" / f"{cell}.json").read_text())
        assert summary["latent_coverage"] > 0.02, cell
        assert summary["inert"] is False, cell
    assert rows_of(whole, "REF") != rows_of(whole, "A2.3")


def test_a_prompt_is_forwarded_once_for_all_cells_and_seeds(whole: Path) -> None:
    (batch,) = json.loads((whole / "run.json").read_text())["notes"]["batches"]
    rows = [row for cell in ("REF", "A1.3", "A2.3") for row in rows_of(whole, cell).values()]
    positions = sum(row["prompt_tokens"] for row in rows)
    assert batch["prompt_positions"] == positions
    # Every item is asked four times: twice under A1.3, which draws.
    assert batch["copied_positions"] == 3 * positions // 4
    # What a row says it cost is what it costs alone.
    assert all(row["forward_tokens"] > row["prompt_tokens"] for row in rows)


def test_rows_add_up(whole: Path) -> None:
    for cell in ("REF", "A1.3", "A2.3"):
        for row in rows_of(whole, cell).values():
            assert row["total_steps"] == row["explicit_tokens"] + row["latent_steps"] <= 160
            assert sum(row["latent_segments"]) == row["latent_steps"]
            assert sum(row["forward_tokens_per_agent"]) == row["forward_tokens"]
            assert (
                0 <= row["entropy"]["min"] <= row["entropy"]["mean"] <= row["entropy"]["max"] <= 1
            )
            # Both experts' f32 logits at every readout, end token included.
            observed = sum(row["entropy_hist"])
            assert row["uplink_bytes"] == observed * 2 * 491 * 4
            assert (row["failure"] is None) or not row["correct"]


def test_a_traced_sample_replays_its_text(whole: Path) -> None:
    traces = [json.loads(x) for x in (whole / "traces" / "REF.jsonl").read_text().splitlines()]
    assert len(traces) == 5
    rows = rows_of(whole, "REF")
    for trace in traces:
        row = rows[trace["item_id"], trace["seed"], trace["sample"]]
        steps = len(trace["mode"])
        assert {len(trace[name]) for name in ("entropy", "token", "mass", "top_ids")} == {steps}
        assert trace["mode"].count("latent") == row["latent_steps"]
        printed = [t for t in trace["token"] if t is not None]
        assert len(printed) - row["explicit_tokens"] in (0, 1)


def test_a_finished_run_resumes_to_a_no_op(dlmom: Call, copy: Path) -> None:
    before = {p: p.read_bytes() for p in (copy / "raw").iterdir()}
    assert dlmom(*resume(copy)).status == 0
    assert {p: p.read_bytes() for p in (copy / "raw").iterdir()} == before


def test_resuming_with_other_seeds_adds_them_and_repeats_no_deterministic_cell(
    dlmom: Call, whole: Path, copy: Path
) -> None:
    words = resume(copy)
    at = words.index("--seeds")
    words[at + 1 : at + 3] = ["7"]
    assert dlmom(*words).status == 0
    assert rows_of(copy, "REF") == rows_of(whole, "REF")
    noisy = rows_of(copy, "A1.3")
    assert {key[1] for key in noisy} == {0, 1, 7}
    assert rows_of(whole, "A1.3").items() <= noisy.items()


def test_without_resume_a_used_folder_is_refused(dlmom: Call, copy: Path) -> None:
    done = dlmom(*[word for word in resume(copy) if word != "--resume"])
    assert done.status == 2
    assert "--resume" in done.err


def test_another_configuration_is_refused_with_a_diff(dlmom: Call, copy: Path) -> None:
    words = resume(copy)
    words[words.index("0.3")] = "0.4"
    done = dlmom(*words)
    assert done.status == 2
    assert "alpha" in done.err
    assert "0.3" in done.err
    assert "0.4" in done.err


def test_a_torn_last_line_is_repaired(dlmom: Call, whole: Path, copy: Path) -> None:
    path = copy / "raw" / "A2.3.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 40])
    assert dlmom(*resume(copy)).status == 0
    assert rows_of(copy, "A2.3") == rows_of(whole, "A2.3")
    assert path.with_name(path.name + ".torn").exists()


def test_a_line_that_is_no_row_is_named(dlmom: Call, copy: Path) -> None:
    path = copy / "raw" / "REF.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{not json}\n", *lines[2:]]))
    done = dlmom(*resume(copy))
    assert done.status == 2
    assert "REF.jsonl:3" in done.err
    aggregated = dlmom("aggregate", copy)
    assert aggregated.status == 2
    assert "REF.jsonl:3" in aggregated.err


def test_a_second_writer_is_refused(dlmom: Call, copy: Path) -> None:
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, sys\n"
            f"f = open({str(copy / '.lock')!r}, 'a')\n"
            "fcntl.flock(f, fcntl.LOCK_EX)\n"
            "print('held', flush=True)\n"
            "sys.stdin.read()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdin is not None
    assert holder.stdout is not None
    try:
        assert holder.stdout.readline() == "held\n"
        done = dlmom(*resume(copy))
        assert done.status == 2
        assert "another run" in done.err
    finally:
        holder.stdin.close()
        holder.wait()
        holder.stdout.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_batch_size_and_order_never_change_an_answer(
    dlmom: Call, tmp_path: Path, dtype: str
) -> None:
    reference: dict[str, dict[tuple[Any, ...], Any]] = {}
    for rows, order in [(1, "given"), (13, "given"), (32, "reversed")]:
        out = tmp_path / f"{rows}"
        done = dlmom(
            *command(
                out, "--suite", "A1", "--only", "A1.3", "--limit", 20, "--dtype", dtype,
                "--batch-size", rows, "--order", order,
            )
        )  # fmt: skip
        assert done.status == 0, done.err
        for cell in ("REF", "A1.3"):
            found = rows_of(out, cell)
            assert any(row["latent_steps"] > 0 for row in found.values())
            assert found == reference.setdefault(cell, found), (cell, rows)


def test_kill_nine_and_resume_equals_an_uninterrupted_run(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    rng = random.Random(20)
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    kills = 0
    for attempt in range(40):
        words = resume(out) if attempt else [w for w in resume(out) if w != "--resume"]
        process = subprocess.Popen(
            [sys.executable, "-m", "dlmom_rs", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        if kills < 5:
            # Wait for rows to appear, then some more, so that kills land inside the work.
            target = _size(out) + rng.randrange(1, 9000)
            while process.poll() is None and _size(out) < target:
                time.sleep(0.01)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        error = process.stderr.read()
        status = process.wait()
        process.stderr.close()
        if status == 0:
            break
        assert status == -signal.SIGKILL, error
    assert status == 0
    assert kills == 5
    for cell in ("REF", "A1.3", "A2.3"):
        assert rows_of(out, cell) == rows_of(whole, cell)
        ours = json.loads((out / "summary" / f"{cell}.json").read_text())
        theirs = json.loads((whole / "summary" / f"{cell}.json").read_text())
        for name in ("accuracy", "failures", "latent_coverage", "switches", "entropy", "downlink"):
            assert ours[name] == theirs[name], (cell, name)


def _size(out: Path) -> int:
    return sum(p.stat().st_size for p in out.glob("raw/*.jsonl"))


def test_interruption_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    out = tmp_path / "stopped"
    words = [w for w in resume(out) if w != "--resume"]
    # A shell's background jobs ignore it, and hand that on.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "dlmom_rs", *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    assert process.stderr is not None
    while process.poll() is None and _size(out) < 1000:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 130
    assert "--resume" in error
    assert "Traceback" not in error
    for file in out.glob("raw/*.jsonl"):
        content = file.read_text()
        assert content == "" or content.endswith("\n")
        assert all(json.loads(line) for line in content.splitlines())


def test_the_papers_literal_threshold_is_all_explicit_and_says_why(
    dlmom: Call, tmp_path: Path
) -> None:
    out = tmp_path / "literal"
    done = dlmom(
        "run", "--suite", "A1", "--only", "A1.2", "--bench", "tinygsm", *EXPERTS, "--limit", 8,
        "--device", "cpu", "--dtype", "fp32", "--display", "none", "--out", out,
    )  # fmt: skip
    assert done.status == 0, done.err
    assert all(row["latent_steps"] == 0 for row in rows_of(out, "A1.2").values())
    assert "no step's entropy exceeded alpha" in done.out
    assert "inert" in done.out


def test_the_link_of_a_single_agent_is_a_loopback(dlmom: Call, tmp_path: Path) -> None:
    out = tmp_path / "single"
    done = dlmom(
        "run", "--suite", "A1", "--only", "REF", "--bench", "tinygsm", "--model", "zoo:tiny-math",
        "--topology", "lockstep", *LATENT, "--limit", 4, "--device", "cpu", "--dtype", "fp32",
        "--display", "none",
        "--out", out,
    )  # fmt: skip
    assert done.status == 0, done.err
    for row in rows_of(out, "REF").values():
        # 491 logits of 4 bytes go up in every step; a mixture of 128 values of 4 bytes, or the
        # one-entry packet of a token, comes down.
        assert row["uplink_bytes"] == sum(row["entropy_hist"]) * 491 * 4
        embedding, token = 28 + 128 * 4, 36 + 8
        assert row["downlink_bytes"] == (
            row["latent_steps"] * embedding + row["explicit_tokens"] * token
        )
        assert len(row["forward_tokens_per_agent"]) == 1


def test_automatic_batch_size_is_recorded_and_kept_on_resume(dlmom: Call, tmp_path: Path) -> None:
    out = tmp_path / "auto"
    words = command(
        out, "--suite", "A1", "--only", "REF", "--limit", 3, "--dtype", "fp32", "--batch-size",
        "auto",
    )  # fmt: skip
    assert dlmom(*words).status == 0
    manifest = json.loads((out / "run.json").read_text())
    chosen = manifest["batch_size"]
    assert chosen in (8, 16, 32, 64, 128)
    assert manifest["notes"]["batch_size_probe"]["rows"] == chosen
    words[words.index("3")] = "5"
    assert dlmom(*words, "--resume").status == 0
    assert json.loads((out / "run.json").read_text())["batch_size"] == chosen
    assert len(rows_of(out, "REF")) == 5


def test_the_kernel_can_be_chosen_and_answers_alike(
    dlmom: Call, whole: Path, tmp_path: Path
) -> None:
    words = ["--suite", "A1", "--only", "REF", "--limit", 3, "--dtype", "fp32", "--batch-size", 8]
    assert dlmom(*command(tmp_path / "torch", *words, "--kernel", "torch")).status == 0
    manifest = json.loads((tmp_path / "torch" / "run.json").read_text())
    assert manifest["context"]["consensus_kernel"] == "torch"
    expected = rows_of(whole, "REF")
    rows = rows_of(tmp_path / "torch", "REF")
    assert len(rows) == 3
    for key, row in rows.items():
        assert (row["text"], row["mode_runs"]) == (
            expected[key]["text"],
            expected[key]["mode_runs"],
        )
        assert row["entropy"]["mean"] == pytest.approx(expected[key]["entropy"]["mean"], abs=1e-6)
    for wish, said in (
        (["--kernel", "triton"], "triton"),
        (["--graphs"], "graphs need CUDA or HIP"),
    ):
        refused = dlmom(*command(tmp_path / "refused", *words, *wish))
        assert refused.status == 2
        assert said in refused.err
        assert len(refused.err.strip().splitlines()) == 1


def test_weights_with_nan_end_the_run_with_one_line(dlmom: Call, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    from dlmom_rs import zoo

    folder = tmp_path / "broken"
    shutil.copytree(zoo.path("tiny-math"), folder)
    weights = load_file(folder / "model.safetensors")
    name = sorted(weights)[1]
    weights[name] = weights[name].clone()
    weights[name].view(-1)[3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    done = dlmom(
        "run", "--suite", "A1", "--bench", "tinygsm", "--model", folder, "--limit", 2, "--device",
        "cpu", "--dtype", "fp32", "--display", "none", "--out", tmp_path / "o",
    )  # fmt: skip
    assert done.status == 1
    assert len(done.err.strip().splitlines()) == 1
    assert "NaN" in done.err
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full to fill a disk")
def test_a_full_disk_ends_the_run_and_loses_nothing(dlmom: Call, whole: Path, copy: Path) -> None:
    path = copy / "raw" / "A2.3.jsonl"
    kept = path.read_text().splitlines(keepends=True)[:4]
    path.unlink()
    path.symlink_to("/dev/full")
    done = dlmom(*resume(copy))
    assert done.status == 1, done
    assert "A2.3" in done.err
    path.unlink()
    path.write_text("".join(kept))
    assert dlmom(*resume(copy)).status == 0
    for cell in ("REF", "A1.3", "A2.3"):
        assert rows_of(copy, cell) == rows_of(whole, cell)


def test_tables_hold_what_the_rows_say(dlmom: Call, whole: Path, tmp_path: Path) -> None:
    from dlmom_rs import RunDataError, read_run

    raw = read_run(whole)
    assert raw.height == 16 + 32 + 16
    by_cell = raw.group_by("experiment").agg(pl.col("correct").mean()).sort("experiment")
    done = dlmom("aggregate", whole, "--out", tmp_path)
    assert done.status == 0, done.err
    wide = pl.read_csv(tmp_path / "aggregate_wide.csv")
    assert set(wide["experiment"]) == {"REF", "A1.1", "A1.3", "A2.3"}
    for cell, accuracy in by_cell.iter_rows():
        value = wide.filter(pl.col("experiment") == cell)["accuracy"].item()
        assert value == pytest.approx(accuracy, abs=1e-12)
    tidy = pl.read_csv(tmp_path / "aggregate.csv")
    assert {"experiment", "metric", "value", "ci_lo", "ci_hi", "n", "p_adj"} <= set(tidy.columns)
    assert "\\toprule" in (tmp_path / "aggregate.tex").read_text()
    assert read_run(whole, "cells").height == 4
    assert read_run(whole, "tidy").height == tidy.height
    texts = read_run(whole, text=True)
    assert texts["text"].str.contains("####").any()
    with pytest.raises(RunDataError, match="nowhere"):
        read_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="table"):
        read_run(whole, "everything")  # type: ignore[arg-type]


def test_neither_aggregate_nor_plot_imports_torch(whole: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from dlmom_rs import _core\n"
        f"run, out = {str(whole)!r}, {str(tmp_path)!r}\n"
        "assert _core.main(['x', 'aggregate', run, '--out', out]) == 0\n"
        "assert _core.main(['x', 'plot', run, '--out', out]) == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("accuracy_vs_total_steps", "accuracy_vs_wallclock", "switch_count_cdf"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert (tmp_path / f"{name}.csv").exists()
