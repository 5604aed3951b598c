"""Run two cells of a suite on one small expert, and read the samples into polars.

python examples/read_a_run.py [a folder to keep the run in]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import polars as pl

from dlmom_rs import DeepLatentMoM, read_run


def main(out: Path) -> None:
    ensemble = DeepLatentMoM.from_pretrained(
        "zoo:tiny-math", device="cpu", dtype="fp32", max_len=256, threads=1
    )
    run = ensemble.run(
        suite="A1",
        only=["REF", "A1.3"],
        bench="tinygsm",
        out=out,
        limit=6,
        max_steps=96,
        alpha=0.3,
        alpha_unit="nats",
        display="none",
    )

    rows = read_run(run)
    print(f"{rows.height} samples with {rows.width} columns")
    steps = pl.col("latent_steps") / pl.col("total_steps")
    print(
        rows.group_by("experiment", maintain_order=True).agg(
            pl.len().alias("n"),
            pl.col("correct").mean().alias("accuracy"),
            steps.mean().round(3).alias("latent share"),
            pl.col("total_steps").mean().round(1).alias("steps"),
        )
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder) / "run")
