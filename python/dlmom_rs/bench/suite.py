"""A whole run, against the same run one sample at a time."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from dlmom_rs import _core

from .timing import Entry

ROWS = 64
LIMIT = 200
#: One at a time takes as long for every sample; fewer are enough.
SOLO = 40


def _rate(rows: int, limit: int, threads: int, fast: bool) -> float:
    """Samples per second of the loop of ``dlmom-rs run``, without loading."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = ["dlmom-rs", "run", "--suite", "A1", "--only", "REF"]
        words += ["--experts", "zoo:tiny-math", "zoo:tiny-general", "--bench", "tinygsm"]
        words += ["--limit", str(limit), "--alpha-unit", "nats", "--alpha", "0.3"]
        words += ["--device", "cpu", "--dtype", "fp32", "--threads", str(threads)]
        words += ["--batch-size", str(rows), "--display", "none", "--out", str(out)]
        if fast:
            words.append("--fast")
        status = _core.main(words)
        if status != 0:
            raise RuntimeError(f"the run ended with {status}")
        notes = json.loads((out / "run.json").read_text(encoding="utf-8"))["notes"]
    batch = notes["batches"][0]
    return float(batch["samples"] / batch["wall_s"])


def entries(rounds: int, threads: int) -> Iterator[Entry]:
    """``tinygsm``, samples a second; the baseline both with invariant bits and without."""
    del rounds  # one run is long enough
    began = time.monotonic()
    batched = _rate(ROWS, LIMIT, threads, fast=False)
    solo = _rate(1, SOLO, threads, fast=False)
    unpadded = _rate(1, SOLO, threads, fast=True)
    yield Entry(
        f"suite B={ROWS}",
        batched,
        unpadded,
        "samples/s",
        "batch 1, no padding (--fast)",
        more=True,
        facts={
            "samples": LIMIT,
            "padded_batch_1": solo,
            "padded_ratio": batched / solo,
            "seconds": time.monotonic() - began,
        },
    )
