"""A step of the loop, against what it is made of and against ``model.generate``."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dlmom_rs import _core
from dlmom_rs.api import DeepLatentMoM
from dlmom_rs.engine.attention import attention
from dlmom_rs.engine.embed import embed
from dlmom_rs.engine.lanes import RowSlotLanes

from . import models
from .consensus import SPEC, logits
from .timing import Entry, in_turns

#: Tokens of a prompt.
PROMPT = 32
#: Steps of a run whose parts are timed.
STEPS = 72
#: First steps of a run that are not timed: there the prompts come in.
WARM = 5
#: Printed tokens of a longer and of a shorter run, so many as the shipped experts print at least;
#: their difference has no prompt and no set-up in it.
PRINTED_LONG, PRINTED_SHORT = 28, 8


def entries(rounds: int, threads: int) -> Iterator[Entry]:
    """Attention over ragged rows, orchestration beyond the forwards at two experts, and explicit
    mode beside ``generate``."""
    torch.set_num_threads(threads)
    for rows in (1, 8, 64):
        yield _attention(rows, rounds)
    for rows in (1, 8, 32):
        yield _orchestration(rows, rounds)
    for rows in (1, 8):
        yield _beside_generate(rows, rounds)


def _attention(rows: int, rounds: int) -> Entry:
    """One layer of Qwen2.5-0.5B's shape over rows of 64 to 512 positions, in a cache of 1,024."""
    heads, kv_heads, size, longest = 14, 2, 64, 512
    draws = torch.Generator().manual_seed(rows)
    query = torch.randn(rows, heads, 1, size, generator=draws)
    keys, values = torch.randn(2, rows, kv_heads, 1024, size, generator=draws)[..., :longest, :]
    lengths = torch.linspace(longest, 64, rows).long()
    visible = (torch.arange(longest) < lengths[:, None])[:, None, None]

    def ours() -> Tensor:
        return attention(query, keys, values, visible, size**-0.5)

    def sdpa() -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=visible, enable_gqa=True
        )

    assert torch.allclose(ours(), sdpa().transpose(1, 2), atol=1e-5)
    found = in_turns({"ours": ours, "sdpa": sdpa}, rounds=rounds, inner=max(1, 256 // rows))
    return Entry(
        f"attention B={rows}",
        1e6 * found["ours"],
        1e6 * found["sdpa"],
        "us",
        "scaled_dot_product_attention under a mask",
        facts={"positions": int(lengths.sum()), "longest": longest},
    )


def _bare(engine: Any, rows: int, k: int) -> Callable[[], object]:
    """Soft embedding, mask and forward of every agent, ``STEPS`` times: what a step cannot do
    without."""
    slots = list(range(rows))
    draws = np.random.default_rng(0)
    packets = []
    for lanes in engine._lanes:
        vocab = lanes.expert.vocabulary.size
        width = min(k, vocab)
        ids = np.stack([draws.choice(vocab, width, replace=False) for _ in slots]).astype(np.int64)
        probs = draws.dirichlet(np.ones(width), rows).astype(np.float32)
        packets.append((ids, probs))

    def work() -> None:
        with torch.inference_mode():
            for lanes in engine._lanes:
                assert isinstance(lanes, RowSlotLanes)
                for slot in slots:
                    lanes.open(slot, 512)
                    lanes.lengths[slot] = PROMPT
            for _ in range(STEPS):
                for lanes, (ids, probs) in zip(engine._lanes, packets, strict=True):
                    x = embed(lanes.expert.embeddings, ids, probs, lanes.device)
                    lanes.step(slots, x)
            for lanes in engine._lanes:
                for slot in slots:
                    lanes.close(slot)

    return work


def _consensus(engine: Any, rows: int, k: int) -> Callable[[], object]:
    """The readouts of ``STEPS`` steps."""
    vocab = engine._lanes[0].expert.vocabulary.size
    given = list(logits(len(engine._lanes), rows, torch.float32, 0, vocab).unbind(0))
    fused = _core.Kernel()

    def work() -> None:
        for _ in range(STEPS):
            fused.read(given, k, SPEC)

    return work


def _loop(
    ensemble: DeepLatentMoM, sources: Sequence[dict[str, Any]], gate: str, steps: int
) -> Callable[[], object]:
    """A run of exactly so many steps; RuntimeError where a sample ends before."""
    config = models.loop_config(
        ensemble, gate=gate, max_latent_steps=steps, max_steps=steps, answer_reserve=0, cap=-1
    )
    # What crosses between two models; agents of one would have their mixtures computed apart.
    config["link"]["message"] = "belief"

    def work() -> None:
        stats = models.run(ensemble, sources, config, len(sources))
        if stats["rows"] != steps * len(sources):
            raise RuntimeError(f"{stats['rows']} rows in {steps} steps of {len(sources)} samples")

    return work


class _Stamps:
    """Times of the steps of an engine's runs, and of the forwards in them, while it is entered.

    Both are taken in the same steps, so that a machine that is slower in one minute than in the
    next moves both. A step lasts from one call of ``Engine.advance`` to the next; forwards are soft
    embedding, mask and model of every agent. The calls that take the times count as neither.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._began: list[float] = []
        self._forwards: list[float] = []
        #: Seconds of a step and of its forwards: medians over the steps of a run, one of each.
        self.runs: list[tuple[float, float]] = []

    def __enter__(self) -> _Stamps:
        advance = self._engine.advance

        def timed_advance(*args: Any) -> Any:
            self._forwards.append(0.0)
            self._began.append(time.perf_counter())
            return advance(*args)

        self._engine.advance = timed_advance
        self._engine._inputs = self._timed(self._engine._inputs)
        for lanes in self._engine._lanes:
            lanes.step = self._timed(lanes.step)
        return self

    def __exit__(self, *_: object) -> None:
        del self._engine.advance, self._engine._inputs
        for lanes in self._engine._lanes:
            del lanes.step

    def _timed(self, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*args: Any) -> Tensor:
            began = time.perf_counter()
            answer = call(*args)
            self._forwards[-1] += time.perf_counter() - began
            return answer

        return timed

    def run(self, work: Callable[[], object]) -> None:
        """Do ``work``, one run of the loop, and note its medians."""
        self._began.clear()
        self._forwards.clear()
        work()
        steps = [after - before for before, after in pairwise(self._began[WARM:])]
        self.runs.append((statistics.median(steps), statistics.median(self._forwards[WARM:-1])))


def _orchestration(rows: int, rounds: int) -> Entry:
    # One layer: what surrounds the forwards is not lost in their noise.
    with tempfile.TemporaryDirectory() as folder:
        model = models.tiny(Path(folder) / "one-layer")
        pair = models.ensemble([str(model)] * 2, rows, fast=True)
    k = pair.default_config()["k"]
    sources = [models.tokens(PROMPT, salt) for salt in range(rows)]
    loop = _loop(pair, sources, "always_latent", STEPS)
    stamps = _Stamps(pair._engine)

    def timed() -> None:
        with stamps:
            stamps.run(loop)

    found = in_turns(
        {
            "loop": timed,
            "bare": _bare(pair._engine, rows, k),
            "consensus": _consensus(pair._engine, rows, k),
        },
        rounds=rounds,
    )
    runs = stamps.runs[1:]  # the first is the one that warms up
    step, forwards = (1e6 * statistics.median(times) for times in zip(*runs, strict=True))
    around = 1e6 * statistics.median(step - forwards for step, forwards in runs)
    consensus = 1e6 * found["consensus"] / STEPS
    return Entry(
        f"step K=2 B={rows}",
        step,
        forwards,
        "us",
        "the forwards in it, with soft embedding and mask",
        facts={
            "consensus_us": consensus,
            "orchestration_us": around - consensus,
            "goal_us": 100 + 5 * rows,
            # With nothing between the forwards: the difference is what their caches lose to a step.
            "bare_us": 1e6 * found["bare"] / STEPS,
        },
    )


def _generate(model: Any, ids: Sequence[Sequence[int]], steps: int) -> Callable[[], object]:
    """``model.generate`` of exactly so many tokens, greedily, prompts padded on the left."""
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + list(row) for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])

    def work() -> object:
        with torch.inference_mode():
            return model.generate(
                input_ids=padded,
                attention_mask=mask,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                pad_token_id=0,
            )

    return work


def _beside_generate(rows: int, rounds: int) -> Entry:
    single = models.ensemble(["zoo:tiny-math"], rows, fast=True)
    sources = [models.asked(question) for question in models.questions(rows)]
    ids = [single._engine.encode(0, source) for source in sources]
    model = single._engine._experts[0].model
    found = in_turns(
        {
            "ours long": _loop(single, sources, "always_explicit", PRINTED_LONG),
            "ours short": _loop(single, sources, "always_explicit", PRINTED_SHORT),
            "theirs long": _generate(model, ids, PRINTED_LONG),
            "theirs short": _generate(model, ids, PRINTED_SHORT),
        },
        rounds=rounds,
    )
    scale = 1e6 / (PRINTED_LONG - PRINTED_SHORT)
    return Entry(
        f"explicit K=1 B={rows}",
        scale * (found["ours long"] - found["ours short"]),
        scale * (found["theirs long"] - found["theirs short"]),
        "us",
        "model.generate, greedy",
    )
