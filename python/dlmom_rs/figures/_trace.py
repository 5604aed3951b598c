"""The figure of one traced sample."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dlmom_rs.figures import _known
from dlmom_rs.figures._canvas import (
    BLACK,
    DASH_DOT,
    DASHED,
    DOTTED,
    THEMES,
    Drawing,
    Theme,
    entitle,
    glue,
    leave_out,
    legend,
    printable,
    save,
)
from dlmom_rs.figures._run import manifest
from dlmom_rs.tables import read_run

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_PER_STEP = (
    *("entropy", "observed", "expert_entropy", "merged_entropy", "mode", "reason"),
    *("top_ids", "top_probs", "top_tokens", "mass", "noise_kl", "token"),
)
_LEAST = 1e-5
_LINEAR_SPAN = 30.0
_STRIP_IN, _MAIN_IN, _MASS_IN = 0.62, 1.75, 0.55
_TOKEN_CHARACTERS = 8
# What an upright token is wide, and what the axes leave of the figure.
_TOKEN_IN, _MARGINS_IN = 0.14, 0.6
_SHADE = "#CFE0EE"
_EXPERTS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("#0072B2", DASHED),
    ("#D55E00", DOTTED),
    ("#009E73", DASH_DOT),
    ("#CC79A7", (6.0, 1.5)),
    ("#56B4E9", (4.0, 1.2, 1.2, 1.2, 1.2, 1.2)),
)


@dataclass(frozen=True)
class _Sample:
    """A traced sample and what is known about it. Entropies are normalised, NaN where unknown."""

    cell: str
    own: str
    item: str
    trace: dict[str, Any]
    row: dict[str, Any] | None
    mean: np.ndarray
    experts: np.ndarray
    merged: np.ndarray
    mass: np.ndarray
    alpha: np.ndarray
    names: tuple[str, ...]
    alpha_label: str
    mass_label: str

    @property
    def latent(self) -> list[bool]:
        return [mode == "latent" for mode in self.trace["mode"]]

    @property
    def spans(self) -> list[tuple[int, int]]:
        """First step and end of every latent span."""
        places = groupby(range(len(self.latent)), key=lambda step: self.latent[step])
        runs = [(latent, list(steps)) for latent, steps in places]
        return [(steps[0], steps[-1] + 1) for latent, steps in runs if latent]

    @property
    def switched(self) -> list[bool]:
        """The first decision sets the mode and is no switch."""
        return [step > 0 and here != self.latent[step - 1] for step, here in enumerate(self.latent)]

    @property
    def tokens(self) -> list[tuple[str, float | None]]:
        """What a step printed, or the likeliest token of a latent one, with its probability."""
        said = []
        for step, token in enumerate(self.trace["token"]):
            ids, probs, texts = (
                self.trace[f"top_{part}"][step] for part in ("ids", "probs", "tokens")
            )
            place = ids.index(token) if token in ids else 0 if token is None and ids else None
            said.append((f"#{token}", None) if place is None else (texts[place], probs[place]))
        return said


def draw(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    cell: str,
    item: str,
    *,
    seed: int | None,
    formats: Sequence[str],
    style: str,
) -> list[str]:
    """:func:`dlmom_rs.figures.draw_trace`, of known formats and style."""
    theme = THEMES[style]
    run = Path(path)
    own = _own_cell(run, cell)
    traces = _traces(run, own)
    trace, short, suffix = _chosen(traces, own, item, seed)
    sample = _sample(run, cell, own, trace, short)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "_", f"trace_{cell}_{short}{suffix}", flags=re.ASCII)
    if not trace["mode"]:
        return [leave_out(folder, name, "the sample took no step")]
    return [save(folder, name, formats, theme, partial(_draw, sample, theme))]


def _own_cell(run: Path, cell: str) -> str:
    """The cell whose rows and traces ``cell`` has."""
    rows = {row["experiment"]: row for row in read_run(run, table="cells").to_dicts()}
    _known(cell, "cell", rows)
    if rows[cell]["skipped"] is not None:
        raise ValueError(f"cell {cell} was skipped: {rows[cell]['skipped']}")
    return str(rows[cell]["alias_of"] or cell)


def _traces(run: Path, cell: str) -> list[dict[str, Any]]:
    """The traces of a cell in the order of the file; of a sample that was run again, the last."""
    from dlmom_rs import RunDataError

    file = run / "traces" / f"{cell}.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")
    except FileNotFoundError:
        lines = []
    found: dict[tuple[str, int, int], dict[str, Any]] = {}
    # What follows the last line break is empty, or was torn off by the end of a process.
    for number, line in enumerate(lines[:-1], 1):
        if not line:
            continue
        try:
            trace = json.loads(line)
            key = (str(trace["item_id"]), int(trace["seed"]), int(trace["sample"]))
            lengths = {name: len(trace[name]) for name in _PER_STEP}
        except KeyError as error:
            raise RunDataError(f"{file}:{number}: no field {error.args[0]}") from error
        except (ValueError, TypeError) as error:
            raise RunDataError(f"{file}:{number}: {error}") from error
        for name, length in lengths.items():
            if length != lengths["mode"]:
                steps = lengths["mode"]
                raise RunDataError(f"{file}:{number}: {name} has {length} entries of {steps} steps")
        found[key] = trace
    if not found:
        raise ValueError(f"cell {cell} has no traced samples in {file}")
    return list(found.values())


def _chosen(
    traces: Sequence[dict[str, Any]], cell: str, item: str, seed: int | None
) -> tuple[dict[str, Any], str, str]:
    """The trace that is asked for, a short name of its item, and what tells its seed."""
    items = list(dict.fromkeys(str(trace["item_id"]) for trace in traces))
    starting = [known for known in items if item and known.startswith(item)]
    if item not in items and len(starting) > 1:
        raise ValueError(f"item {item!r} is the start of several: {', '.join(starting)}")
    whole = (
        starting[0]
        if item not in items and starting
        else _known(item, "item", items, many=f"traced in {cell}")
    )
    of_item = [trace for trace in traces if trace["item_id"] == whole]
    seeds = list(dict.fromkeys(trace["seed"] for trace in of_item))
    if seed is not None and seed not in seeds:
        known = ", ".join(map(str, seeds))
        raise ValueError(
            f"item {whole} was not traced with seed {seed} (traced in {cell}: {known})"
        )
    of_seed = [t for t in of_item if t["seed"] == (seeds[0] if seed is None else seed)]
    length = next(
        size
        for size in range(8, max(map(len, items)) + 9)
        if sum(known.startswith(whole[:size]) for known in items) == 1 or size >= len(whole)
    )
    suffix = f"_seed{seed}" if seed is not None and len(seeds) > 1 else ""
    return of_seed[0], whole[:length], suffix


def _sample(run: Path, cell: str, own: str, trace: dict[str, Any], item: str) -> _Sample:
    held = manifest(run) or {}
    config = _config(run, cell) or _config(run, own)
    steps = len(trace["mode"])
    experts = _numbers_2d(trace["expert_entropy"])
    mean, observed = _numbers(trace["entropy"]), _numbers(trace["observed"])
    models = _agents(held, experts.shape[1])
    logs = [math.log(size) if size else math.nan for _, size in models]
    shared = held.get("ln_vocab") or (logs[0] if len(set(logs)) == 1 else None)
    if shared:
        logs = [float(shared)] * experts.shape[1]
    alpha, label = np.full(steps, np.nan), ""
    value, unit = config.get("alpha"), config.get("alpha_unit")
    # The controls and the gate against a block's first step do not read it.
    if value is not None and config.get("gate") in ("threshold", "trend"):
        if unit == "normalized":
            alpha = np.full(steps, float(value))
        elif unit == "nats":
            # Of experts with different vocabularies every step has its own.
            usable = (observed > 0) & np.isfinite(observed) & (mean > 0)
            ratio = np.divide(mean, observed, out=np.full(steps, np.nan), where=usable)
            if usable.any():
                ratio[~usable] = np.nanmedian(ratio)
            alpha = float(value) * ratio
        label = f"alpha = {float(value):g} ({unit})"
    raw = read_run(run)
    raw = raw.filter(raw["experiment"] == own)
    raw = raw.filter(raw["item_id"] == trace["item_id"])
    rows = [
        row
        for row in raw.to_dicts()
        if (row["seed"], row["sample"]) == (trace["seed"], trace["sample"])
    ]
    k = config.get("k")
    return _Sample(
        cell=cell,
        own=own,
        item=item,
        trace=trace,
        row=rows[0] if rows else None,
        mean=mean,
        experts=experts / np.array(logs) if experts.shape[1] else experts,
        merged=_numbers(trace["merged_entropy"]) / (float(shared) if shared else math.nan),
        mass=_numbers(trace["mass"]),
        alpha=alpha,
        names=tuple(name for name, _ in models),
        alpha_label=label,
        mass_label=f"top-{k} mass" if isinstance(k, int) and k > 0 else "mass",
    )


def _config(run: Path, cell: str) -> dict[str, Any]:
    import yaml

    from dlmom_rs import RunDataError

    file = run / "configs" / f"{cell}.yaml"
    try:
        held = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, ValueError) as error:
        raise RunDataError(f"{file}: {' '.join(str(error).split())}") from error
    return held if isinstance(held, dict) else {}


def _agents(held: dict[str, Any], count: int) -> list[tuple[str, int | None]]:
    """Name and vocabulary of every expert, as far as the manifest knows them."""
    models = held.get("models")
    context = held.get("context")
    agents = context.get("agents") if isinstance(context, dict) else None
    known: list[tuple[str, int | None]] = []
    if isinstance(models, list) and isinstance(agents, list) and len(agents) == count:
        for agent in agents:
            model = models[agent] if isinstance(agent, int) and agent < len(models) else {}
            vocabulary = model.get("vocab")
            size = vocabulary if isinstance(vocabulary, int) and vocabulary > 1 else None
            known.append((str(model.get("name", "")), size))
    return known or [("", None)] * count


def _numbers(values: Sequence[float | None]) -> np.ndarray:
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _numbers_2d(rows: Sequence[Sequence[float | None]]) -> np.ndarray:
    """One row per step; steps with fewer experts than others are filled up with NaN."""
    width = max(map(len, rows), default=0)
    filled = np.full((len(rows), width), np.nan)
    for step, row in enumerate(rows):
        filled[step, : len(row)] = _numbers(row)
    return filled


def _draw(sample: _Sample, theme: Theme) -> Drawing:
    engine = ConstrainedLayoutEngine(hspace=0.02, h_pad=0.02)
    figure = Figure(
        figsize=(theme.trace_width_in, _STRIP_IN + _MAIN_IN + _MASS_IN + 0.7), layout=engine
    )
    strip, axes, mass = figure.subplots(
        3, 1, sharex=True, height_ratios=[_STRIP_IN, _MAIN_IN, _MASS_IN]
    )
    handles = _entropies(axes, sample, theme)
    steps = range(len(sample.mean))
    mass.plot(steps, sample.mass, color=BLACK, linewidth=0.8, drawstyle="steps-mid")
    low = np.nanmin(sample.mass) if np.isfinite(sample.mass).any() else 0.0
    mass.set_ylim(min(math.floor(20 * low) / 20, 0.9), 1.005)
    mass.yaxis.set_major_locator(MaxNLocator(2))
    mass.set_ylabel(sample.mass_label.replace(" ", "\n"))
    mass.set_xlabel("step")
    mass.set_xlim(-0.5, len(sample.mean) - 0.5)
    mass.xaxis.set_major_locator(MaxNLocator(integer=True))
    for panel in (strip, axes, mass):
        for first, end in sample.spans:
            panel.axvspan(first - 0.5, end - 0.5, color=_SHADE, linewidth=0, zorder=0)
    if sample.spans:
        handles["latent span"] = Patch(color=_SHADE)
    switches = [step - 0.5 for step, switched in enumerate(sample.switched) if switched]
    if switches:
        axes.plot(
            switches,
            [0.0] * len(switches),
            transform=axes.get_xaxis_transform(),
            color=BLACK,
            marker="^",
            markersize=4.0,
            linestyle="none",
            clip_on=False,
            zorder=6,
        )
        handles["switch"] = Line2D(
            [], [], color=BLACK, marker="^", markersize=4.0, linestyle="none"
        )
    _label_tokens(strip, sample, theme)
    entitle(figure, _title(sample), theme)
    legend(figure, theme, handles, 2.2)
    return _table(figure, sample)


def _entropies(axes: Axes, sample: _Sample, theme: Theme) -> dict[str, Artist]:
    steps = range(len(sample.mean))
    several = sample.experts.shape[1] > 1
    curves = [sample.mean, sample.merged, *(sample.experts.T if several else ())]
    values = np.concatenate([*curves, sample.alpha])
    values = values[np.isfinite(values)]
    least = np.quantile(values[values > 0], 0.05) if (values > 0).any() else 1.0
    wide = values.size > 0 and values.max() > _LINEAR_SPAN * least

    def shown(curve: np.ndarray) -> np.ndarray:
        return np.maximum(curve, _LEAST) if wide else curve

    handles: dict[str, Artist] = {}
    if several:
        for index, curve in enumerate(sample.experts.T):
            colour, dashes = _EXPERTS[index % len(_EXPERTS)]
            name = f"expert {index + 1}" + (
                f": {sample.names[index]}" if sample.names[index] else ""
            )
            handles[name] = axes.plot(
                steps, shown(curve), color=colour, linestyle=(0, dashes), linewidth=0.7, zorder=3
            )[0]
    handles["mean of experts" if several else "entropy"] = axes.plot(
        steps, shown(sample.mean), color=BLACK, linewidth=1.6, zorder=5
    )[0]
    # One expert's distribution is not merged with anything.
    if several and np.isfinite(sample.merged).any():
        handles["merged"] = axes.plot(
            steps,
            shown(sample.merged),
            color="#777777",
            linewidth=0.8,
            marker=".",
            markersize=3.0,
            zorder=4,
        )[0]
    if np.isfinite(sample.alpha).any():
        handles[sample.alpha_label] = axes.plot(
            steps,
            shown(sample.alpha),
            color="#B22222" if theme.name == "default" else BLACK,
            linestyle=(0, (1.0, 1.0)),
            linewidth=1.4,
            zorder=4,
        )[0]
    if wide:
        axes.set_yscale("log")
    else:
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(0.0, max(bottom, 0.0)), top)
    axes.set_ylabel("entropy / ln V")
    return handles


def _label_tokens(strip: Axes, sample: _Sample, theme: Theme) -> None:
    """Tokens above their steps: all where there is room, else those of the highest entropies."""
    strip.set_axis_off()
    strip.set_ylim(0, 1)
    steps = len(sample.mean)
    gap = math.ceil(_TOKEN_IN * steps / (theme.trace_width_in - _MARGINS_IN))
    order = sorted(range(steps), key=lambda step: -np.nan_to_num(sample.mean[step], nan=-1.0))
    chosen: list[int] = []
    for step in order:
        if all(abs(step - other) >= gap for other in chosen):
            chosen.append(step)
    for step in chosen:
        text = printable(sample.tokens[step][0].replace(" ", "\N{OPEN BOX}"))
        if len(text) > _TOKEN_CHARACTERS:
            text = text[: _TOKEN_CHARACTERS - 1] + "…"
        strip.text(
            step, 0.02, text, rotation=90, ha="center", va="bottom", fontsize=8.0, parse_math=False
        )


def _title(sample: _Sample) -> str:
    trace = sample.trace
    cell = sample.cell if sample.cell == sample.own else f"{sample.cell} = {sample.own}"
    parts = [
        cell,
        f"item {sample.item}" + ("…" if sample.item != trace["item_id"] else ""),
        f"seed {trace['seed']}",
    ]
    if sample.row is not None:
        parts.insert(1, sample.row["bench"])
    count = (
        f"{len(sample.mean)} steps, {sum(sample.latent)} latent, {sum(sample.switched)} switches"
    )
    parts.append(count)
    if sample.row is not None:
        verdict = "right" if sample.row["correct"] else "wrong"
        answer = sample.row["answer"]
        said = f"answer {answer}" if answer is not None else "no answer"
        parts.append(f"{said} ({verdict}, gold {sample.row['gold']})")
    return ", ".join(glue(part) if len(part) < 36 else part for part in parts)


def _table(figure: Figure, sample: _Sample) -> Drawing:
    several = range(sample.experts.shape[1])
    columns = (
        *("experiment", "item_id", "seed", "sample", "step", "mode", "switched", "reason"),
        *("entropy", "observed", "alpha", "merged_entropy"),
        *(f"expert_{index + 1}_entropy" for index in several),
        *("mass", "noise_kl", "token", "probability"),
    )

    def known(value: float | None) -> float | None:
        return None if value is None or not math.isfinite(value) else float(value)

    trace = sample.trace
    rows = [
        (
            sample.cell,
            trace["item_id"],
            trace["seed"],
            trace["sample"],
            step,
            trace["mode"][step],
            sample.switched[step],
            trace["reason"][step],
            known(sample.mean[step]),
            known(trace["observed"][step]),
            known(sample.alpha[step]),
            known(sample.merged[step]),
            *(known(sample.experts[step, index]) for index in several),
            known(sample.mass[step]),
            known(trace["noise_kl"][step]),
            *sample.tokens[step],
        )
        for step in range(len(sample.mean))
    ]
    return Drawing(figure, columns, rows)
