"""The figures of a whole run."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, MaxNLocator, NullLocator

from dlmom_rs.figures._canvas import (
    NBSP,
    REF,
    THEMES,
    Drawing,
    Look,
    Theme,
    canvas,
    glue,
    leave_out,
    legend,
    printable,
    save,
    span,
)
from dlmom_rs.tables import read_run

if TYPE_CHECKING:
    import polars as pl
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

# More curves are spread over panels.
_PANEL_CURVES = 8
# More bands in a panel would be mud; the title says how wide all are.
_SHADED_CURVES = 4
# A linear axis would press smaller values onto the edge.
_LINEAR_SPAN = 30.0
_BINS_A_DECADE = 4
_MOST_DECADES = 12


@dataclass(frozen=True)
class _Cell:
    """A cell with rows of its own: its line of the cells table, and the names of its aliases."""

    row: dict[str, Any]
    aliases: tuple[str, ...]
    look: Look

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
    manifest: dict[str, Any] | None
    theme: Theme

    def of(self, cell: _Cell, column: str) -> list[Any]:
        """A column of the raw rows of one cell."""
        rows = self.raw.filter(self.raw["experiment"] == cell.id)
        return rows[column].to_list()

    def item_means(self, cell: _Cell, *columns: str) -> list[float]:
        """Means over the samples of every item of the sum of ``columns``, in the order of rows."""
        values: defaultdict[str, list[float]] = defaultdict(list)
        sums = zip(*(self.of(cell, column) for column in columns), strict=True)
        for item, parts in zip(self.of(cell, "item_id"), sums, strict=True):
            if all(part is not None for part in parts):
                values[item].append(math.fsum(parts))
        return [math.fsum(of_item) / len(of_item) for of_item in values.values()]


@dataclass(frozen=True)
class _Spec:
    """A figure: ``needs`` says why a run cannot have it, or nothing; ``draw`` draws it."""

    name: str
    needs: Callable[[_Run], str | None]
    draw: Callable[[_Run], Drawing]


def draw(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    formats: Sequence[str],
    style: str,
) -> list[str]:
    """:func:`dlmom_rs.figures.draw_run`, of known formats and style."""
    run = _read(path, THEMES[style])
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for spec in _FIGURES:
        reason = spec.needs(run)
        lines.append(
            leave_out(folder, spec.name, reason)
            if reason is not None
            else save(folder, spec.name, formats, run.theme, partial(spec.draw, run))
        )
    return lines


def _read(path: str | os.PathLike[str], theme: Theme) -> _Run:
    rows = read_run(path, table="cells").to_dicts()
    aliases: dict[str, list[str]] = {}
    for row in rows:
        if row["alias_of"] is not None:
            aliases.setdefault(row["alias_of"], []).append(row["experiment"])
    own = [row for row in rows if row["alias_of"] is None and row["skipped"] is None]
    looks = theme.looks([(row["experiment"], row["suite"]) for row in own])
    cells = tuple(
        _Cell(row, tuple(aliases.get(row["experiment"], ())), look)
        for row, look in zip(own, looks, strict=True)
    )
    return _Run(cells, read_run(path, table="raw"), manifest(path), theme)


def manifest(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What ``run.json`` holds; ``None`` where there is none."""
    from dlmom_rs import RunDataError

    file = Path(path) / "run.json"
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise RunDataError(f"{file}: {error}") from error
    if not isinstance(held, dict):
        raise RunDataError(f"{file}: no object")
    return held


# What the figures share


def _one_bench(run: _Run) -> str | None:
    benches = sorted({str(cell.row["bench"]) for cell in run.cells})
    if len(benches) == 1:
        return None
    return f"cells of several benchmarks ({', '.join(benches)}) cannot be compared"


def _needs(column: str, nothing: str, run: _Run) -> str | None:
    """One benchmark, and a column of raw rows that is not 0 throughout."""
    return _one_bench(run) or (None if run.raw[column].sum() > 0 else nothing)


def _title(cells: Sequence[_Cell], note: str) -> str:
    items, samples = ([cell.row[column] for cell in cells] for column in ("n_items", "n"))
    parts = [str(cells[0].row["bench"]), f"n = {span(items)} items"]
    if samples != items:
        parts.append(f"{span(samples)} samples")
    # Where the title takes two lines, the note stays whole.
    return ", ".join([*parts, glue(note)])


def _joined(cells: Sequence[_Cell]) -> str:
    return ", ".join(cell.label for cell in cells)


def _names(cells: Sequence[_Cell]) -> str:
    return " ".join(name for cell in cells for name in (cell.id, *cell.aliases))


def _alike(cells: Sequence[_Cell], key: Callable[[_Cell], Any]) -> list[list[_Cell]]:
    """Cells grouped by what they look like, in the order of the run."""
    groups: dict[Any, list[_Cell]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return list(groups.values())


class _Grouped(Protocol):
    @property
    def cells(self) -> tuple[_Cell, ...]: ...


_Curves = TypeVar("_Curves", bound=_Grouped)


def _panels(curves: Sequence[_Curves], suites: Sequence[str]) -> list[tuple[str, list[_Curves]]]:
    """Titles and curves. Many curves are spread over panels by suite, the reference in each; small
    suites share a panel, large ones get several."""
    if len(curves) <= _PANEL_CURVES:
        return [("", list(curves))]
    reference = [c for c in curves if any(cell.id == REF for cell in c.cells)]
    others = [c for c in curves if c not in reference]
    room = _PANEL_CURVES - len(reference)
    panels: list[tuple[str, list[_Curves]]] = []
    for suite in suites:
        members = [c for c in others if any(cell.row["suite"] == suite for cell in c.cells)]
        if panels and members and len(panels[-1][1]) + len(members) <= room:
            title, earlier = panels[-1]
            fresh = [c for c in members if c not in earlier]
            panels[-1] = (f"{title}, {suite}", [*earlier, *fresh])
            continue
        panels.extend((suite, members[i : i + room]) for i in range(0, len(members), room))
    return [(title, [*reference, *members]) for title, members in panels]


def _draw_panels(
    run: _Run,
    curves: Sequence[_Curves],
    title: str,
    label: str,
    draw_one: Callable[[Axes, _Curves, bool], Artist],
) -> tuple[Any, list[Axes], dict[str, Artist]]:
    """A figure of curves; ``draw_one`` is told whether to shade."""
    suites = dict.fromkeys(cell.row["suite"] for c in curves for cell in c.cells if cell.id != REF)
    order = [s for s in dict.fromkeys(cell.row["suite"] for cell in run.cells) if s in suites]
    panels = _panels(curves, order)
    figure, grid = canvas(run.theme, len(panels), title)
    handles: dict[str, Artist] = {}
    for axes, (heading, members) in zip(grid, panels, strict=True):
        crowded = len(members) > _SHADED_CURVES
        for index, curve in enumerate(members):
            handle = draw_one(axes, curve, index == 0 or not crowded)
            handles.setdefault(_joined(curve.cells), handle)
        axes.set_ylabel(label)
        if len(panels) > 1:
            text = textwrap.fill(printable(heading), run.theme.characters())
            axes.set_title(text, loc="left", pad=2, parse_math=False)
    return figure, grid, {_joined(c.cells): handles[_joined(c.cells)] for c in curves}


# Accuracy against cost

_Estimate = tuple[float, float | None, float | None]


@dataclass(frozen=True)
class _Cost:
    """A mean with its interval over items, its names in the CSV, and what else goes there."""

    names: tuple[str, str, str]
    of: Callable[[_Run, _Cell], _Estimate]
    label: Callable[[_Run], str]
    bytes: bool = False
    more: tuple[str, ...] = ()
    more_of: Callable[[_Run, _Cell], tuple[Any, ...]] = lambda *_: ()


def _columns(mean: str, low: str, high: str, _: _Run, cell: _Cell) -> _Estimate:
    return cell.row[mean], cell.row[low], cell.row[high]


def _bytes(run: _Run, cell: _Cell) -> _Estimate:
    values = run.item_means(cell, *_LINKS)
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = 1.96 * math.sqrt(variance / len(values))
    return mean, mean - half, mean + half


_LINKS = ("uplink_bytes", "downlink_bytes")
_PER_LINK = tuple(
    f"{link}_bytes{per}" for per in ("_per_step", "_per_solved") for link in ("uplink", "downlink")
)


def _links(run: _Run, cell: _Cell) -> tuple[Any, ...]:
    means = []
    for column in _LINKS:
        values = run.item_means(cell, column)
        means.append(math.fsum(values) / len(values))
    return (*means, *(cell.row[column] for column in _PER_LINK))


def _no_bytes(run: _Run) -> str | None:
    if any((run.raw[column] > 0).any() for column in _LINKS):
        return _one_bench(run)
    if run.raw["forward_tokens_per_agent"].list.len().max() == 1:
        return "no bytes cross a link with one agent"
    return "no sample sent bytes over a link"


def _slots(run: _Run) -> str:
    return f"batch size {span(run.raw['batch_size'].to_list())}"


_STEPS = _Cost(
    ("total_steps", "total_steps_lo", "total_steps_hi"),
    partial(_columns, "total_steps", "total_steps_ci_lo", "total_steps_ci_hi"),
    lambda _: "mean steps per sample, latent + explicit",
)
_SECONDS = _Cost(
    ("latency_s", "latency_s_lo", "latency_s_hi"),
    partial(_columns, "latency_mean_s", "latency_mean_ci_lo_s", "latency_mean_ci_hi_s"),
    lambda run: f"mean latency per sample (s), {_slots(run)}",
)
_BYTES = _Cost(
    ("bytes", "bytes_lo", "bytes_hi"),
    _bytes,
    lambda _: "mean bytes per sample, uplink + downlink",
    bytes=True,
    more=(*_LINKS, *_PER_LINK),
    more_of=_links,
)


def _strict(cell: _Cell) -> tuple[float, float, float]:
    row = cell.row
    return row["accuracy"], row["accuracy_ci_lo"], row["accuracy_ci_hi"]


def _frontier(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at least as cheap and as accurate, and better in one of them."""
    return [not any(a <= x and b >= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def _byte_marks(
    points: Sequence[tuple[float, float]], above_zero: Sequence[float]
) -> LogLocator | FixedLocator:
    """Marks of a logarithmic axis: powers of ten, and of a short one thrice these."""
    least, most = math.log10(min(above_zero)), math.log10(max(above_zero))
    if len(above_zero) == len(points):
        return LogLocator(subs=(1.0, 3.0) if most - least < 2 else (1.0,), numticks=7)
    every = math.ceil((most - least) / 4)
    return FixedLocator([0.0, *(10.0**n for n in range(math.ceil(least), int(most) + 1, every))])


def _accuracy_against(cost: _Cost, run: _Run) -> Drawing:
    figure, [axes] = canvas(run.theme, 1, _title(run.cells, "95 % intervals"))
    costs = {cell.id: cost.of(run, cell) for cell in run.cells}
    groups = _alike(run.cells, lambda cell: (costs[cell.id], _strict(cell)))
    points = [(costs[group[0].id][0], _strict(group[0])[0]) for group in groups]
    best = _frontier(points)
    above_zero = [x for x, _ in points if x > 0]
    wide = cost.bytes and max(above_zero) > _LINEAR_SPAN * min(above_zero)
    # Where an interval reaches below 0, a logarithmic axis cannot show its end.
    least = 0.3 * min(above_zero) if wide and len(above_zero) == len(points) else -math.inf
    handles: dict[str, Artist] = {}
    rows = {}
    for group, on_frontier in zip(groups, best, strict=True):
        first, name = group[0], _joined(group)
        mean, low, high = costs[first.id]
        accuracy, accuracy_low, accuracy_high = _strict(first)
        axes.errorbar(
            [mean],
            [accuracy],
            xerr=None if low is None or high is None else [[mean - max(low, least)], [high - mean]],
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
            zorder=5 if first.id == REF else 4,
            # A marker at the edge is to stay whole.
            clip_on=False,
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
                *costs[cell.id],
                *cost.more_of(run, cell),
                *_strict(cell),
                on_frontier,
            )
    axes.set_xlabel(cost.label(run))
    axes.set_ylabel("strict accuracy (%)")
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g}")
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, -0.02), min(top, 1.02))
    if wide and len(above_zero) == len(points):
        axes.set_xscale("log")
    elif wide:
        # 0 has a place of its own, and below it is nothing.
        axes.set_xscale("symlog", linthresh=min(above_zero), linscale=0.5)
        axes.set_xlim(left=-0.3 * min(above_zero))
    left, right = axes.get_xlim()
    axes.set_xlim(left if wide else max(left, 0.0), right)
    if cost.bytes:
        axes.xaxis.set_major_formatter(EngFormatter(unit="B", sep=NBSP))
        if wide:
            axes.xaxis.set_major_locator(_byte_marks(points, above_zero))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
    left, right = axes.get_xlim()
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
    axes.set_xlim(left, right)
    legend(figure, run.theme, handles, 1.6)
    columns = (
        *("label", "experiment", "suite", "aliases", "bench", "n", "n_items", "batch_size"),
        *cost.names,
        *cost.more,
        *("accuracy", "accuracy_lo", "accuracy_hi", "pareto"),
    )
    return Drawing(figure, columns, [rows[cell.id] for cell in run.cells])


# Drift


@dataclass(frozen=True)
class _Histogram:
    """Shares of the items of ``cells`` by bin, the bin of 0 first."""

    cells: tuple[_Cell, ...]
    shares: tuple[float, ...]
    counts: tuple[int, ...]
    items: int


def _no_drift(run: _Run) -> str | None:
    drift = run.raw["drift_kl"].drop_nulls()
    if len(drift) == 0:
        return "no row has a drift"
    return _one_bench(run) or (None if (drift > 0).any() else "every drift is 0")


def _drift_histogram(run: _Run) -> Drawing:
    cells = [cell for cell in run.cells if any(kl is not None for kl in run.of(cell, "drift_kl"))]
    positive = [
        kl for cell in cells for kl in run.of(cell, "drift_kl") if kl is not None and kl > 0
    ]
    end = math.floor(math.log10(max(positive))) + 1
    start = max(math.floor(math.log10(min(positive))), end - _MOST_DECADES)
    bins = _BINS_A_DECADE * (end - start)

    def bin_of(kl: float) -> int:
        """0 is what a logarithm has no place for."""
        if kl < 10.0**start:
            return 0
        return 1 + min(math.floor(_BINS_A_DECADE * (math.log10(kl) - start)), bins - 1)

    def counted(cell: _Cell) -> _Histogram:
        by_item: defaultdict[str, list[int]] = defaultdict(list)
        for item, kl in zip(run.of(cell, "item_id"), run.of(cell, "drift_kl"), strict=True):
            if kl is not None:
                by_item[item].append(bin_of(kl))
        shares, counts = [0.0] * (bins + 1), [0] * (bins + 1)
        for of_item in by_item.values():
            for index in of_item:
                shares[index] += 1 / len(of_item) / len(by_item)
                counts[index] += 1
        return _Histogram((cell,), tuple(shares), tuple(counts), len(by_item))

    alone = {cell.id: counted(cell) for cell in cells}
    groups = _alike(cells, lambda c: (alone[c.id].shares, alone[c.id].counts, alone[c.id].items))
    curves = [
        _Histogram(tuple(group), first.shares, first.counts, first.items)
        for group in groups
        for first in [alone[group[0].id]]
    ]
    # In decades; the bin of 0 stands apart.
    width = 1 / _BINS_A_DECADE
    apart = (end - start) / 7
    zero = start - max(apart, 2 * width)

    def draw_one(axes: Axes, curve: _Histogram, _: bool) -> Artist:
        look = curve.cells[0].look
        style: dict[str, Any] = {"zorder": 4 if curve.cells[0].id == REF else 3, "clip_on": False}
        if curve.shares[0] > 0:
            level = [curve.shares[0]] * 2
            ends = [zero - width / 2, zero + width / 2]
            axes.plot(ends, level, color=look.colour, linestyle=look.line, **style)
            axes.plot([zero], level[:1], **look.marks(0.6), linestyle="none", **style)
        # From the last empty bin before to the first one after what there is.
        shares = [0.0, *curve.shares[1:], 0.0]
        filled = [index for index, share in enumerate(shares) if share > 0] or [1]
        first, last = filled[0] - 1, filled[-1] + 1
        return axes.plot(
            [start + width * (index - 0.5) for index in range(first, last + 1)],
            shares[first : last + 1],
            **look.marks(0.6),
            drawstyle="steps-mid",
            linestyle=look.line,
            markevery=[index - first for index in filled if shares[index] > 0],
            **style,
        )[0]

    reference = [cell for cell in cells if cell.id == REF]
    floor = _quantile(run.item_means(reference[0], "drift_kl"), 0.95) if reference else None
    note = "no noise floor: REF has no drift" if floor is None else f"noise floor {floor:.2g} nats"
    figure, grid, handles = _draw_panels(
        run, curves, _title(cells, note), "share of items", draw_one
    )
    top = max(max(curve.shares) for curve in curves)
    for axes in grid:
        axes.axvline((zero + start) / 2, color="#999999", linewidth=0.6, linestyle=(0, (1, 2)))
        if floor is not None:
            edge = math.log10(floor) if floor >= 10.0**start else zero + width / 2
            axes.axvspan(zero - width, edge, color="#DDDDDD", linewidth=0, zorder=0)
            handles["noise floor (REF)"] = Patch(color="#DDDDDD")
    axes = grid[-1]
    axes.set_xlim(zero - width, end)
    axes.set_ylim(0, min(1.05 * top, 1.02))
    every = math.ceil((end - start) / 5)
    decades = [*range(start, end + 1, every)]
    axes.xaxis.set_major_locator(FixedLocator([zero, *decades]))
    lowest = "0" if min(positive) >= 10.0**start else "\N{ALMOST EQUAL TO} 0"
    axes.xaxis.set_ticklabels([lowest, *(rf"$10^{{{decade}}}$" for decade in decades)])
    axes.set_xlabel("mean KL divergence from REF per sample (nats)")
    legend(figure, run.theme, handles, 2.6)
    columns = (
        "label",
        "experiments",
        "bench",
        "n",
        "n_items",
        "kl_from",
        "kl_to",
        "count",
        "share",
    )
    edges = [10.0 ** (start + width * index) for index in range(bins + 1)]
    rows = [
        (
            _joined(curve.cells),
            _names(curve.cells),
            curve.cells[0].row["bench"],
            sum(curve.counts),
            curve.items,
            *limits,
            count,
            share,
        )
        for curve in curves
        for limits, count, share in zip(
            [(0.0, edges[0]), *pairwise(edges)], curve.counts, curve.shares, strict=True
        )
    ]
    return Drawing(figure, columns, rows)


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


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
            linestyle=look.line,
            markevery=slice(0, len(self.steps), math.ceil(len(self.steps) / 12)),
            # Half of the markers at 0 and 1 lies outside.
            clip_on=False,
            zorder=4 if first.id == REF else 3,
        )[0]


def _switch_count_cdf(run: _Run) -> Drawing:
    counts = {cell.id: sorted(run.of(cell, "switches")) for cell in run.cells}
    groups = _alike(run.cells, lambda cell: (cell.row["n_items"], *counts[cell.id]))
    curves = [_Curve.of(group, counts[group[0].id]) for group in groups]
    end = max(curve.steps[-1] for curve in curves) + 1
    band = f"95 % band ±{span([curve.half for curve in curves], '.2f')}"
    figure, grid, handles = _draw_panels(
        run,
        curves,
        _title(run.cells, band),
        "cumulative share",
        lambda axes, curve, shaded: curve.draw(axes, end, shaded),
    )
    grid[-1].set_xlim(0, end)
    grid[-1].set_ylim(0, 1.02)
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1].set_xlabel("mode switches per sample")
    legend(figure, run.theme, handles, 2.6)
    shared = ("bench", "n", "n_items")
    columns = ("label", "experiments", *shared, "switches", "cdf", "cdf_lo", "cdf_hi")
    rows = [
        (
            _joined(curve.cells),
            _names(curve.cells),
            *(curve.cells[0].row[column] for column in shared),
            *point,
        )
        for curve in curves
        for point in zip(curve.steps, curve.shares, curve.low, curve.high, strict=True)
    ]
    return Drawing(figure, columns, rows)


# Memory


@dataclass(frozen=True)
class _Timed:
    """A cell's last invocation, and the high-water mark of memory at its end."""

    cell: _Cell
    samples: int
    wall_s: float
    peak: int
    # The mark was as high before: what the cell itself needed is at most that.
    inherited: bool

    @property
    def rate(self) -> float:
        return self.samples / self.wall_s


def _kind(run: _Run) -> str:
    """The column of memory that all timed cells have, the device's first."""
    cells = [cell for cell in run.cells if cell.id in _timings(run)]
    on_device = all(cell.row["peak_device_bytes"] is not None for cell in cells)
    return "peak_device_bytes" if on_device else "peak_rss_bytes"


def _timings(run: _Run) -> dict[str, tuple[int, float]]:
    """Samples and seconds by cell, as ``run.json`` has them."""
    notes = (run.manifest or {}).get("notes")
    held = notes.get("timings") if isinstance(notes, dict) else None
    timings = {}
    for cell, timing in held.items() if isinstance(held, dict) else ():
        if not isinstance(timing, dict):
            continue
        samples, seconds = timing.get("samples"), timing.get("wall_s")
        if not isinstance(samples, int) or not isinstance(seconds, (int, float)):
            continue
        if samples > 0 and seconds > 0:
            timings[cell] = (samples, float(seconds))
    return timings


def _timed(run: _Run) -> list[_Timed]:
    """In the order in which the cells ran."""
    timings, kind = _timings(run), _kind(run)
    cells = [c for c in run.cells if c.id in timings and c.row[kind] is not None]
    cells.sort(key=lambda cell: max(run.of(cell, "started_at")))
    before = [None, *(cell.row[kind] for cell in cells)]
    return [
        # A lower mark than the last cell's is that of another process.
        _Timed(cell, *timings[cell.id], peak=cell.row[kind], inherited=cell.row[kind] == last)
        for cell, last in zip(cells, before, strict=False)
    ]


def _no_memory(run: _Run) -> str | None:
    if run.manifest is None:
        return "there is no run.json with the cells' timings"
    timings = _timings(run)
    if not any(cell.id in timings for cell in run.cells):
        return "run.json has no timings"
    timed = _timed(run)
    if not timed:
        return "no row has a peak of memory"
    if len(timed) == 1:
        return f"only {timed[0].cell.id} has timings and a peak of memory"
    if len({point.peak for point in timed}) == 1:
        what = "device" if _kind(run) == "peak_device_bytes" else "resident"
        size = f"{timed[0].peak / 1e6:,.0f} MB".replace(",", " ")
        return (
            f"peak {what} memory is one high-water mark of the process, "
            f"{size} by the end of every cell"
        )
    return _one_bench(run)


def _memory_vs_throughput(run: _Run) -> Drawing:
    timed, kind = _timed(run), _kind(run)
    figure, [axes] = canvas(run.theme, 1, _title([t.cell for t in timed], "one timing per cell"))
    unit, power = ("GB", 1e9) if max(t.peak for t in timed) >= 1e9 else ("MB", 1e6)
    handles: dict[str, Artist] = {}
    for point in timed:
        handles[point.cell.label] = axes.plot(
            [point.rate],
            [point.peak / power],
            **point.cell.look.marks(1.0),
            linestyle="none",
            zorder=5 if point.cell.id == REF else 4,
            clip_on=False,
        )[0]
    axes.margins(0.12)
    axes.autoscale_view()
    left, right = axes.get_xlim()
    axes.set_xlim(max(left, 0.0), right)
    for point in timed:
        if point.inherited:
            axes.annotate(
                "",
                (point.rate, point.peak / power),
                (0, -16),
                textcoords="offset points",
                arrowprops={
                    "arrowstyle": "<-",
                    "color": point.cell.look.colour,
                    "linewidth": 0.8,
                    "shrinkA": 0,
                    "shrinkB": 0,
                },
                zorder=3,
            )
    order = {cell.label: handles[cell.label] for cell in run.cells if cell.label in handles}
    if any(point.inherited for point in timed):
        order["upper bound"] = Line2D(
            [], [], color="#555555", marker=r"$\downarrow$", markersize=8.0, linestyle="none"
        )
    what = "device" if kind == "peak_device_bytes" else "resident"
    axes.set_xlabel(f"samples per second of wall time, {_slots(run)}")
    axes.set_ylabel(f"high-water mark of\n{what} memory ({unit})")
    # A formatter with an offset would hide what the marks have in common.
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    legend(figure, run.theme, order, 1.6)
    columns = (
        *("label", "experiment", "suite", "aliases", "bench", "n", "batch_size", "samples"),
        *("wall_s", "samples_per_s", "steps_per_s", "memory", "high_water_bytes", "inherited"),
    )
    rows = {
        point.cell.id: (
            point.cell.label,
            point.cell.id,
            point.cell.row["suite"],
            " ".join(point.cell.aliases),
            point.cell.row["bench"],
            point.cell.row["n"],
            " ".join(str(size) for size in sorted(set(run.of(point.cell, "batch_size")))),
            point.samples,
            point.wall_s,
            point.rate,
            point.rate * point.cell.row["total_steps"],
            kind,
            point.peak,
            point.inherited,
        )
        for point in timed
    }
    return Drawing(figure, columns, [rows[cell.id] for cell in run.cells if cell.id in rows])


_FIGURES = (
    _Spec(
        "accuracy_vs_total_steps",
        partial(_needs, "total_steps", "no sample took a step"),
        partial(_accuracy_against, _STEPS),
    ),
    _Spec(
        "accuracy_vs_wallclock",
        partial(_needs, "latency_s", "no sample has a latency"),
        partial(_accuracy_against, _SECONDS),
    ),
    _Spec("drift_histogram", _no_drift, _drift_histogram),
    _Spec(
        "switch_count_cdf",
        partial(_needs, "total_steps", "no sample took a step"),
        _switch_count_cdf,
    ),
    _Spec("bandwidth_vs_accuracy", _no_bytes, partial(_accuracy_against, _BYTES)),
    _Spec("memory_vs_throughput", _no_memory, _memory_vs_throughput),
)
