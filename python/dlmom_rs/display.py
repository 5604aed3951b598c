"""What a terminal shows: the progress of a run, and a sample's timeline.

The Rust side sends every event as one JSON text, progress at most ten times a second.
"""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.rule import Rule
from rich.text import Text


class RichDisplay:
    """Draws one bar per cell on standard error; every method takes one JSON text."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            expand=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def start(self, payload: str) -> None:
        """A cell begins (``CellStart``)."""
        cell = json.loads(payload)
        if not self._progress.live.is_started:
            self._progress.start()
        self._tasks[cell["id"]] = self._progress.add_task(
            f"[{cell['index']}/{cell['cells']}] {cell['id']}",
            total=cell["total"],
            completed=cell["done"],
            note="",
        )

    def update(self, payload: str) -> None:
        """A cell moves on (``CellProgress``)."""
        cell = json.loads(payload)
        task = self._tasks.get(cell["id"])
        if task is None:
            return
        accuracy = 100.0 * cell["correct"] / cell["session"] if cell["session"] else 0.0
        note = f"acc {accuracy:.1f} %  latent {100.0 * cell['coverage']:.1f} %"
        if cell["failures"]:
            note += f"  [red]{cell['failures']} failed[/red]"
        self._progress.update(task, completed=cell["done"], note=note)

    def finish(self, payload: str) -> None:
        """A cell ended (``CellProgress``)."""
        self.update(payload)
        task = self._tasks.get(json.loads(payload)["id"])
        if task is not None:
            self._progress.stop_task(task)

    def line(self, payload: str) -> None:
        """A line to keep."""
        self._progress.console.print(json.loads(payload), highlight=False, markup=False)

    def stop(self, _payload: str) -> None:
        """Nothing more will come."""
        if self._progress.live.is_started:
            self._progress.stop()


_BLOCKS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"
_STYLES = {"latent": "magenta", "explicit": "cyan"}


def _visible(text: str) -> str:
    """A token's text on one line: line ends and tabs as symbols, other controls as their code."""
    for mark, shown in (("\n", "\u21b5"), ("\r", "\u240d"), ("\t", "\u21e5")):
        text = text.replace(mark, shown)
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class RichTimeline:
    """Prints a sample's steps on standard output as they come; every method takes one JSON text.

    A line holds the step, its mode, a bar of the entropy the controller saw (alpha in its middle),
    the packet's mass, and what comes next: the packet's first tokens, or the printed token.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._full = 1.0
        self._alpha: float | None = None
        self._agent = 0
        self._names: list[str] = []
        wide = self._console.width >= 100
        self._bar = 20 if wide else 12

    def start(self, payload: str) -> None:
        """Before the first step (``Header``)."""
        header: dict[str, Any] = json.loads(payload)
        self._names = header["experts"]
        self._alpha = header["alpha"]
        self._full = header["full"]
        self._print(Text(header["title"], style="bold", overflow="ellipsis", no_wrap=True))
        about = f"{' + '.join(header['experts'])}   entropy {header['unit']}"
        if self._alpha is not None:
            about += f", alpha {self._alpha:g} at \u2502"
        self._print(Text(about, style="dim", overflow="ellipsis", no_wrap=True))
        columns = f"step  mode      {'entropy':<{self._bar + 8}}  mass   next"
        self._print(Text(columns, style="dim underline", overflow="crop", no_wrap=True))

    def step(self, payload: str) -> None:
        """A step (``Step``)."""
        step: dict[str, Any] = json.loads(payload)
        if step["agent"] != self._agent:
            self._agent = step["agent"]
            self._print(Text(f"      \u2192 {self._names[self._agent]}", style="bold cyan"))
        style = _STYLES.get(step["mode"], "")
        line = Text(overflow="ellipsis", no_wrap=True)
        line.append(f"{step['step']:4d}", style="dim")
        line.append(" \u203a" if step["switched"] else "  ", style="bold yellow")
        line.append(f"{step['mode']:<9} ", style=style)
        self._append_bar(line, step["entropy"], style)
        line.append(f" {step['entropy']:6.4f}  ", style=style)
        line.append(f"{step['mass']:.3f}  ", style="dim")
        if step["mode"] == "latent":
            for text, p in step["top"]:
                line.append(_visible(text), style="magenta")
                line.append(f" {p:.2f}  ", style="dim")
        elif step["injected"]:
            line.append(f"a text of {step['injected']} tokens", style="dim italic")
        elif step["token"] is None:
            line.append("end", style="dim italic")
        else:
            line.append(_visible(step["token"]), style="bold reverse")
        self._print(line)

    def finish(self, payload: str) -> None:
        """After the last step (``Footer``)."""
        footer: dict[str, Any] = json.loads(payload)
        self._print(Rule(style="dim"))
        self._print(Text(footer["text"]))
        self._print(Rule(style="dim"))
        for fact in footer["facts"]:
            self._print(Text(fact, style="dim"))

    def _append_bar(self, line: Text, entropy: float | None, style: str) -> None:
        """A bar of eighths of a cell, with a mark where alpha is."""
        share = 0.0 if entropy is None else min(max(entropy / self._full, 0.0), 1.0)
        eighths = round(share * self._bar * 8)
        mark = None
        if self._alpha is not None and 0 < self._alpha < self._full:
            mark = int(self._alpha / self._full * self._bar)
        for cell in range(self._bar):
            filled = min(max(eighths - 8 * cell, 0), 8)
            if cell == mark and filled == 0:
                line.append("\u2502", style="dim")
            else:
                line.append(_BLOCKS[filled], style=style)

    def _print(self, what: Text | Rule) -> None:
        self._console.print(what)
