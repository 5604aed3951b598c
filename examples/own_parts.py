"""Parts of your own in the loop: a controller, a consensus and a compressor.

Each is a plain class with one method; nothing is inherited. See `dlmom_rs.parts`.

    python examples/own_parts.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dlmom_rs import DeepLatentMoM

if TYPE_CHECKING:
    import numpy.typing as npt
    from torch import Tensor

    from dlmom_rs.parts import Mode

QUESTION = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have?"
CONFIG = {"controller": {"alpha_unit": "nats"}, "max_steps": 96}


class Surprised:
    """Latent while the entropy is above its own running mean. One object per sample."""

    def __init__(self) -> None:
        self.mean = 0.5

    def observe(self, entropy: float, mode: Mode | None) -> Mode:
        del mode  # the mode of the last step, None before the first
        above = entropy > self.mean
        self.mean = 0.8 * self.mean + 0.2 * entropy
        return "latent" if above else "explicit"


class FirstLeads:
    """Three parts of the first expert's preferences, one part of the others' mean."""

    name = "first_leads"

    def merge(self, rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        return 0.75 * rows[0] + 0.25 * rows[1:].mean(axis=0)


class Int4Values:
    """Keeps keys and rounds values to 4 bits, one scale per head and position."""

    def __init__(self) -> None:
        self.calls = 0

    def compress(
        self, keys: Tensor, values: Tensor, *, layer: int, agent: int
    ) -> tuple[Tensor, Tensor]:
        del layer, agent
        self.calls += 1
        scale = values.abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 7
        return keys, (values / scale).round() * scale


def main() -> None:
    ensemble = DeepLatentMoM.from_pretrained(
        ["zoo:tiny-math", "zoo:tiny-general"], device="cpu", dtype="fp32", max_len=256, threads=1
    )
    print(QUESTION)
    compressor = Int4Values()
    runs = {
        "built-in parts": ensemble.generate(QUESTION, config=CONFIG),
        "own controller": ensemble.generate(QUESTION, config=CONFIG, controller=Surprised),
        "own consensus": ensemble.generate(QUESTION, config=CONFIG, consensus=FirstLeads()),
        "own compressor": ensemble.generate(
            QUESTION, config=CONFIG, compressor=compressor, compress_every=8
        ),
    }
    for name, result in runs.items():
        print(
            f"{name:<15} {result.latent_steps:3} latent, {result.explicit_tokens:3} printed, "
            f"entropy {result.entropy['mean']:.4f}: {result.text!r}"
        )
    print(f"the compressor was asked about {compressor.calls} layers")


if __name__ == "__main__":
    main()
