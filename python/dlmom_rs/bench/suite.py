"""A whole run, against the same run one sample at a time."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from .timing import Entry

ROWS = 64
LIMIT = 200
#: One at a time takes as long for every sample; fewer are enough.
SOLO = 40


def _rate(rows: int, limit: int, threads: int, fast: bool) -> float:
    """Samples per second of the loop of ``dlmom-rs run``, without loading."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        words = [sys.executable, "-m", "dlmom_rs", "run", "--suite", "A1", "--only", "REF"]
        words += ["--experts", "zoo:tiny-math", "zoo:tiny-general", "--bench", "tinygsm"]
        words += ["--limit", str(limit), "--alpha-unit", "nats", "--alpha", "0.3"]
        words += ["--device", "cpu", "--dtype", "fp32", "--threads", str(threads)]
        words += ["--batch-size", str(rows), "--display", "none", "--out", str(out)]
        if fast:
            words.append("--fast")
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the run failed: {done.stderr.strip()}")
        notes = json.loads((out / "run.json").read_text(encoding="utf-8"))["notes"]
    batch = notes["batches"][0]
    return float(batch["samples"] / batch["wall_s"])


def entries(rounds: int, threads: int) -> Iterator[Entry]:
    """``tinygsm``, samples a second: against the same run, and against one without padded rows."""
    del rounds  # one run is long enough
    began = time.monotonic()
    batched = _rate(ROWS, LIMIT, threads, fast=False)
    solo = _rate(1, SOLO, threads, fast=False)
    unpadded = _rate(1, SOLO, threads, fast=True)
    facts = {"samples": LIMIT, "seconds": time.monotonic() - began}
    for against, rate in (("the same run at batch 1", solo), ("batch 1 with --fast", unpadded)):
        yield Entry(f"suite B={ROWS}", batched, rate, "samples/s", against, more=True, facts=facts)
