"""What figures share: styles, looks of cells, titles, legends, files."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from dlmom_rs.figures import FORMATS

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

REF = "REF"
NBSP = "\N{NO-BREAK SPACE}"
BLACK = "#000000"
# Okabe and Ito's palette; black is the reference's, and grey stands in for yellow, which is too
# faint for lines on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#999999")
# Colours of matplotlib's cividis from dark to middling: legible to the colour-blind, in grey, and
# on white. Neighbours in the order of cells are far apart in lightness.
_LIGHTNESS = (0.0, 0.62, 0.25, 0.5, 0.12, 0.7, 0.38)
SOLID, DASHED, DASH_DOT, DOTTED = (), (3.0, 1.5), (4.0, 1.2, 1.2, 1.2), (1.2, 1.2)
_DASHES: tuple[tuple[float, ...], ...] = (
    DASHED,
    DOTTED,
    DASH_DOT,
    (6.0, 1.5),
    (4.0, 1.2, 1.2, 1.2, 1.2, 1.2),
)
# The paper's suites look the same in every run.
_SUITES: dict[str, tuple[str, tuple[float, ...]]] = {
    "A1": ("o", SOLID),
    "A2": ("s", DASHED),
    "A3": ("^", DASH_DOT),
    "A4": ("D", DOTTED),
}
_OTHER_SUITES: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("v", SOLID),
    ("P", DASHED),
    ("X", DASH_DOT),
    ("p", DOTTED),
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", ">")
_SIZES = {"*": 10.0, "^": 7.0, "v": 7.0, "<": 7.0, ">": 7.0, "P": 8.0, "X": 8.0, "p": 7.0}
_FILLS = ("full", "none", "bottom", "left", "top", "right")

_AXES_HEIGHT_IN = 2.4
_PANEL_HEIGHT_IN = 1.5
# Measures of 8 pt text.
_EM_IN = 8 / 72
_LINE_IN = 0.17
_WIDEST_LEGEND = 5

_COMMON: dict[str, Any] = {
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
    # Without a salt, ids in SVG files are random.
    "svg.hashsalt": "dlmom-rs",
}
_PAPER: dict[str, Any] = {
    # Fonts that come with matplotlib, so that figures look the same everywhere.
    "font.family": ["STIXGeneral", "DejaVu Serif", "DejaVu Sans", "serif"],
    "mathtext.fontset": "stix",
    "pdf.fonttype": 42,
    "ps.fonttype": 42,
    "svg.fonttype": "none",
    "lines.linewidth": 1.0,
}
# Dates would change the bytes of files that show the same.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


@dataclass(frozen=True)
class Look:
    """How a cell is drawn."""

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

    @property
    def line(self) -> Any:
        """Its line style for ``Axes.plot``."""
        return (self.phase, self.dashes) if self.dashes else "-"


@dataclass(frozen=True)
class Theme:
    """A style: widths in inches, of a character of 8 pt as well, and matplotlib's settings."""

    name: str
    width_in: float
    trace_width_in: float
    character_in: float
    settings: Mapping[str, Any]
    looks: Callable[[Sequence[tuple[str, str]]], list[Look]]

    def characters(self, width_in: float | None = None) -> int:
        """Characters that a line of a width holds, the figure's if none is given."""
        return int((self.width_in if width_in is None else width_in) / self.character_in)


def _looks(cells: Sequence[tuple[str, str]]) -> list[Look]:
    """Markers and dashes tell the suites, colours the cells, fills those beyond the colours."""
    suites = dict(_SUITES)
    seen: Counter[str] = Counter()
    looks = []
    for experiment, suite in cells:
        if experiment == REF:
            looks.append(_REFERENCE)
            continue
        if suite not in suites:
            suites[suite] = _OTHER_SUITES[(len(suites) - len(_SUITES)) % len(_OTHER_SUITES)]
        index = seen.total() % len(_COLOURS)
        fill = _FILLS[seen[suite] // len(_COLOURS) % len(_FILLS)]
        seen[suite] += 1
        looks.append(Look(_COLOURS[index], *suites[suite], 1.7 * index, fill))
    return looks


def _paper_looks(cells: Sequence[tuple[str, str]]) -> list[Look]:
    """Markers and their fills tell all cells apart, whatever becomes of the colours."""
    shades = [
        mpl.colors.to_hex(mpl.colormaps["cividis"](lightness)).upper() for lightness in _LIGHTNESS
    ]
    looks = []
    index = 0
    for experiment, _ in cells:
        if experiment == REF:
            looks.append(_REFERENCE)
            continue
        fill = _FILLS[index // len(_MARKERS) % len(_FILLS)]
        marker, dashes = _MARKERS[index % len(_MARKERS)], _DASHES[index % len(_DASHES)]
        looks.append(Look(shades[index % len(shades)], marker, dashes, 1.7 * index, fill))
        index += 1
    return looks


_REFERENCE = Look(BLACK, "*", SOLID, 0.0, _FILLS[0])
THEMES = {
    "default": Theme("default", 3.5, 7.0, 0.066, _COMMON, _looks),
    "paper": Theme("paper", 3.3, 3.3, 0.058, {**_COMMON, **_PAPER}, _paper_looks),
}


@dataclass(frozen=True)
class Drawing:
    """A figure and the table of what it shows."""

    figure: Figure
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]


def save(
    folder: Path,
    name: str,
    formats: Sequence[str],
    theme: Theme,
    draw: Callable[[], Drawing],
) -> str:
    """Draw, write the picture in every format and the CSV, and return the line that says so."""
    # From matplotlib's defaults, not from the user's configuration; both are back afterwards.
    with matplotlib.style.context(["default", dict(theme.settings)]):
        drawing = draw()
        # Every format gets the same layout: laid out anew, a figure would shift a little.
        drawing.figure.set_dpi(mpl.rcParams["savefig.dpi"])
        drawing.figure.draw_without_rendering()
        drawing.figure.set_layout_engine("none")
        images = {}
        for form in formats:
            image = io.BytesIO()
            drawing.figure.savefig(image, format=form, metadata=_METADATA[form])
            images[form] = image.getvalue()
    for form, data in images.items():
        (folder / f"{name}.{form}").write_bytes(data)
    (folder / f"{name}.csv").write_text(_csv(drawing), encoding="utf-8", newline="")
    endings = formats[0] if len(formats) == 1 else f"{{{','.join(formats)}}}"
    return f"{folder / name}.{endings}"


def leave_out(folder: Path, name: str, reason: str) -> str:
    """Remove what an earlier drawing left under that name, and return the line that says why."""
    for form in (*FORMATS, "csv"):
        (folder / f"{name}.{form}").unlink(missing_ok=True)
    return f"{name}: not drawn: {reason}"


def _csv(drawing: Drawing) -> str:
    def text(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, bool):
            return "true" if value else "false"
        return repr(float(value)) if isinstance(value, float) else str(value)

    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(drawing.columns)
    writer.writerows([text(value) for value in row] for row in drawing.rows)
    return buffer.getvalue()


def span(values: Sequence[float], form: str = "") -> str:
    """``LEAST to LARGEST``, or the one value."""
    ends = [format(value, form) for value in (min(values), max(values))]
    return " to ".join(dict.fromkeys(ends))


def glue(text: str) -> str:
    """Text that line breaks leave whole."""
    return text.replace(" ", NBSP)


def printable(text: str) -> str:
    """Text as the fonts in use can show it, the rest as escapes."""
    fonts = _fonts(tuple(mpl.rcParams["font.family"]))

    def show(character: str) -> str:
        # A no-break space counts as unprintable.
        if (character.isprintable() or character == NBSP) and any(
            f.get_char_index(ord(character)) for f in fonts
        ):
            return character
        escaped = character.encode("unicode_escape").decode("ascii")
        return escaped if escaped != character else f"\\x{ord(character):02x}"

    if re.fullmatch(r"[ -~]*", text):
        return text
    return "".join(character if character == "\n" else show(character) for character in text)


@cache
def _fonts(families: tuple[str, ...]) -> list[Any]:
    return [get_font(findfont(FontProperties(family=[family]))) for family in families]


def canvas(theme: Theme, panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with panels of one scale below each other."""
    height = _AXES_HEIGHT_IN + _PANEL_HEIGHT_IN * (panels - 1)
    figure = Figure(figsize=(theme.width_in, height), layout="constrained")
    axes = figure.subplots(panels, squeeze=False, sharex=True, sharey=True)[:, 0].tolist()
    entitle(figure, title, theme)
    return figure, axes


def entitle(figure: Figure, title: str, theme: Theme) -> None:
    """A title in as many lines as it takes."""
    # Not to the very edge.
    characters = theme.characters(figure.get_figwidth() - 0.05)
    # A benchmark's name is no formula.
    figure.suptitle(textwrap.fill(printable(title), characters), fontsize=8.0, parse_math=False)


def legend(figure: Figure, theme: Theme, handles: Mapping[str, Artist], handle_em: float) -> None:
    """Below the axes, by label; the figure grows with it, so that the axes keep their size."""
    width = figure.get_figwidth()
    beside = _EM_IN * (handle_em + 1.5)
    wrap = theme.characters(width - beside)
    labels = [textwrap.fill(printable(label), wrap) for label in handles]
    lines = [label.count("\n") + 1 for label in labels]
    widths = [theme.character_in * max(map(len, label.split("\n"))) + beside for label in labels]
    columns = next(
        (
            count
            for count in range(min(len(labels), _WIDEST_LEGEND), 1, -1)
            if sum(max(column) for column in np.array_split(widths, count)) <= width
        ),
        1,
    )
    box = figure.legend(
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
    for text in box.get_texts():
        text.set_parse_math(False)
    rows = max(sum(column) for column in np.array_split(lines, columns))
    figure.set_figheight(figure.get_figheight() + _LINE_IN * rows)
