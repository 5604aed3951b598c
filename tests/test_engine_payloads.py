"""Messages that are no packets, mixtures without a forward, and compressors, on the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlmom_rs.engine.backend import Engine
from dlmom_rs.engine.testing import encode_packets, prefill, printed, step
from dlmom_rs.zoo import path

PACKETS = [[(5, 0.5), (9, 0.25), (70, 0.25)], [(3, 1.0)], [(400, 0.75), (2, 0.25)]]


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine.load(
        [str(path("tiny-math"))],
        [0],
        device="cpu",
        dtype=request.param,
        slots=8,
        max_len=64,
        threads=1,
        trust_remote_code=False,
        deterministic=False,
        fast=False,
        attn=None,
    )


def start(engine: Engine, slots: int = 3) -> None:
    for slot in range(slots):
        engine.open([(slot, 0, 40)])
        prefill(engine, slot, printed([7, 8, 9 + slot]))


def mixtures(engine: Engine) -> bytes:
    ids, probs, k = encode_packets(PACKETS)
    return engine.embed_packets(0, ids, probs, len(PACKETS), k)[0]


def advance(engine: Engine, payloads: list[tuple[str, list[int], bytearray]]) -> torch.Tensor:
    slots, ids, probs, k, _ = step(dict(enumerate(PACKETS)))
    logits = engine.advance([(0, [], (slots, ids, probs, k, payloads), [])])[0][1]
    assert logits is not None
    return logits


def test_an_embedding_sent_in_full_gives_the_packets_bits(engine: Engine) -> None:
    start(engine)
    packets = advance(engine, [])
    start(engine)
    embedded = advance(engine, [("embed", [0, 1, 2], bytearray(mixtures(engine)))])
    assert torch.equal(packets, embedded)
    start(engine)
    width = engine.info()["models"][0]["hidden"]
    middle = bytearray(mixtures(engine)[4 * width : 8 * width])
    assert torch.equal(packets, advance(engine, [("embed", [1], middle)]))


def test_mixtures_are_the_float64_sum_rounded_once(engine: Engine) -> None:
    ids, probs, k = encode_packets(PACKETS)
    data, width = engine.embed_packets(0, ids, probs, len(PACKETS), k)
    got = np.frombuffer(data, "<f4").reshape(len(PACKETS), width)
    table = engine._experts[0].embeddings.weight.detach().double().numpy()
    want = np.stack([sum(p * table[i] for i, p in packet) for packet in PACKETS])
    scale = np.abs(table).max()
    rounding = 2.0**-8 if engine._experts[0].dtype == torch.bfloat16 else 2.0**-22
    assert np.abs(got - want).max() <= rounding * scale


def test_a_dense_distribution_feeds_the_same_mixture(engine: Engine) -> None:
    vocab = engine.info()["models"][0]["vocab"]
    probs = np.zeros((3, vocab), "<f4")
    for row, packet in enumerate(PACKETS):
        for token, p in packet:
            probs[row, token] = p
    start(engine)
    packets = advance(engine, [])
    start(engine)
    dense = advance(engine, [("dense", [0, 1, 2], bytearray(probs.tobytes()))])
    scale = float(packets.abs().max())
    tolerance = 0.05 if engine._experts[0].dtype == torch.bfloat16 else 1e-4
    assert float((packets - dense).abs().max()) <= tolerance * scale
    assert torch.equal(packets.argmax(-1), dense.argmax(-1))
    # A row's bits do not depend on how many travel together.
    start(engine)
    alone = advance(engine, [("dense", [2], bytearray(probs[2].tobytes()))])
    assert torch.equal(alone[2], dense[2])


def test_spans_of_payloads_are_spans_of_packets(engine: Engine) -> None:
    engine.open([(0, 0, 40), (1, 0, 40)])
    by_packets = prefill(engine, 0, PACKETS)
    payload = ("embed", bytearray(mixtures(engine)))
    empty = bytearray()
    by_payload = engine.advance([(0, [(1, empty, empty, 3, 1, payload)], None, [])])[0][0][0]
    assert torch.equal(by_packets, by_payload)
    assert engine.length(1, 0) == 3


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (("embed", [0], bytearray(8)), "embed payloads"),
        (("dense", [0], bytearray(8)), "dense payloads"),
        (("hidden", [0], bytearray(8)), "unknown payload 'hidden'"),
        (("embed", [3], bytearray(8)), "a row outside 0..3"),
    ],
)
def test_malformed_payloads_are_refused_before_anything_moves(
    engine: Engine, payload: tuple[str, list[int], bytearray], message: str
) -> None:
    start(engine)
    with pytest.raises(ValueError, match=message):
        advance(engine, [payload])
    assert engine.length(0, 0) == 3


class Halve:
    """Halves every value and remembers what it was shown."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, torch.Size]] = []

    def compress(
        self, keys: torch.Tensor, values: torch.Tensor, *, layer: int, agent: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls.append((layer, agent, keys.shape))
        return keys, values / 2


def test_a_compressor_rewrites_one_lane_and_leaves_the_others(engine: Engine) -> None:
    start(engine)
    untouched = advance(engine, [])
    start(engine)
    halve = Halve()
    engine.set_compressor(halve)
    try:
        engine.compress([(1, 0)])
    finally:
        engine.set_compressor(None)
    layers, heads, size = 4, 2, 32
    assert halve.calls == [(layer, 0, torch.Size([heads, 3, size])) for layer in range(layers)]
    changed = advance(engine, [])
    assert torch.equal(changed[0], untouched[0])
    assert torch.equal(changed[2], untouched[2])
    assert not torch.equal(changed[1], untouched[1])


class Answer:
    def __init__(self, answer: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        self._answer = answer

    def compress(self, keys: torch.Tensor, values: torch.Tensor, **_: int) -> Any:
        return self._answer(keys, values)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda k, _: k, "answer with a pair"),
        (lambda k, v: (k[:, :2], v), "keys of shape .* a compressor may change values, not"),
        (lambda k, _: (k, None), "values of shape NoneType"),
    ],
)
def test_what_a_compressor_may_not_answer(
    engine: Engine, answer: Callable[[torch.Tensor, torch.Tensor], Any], message: str
) -> None:
    start(engine)
    engine.set_compressor(Answer(answer))
    try:
        with pytest.raises(ValueError, match=message):
            engine.compress([(0, 0)])
    finally:
        engine.set_compressor(None)


def test_compressing_needs_a_compressor(engine: Engine, tmp_path: Path) -> None:
    start(engine)
    with pytest.raises(ValueError, match="no KV compressor is set"):
        engine.compress([(0, 0)])
    with pytest.raises(TypeError, match="has no method compress"):
        engine.set_compressor(tmp_path)
