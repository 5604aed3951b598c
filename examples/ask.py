"""Ask an ensemble a question: the answer first, then the same one step by step.

python examples/ask.py ["a question"]
"""

from __future__ import annotations

import sys

from dlmom_rs import DeepLatentMoM

QUESTION = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have?"
# These experts are surer than the paper's threshold expects: they think above 0.3 nats.
CONFIG = {"controller": {"alpha": 0.3, "alpha_unit": "nats"}, "max_steps": 96}


def main(question: str) -> None:
    ensemble = DeepLatentMoM.from_pretrained(
        ["zoo:tiny-math", "zoo:tiny-general"], device="cpu", dtype="fp32", max_len=256, threads=1
    )
    print(question)
    result = ensemble.generate(question, config=CONFIG)
    print(f"answer: {result.text!r}")
    print(
        f"{result.explicit_tokens} tokens printed, {result.latent_steps} latent steps, "
        f"{result.switches} switches, {result.uplink_bytes} bytes up, "
        f"{result.downlink_bytes} bytes down"
    )

    print("\nstep  mode      entropy  next")
    with ensemble.stream(question, config=CONFIG) as stream:
        for event in stream:
            if event.mode == "latent":
                tops = zip(event.top_tokens[:3], event.top_probs, strict=False)
                shown = ", ".join(f"{token!r} {p:.2f}" for token, p in tops)
            else:
                shown = repr(event.text)
            print(f"{event.step:4}  {event.mode:<8}  {event.observed:7.4f}  {shown}")
    print(f"the stream came to the same result: {stream.result == result}")


if __name__ == "__main__":
    main(*(sys.argv[1:] or [QUESTION]))
