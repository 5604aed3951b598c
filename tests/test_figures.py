"""Figures of runs: what they draw, held to numpy; what they look like, as far as a test can see."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from dlmom_rs import RunDataError
from dlmom_rs.figures import FORMATS, STYLES, _canvas, _trace, draw_run, draw_trace

# What plain rows of one agent give, and what they leave out.
NAMES = ("accuracy_vs_total_steps", "accuracy_vs_wallclock", "switch_count_cdf")
LEFT_OUT = {
    "drift_histogram": "no row has a drift",
    "bandwidth_vs_accuracy": "no bytes cross a link with one agent",
    "memory_vs_throughput": "there is no run.json with the cells' timings",
}
ALL = (*NAMES[:2], "drift_histogram", NAMES[2], "bandwidth_vs_accuracy", "memory_vs_throughput")
Row = dict[str, Any]


def lines_of(out: Path, changes: dict[str, str] | None = None) -> list[str]:
    """A line per figure; ``changes`` are reasons of figures that plain rows have."""
    reasons = LEFT_OUT | (changes or {})
    return [
        f"{name}: not drawn: {reasons[name]}" if name in reasons else str(out / f"{name}.png")
        for name in ALL
    ]


def made(lines: list[str]) -> list[Path]:
    return [Path(line) for line in lines if ": not drawn: " not in line]


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


def rich_cell(experiment: str, n: int, *, mark: int = 1 << 29, **options: Any) -> list[Row]:
    """Rows of two agents with bytes, drift and a high-water mark of memory."""
    draws = random.Random(f"rich {experiment}")
    return [
        r
        | {
            "forward_tokens_per_agent": [30, 30],
            "uplink_bytes": draws.randrange(1000, 9000),
            "downlink_bytes": draws.randrange(100, 900),
            "drift": {
                "kl": 0.0 if experiment == "REF" else 10 ** draws.gauss(-3, 1.0),
                "cosine": 0.9,
                "events": 1,
            },
            "peak_rss_bytes": mark,
        }
        for r in random_cell(experiment, n, **options)
    ]


def write_timings(run: Path, timings: dict[str, tuple[int, float]]) -> None:
    """``run.json`` with samples and seconds by cell."""
    write_manifest(run, [(name, "run", None) for name in timings])
    manifest = json.loads((run / "run.json").read_text())
    manifest["notes"] = {
        "timings": {
            name: {"samples": n, "steps": 9, "occupancy": 0.5, "backend_s": s / 2, "wall_s": s}
            for name, (n, s) in timings.items()
        }
    }
    (run / "run.json").write_text(json.dumps(manifest))


def whole_run(run: Path, cells: list[str]) -> Path:
    """A run that has every figure, if it has two cells."""
    draws = random.Random(5)
    rows = [
        [
            r | {"started_at": 1e9 + 1000 * index}
            for r in rich_cell(
                name, 15, mark=(500 + 50 * ((index + 1) // 2)) << 20, seeds=1 + (name == "A1.2")
            )
        ]
        for index, name in enumerate(cells)
    ]
    write(run, *rows)
    write_timings(run, {name: (15, draws.uniform(1, 9)) for name in cells})
    return run


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
    assert lines == lines_of(tmp_path / "out")
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


LOOKS = [("default", shape) for shape in SHAPES] + [
    ("paper", shape) for shape in ("one cell", "every suite")
]


@pytest.mark.parametrize(("style", "shape"), LOOKS, ids=[f"{s}, {n}" for s, n in LOOKS])
def test_pictures_are_readable(
    tmp_path: Path, figures: list[Figure], style: str, shape: str
) -> None:
    cells = SHAPES[shape]
    run = whole_run(tmp_path / "run", cells)
    with mpl.rc_context({"font.size": 3.0, "text.usetex": False, "figure.dpi": 31.0}):
        before = dict(mpl.rcParams)
        lines = draw_run(run, tmp_path / "out", style=style)
        assert dict(mpl.rcParams) == before
    assert len(made(lines)) == (4 if shape == "one cell" else 6)
    for line, figure in zip(made(lines), figures, strict=True):
        pixels = matplotlib.image.imread(line)[..., :3]
        assert line.stat().st_size > 5_000
        assert pixels.shape[1] == {"default": 1050, "paper": 990}[style]
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
        if style == "paper":
            assert len({look[1:] for look in looks}) == len(looks)
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
    draw_run(write(tmp_path / "whole", random_cell("REF", 5)), out, formats=FORMATS)
    assert len(list(out.iterdir())) == 12
    failed = [
        row("REF", i, latent=0, explicit=0, switches=0, failure="backend_error", stop="prompt")
        for i in range(5)
    ]
    nothing = dict.fromkeys((NAMES[0], NAMES[2]), "no sample took a step")
    lines = draw_run(write(tmp_path / "failed", failed), out, formats=FORMATS)
    wallclock = f"{out / NAMES[1]}.{{png,svg,pdf}}"
    assert lines == [lines_of(out, nothing)[0], wallclock, *lines_of(out, nothing)[2:]]
    # What was there is not taken for this run's.
    assert {path.name for path in out.iterdir()} == {
        *(f"accuracy_vs_wallclock.{ending}" for ending in ("png", "svg", "pdf", "csv")),
    }
    untimed = random_cell("REF", 5)
    untimed = [r | {"latency_s": 0.0} for r in untimed]
    lines = draw_run(write(tmp_path / "untimed", untimed), out)
    assert lines == lines_of(out, {NAMES[1]: "no sample has a latency"})
    assert all(path.is_file() for path in made(lines))
    assert len(list(out.iterdir())) == 4


def test_benchmarks_do_not_mix(tmp_path: Path) -> None:
    run = write(tmp_path / "run", random_cell("REF", 5), random_cell("A1.2", 5, bench="gsm8k"))
    why = "cells of several benchmarks (gsm8k, tinygsm) cannot be compared"
    assert draw_run(run, tmp_path / "out") == lines_of(tmp_path / "out", dict.fromkeys(NAMES, why))
    other = [r | {"bench": "gsm8k"} for r in rich_cell("A1.2", 5)]
    run = write(tmp_path / "rich", rich_cell("REF", 5, mark=9), other)
    write_timings(run, {"REF": (5, 1.0), "A1.2": (5, 2.0)})
    assert draw_run(run, tmp_path / "out") == [f"{name}: not drawn: {why}" for name in ALL]


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
    assert done.stdout.splitlines() == lines_of(run / "figs")


# Bytes


def bars(axes: Any) -> list[tuple[float, float, float, float]]:
    """Ends of the horizontal and the vertical error bar of every point."""
    found = []
    for container in axes.containers:
        across, up = (bar.get_segments()[0] for bar in container.lines[2])
        found.append((across[0][0], across[1][0], up[0][1], up[1][1]))
    return found


@pytest.mark.parametrize("factor", [1, 40], ids=["linear", "logarithmic"])
def test_bytes_of_both_directions_with_their_intervals(
    tmp_path: Path, figures: list[Figure], factor: int
) -> None:
    cells = {
        "REF": rich_cell("REF", 30),
        "A1.2": rich_cell("A1.2", 30, seeds=3),
        "A1.3": [
            r | {"uplink_bytes": factor * r["uplink_bytes"], "correct": False}
            for r in rich_cell("A1.3", 12)
        ],
        "A1.4": [r | {"correct": True} for r in rich_cell("A1.4", 12)],
    }
    draw_run(write(tmp_path / "run", *cells.values()), tmp_path / "out")
    axes = figures[-1].axes[0]
    assert axes.get_xlabel() == "mean bytes per sample, uplink + downlink"
    assert axes.get_xscale() == ("linear" if factor == 1 else "log")
    drawn = table(tmp_path / "out", "bandwidth_vs_accuracy")
    assert [point["experiment"] for point in drawn] == list(cells)
    for point, ends in zip(drawn, bars(axes), strict=True):
        rows = cells[point["experiment"]]
        up, down = item_means(rows, "uplink_bytes"), item_means(rows, "downlink_bytes")
        both = up + down
        half = 1.96 * both.std(ddof=1) / math.sqrt(len(both))
        expected = [both.mean(), both.mean() - half, both.mean() + half, up.mean(), down.mean()]
        got = ("bytes", "bytes_lo", "bytes_hi", "uplink_bytes", "downlink_bytes")
        assert [float(point[name]) for name in got] == pytest.approx(expected, rel=1e-12)
        solved = sum(r["correct"] for r in rows)
        for link in ("uplink_bytes", "downlink_bytes"):
            total = sum(r[link] for r in rows)
            steps = sum(r["total_steps"] for r in rows)
            assert float(point[f"{link}_per_step"]) == pytest.approx(total / steps)
            if solved:
                assert float(point[f"{link}_per_solved"]) == pytest.approx(total / solved)
            else:
                assert point[f"{link}_per_solved"] == ""
        # Several samples of an item are one trial.
        items = item_means(rows, "correct")
        low, high = wilson(float(items.mean()), len(items))
        assert ends[:2] == pytest.approx(expected[1:3])
        assert ends[2:] == pytest.approx([max(0.0, low), min(1.0, high)], abs=1e-9)
        bottom, top = axes.get_ylim()
        assert bottom <= ends[2] <= ends[3] <= top


def test_no_bytes_beside_many_have_a_place(tmp_path: Path, figures: list[Figure]) -> None:
    silent = [r | {"uplink_bytes": 0, "downlink_bytes": 0} for r in rich_cell("REF", 9)]
    loud = [r | {"uplink_bytes": 1000 * r["uplink_bytes"]} for r in rich_cell("A1.3", 9)]
    run = write(tmp_path / "run", silent, rich_cell("A1.2", 9), loud)
    draw_run(run, tmp_path / "out")
    axes = figures[-1].axes[0]
    assert axes.get_xscale() == "symlog"
    ticks = axes.get_xticks()
    assert ticks[0] == 0.0
    assert all(tick > 0 and math.log10(tick).is_integer() for tick in ticks[1:])
    mute = write(tmp_path / "mute", silent)
    line = draw_run(mute, tmp_path / "out")[4]
    assert line == "bandwidth_vs_accuracy: not drawn: no sample sent bytes over a link"


# Drift


def with_drift(rows: list[Row], kls: list[float | None]) -> list[Row]:
    drift = [None if kl is None else {"kl": kl, "cosine": 1.0, "events": 0} for kl in kls]
    return [r | {"drift": d} for r, d in zip(rows, drift, strict=True)]


def test_drift_is_counted_on_logarithmic_bins(tmp_path: Path, figures: list[Figure]) -> None:
    draws = np.random.default_rng(7)
    kls = {
        "REF": [0.0] * 10 + list(10 ** draws.uniform(-7, -5, 20)),
        "A1.2": list(10 ** draws.normal(-2, 0.8, 90)),
        "A1.3": [None] * 5 + list(10 ** draws.normal(-1, 0.5, 25)),
        "A1.4": [None] * 4,
    }
    cells = {
        name: with_drift(random_cell(name, len(values) // s, seeds=s), values)
        for (name, values), s in zip(kls.items(), (1, 3, 1, 1), strict=True)
    }
    draw_run(write(tmp_path / "run", *cells.values()), tmp_path / "out")
    drawn = table(tmp_path / "out", "drift_histogram")
    assert list(drawn[0]) == [
        *("label", "experiments", "bench", "n", "n_items", "kl_from", "kl_to", "count", "share"),
    ]
    assert list(dict.fromkeys(p["label"] for p in drawn)) == ["REF", "A1.2", "A1.3"]
    for name in ("REF", "A1.2", "A1.3"):
        bins = [p for p in drawn if p["label"] == name]
        edges = [float(p["kl_from"]) for p in bins] + [float(bins[-1]["kl_to"])]
        assert edges[0] == 0.0
        assert edges[1:] == pytest.approx(10 ** np.arange(-7, math.log10(edges[-1]) + 0.1, 0.25))
        rows = [r for r in cells[name] if r["drift"] is not None]
        values = [r["drift"]["kl"] for r in rows]
        counts = np.histogram(values, edges)[0]
        assert [int(p["count"]) for p in bins] == counts.tolist()
        items = {r["item_id"] for r in rows}
        assert {(p["n"], p["n_items"]) for p in bins} == {(str(len(rows)), str(len(items)))}
        # All items of these cells have as many samples as each other.
        assert [float(p["share"]) for p in bins] == pytest.approx(counts / len(rows))
    floor = np.quantile([kl for kl in kls["REF"] if kl is not None], 0.95)
    figure = figures[2]
    [shade] = figure.axes[0].patches
    assert shade.get_x() + shade.get_width() == pytest.approx(math.log10(floor))
    assert f"noise floor {floor:.2g} nats" in figure.get_suptitle().replace("\xa0", " ")
    assert figure.axes[0].get_xticklabels()[0].get_text() == "0"


def test_samples_of_one_item_share_its_weight(tmp_path: Path) -> None:
    rows = random_cell("A1.2", 2, seeds=4)[:5]
    assert len({r["item_id"] for r in rows}) == 2
    run = write(tmp_path / "run", with_drift(rows, [1e-3, 1e-3, 1e-2, 1e-1, 0.5]))
    draw_run(run, tmp_path / "out")
    bins = table(tmp_path / "out", "drift_histogram")
    shares = {float(p["kl_from"]): float(p["share"]) for p in bins if p["count"] != "0"}
    assert list(shares.values()) == pytest.approx([2 / 8, 1 / 8, 1 / 8, 1 / 2])
    assert sum(float(p["share"]) for p in bins) == pytest.approx(1.0)


def test_drift_without_a_reference_or_a_value(tmp_path: Path, figures: list[Figure]) -> None:
    only = write(tmp_path / "only", with_drift(random_cell("A1.2", 3), [1e-30, 1e-3, 1e-2]))
    assert len(made(draw_run(only, tmp_path / "out"))) == 4
    assert "no noise floor" in figures[2].get_suptitle().replace("\xa0", " ")
    assert not figures[2].axes[0].patches
    # A value far below the others does not stretch the axis, and is not called 0.
    assert figures[2].axes[0].get_xticklabels()[0].get_text() == "≈ 0"
    assert table(tmp_path / "out", "drift_histogram")[0]["count"] == "1"
    nil = write(tmp_path / "nil", with_drift(random_cell("REF", 3), [0.0] * 3))
    expected = "drift_histogram: not drawn: every drift is 0"
    assert draw_run(nil, tmp_path / "out")[2] == expected


# Memory


def timed_run(run: Path, marks: dict[str, int], **fields: Any) -> Path:
    """Cells in the order in which they ran, which is not that of the manifest."""
    rows = [
        [
            r | {"started_at": 1e9 + 100 * index, "peak_rss_bytes": mark} | fields
            for r in random_cell(name, 6)
        ]
        for index, (name, mark) in enumerate(marks.items())
    ]
    write(run, *rows)
    write_timings(run, {name: (6, 2.0 + i) for i, name in enumerate(sorted(marks))})
    return run


def test_memory_is_a_mark_that_later_cells_inherit(tmp_path: Path, figures: list[Figure]) -> None:
    marks = {"REF": 10**9, "A1.3": 2 * 10**9, "A1.2": 2 * 10**9, "A1.5": 10**8, "A1.4": 3 * 10**8}
    lines = draw_run(timed_run(tmp_path / "run", marks), tmp_path / "out")
    assert Path(lines[5]).is_file()
    drawn = {p["experiment"]: p for p in table(tmp_path / "out", "memory_vs_throughput")}
    assert {name: int(p["high_water_bytes"]) for name, p in drawn.items()} == marks
    # A1.5 began another process.
    assert [name for name, p in drawn.items() if p["inherited"] == "true"] == ["A1.2"]
    assert {p["memory"] for p in drawn.values()} == {"peak_rss_bytes"}
    for index, name in enumerate(sorted(marks)):
        assert float(drawn[name]["samples_per_s"]) == 6 / (2.0 + index)
        assert (drawn[name]["samples"], float(drawn[name]["wall_s"])) == ("6", 2.0 + index)
    axes = figures[-1].axes[0]
    assert axes.get_ylabel() == "high-water mark of\nresident memory (GB)"
    assert "upper bound" in [text.get_text() for text in figures[-1].legends[0].get_texts()]
    assert len(axes.texts) == 1
    assert axes.texts[0].xy == (6 / 2.0, 2.0)


def test_device_memory_goes_before_resident_memory(tmp_path: Path, figures: list[Figure]) -> None:
    run = timed_run(tmp_path / "run", {"REF": 7, "A1.2": 7}, peak_device_bytes=5)
    line = draw_run(run, tmp_path / "out")[5]
    assert line.endswith(
        "peak device memory is one high-water mark of the process, 0 MB by the end of every cell"
    )
    rows = [json.loads(r) for r in (run / "raw" / "REF.jsonl").read_text().splitlines()]
    rows[2]["peak_device_bytes"] = 10**6
    (run / "raw" / "REF.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert Path(draw_run(run, tmp_path / "out")[5]).is_file()
    drawn = table(tmp_path / "out", "memory_vs_throughput")
    assert {p["experiment"]: (p["memory"], p["high_water_bytes"]) for p in drawn} == {
        "REF": ("peak_device_bytes", "1000000"),
        "A1.2": ("peak_device_bytes", "5"),
    }
    assert figures[-1].axes[0].get_ylabel() == "high-water mark of\ndevice memory (MB)"


def test_memory_without_two_marks_says_why(tmp_path: Path) -> None:
    def reason(run: Path) -> str:
        return draw_run(run, tmp_path / "out")[5].removeprefix("memory_vs_throughput: not drawn: ")

    same = timed_run(tmp_path / "same", {"REF": 8 * 10**8, "A1.2": 8 * 10**8})
    mark = "one high-water mark of the process, 800 MB by the end of every cell"
    assert reason(same) == f"peak resident memory is {mark}"
    write_manifest(same, [("REF", "run", None), ("A1.2", "run", None)])
    assert reason(same) == "run.json has no timings"
    write_timings(same, {"REF": (6, 1.0), "A1.2": (0, 0.0)})
    assert reason(same) == "only REF has timings and a peak of memory"
    unknown = timed_run(tmp_path / "unknown", {"REF": 1, "A1.2": 2})
    for file in (unknown / "raw").iterdir():
        file.write_text(
            file.read_text().replace('"peak_rss_bytes": ', '"peak_rss_bytes": null, "x": ')
        )
    assert reason(unknown) == "no row has a peak of memory"


# Formats and styles


def pdf_of(path: Path) -> bytes:
    data = path.read_bytes()
    assert data.startswith(b"%PDF-")
    assert data.rstrip().endswith(b"%%EOF")
    return data


def svg_of(path: Path) -> ET.Element:
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return root


def test_formats_and_what_the_paper_style_changes(tmp_path: Path) -> None:
    run = whole_run(tmp_path / "run", ["REF", "A1.2", "A1.3"])
    for style in STYLES:
        out = tmp_path / style
        lines = draw_run(run, out, formats=FORMATS, style=style)
        assert lines == [f"{out / name}.{{png,svg,pdf}}" for name in ALL]
        for name in ALL:
            assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            texts = svg_of(out / f"{name}.svg").iter("{http://www.w3.org/2000/svg}text")
            words = ["".join(text.itertext()) for text in texts]
            data = pdf_of(out / f"{name}.pdf")
            # TrueType in PDF, and text as text in SVG.
            assert (b"/Type3" in data, b"/FontFile2" in data) == (
                style == "default",
                style == "paper",
            )
            assert any("A1.2" in word for word in words) == (style == "paper")
    # The same bytes again, in whatever order.
    again = draw_run(run, tmp_path / "again", formats=["pdf", "svg", "pdf"])
    assert again[0] == f"{tmp_path / 'again' / ALL[0]}.{{pdf,svg}}"
    for name in ALL:
        for ending in ("svg", "pdf", "csv"):
            first, second = (tmp_path / d / f"{name}.{ending}" for d in ("default", "again"))
            assert first.read_bytes() == second.read_bytes()
    for name in ALL:
        csvs = [(tmp_path / style / f"{name}.csv").read_bytes() for style in STYLES]
        assert csvs[0] == csvs[1]


def test_grey_prints_tell_cells_apart() -> None:
    """Colours of the paper style differ in lightness, and none is too faint for white paper."""
    looks = _canvas.THEMES["paper"].looks([(f"A1.{i}", "A1") for i in range(40)])
    assert len({(look.marker, look.fill) for look in looks}) == 40
    shades = {look.colour for look in looks}
    light = sorted(np.dot(mpl.colors.to_rgb(c), [0.2126, 0.7152, 0.0722]) for c in shades)
    assert min(np.diff(light)) > 0.03
    assert light[-1] < 0.65


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": ["eps "]}, r"unknown format 'eps ' \(known: png, svg, pdf\)"),
        (
            {"formats": ["pngs"]},
            r"unknown format 'pngs'; did you mean png\? \(known: png, svg, pdf\)",
        ),
        ({"formats": []}, "no format: give one or more of png, svg, pdf"),
        (
            {"style": "papers"},
            r"unknown style 'papers'; did you mean paper\? \(known: default, paper\)",
        ),
    ],
)
def test_unknown_formats_and_styles(tmp_path: Path, options: Any, message: str) -> None:
    run = write(tmp_path / "run", random_cell("REF", 2))
    for call in (draw_run, lambda *a, **o: draw_trace(*a, "REF", "item", **o)):
        with pytest.raises(ValueError, match=f"^{message}$"):
            call(run, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.sampled_from(STYLES))
def test_any_text_can_be_shown(text: str, style: str) -> None:
    with mpl.rc_context(dict(_canvas.THEMES[style].settings)):
        shown = _canvas.printable(text)
        assert _canvas.printable(shown) == shown
        figure = Figure(figsize=(1, 1))
        figure.text(0.1, 0.5, shown, parse_math=False)
        # A glyph that no font has would be a warning, and warnings are errors.
        FigureCanvasAgg(figure).draw()
    kept = "".join(c for c in text if " " <= c <= "~")
    assert kept in "".join(c for c in shown if " " <= c <= "~") or len(kept) < len(text)
    assert text != kept or shown == text


# Traces

VOCABULARY = 100
WORDS = [" the", "7", "\n", "日本", "$x^$", "a much longer token", "", "\ud7ff"]


def trace_line(item: str, modes: str, *, experts: int = 2, seed: int = 0, **changes: Any) -> Row:
    """A line of a trace; ``modes`` has an l or an e for every step."""
    draws = random.Random(f"{item} {modes} {seed}")
    steps = len(modes)
    own = [[draws.uniform(0.01, 3.0) for _ in range(experts)] for _ in range(steps)]
    nats = [sum(e) / experts for e in own]
    ids = [draws.sample(range(VOCABULARY), 5) for _ in range(steps)]
    line = {
        "experiment": "REF",
        "item_id": item,
        "seed": seed,
        "sample": 0,
        "entropy": [h / math.log(VOCABULARY) for h in nats],
        "observed": nats,
        "expert_entropy": own,
        "merged_entropy": [0.8 * h for h in nats],
        "mode": ["latent" if mode == "l" else "explicit" for mode in modes],
        "reason": ["above_alpha" if mode == "l" else "below_alpha" for mode in modes],
        "top_ids": ids,
        "top_probs": [[0.5, 0.2, 0.1, 0.05, 0.01]] * steps,
        "top_tokens": [[WORDS[i % len(WORDS)] for i in five] for five in ids],
        "mass": [draws.uniform(0.9, 1.0) for _ in range(steps)],
        "noise_kl": [0.0] * steps,
        "token": [
            None if mode == "l" else draws.choice([five[0], five[1], 999])
            for mode, five in zip(modes, ids, strict=True)
        ],
    }
    assert set(changes) <= set(line)
    return line | changes


def traced_run(run: Path, lines: list[Row], **config: Any) -> Path:
    rows = [
        row("REF", 0, correct=i == 0) | {"item_id": line["item_id"], "seed": line["seed"]}
        for i, line in enumerate(lines)
    ]
    write(run, rows, [row("A1.2", 0)])
    write_manifest(
        run,
        [
            ("REF", "run", None),
            ("A1.1", "alias", "REF"),
            ("A1.2", "run", None),
            ("A3.1", "skip", "the models differ"),
        ],
    )
    manifest = json.loads((run / "run.json").read_text())
    manifest |= {
        "ln_vocab": math.log(VOCABULARY),
        "models": [{"name": "tiny", "vocab": VOCABULARY}, {"name": "small", "vocab": VOCABULARY}],
        "context": {"agents": [0, 1]},
    }
    (run / "run.json").write_text(json.dumps(manifest))
    (run / "traces").mkdir()
    (run / "traces" / "REF.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
    )
    (run / "configs").mkdir()
    knobs = {"gate": "threshold", "alpha": 1.2, "alpha_unit": "nats", "k": 50} | config
    (run / "configs" / "REF.yaml").write_text(json.dumps(knobs))
    return run


MODES = "ellleeelleeeeeeelleeeeeeeel"


@pytest.mark.parametrize("style", STYLES)
def test_a_trace_shows_its_steps(tmp_path: Path, figures: list[Figure], style: str) -> None:
    line = trace_line("0123456789abcdef", MODES)
    run = traced_run(tmp_path / "run", [line])
    [path] = draw_trace(run, tmp_path / "out", "A1.1", "0123", style=style)
    assert path == str(tmp_path / "out" / "trace_A1.1_01234567.png")
    strip, main, mass = figures[0].axes
    spans = [(1, 4), (7, 9), (16, 18), (26, 27)]
    for axes in (strip, main, mass):
        shades = [(patch.get_x(), patch.get_width()) for patch in axes.patches]
        assert shades == [(first - 0.5, end - first) for first, end in spans]
    shown = {
        text.get_text(): handle.get_ydata()
        for text, handle in zip(
            figures[0].legends[0].get_texts(), figures[0].legends[0].legend_handles, strict=True
        )
        if hasattr(handle, "get_ydata")
    }
    curves = {artist.get_label(): artist for artist in main.get_lines()}
    assert len(curves) == len(main.get_lines()) == 6
    ln_v = math.log(VOCABULARY)
    drawn = [artist.get_ydata() for artist in main.get_lines()]
    experts = np.array(line["expert_entropy"]) / ln_v
    for curve, expected in zip(
        drawn,
        [
            *experts.T,
            line["entropy"],
            np.array(line["merged_entropy"]) / ln_v,
            [1.2 / ln_v] * len(MODES),
        ],
        strict=False,
    ):
        assert curve == pytest.approx(expected)
    switches = [i - 0.5 for i in range(1, len(MODES)) if MODES[i] != MODES[i - 1]]
    assert main.get_lines()[-1].get_xdata() == pytest.approx(switches)
    assert list(shown) == [
        *("expert 1: tiny", "expert 2: small", "mean of experts", "merged", "alpha = 1.2 (nats)"),
        "switch",
    ]
    assert mass.get_lines()[0].get_ydata() == pytest.approx(line["mass"])
    assert mass.get_ylabel() == "top-50\nmass"
    title = figures[0].get_suptitle().replace("\xa0", " ").replace("\n", " ")
    assert title == (
        "A1.1 = REF, tinygsm, item 01234567…, seed 0, 27 steps, 8 latent, 7 switches, "
        "answer 7 (right, gold 7)"
    )
    rows = table(tmp_path / "out", "trace_A1.1_01234567")
    assert [int(r["step"]) for r in rows] == list(range(27))
    assert [r["mode"][0] for r in rows] == list(MODES)
    assert [i for i, r in enumerate(rows) if r["switched"] == "true"] == [s + 0.5 for s in switches]
    for r, own, ids, texts, token in zip(
        rows, experts, line["top_ids"], line["top_tokens"], line["token"], strict=True
    ):
        got = [float(r[f"expert_{e}_entropy"]) for e in (1, 2)]
        assert got == pytest.approx(own)
        assert float(r["alpha"]) == pytest.approx(1.2 / ln_v)
        place = 0 if token is None else ids.index(token) if token in ids else None
        assert r["token"] == ("#999" if place is None else texts[place])
        assert r["probability"] == ("" if place is None else str([0.5, 0.2][place]))
    # Nothing lies on something else, and nothing outside.
    figure = figures[0]
    figure.set_dpi(300.0)
    renderer = FigureCanvasAgg(figure).get_renderer()
    labels = [text.get_window_extent(renderer) for text in strip.texts if text.get_text()]
    assert len(labels) >= (5 if style == "paper" else 20)
    for index, box in enumerate(labels):
        assert not any(box.overlaps(other) for other in labels[:index])
        assert box.y0 >= main.bbox.y1
        assert box.y1 <= figure._suptitle.get_window_extent(renderer).y0
    pixels = matplotlib.image.imread(path)[..., :3]
    ink = (pixels < 0.9).any(axis=2)
    assert not ink[[0, -1]].any()
    assert not ink[:, [0, -1]].any()


def test_one_expert_and_other_gates(tmp_path: Path, figures: list[Figure]) -> None:
    line = trace_line("item", "eeee", experts=1, observed=[0.1, 0.2, 0.3, 0.4])
    for index, (config, expected) in enumerate(
        [
            ({"alpha": 0.6, "alpha_unit": "normalized"}, [0.6] * 4),
            ({"alpha": 0.3, "alpha_unit": "quantile"}, None),
            ({"alpha": 0.6, "alpha_unit": "normalized", "gate": "always_explicit"}, None),
        ]
    ):
        run = traced_run(tmp_path / f"run{index}", [line], **config)
        draw_trace(run, tmp_path / "out", "REF", "item")
        main = figures[index].axes[1]
        # Only one expert's entropy, which is its own mean; no span, no switch.
        assert len(main.get_lines()) == (1 if expected is None else 2)
        if expected is not None:
            assert main.get_lines()[1].get_ydata() == pytest.approx(expected)
        assert not main.patches
        alphas = [r["alpha"] for r in table(tmp_path / "out", "trace_REF_item")]
        assert alphas == ([""] * 4 if expected is None else ["0.6"] * 4)


def test_traces_that_fail_or_lack_a_manifest(tmp_path: Path, figures: list[Figure]) -> None:
    """NaN is null in a trace; an entropy of 0 has no logarithm and no alpha of its own."""
    line = trace_line("item", "elle", experts=2)
    for field in ("entropy", "observed", "merged_entropy", "mass"):
        line[field] = [0.0, *line[field][1:3], None]
    for field in ("entropy", "observed", "merged_entropy"):
        line[field][1] = 1e-4 * (1.0 if field == "entropy" else math.log(VOCABULARY))
    line["expert_entropy"] = [[0.0, 0.0], [1e-4, 1e-3], line["expert_entropy"][2], [None, None]]
    run = traced_run(tmp_path / "run", [line, trace_line("empty", "")])
    draw_trace(run, tmp_path / "out", "REF", "item")
    assert figures[0].axes[1].get_yscale() == "log"
    assert min(figures[0].axes[1].get_lines()[2].get_ydata()[:3]) == 1e-5
    rows = table(tmp_path / "out", "trace_REF_item")
    assert [r["entropy"] == "" for r in rows] == [False, False, False, True]
    assert rows[0]["entropy"] == "0.0"
    assert float(rows[0]["alpha"]) == pytest.approx(1.2 / math.log(VOCABULARY))
    assert draw_trace(run, tmp_path / "out", "REF", "empty") == [
        "trace_REF_empty: not drawn: the sample took no step"
    ]
    (run / "run.json").unlink()
    (run / "configs" / "REF.yaml").unlink()
    draw_trace(run, tmp_path / "out", "REF", "item", formats=["svg", "pdf"])
    [row, *_] = table(tmp_path / "out", "trace_REF_item")
    assert (row["alpha"], row["merged_entropy"], row["expert_1_entropy"]) == ("", "", "")
    svg_of(tmp_path / "out" / "trace_REF_item.svg")
    pdf_of(tmp_path / "out" / "trace_REF_item.pdf")


def test_which_trace_is_drawn(tmp_path: Path) -> None:
    lines = [
        trace_line("tinygsm-test-1", "ee"),
        trace_line("tinygsm-test-1", "eeel", seed=4),
        trace_line("tinygsm-test-12", "ee"),
        trace_line("a/b c", "ee"),
        # The sample was run again: its row did not make it to the disk.
        trace_line("tinygsm-test-12", "lle"),
    ]
    run = traced_run(tmp_path / "run", lines)
    with (run / "traces" / "REF.jsonl").open("a") as file:
        file.write('{"experiment": "RE')
    out = tmp_path / "out"

    def drawn(item: str, seed: int | None = None) -> tuple[str, int]:
        [path] = draw_trace(run, out, "REF", item, seed)
        return Path(path).stem, len(table(out, Path(path).stem))

    # A whole id goes before the start of another.
    assert drawn("tinygsm-test-1") == ("trace_REF_tinygsm-test-1", 2)
    assert drawn("tinygsm-test-1", 0) == ("trace_REF_tinygsm-test-1_seed0", 2)
    assert drawn("tinygsm-test-1", 4) == ("trace_REF_tinygsm-test-1_seed4", 4)
    assert drawn("tinygsm-test-12", 0) == ("trace_REF_tinygsm-test-12", 3)
    assert drawn("a/") == ("trace_REF_a_b_c", 2)
    for arguments, message in [
        (("A1", "a/"), r"unknown cell 'A1'; did you mean A1.1\? \(known: REF, A1.1, A1.2, A3.1\)"),
        (("A3.1", "a/"), "cell A3.1 was skipped: the models differ"),
        (("A1.2", "a/"), r"cell A1.2 has no traced samples in .*A1\.2\.jsonl"),
        (("REF", "tiny"), "item 'tiny' is the start of several: tinygsm-test-1, tinygsm-test-12"),
        (
            ("REF", "tinygsm-tset-12"),
            r"unknown item 'tinygsm-tset-12'; did you mean tinygsm-test-12\? "
            r"\(traced in REF: tinygsm-test-1, tinygsm-test-12, a/b c\)",
        ),
        (("REF", ""), r"unknown item '' \(traced in REF: .*\)"),
        (("REF", "a/", 7), r"item a/b c was not traced with seed 7 \(traced in REF: 0\)"),
    ]:
        with pytest.raises(ValueError, match=f"^{message}$"):
            draw_trace(run, tmp_path / "no", *arguments)
    assert not (tmp_path / "no").exists()


def test_malformed_traces_name_their_line(tmp_path: Path) -> None:
    whole = trace_line("item", "el")
    for index, (line, message) in enumerate(
        [
            ("{", r"REF\.jsonl:2: "),
            ("{}", r"REF\.jsonl:2: no field item_id$"),
            (json.dumps(whole | {"mass": [1.0]}), r"REF\.jsonl:2: mass has 1 entries of 2 steps$"),
        ]
    ):
        run = traced_run(tmp_path / str(index), [whole])
        with (run / "traces" / "REF.jsonl").open("a") as file:
            file.write(line + "\n")
        with pytest.raises(RunDataError, match=message):
            draw_trace(run, tmp_path / "out", "REF", "item")
    (run / "traces" / "REF.jsonl").write_text(json.dumps(whole) + "\n")
    (run / "configs" / "REF.yaml").write_text("a: [")
    with pytest.raises(RunDataError, match=r"REF\.yaml: "):
        draw_trace(run, tmp_path / "out", "REF", "item")
    with pytest.raises(RunDataError, match="no such folder"):
        draw_trace(tmp_path / "nowhere", tmp_path / "out", "REF", "item")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.booleans(), max_size=60))
def test_spans_and_switches_are_those_of_the_modes(latent: list[bool]) -> None:
    line = trace_line("item", "".join("l" if here else "e" for here in latent))
    none = np.zeros(0)
    sample = _trace._Sample(
        *("REF", "REF", "item", line, None, none, none, none, none, none, (), "", "")
    )
    covered = [step for first, end in sample.spans for step in range(first, end)]
    assert covered == [step for step, here in enumerate(latent) if here]
    # Spans do not touch: each is as long as it can be.
    assert all(a[1] < b[0] for a, b in pairwise(sample.spans))
    changes = sum(a != b for a, b in pairwise(latent))
    assert sum(sample.switched) == changes
