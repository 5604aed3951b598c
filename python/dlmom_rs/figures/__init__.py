"""The figures of a run, each with the CSV of what it shows beside it.

Points carry 95 % intervals, curves a 95 % band. Cells that share their rows (aliases) or look
exactly alike are drawn once under a joined label. Neither torch nor transformers is needed, and
matplotlib is loaded by the first drawing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence

__all__ = ["FORMATS", "STYLES", "draw_run", "draw_trace"]

#: Formats of figures.
FORMATS = ("png", "svg", "pdf")
#: Styles of figures.
STYLES = ("default", "paper")


def draw_run(
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    formats: Sequence[str] = ("png",),
    style: str = "default",
) -> list[str]:
    """Draw the figures of the run folder ``run`` into the folder ``out``, which is created.

    - ``accuracy_vs_total_steps``: strict accuracy (percent, Wilson's 95 % interval, items as
      trials) against mean steps per sample, latent and explicit (95 % interval over items), a point
      per cell; the grey stairs are the Pareto frontier of the points: fewer steps, higher accuracy.
    - ``accuracy_vs_wallclock``: the same against mean latency per sample in seconds.
    - ``drift_histogram``: the share of items by mean KL divergence from the reference pipeline
      (nats), 4 bins a decade, a curve per cell; several samples of an item share its weight. What
      is 0, or over 12 decades below the largest, is in the bin "0". The grey span ends at the 95 %
      quantile of REF's own drift, the noise floor.
    - ``switch_count_cdf``: the share of samples with at most so many changes of mode, a curve per
      cell; the shading is the Dvoretzky-Kiefer-Wolfowitz 95 % band, items counted as trials.
    - ``bandwidth_vs_accuracy``: strict accuracy against mean bytes per sample over all links,
      uplink and downlink, as above; a logarithmic axis where the means span more than a factor
      of 30. Only with several agents.
    - ``memory_vs_throughput``: peak bytes against samples per second of wall time (``timings`` of
      ``run.json``: the cell's last invocation). Memory is the device's peak where every cell has
      one, else the process's resident set. Either is a high-water mark that later cells of a
      process inherit: where a cell did not raise it, the point is an upper bound and has an arrow.
      Only where the marks of two cells differ.

    More than 8 curves are spread over panels by suite, REF in each; of more than 4 in a panel only
    the first is shaded, and the title gives the half-width for all.

    ``formats`` are of ``png``, ``svg`` and ``pdf``. ``style`` is ``default`` (3.5 in wide, markers
    and dashes by suite, Okabe and Ito's colours) or ``paper`` (one column of 3.3 in, serif, 8 pt,
    TrueType fonts in PDF and text as text in SVG; every cell has a marker of its own, and colours
    of rising lightness, so that grey prints tell cells apart).

    ``NAME.csv`` holds the numbers that were drawn, shares as fractions; the same rows give the same
    bytes of every file. Returns a line per figure: its path, as ``NAME.{png,pdf}`` where there are
    several, or ``NAME: not drawn: REASON``, in which case files of an earlier drawing under that
    name are removed.

    Raises ``ValueError`` for an unknown format or style, :class:`dlmom_rs.RunDataError` for a
    folder without raw rows or with a malformed one, and ``OSError`` where ``out`` cannot be
    written.
    """
    chosen, theme = _formats(formats), _known(style, "style", STYLES)
    from dlmom_rs.figures import _run

    return _run.draw(run, out, chosen, theme)


def draw_trace(  # noqa: PLR0917  # the host calls it by position
    run: str | os.PathLike[str],
    out: str | os.PathLike[str],
    cell: str,
    item: str,
    seed: int | None = None,
    formats: Sequence[str] = ("png",),
    style: str = "default",
) -> list[str]:
    """Draw one traced sample of the run folder ``run`` into the folder ``out``, which is created.

    The steps (from 0) of ``item`` in ``traces/CELL.jsonl``, of ``seed`` or of the first one traced:
    entropies normalised by ``ln V`` (every expert's where there are several, their mean, which is
    what the gate reads, and the merged distribution's), the threshold ``alpha`` of
    ``configs/CELL.yaml`` turned into the same unit, latent spans shaded, switches marked, tokens
    above the steps of highest entropy (printed ones, or the likeliest of a latent step), and below
    the packet's top-k mass. The axis is logarithmic where the entropies span more than a factor of
    30; smaller ones than 1e-5 are drawn there. An alpha in another unit than ``normalized`` or
    ``nats`` is not drawn.

    ``item`` is an id or the start of one; ``cell`` may be an alias. Formats, styles and the CSV
    (``trace_CELL_ITEM``, with ``_seedN`` where several seeds were traced and one was named) are
    those of :func:`draw_run`; in the CSV merged and experts' entropies are normalised as well, and
    ``observed`` is what the gate saw in its own unit. Returns one line, as :func:`draw_run` does.

    Raises ``ValueError`` for an unknown format, style, cell, item or seed, naming the known ones,
    :class:`dlmom_rs.RunDataError` for a folder that is no run or has a malformed line, and
    ``OSError`` where ``out`` cannot be written.
    """
    chosen, theme = _formats(formats), _known(style, "style", STYLES)
    from dlmom_rs.figures import _trace

    return _trace.draw(run, out, cell, item, seed=seed, formats=chosen, style=theme)


def _formats(formats: Sequence[str]) -> tuple[str, ...]:
    names = (formats,) if isinstance(formats, str) else tuple(formats)
    if not names:
        raise ValueError(f"no format: give one or more of {', '.join(FORMATS)}")
    return tuple(dict.fromkeys(_known(name, "format", FORMATS) for name in names))


def _known(name: str, what: str, known: Iterable[str], *, many: str | None = None) -> str:
    """``name``, or a ``ValueError`` with the nearest of ``known`` and all of them."""
    names = list(known)
    if name in names:
        return name
    starting = [known for known in names if name and known.startswith(name)]
    near = starting or difflib.get_close_matches(name, names, n=1)
    guess = f"; did you mean {near[0]}?" if near else ""
    shown = ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
    raise ValueError(f"unknown {what} {name!r}{guess} ({many or 'known'}: {shown or 'none'})")
