"""Fixtures shared by the Python tests."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture
def dlmom(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command line in this process; file-descriptor capture sees what Rust prints."""
    from dlmom_rs import _core

    def call(*argv: object) -> Done:
        capfd.readouterr()
        status = _core.main(["dlmom-rs", *map(str, argv)])
        captured = capfd.readouterr()
        return Done(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real models and benchmark rows, where a developer has one."""
    folder = Path(os.environ.get("DLMOM_SHARED", ROOT.parent / "shared"))
    if not (folder / "models").is_dir():
        pytest.skip(f"no folder of real models (set DLMOM_SHARED); looked at {folder.name}/models")
    return folder


def rows_of(run: Path, cell: str, volatile: Sequence[str] = ()) -> dict[tuple[Any, ...], Any]:
    """The raw rows of a cell by (item, seed, sample), without timing and memory."""
    drop = {
        "latency_s",
        "peak_device_bytes",
        "peak_rss_bytes",
        "batch_size",
        "started_at",
        *volatile,
    }
    rows = {}
    for line in (run / "raw" / f"{cell}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        key = (row["item_id"], row["seed"], row["sample"])
        assert key not in rows, f"{cell}: {key} is recorded twice"
        rows[key] = {k: v for k, v in row.items() if k not in drop}
    return rows
