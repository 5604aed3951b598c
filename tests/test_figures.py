"""Figures of runs: what they draw, held to numpy; what they look like, as far as a test can see."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from dlmom_rs import RunDataError
from dlmom_rs.figures import draw_run

NAMES = ("accuracy_vs_total_steps", "accuracy_vs_wallclock", "switch_count_cdf")
Row = dict[str, Any]


def row(experiment: str, item: int, *, suite: str | None = None, **changes: Any) -> Row:
    """A raw row with every field of its schema."""
    latent, explicit = changes.pop("latent", 4), changes.pop("explicit", 6)
    correct = changes.pop("correct", True)
    made = {
        "schema_version": 1,
        "experiment": experiment,
        "suite": suite or experiment.partition(".")[0],
        "bench": "tinygsm",
        "config_hash": f"digest of {experiment}",
        "item_id": f"item-{item:04}",
        "seed": 0,
        "sample": 0,
        "deterministic": True,
        "extractor_version": 1,
        "correct": correct,
        "correct_flexible": correct,
        "answer": "7",
        "answer_flexible": "7",
        "answer_method": "boxed",
        "gold": "7" if correct else "8",
        "text": f"{experiment} {item}",
        "failure": None,
        "error": None,
        "stop": "eos",
        "explicit_tokens": explicit,
        "latent_steps": latent,
        "total_steps": latent + explicit,
        "latent_segments": [latent] if latent else [],
        "prompt_tokens": 20,
        "switches": 1,
        "handoffs": 0,
        "forward_tokens": 20 + latent + explicit,
        "forward_tokens_per_agent": [20 + latent + explicit],
        "uplink_bytes": 0,
        "downlink_bytes": 0,
        "entropy": {"mean": 0.3, "min": 0.1, "max": 0.5},
        "entropy_hist": [0] * 22,
        "topk_mass": 0.9,
        "noise_kl": 0.0,
        "drift": None,
        "latency_s": 0.5,
        "peak_device_bytes": None,
        "peak_rss_bytes": 1 << 20,
        "batch_size": 8,
        "started_at": 1e9 + item,
    }
    unknown = set(changes) - set(made)
    assert not unknown, unknown
    return made | changes


def write(run: Path, *cells: list[Row]) -> Path:
    """A run folder of raw files alone."""
    (run / "raw").mkdir(parents=True)
    for rows in cells:
        lines = "".join(json.dumps(r) + "\n" for r in rows)
        (run / "raw" / f"{rows[0]['experiment']}.jsonl").write_text(lines, encoding="utf-8")
    return run


def write_manifest(run: Path, cells: list[tuple[str, str, str | None]]) -> None:
    """``run.json`` with cells (id, kind, alias or reason)."""
    manifest = {
        "format": 1,
        "version": "0.1.0",
        "bench": "tinygsm",
        "data_sha256": "00",
        "items": 1,
        "seeds": [0],
        "samples": 1,
        "batch_size": 8,
        "models": [],
        "shared_model": True,
        "experts": 1,
        "ln_vocab": None,
        "context": {},
        "environment": {},
        "cells": [
            {
                "id": name,
                "suite": name.partition(".")[0],
                "kind": kind,
                "alias_of": what if kind == "alias" else None,
                "reason": what if kind == "skip" else None,
                "config_hash": f"digest of {name}",
                "deterministic": True,
            }
            for name, kind, what in cells
        ],
        "invocations": [],
    }
    (run / "run.json").write_text(json.dumps(manifest), encoding="utf-8")


def random_cell(
    experiment: str, n: int, *, seeds: int = 1, scale: int = 1, **fixed: Any
) -> list[Row]:
    draws = random.Random(f"{experiment} {n} {seeds}")
    return [
        row(
            experiment,
            item,
            seed=seed,
            deterministic=seeds == 1,
            correct=draws.random() < 0.4,
            latent=draws.randrange(10 * scale),
            explicit=draws.randrange(1, 30 * scale),
            switches=draws.choice([0, 1, 1, 2, 4, 7]),
            latency_s=draws.uniform(0.1, 1.0) * scale,
            **fixed,
        )
        for item in range(n)
        for seed in range(seeds)
    ]


def table(out: Path, name: str) -> list[dict[str, str]]:
    with (out / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def item_means(rows: list[Row], field: str) -> np.ndarray:
    items = sorted({r["item_id"] for r in rows})
    return np.array([np.mean([float(r[field]) for r in rows if r["item_id"] == i]) for i in items])


def wilson(share: float, n: int) -> tuple[float, float]:
    z = 1.959963984540054
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return centre - half, centre + half


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, laid out as they were."""
    seen: list[Figure] = []
    save = Figure.savefig

    def spy(self: Figure, *args: Any, **options: Any) -> None:
        seen.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return seen


@pytest.mark.parametrize(
    ("name", "field", "column"),
    [
        ("accuracy_vs_total_steps", "total_steps", "total_steps"),
        ("accuracy_vs_wallclock", "latency_s", "latency_s"),
    ],
)
def test_points_are_means_over_items_with_intervals(
    tmp_path: Path, name: str, field: str, column: str
) -> None:
    cells = {
        "REF": random_cell("REF", 40),
        "A1.2": random_cell("A1.2", 40, seeds=3, batch_size=16),
        "A2.3": random_cell("A2.3", 25, scale=3),
        "A4.2": random_cell("A4.2", 1),
    }
    lines = draw_run(write(tmp_path / "run", *cells.values()), tmp_path / "out")
    assert lines == [str(tmp_path / "out" / f"{n}.png") for n in NAMES]
    drawn = table(tmp_path / "out", name)
    assert list(drawn[0]) == [
        *("label", "experiment", "suite", "aliases", "bench", "n", "n_items", "batch_size"),
        *(column, f"{column}_lo", f"{column}_hi"),
        *("accuracy", "accuracy_lo", "accuracy_hi", "pareto"),
    ]
    assert [point["label"] for point in drawn] == list(cells)
    points = {}
    for point in drawn:
        rows = cells[point["experiment"]]
        costs, right = item_means(rows, field), item_means(rows, "correct")
        assert (int(point["n"]), int(point["n_items"])) == (len(rows), len(costs))
        assert point["batch_size"] == str(rows[0]["batch_size"])
        assert (point["suite"], point["bench"]) == (rows[0]["suite"], "tinygsm")
        assert float(point[column]) == pytest.approx(costs.mean(), rel=1e-12)
        if len(costs) == 1:
            assert point[f"{column}_lo"] == point[f"{column}_hi"] == ""
        else:
            half = 1.96 * costs.std(ddof=1) / math.sqrt(len(costs))
            assert float(point[f"{column}_lo"]) == pytest.approx(costs.mean() - half, rel=1e-12)
            assert float(point[f"{column}_hi"]) == pytest.approx(costs.mean() + half, rel=1e-12)
        assert float(point["accuracy"]) == pytest.approx(right.mean(), rel=1e-12)
        low, high = wilson(float(right.mean()), len(right))
        assert float(point["accuracy_lo"]) == pytest.approx(max(0.0, low), abs=1e-9)
        assert float(point["accuracy_hi"]) == pytest.approx(min(1.0, high), abs=1e-9)
        points[point["experiment"]] = float(point[column]), float(point["accuracy"])
    # Sorted by cost and then accuracy, the frontier is where the running maximum rises.
    frontier, best = set(), -1.0
    for cell, (_, accuracy) in sorted(points.items(), key=lambda p: (p[1][0], -p[1][1])):
        if accuracy > best:
            frontier.add(cell)
            best = accuracy
    assert {p["experiment"] for p in drawn if p["pareto"] == "true"} == frontier
    assert {p["pareto"] for p in drawn} <= {"true", "false"}


def test_the_frontier_is_fewer_steps_and_higher_accuracy(tmp_path: Path) -> None:
    def cell(name: str, steps: int, right: int) -> list[Row]:
        return [row(name, i, latent=0, explicit=steps, correct=i < right) for i in range(10)]

    cells = [
        cell("REF", 20, 5),
        cell("A1.2", 30, 8),
        cell("A1.3", 25, 5),  # dearer than REF, no better
        cell("A1.4", 20, 4),  # as dear as REF, worse
        cell("A1.5", 10, 1),
        cell("A1.6", 40, 8),  # dearer than A1.2, no better
        cell("A1.7", 20, 5),  # REF's own point
    ]
    draw_run(write(tmp_path / "run", *cells), tmp_path / "out")
    points = table(tmp_path / "out", NAMES[0])
    assert [p["experiment"] for p in points if p["pareto"] == "true"] == [
        *("REF", "A1.2", "A1.5", "A1.7"),
    ]
    assert [p["label"] for p in points] == [
        *("REF, A1.7", "A1.2", "A1.3", "A1.4", "A1.5", "A1.6", "REF, A1.7"),
    ]


def test_curves_are_empirical_distributions_with_their_band(tmp_path: Path) -> None:
    cells = {
        "REF": [row("REF", i, switches=0) for i in range(30)],
        "A1.2": random_cell("A1.2", 20, seeds=3),
        "A2.3": [row("A2.3", i, switches=3 + i % 5) for i in range(11)],
    }
    draw_run(write(tmp_path / "run", *cells.values()), tmp_path / "out")
    drawn = table(tmp_path / "out", "switch_count_cdf")
    assert list(drawn[0]) == [
        *("label", "experiments", "bench", "n", "n_items"),
        *("switches", "cdf", "cdf_lo", "cdf_hi"),
    ]
    assert list(dict.fromkeys(p["label"] for p in drawn)) == list(cells)
    for name, rows in cells.items():
        curve = [p for p in drawn if p["label"] == name]
        switches = np.array([r["switches"] for r in rows])
        steps = np.union1d(switches, [0])
        shares = np.array([np.mean(switches <= step) for step in steps])
        # Three seeds of one item are one trial.
        items = len({r["item_id"] for r in rows})
        half = math.sqrt(math.log(2 / 0.05) / (2 * items))
        assert [int(p["switches"]) for p in curve] == steps.tolist()
        assert [float(p["cdf"]) for p in curve] == pytest.approx(shares)
        assert [float(p["cdf_lo"]) for p in curve] == pytest.approx(np.clip(shares - half, 0, 1))
        assert [float(p["cdf_hi"]) for p in curve] == pytest.approx(np.clip(shares + half, 0, 1))
        assert {(p["n"], p["n_items"]) for p in curve} == {(str(len(rows)), str(items))}


def test_aliases_and_skipped_cells_are_not_drawn(tmp_path: Path, figures: list[Figure]) -> None:
    run = write(tmp_path / "run", random_cell("REF", 12), random_cell("A1.2", 12))
    write_manifest(
        run,
        [
            ("REF", "run", None),
            ("A1.1", "alias", "REF"),
            ("A1.2", "run", None),
            ("A3.1", "skip", "the models differ"),
            ("A4.1", "alias", "REF"),
            ("A4.2", "run", None),
        ],
    )
    draw_run(run, tmp_path / "out")
    for name in NAMES[:2]:
        points = table(tmp_path / "out", name)
        assert [(p["label"], p["aliases"]) for p in points] == [
            ("A1.1 = A4.1 = REF", "A1.1 A4.1"),
            ("A1.2", ""),
        ]
    curves = {(p["label"], p["experiments"]) for p in table(tmp_path / "out", NAMES[2])}
    assert curves == {("A1.1 = A4.1 = REF", "REF A1.1 A4.1"), ("A1.2", "A1.2")}
    for figure in figures:
        labels = [text.get_text() for text in figure.legends[0].get_texts()]
        assert labels[:2] == ["A1.1 = A4.1 = REF", "A1.2"]


def test_cells_with_one_curve_share_it(tmp_path: Path, figures: list[Figure]) -> None:
    def cell(name: str, switches: list[int], latent: int) -> list[Row]:
        return [row(name, i, switches=s, latent=latent) for i, s in enumerate(switches)]

    cells = [
        cell("REF", [0, 1, 2, 1], 3),
        cell("A2.1", [5, 5, 0, 1], 4),
        cell("A2.2", [1, 1, 2, 0], 5),  # REF's curve
        cell("A2.3", [0, 1, 1, 2, 0, 1, 1, 2], 6),  # the same shares, another band
    ]
    draw_run(write(tmp_path / "run", *cells), tmp_path / "out")
    drawn = table(tmp_path / "out", NAMES[2])
    labels = ["REF, A2.2", "A2.1", "A2.3"]
    assert list(dict.fromkeys(p["label"] for p in drawn)) == labels
    assert [t.get_text() for t in figures[2].legends[0].get_texts()] == labels
    assert len(figures[2].axes[0].get_lines()) == 3
    # Their steps differ, so they are points of their own.
    assert len(figures[0].axes[0].get_lines()) > 4
    assert [p["label"] for p in table(tmp_path / "out", NAMES[0])] == [
        "REF",
        "A2.1",
        "A2.2",
        "A2.3",
    ]


PAPER = [f"A{s}.{i}" for s, n in ((1, 7), (2, 7), (3, 5), (4, 4)) for i in range(1, n + 1)]
SHAPES = {
    "one cell": ["REF"],
    "three cells": ["REF", "A2.1", "A3.2"],
    "nine cells": ["REF", *(f"A2.{i}" for i in range(1, 8)), "A4.2"],
    "no reference": ["A1.2", "A1.3"],
    "every suite": ["REF", *PAPER],
    "a wide suite": ["REF", *(f"sweep.{i}" for i in range(1, 19))],
    "many suites": ["REF", *(f"suite{i}.1" for i in range(1, 13))],
}


@pytest.mark.parametrize("cells", SHAPES.values(), ids=SHAPES)
def test_pictures_are_readable(tmp_path: Path, figures: list[Figure], cells: list[str]) -> None:
    run = write(tmp_path / "run", *(random_cell(c, 15, seeds=1 + (c == "A1.2")) for c in cells))
    with mpl.rc_context({"font.size": 3.0, "text.usetex": False, "figure.dpi": 31.0}):
        before = dict(mpl.rcParams)
        lines = draw_run(run, tmp_path / "out")
        assert dict(mpl.rcParams) == before
    for line, figure in zip(lines, figures, strict=True):
        pixels = matplotlib.image.imread(line)[..., :3]
        assert Path(line).stat().st_size > 5_000
        assert pixels.shape[1] == 1050
        ink = (pixels < 0.9).any(axis=2)
        assert 0.01 < ink.mean() < 0.5
        # Nothing is cut off at an edge of the picture.
        assert not ink[[0, -1]].any()
        assert not ink[:, [0, -1]].any()
        figure.set_dpi(300.0)
        renderer = FigureCanvasAgg(figure).get_renderer()
        shown = [
            text
            for text in figure.findobj(Text)
            if isinstance(text, Text) and text.get_visible() and text.get_text()
        ]
        assert all(text.get_fontsize() >= 8.0 for text in shown)
        legend = figure.legends[0]
        boxes = [text.get_window_extent(renderer) for text in legend.get_texts()]
        for index, box in enumerate(boxes):
            assert figure.bbox.contains(*box.min)
            assert figure.bbox.contains(*box.max)
            assert not any(box.overlaps(other) for other in boxes[:index])
        looks = [
            (line.get_color(), line.get_marker(), line.get_fillstyle())
            for line in legend.get_lines()
        ]
        assert len(set(looks)) == len(looks)
        for axes in figure.axes:
            assert axes.bbox.height > 1.0 * figure.dpi
            assert axes.get_ylabel()
        assert figure.axes[-1].get_xlabel()
        title = " ".join(figure.get_suptitle().split())
        assert title.startswith("tinygsm, n = 15 items")
        assert ("15 to 30 samples" in title) == ("A1.2" in cells)


def test_many_curves_are_spread_over_panels(tmp_path: Path, figures: list[Figure]) -> None:
    shared = [0, 1, 2, 3, 9] * 3

    def cell(name: str) -> list[Row]:
        rows = random_cell(name, 15)
        if name in ("A1.7", "A4.4"):
            return [r | {"switches": s} for r, s in zip(rows, shared, strict=True)]
        return rows

    draw_run(write(tmp_path / "run", *(cell(c) for c in ["REF", *PAPER])), tmp_path / "out")
    panels = [(axes.get_title(loc="left"), len(axes.get_lines())) for axes in figures[2].axes]
    # The reference is in each, and the curve that A1.7 and A4.4 share in both of theirs.
    assert panels == [("A1", 8), ("A2", 8), ("A3", 6), ("A4", 5)]
    labels = [p["label"] for p in table(tmp_path / "out", NAMES[2])]
    assert "A1.7, A4.4" in labels
    assert len(set(labels)) == 23
    # In a crowd the reference's band stands for all.
    assert [len(axes.collections) for axes in figures[2].axes] == [1, 1, 1, 1]
    for name, cells, expected in [
        ("wide", SHAPES["a wide suite"], [("sweep", 8), ("sweep", 8), ("sweep", 5)]),
        (
            "many",
            SHAPES["many suites"],
            [
                ("suite1, suite2, suite3, suite4, suite5, suite6,\nsuite7", 8),
                ("suite8, suite9, suite10, suite11, suite12", 6),
            ],
        ),
    ]:
        draw_run(write(tmp_path / name, *(random_cell(c, 40) for c in cells)), tmp_path / "out")
        axes = figures[-1].axes
        assert [(a.get_title(loc="left"), len(a.get_lines())) for a in axes] == expected


def test_bands_are_drawn_where_there_is_room(tmp_path: Path, figures: list[Figure]) -> None:
    cells = [random_cell(name, 15) for name in ("REF", "A1.2", "A1.3", "A1.4")]
    draw_run(write(tmp_path / "run", *cells), tmp_path / "out")
    assert len(figures[2].axes[0].collections) == 4
    title = " ".join(figures[2].get_suptitle().split())
    assert title == "tinygsm, n = 15 items, 95 % band ±0.35"


def test_drawing_again_changes_no_byte(tmp_path: Path) -> None:
    cells = [random_cell(name, 20, seeds=2) for name in ("REF", "A1.2", "A2.3")]
    draw_run(write(tmp_path / "run", *cells), tmp_path / "first")
    draw_run(tmp_path / "run", tmp_path / "second")
    # Rows in another order, and one superseded: files are append-only.
    rewritten = [[rows[3] | {"switches": 99}, *reversed(rows)] for rows in cells]
    draw_run(write(tmp_path / "other", *rewritten), tmp_path / "third")
    for name in NAMES:
        first = (tmp_path / "first" / f"{name}.csv").read_bytes()
        assert first == (tmp_path / "second" / f"{name}.csv").read_bytes()
        assert first == (tmp_path / "third" / f"{name}.csv").read_bytes()
        assert b"\r" not in first


def test_figures_without_data_say_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    draw_run(write(tmp_path / "whole", random_cell("REF", 5)), out)
    assert len(list(out.iterdir())) == 6
    failed = [
        row("REF", i, latent=0, explicit=0, switches=0, failure="backend_error", stop="prompt")
        for i in range(5)
    ]
    assert draw_run(write(tmp_path / "failed", failed), out) == [
        "accuracy_vs_total_steps: not drawn: no sample took a step",
        str(out / "accuracy_vs_wallclock.png"),
        "switch_count_cdf: not drawn: no sample took a step",
    ]
    # What was there is not taken for this run's.
    assert {path.name for path in out.iterdir()} == {
        "accuracy_vs_wallclock.png",
        "accuracy_vs_wallclock.csv",
    }
    untimed = random_cell("REF", 5)
    untimed = [r | {"latency_s": 0.0} for r in untimed]
    lines = draw_run(write(tmp_path / "untimed", untimed), out)
    assert lines[1] == "accuracy_vs_wallclock: not drawn: no sample has a latency"
    assert Path(lines[0]).is_file()
    assert Path(lines[2]).is_file()
    assert len(list(out.iterdir())) == 4


def test_benchmarks_do_not_mix(tmp_path: Path) -> None:
    run = write(tmp_path / "run", random_cell("REF", 5), random_cell("A1.2", 5, bench="gsm8k"))
    why = "not drawn: cells of several benchmarks (gsm8k, tinygsm) cannot be compared"
    assert draw_run(run, tmp_path / "out") == [f"{name}: {why}" for name in NAMES]


def test_names_are_text(tmp_path: Path, figures: list[Figure]) -> None:
    """Dollars are no formula, and commas and quotes survive the CSV."""
    name = 'B1,"$\\frac$'
    rows = [row("REF", i, bench="$\\bench$") for i in range(3)]
    odd = [row(name, i, suite="B1", bench="$\\bench$", switches=i) for i in range(3)]
    run = write(tmp_path / "run", rows)
    (run / "raw" / "odd.jsonl").write_text("".join(json.dumps(r) + "\n" for r in odd))
    draw_run(run, tmp_path / "out")
    assert {p["label"] for p in table(tmp_path / "out", NAMES[2])} == {"REF", name}
    assert figures[2].legends[0].get_texts()[1].get_text() == name


def test_folders_without_rows_are_errors(tmp_path: Path) -> None:
    with pytest.raises(RunDataError, match="no such folder"):
        draw_run(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "empty" / "raw").mkdir(parents=True)
    with pytest.raises(RunDataError, match="no raw rows"):
        draw_run(tmp_path / "empty", tmp_path / "out")
    broken = write(tmp_path / "broken", random_cell("REF", 3))
    with (broken / "raw" / "REF.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(RunDataError, match=r"REF\.jsonl:4"):
        draw_run(broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_an_os_error(tmp_path: Path) -> None:
    run = write(tmp_path / "run", random_cell("REF", 3))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileExistsError):
        draw_run(run, tmp_path / "file")


def test_plot_needs_neither_torch_nor_a_window(tmp_path: Path) -> None:
    run = write(tmp_path / "run", random_cell("REF", 5))
    code = (
        "import sys, dlmom_rs.cli\n"
        f"sys.argv = ['dlmom-rs', 'plot', {str(run)!r}]\n"
        "try:\n"
        "    status = dlmom_rs.cli.main()\n"
        "except SystemExit as end:\n"
        "    status = end.code\n"
        "loaded = {'torch', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "assert 'dlmom_rs.figures' in sys.modules\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], check=False, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(run / "figs" / f"{name}.png") for name in NAMES]
