"""Runs as polars data frames."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import polars as pl


def read_run(
    path: str | os.PathLike[str],
    table: Literal["raw", "cells", "tidy"] = "raw",
    *,
    text: bool = False,
) -> pl.DataFrame:
    """Read a run folder into a data frame, through Arrow and without copying.

    ``raw`` has one row per recorded sample, ``cells`` one row per cell (accuracy with its Wilson
    interval, coverage, switches, steps, bytes, latency), ``tidy`` one row per cell and metric.
    ``text`` adds the printed text to ``raw``. Steps and tokens are counts, times seconds,
    entropies normalised by ``ln V`` unless a column says nats.

    Raises :class:`dlmom_rs.RunDataError` for a missing folder or a malformed line, naming file,
    line and field.
    """
    import polars as pl

    from dlmom_rs import _core

    return pl.DataFrame(_core.run_table(os.fspath(path), table, text))
