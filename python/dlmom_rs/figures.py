"""The figures of a run, each a PNG with the CSV of what it shows beside it.

Points carry 95 % intervals on both axes, curves a 95 % band. Cells that share their rows (aliases)
or look exactly alike are drawn once under a joined label. Neither torch nor transformers is needed.
"""

from __future__ import annotations

import csv
import io
import math
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dlmom_rs.tables import read_run

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

__all__ = ["draw_run"]

_REF = "REF"
# Okabe and Ito's palette; black is the reference's, and grey stands in for yellow, which is too
# faint for lines on white.
_BLACK = "#000000"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#999999")
# The paper's suites look the same in every run.
_SOLID, _DASHED, _DASH_DOT, _DOTTED = (), (3.0, 1.5), (4.0, 1.2, 1.2, 1.2), (1.2, 1.2)
_SUITES: dict[str, tuple[str, tuple[float, ...]]] = {
    "A1": ("o", _SOLID),
    "A2": ("s", _DASHED),
    "A3": ("^", _DASH_DOT),
    "A4": ("D", _DOTTED),
}
_OTHER_SUITES: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("v", _SOLID),
    ("P", _DASHED),
    ("X", _DASH_DOT),
    ("p", _DOTTED),
)
_SIZES = {"*": 10.0, "^": 7.0, "v": 7.0, "P": 8.0, "X": 8.0, "p": 7.0}
_FILLS = ("full", "none", "bottom", "left", "top", "right")

_WIDTH_IN = 3.5
_AXES_HEIGHT_IN = 2.4
_PANEL_HEIGHT_IN = 1.5
# Measures of 8 pt text, for the legend.
_EM_IN = 8 / 72
_CHARACTER_IN = 0.066
_LINE_IN = 0.17
_LABEL_WIDTH = 46
_LINE_WIDTH = 52
_WIDEST_LEGEND = 5
# More curves are spread over panels.
_PANEL_CURVES = 8
# More bands in a panel would be mud; the title says how wide all are.
_SHADED_CURVES = 4
_STYLE: dict[str, Any] = {
    "font.size": 8.0,
    "axes.labelsize": 8.0,
    "axes.titlesize": 8.0,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "legend.fontsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.2,
    "savefig.dpi": 300.0,
}


@dataclass(frozen=True)
class _Look:
    colour: str
    marker: str
    dashes: tuple[float, ...]
    # Where its first dash begins, so that dashed curves that coincide all show.
    phase: float
    fill: str

    def marks(self, scale: float) -> dict[str, Any]:
        """What ``Axes.plot`` is told about colour and markers."""
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": scale * _SIZES.get(self.marker, 5.5),
            "fillstyle": self.fill,
            "markerfacecoloralt": "white",
            "markeredgewidth": 0.5 if self.fill == "full" else 1.0,
            "markeredgecolor": "white" if self.fill == "full" else self.colour,
        }


@dataclass(frozen=True)
class _Cell:
    """A cell with rows of its own: its line of the cells table, and the names of its aliases."""

    row: dict[str, Any]
    aliases: tuple[str, ...]
    look: _Look

    @property
    def id(self) -> str:
        return str(self.row["experiment"])

    @property
    def label(self) -> str:
        return " = ".join([*self.aliases, self.id])


@dataclass(frozen=True)
class _Run:
    cells: tuple[_Cell, ...]
    raw: pl.DataFrame

    def of(self, cell: _Cell, column: str) -> list[Any]:
        """A column of the raw rows of one cell."""
        rows = self.raw.filter(self.raw["experiment"] == cell.id)
        return rows[column].to_list()


@dataclass(frozen=True)
class _Drawing:
    figure: Figure
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@dataclass(frozen=True)
class _Spec:
    """A figure: ``needs`` says why a run cannot have it, or nothing; ``draw`` draws it."""

    name: str
    needs: Callable[[_Run], str | None]
    draw: Callable[[_Run], _Drawing]


def draw_run(run: str | os.PathLike[str], out: str | os.PathLike[str]) -> list[str]:
    """Draw the figures of the run folder ``run`` into the folder ``out``, which is created.

    - ``accuracy_vs_total_steps``: strict accuracy (percent, Wilson's 95 % interval) against mean
      steps per sample, latent and explicit (95 % interval over items), a point per cell; the grey
      stairs are the Pareto frontier of the points: fewer steps, higher accuracy.
    - ``accuracy_vs_wallclock``: the same against mean latency per sample in seconds.
    - ``switch_count_cdf``: the share of samples with at most so many changes of mode, a curve per
      cell; the shading is the Dvoretzky-Kiefer-Wolfowitz 95 % band, items counted as trials. More
      than 8 curves are spread over panels by suite, REF in each, and of more than 4 in a panel only
      the first is shaded; the title gives the half-width for all.

    ``NAME.csv`` beside each ``NAME.png`` holds the numbers that were drawn, accuracies as
    fractions; the same rows give the same bytes. Returns a line per figure: the path of the PNG, or
    ``NAME: not drawn: REASON``, in which case files of an earlier drawing under that name are
    removed.

    Raises :class:`dlmom_rs.RunDataError` for a folder without raw rows or with a malformed one, and
    ``OSError`` where ``out`` cannot be written.
    """
    tables = _read(run)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    return [_make(spec, tables, folder) for spec in _FIGURES]


def _make(spec: _Spec, run: _Run, folder: Path) -> str:
    png, table = folder / f"{spec.name}.png", folder / f"{spec.name}.csv"
    reason = spec.needs(run)
    if reason is not None:
        png.unlink(missing_ok=True)
        table.unlink(missing_ok=True)
        return f"{spec.name}: not drawn: {reason}"
    # From matplotlib's defaults, not from the user's configuration; both are back afterwards.
    with matplotlib.style.context(["default", _STYLE]):
        drawing = spec.draw(run)
        image = io.BytesIO()
        drawing.figure.savefig(image, format="png")
    png.write_bytes(image.getvalue())
    table.write_text(_csv(drawing), encoding="utf-8", newline="")
    return str(png)


def _read(path: str | os.PathLike[str]) -> _Run:
    rows = read_run(path, table="cells").to_dicts()
    aliases: dict[str, list[str]] = {}
    for row in rows:
        if row["alias_of"] is not None:
            aliases.setdefault(row["alias_of"], []).append(row["experiment"])
    own = [row for row in rows if row["alias_of"] is None and row["skipped"] is None]
    looks = _looks([(row["experiment"], row["suite"]) for row in own])
    cells = tuple(
        _Cell(row, tuple(aliases.get(row["experiment"], ())), look)
        for row, look in zip(own, looks, strict=True)
    )
    return _Run(cells, read_run(path, table="raw"))


def _looks(cells: Sequence[tuple[str, str]]) -> list[_Look]:
    """Markers and dashes tell the suites, colours the cells, fills those beyond the colours."""
    suites = dict(_SUITES)
    seen: Counter[str] = Counter()
    looks = []
    for experiment, suite in cells:
        if experiment == _REF:
            looks.append(_Look(_BLACK, "*", _SOLID, 0.0, _FILLS[0]))
            continue
        if suite not in suites:
            suites[suite] = _OTHER_SUITES[(len(suites) - len(_SUITES)) % len(_OTHER_SUITES)]
        index = seen.total() % len(_COLOURS)
        fill = _FILLS[seen[suite] // len(_COLOURS) % len(_FILLS)]
        seen[suite] += 1
        looks.append(_Look(_COLOURS[index], *suites[suite], 1.7 * index, fill))
    return looks


def _csv(drawing: _Drawing) -> str:
    def text(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        return repr(value) if isinstance(value, float) else str(value)

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(drawing.columns)
    writer.writerows([text(value) for value in row] for row in drawing.rows)
    return buffer.getvalue()


# What the figures share


def _one_bench(run: _Run) -> str | None:
    benches = sorted({str(cell.row["bench"]) for cell in run.cells})
    if len(benches) == 1:
        return None
    return f"cells of several benchmarks ({', '.join(benches)}) cannot be compared"


def _needs(column: str, nothing: str, run: _Run) -> str | None:
    """One benchmark, and a column of raw rows that is not 0 throughout."""
    return _one_bench(run) or (None if run.raw[column].sum() > 0 else nothing)


def _title(run: _Run, note: str) -> str:
    items, samples = ([cell.row[column] for cell in run.cells] for column in ("n_items", "n"))
    parts = [run.cells[0].row["bench"], f"n = {_span(items)} items"]
    if samples != items:
        parts.append(f"{_span(samples)} samples")
    # Where the title takes two lines, the note stays whole.
    return ", ".join([*parts, note.replace(" ", "\N{NO-BREAK SPACE}")])


def _span(values: Sequence[float], form: str = "") -> str:
    ends = [format(value, form) for value in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


def _canvas(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    height = _AXES_HEIGHT_IN + _PANEL_HEIGHT_IN * (panels - 1)
    figure = Figure(figsize=(_WIDTH_IN, height), layout="constrained")
    axes = figure.subplots(panels, squeeze=False, sharex=True, sharey=True)[:, 0].tolist()
    # A benchmark's name is no formula.
    figure.suptitle(textwrap.fill(title, _LINE_WIDTH), fontsize=8.0, parse_math=False)
    return figure, axes


def _legend(figure: Figure, handles: dict[str, Artist], handle_em: float) -> None:
    """Below the axes, by label; the figure grows with it, so that the axes keep their size."""
    labels = [textwrap.fill(label, _LABEL_WIDTH) for label in handles]
    lines = [label.count("\n") + 1 for label in labels]
    widths = [
        _CHARACTER_IN * max(map(len, label.split("\n"))) + _EM_IN * (handle_em + 1.5)
        for label in labels
    ]
    columns = next(
        (
            count
            for count in range(min(len(labels), _WIDEST_LEGEND), 1, -1)
            if sum(max(column) for column in np.array_split(widths, count)) <= _WIDTH_IN
        ),
        1,
    )
    legend = figure.legend(
        list(handles.values()),
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=handle_em,
        handletextpad=0.5,
        columnspacing=1.0,
        borderaxespad=0.2,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    rows = max(sum(column) for column in np.array_split(lines, columns))
    figure.set_figheight(figure.get_figheight() + _LINE_IN * rows)


def _joined(cells: Sequence[_Cell]) -> str:
    return ", ".join(cell.label for cell in cells)


def _alike(cells: Sequence[_Cell], key: Callable[[_Cell], Any]) -> list[list[_Cell]]:
    """Cells grouped by what they look like, in the order of the run."""
    groups: dict[Any, list[_Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return list(groups.values())


# Accuracy against cost


@dataclass(frozen=True)
class _Cost:
    """Columns of the cells table that hold a mean and its interval, and their names in the CSV."""

    mean: str
    low: str
    high: str
    names: tuple[str, str, str]

    def of(self, cell: _Cell) -> tuple[float, float | None, float | None]:
        row = cell.row
        return row[self.mean], row[self.low], row[self.high]


_STEPS = _Cost(
    "total_steps",
    "total_steps_ci_lo",
    "total_steps_ci_hi",
    ("total_steps", "total_steps_lo", "total_steps_hi"),
)
_SECONDS = _Cost(
    "latency_mean_s",
    "latency_mean_ci_lo_s",
    "latency_mean_ci_hi_s",
    ("latency_s", "latency_s_lo", "latency_s_hi"),
)


def _strict(cell: _Cell) -> tuple[float, float, float]:
    row = cell.row
    return row["accuracy"], row["accuracy_ci_lo"], row["accuracy_ci_hi"]


def _frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as cheap and as accurate, and better in one of them."""
    return [not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def _accuracy_against(cost: _Cost, label: Callable[[_Run], str], run: _Run) -> _Drawing:
    figure, [axes] = _canvas(1, _title(run, "95 % intervals"))
    groups = _alike(run.cells, lambda cell: (cost.of(cell), _strict(cell)))
    points = [(cost.of(group[0])[0], _strict(group[0])[0]) for group in groups]
    best = _frontier(points)
    handles: dict[str, Artist] = {}
    rows = {}
    for group, on_frontier in zip(groups, best, strict=True):
        first, name = group[0], _joined(group)
        mean, low, high = cost.of(first)
        accuracy, accuracy_low, accuracy_high = _strict(first)
        axes.errorbar(
            [mean],
            [accuracy],
            xerr=None if low is None or high is None else [[mean - low], [high - mean]],
            # Rounding may put an end of the interval of 0 or 1 on the wrong side of it.
            yerr=[[max(0.0, accuracy - accuracy_low)], [max(0.0, accuracy_high - accuracy)]],
            fmt="none",
            ecolor=first.look.colour,
            elinewidth=0.8,
            capsize=1.5,
            zorder=3,
        )
        handles[name] = axes.plot(
            [mean],
            [accuracy],
            **first.look.marks(1.0),
            linestyle="none",
            # The reference is not to vanish behind its variants.
            zorder=5 if first.id == _REF else 4,
        )[0]
        for cell in group:
            row = cell.row
            rows[cell.id] = (
                name,
                cell.id,
                row["suite"],
                " ".join(cell.aliases),
                row["bench"],
                row["n"],
                row["n_items"],
                " ".join(str(size) for size in sorted(set(run.of(cell, "batch_size")))),
                *cost.of(cell),
                *_strict(cell),
                on_frontier,
            )
    axes.set_xlabel(label(run))
    axes.set_ylabel("strict accuracy (%)")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, -0.02), min(top, 1.02))
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, 0.0), right)
    stairs = sorted(point for point, on in zip(points, best, strict=True) if on)
    handles["Pareto frontier"] = axes.plot(
        [*(x for x, _ in stairs), right],
        [*(y for _, y in stairs), stairs[-1][1]],
        drawstyle="steps-post",
        # Wide and pale, so that it shows behind intervals.
        color="#BBBBBB",
        linewidth=3.0,
        solid_joinstyle="miter",
        zorder=2,
    )[0]
    _legend(figure, handles, 1.6)
    columns = (
        *("label", "experiment", "suite", "aliases", "bench", "n", "n_items", "batch_size"),
        *cost.names,
        *("accuracy", "accuracy_lo", "accuracy_hi", "pareto"),
    )
    return _Drawing(figure, columns, [rows[cell.id] for cell in run.cells])


def _steps_label(_: _Run) -> str:
    return "mean steps per sample, latent + explicit"


def _seconds_label(run: _Run) -> str:
    slots = _span(run.raw["batch_size"].to_list())
    return f"mean latency per sample (s), batch size {slots}"


# Switches


@dataclass(frozen=True)
class _Curve:
    """The empirical distribution of a count, shared by ``cells``: ``shares[i]`` of the samples have
    at most ``steps[i]``, and so with probability 0.95 has the population, but for ``half``."""

    cells: tuple[_Cell, ...]
    steps: tuple[int, ...]
    shares: tuple[float, ...]
    half: float

    @classmethod
    def of(cls, cells: Sequence[_Cell], values: Sequence[int]) -> _Curve:
        counts = Counter(values)
        steps = sorted({0, *counts})
        totals = accumulate(counts[step] for step in steps)
        # Samples of one item are one trial, as in Wilson's interval.
        half = math.sqrt(math.log(2 / 0.05) / (2 * cells[0].row["n_items"]))
        return cls(tuple(cells), tuple(steps), tuple(t / len(values) for t in totals), half)

    @property
    def low(self) -> list[float]:
        return [max(0.0, share - self.half) for share in self.shares]

    @property
    def high(self) -> list[float]:
        return [min(1.0, share + self.half) for share in self.shares]

    def draw(self, axes: Axes, end: int, shaded: bool) -> Artist:
        first = self.cells[0]
        look = first.look
        if shaded:
            axes.fill_between(
                [*self.steps, end],
                [*self.low, self.low[-1]],
                [*self.high, self.high[-1]],
                step="post",
                color=look.colour,
                alpha=0.12,
                linewidth=0,
            )
        return axes.plot(
            [*self.steps, end],
            [*self.shares, self.shares[-1]],
            **look.marks(0.6),
            drawstyle="steps-post",
            linestyle=(look.phase, look.dashes) if look.dashes else "-",
            markevery=slice(0, len(self.steps), math.ceil(len(self.steps) / 12)),
            # Half of the markers at 0 and 1 lies outside.
            clip_on=False,
            zorder=4 if first.id == _REF else 3,
        )[0]


def _switch_count_cdf(run: _Run) -> _Drawing:
    counts = {cell.id: sorted(run.of(cell, "switches")) for cell in run.cells}
    groups = _alike(run.cells, lambda cell: (cell.row["n_items"], *counts[cell.id]))
    curves = [_Curve.of(group, counts[group[0].id]) for group in groups]
    end = max(curve.steps[-1] for curve in curves) + 1
    suites = dict.fromkeys(cell.row["suite"] for cell in run.cells if cell.id != _REF)
    panels = _panels(curves, list(suites))
    band = f"95 % band ±{_span([curve.half for curve in curves], '.2f')}"
    figure, grid = _canvas(len(panels), _title(run, band))
    handles: dict[str, Artist] = {}
    for axes, (title, members) in zip(grid, panels, strict=True):
        crowded = len(members) > _SHADED_CURVES
        for index, curve in enumerate(members):
            handle = curve.draw(axes, end, shaded=index == 0 or not crowded)
            handles.setdefault(_joined(curve.cells), handle)
        axes.set_ylabel("cumulative share")
        if len(panels) > 1:
            axes.set_title(textwrap.fill(title, _LINE_WIDTH), loc="left", pad=2, parse_math=False)
    grid[-1].set_xlim(0, end)
    grid[-1].set_ylim(0, 1.02)
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].set_xlabel("mode switches per sample")
    _legend(figure, {_joined(c.cells): handles[_joined(c.cells)] for c in curves}, 2.6)
    shared = ("bench", "n", "n_items")
    columns = ("label", "experiments", *shared, "switches", "cdf", "cdf_lo", "cdf_hi")
    rows = [
        (
            _joined(curve.cells),
            " ".join(name for cell in curve.cells for name in (cell.id, *cell.aliases)),
            *(curve.cells[0].row[column] for column in shared),
            *point,
        )
        for curve in curves
        for point in zip(curve.steps, curve.shares, curve.low, curve.high, strict=True)
    ]
    return _Drawing(figure, columns, rows)


def _panels(curves: Sequence[_Curve], suites: Sequence[str]) -> list[tuple[str, list[_Curve]]]:
    """Titles and curves. Many curves are spread over panels by suite, the reference in each; small
    suites share a panel, large ones get several."""
    if len(curves) <= _PANEL_CURVES:
        return [("", list(curves))]
    reference = [c for c in curves if any(cell.id == _REF for cell in c.cells)]
    others = [c for c in curves if c not in reference]
    room = _PANEL_CURVES - len(reference)
    panels: list[tuple[str, list[_Curve]]] = []
    for suite in suites:
        members = [c for c in others if any(cell.row["suite"] == suite for cell in c.cells)]
        if panels and members and len(panels[-1][1]) + len(members) <= room:
            title, earlier = panels[-1]
            fresh = [c for c in members if c not in earlier]
            panels[-1] = (f"{title}, {suite}", [*earlier, *fresh])
            continue
        panels.extend((suite, members[i : i + room]) for i in range(0, len(members), room))
    return [(title, [*reference, *members]) for title, members in panels]


_FIGURES = (
    _Spec(
        "accuracy_vs_total_steps",
        partial(_needs, "total_steps", "no sample took a step"),
        partial(_accuracy_against, _STEPS, _steps_label),
    ),
    _Spec(
        "accuracy_vs_wallclock",
        partial(_needs, "latency_s", "no sample has a latency"),
        partial(_accuracy_against, _SECONDS, _seconds_label),
    ),
    _Spec(
        "switch_count_cdf",
        partial(_needs, "total_steps", "no sample took a step"),
        _switch_count_cdf,
    ),
)
