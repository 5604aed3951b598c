"""The live progress panel. The Rust side sends events at most ten times a second."""

from __future__ import annotations

import json

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
