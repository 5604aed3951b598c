"""Two small trained models, where a checkout has them: known greedy texts come out of the lanes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dlmom_rs.engine.testing import Packet, advance, load, prefill, printed

MODELS = Path(os.environ.get("DLMOM_SHARED") or Path(__file__).parents[2] / "shared") / "models"
#: Greedy continuations published with the models or checked against their own implementations.
KNOWN = {
    "stories260k": (
        [1, 403, 407, 261, 378],
        [432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337],
        b", there was a little girl named Lily. She loved to play",
    ),
    "tinystories-656k-bf16": (
        [1, 80, 147, 201, 282, 57],
        [313, 598, 303, 1049, 1468, 267, 628, 333, 94, 1210, 263, 251, 604, 94, 1030, 94],
        b", a little girl named Lily lived in a small house with her mom, dad, ",
    ),
}


@pytest.fixture(params=sorted(KNOWN))
def name(request: pytest.FixtureRequest) -> str:
    name = str(request.param)
    if not (MODELS / name).is_dir():
        pytest.skip(f"the trained model {name} is not in this checkout (see DLMOM_SHARED)")
    return name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_greedy_text_alone_and_in_a_crowd(name: str, dtype: str) -> None:
    prompt, want, text = KNOWN[name]
    logits: list[list[torch.Tensor]] = []
    for slots in (1, 16):
        engine = load(MODELS / name, slots=slots, max_len=200, dtype=dtype)
        info = engine.info()
        assert info["bit_invariant"], info["bit_invariance_reason"]
        slot = slots // 2
        mates = [s for s in range(slots) if s != slot]
        engine.open([(s, 0, 150) for s in (slot, *mates)])
        for s in mates:
            prefill(engine, s, printed([1, *range(10, 12 + 7 * s)]))
        seen = [prefill(engine, slot, printed(prompt))]
        for step in range(len(want) - 1):
            rows: dict[int, Packet] = {s: [(50, 0.5), (60 + step, 0.5)] for s in mates}
            rows[slot] = [(int(seen[-1].argmax()), 1.0)]
            seen.append(advance(engine, rows)[slot])
        out = [int(z.argmax()) for z in seen]
        pieces = info["models"][0]["token_bytes"]
        assert out == want
        assert b"".join(pieces[i] for i in out).startswith(text)
        logits.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*logits, strict=True))


def test_tokenizers_are_read_as_their_files_say(name: str) -> None:
    engine = load(MODELS / name)
    model = engine.info()["models"][0]
    assert engine.encode(0, {"kind": "text", "text": "Once upon a time"})[0] == 1
    if name == "stories260k":
        assert engine.encode(0, {"kind": "text", "text": "Once upon a time"}) == KNOWN[name][0]
        assert model["token_bytes"][3:259] == [bytes([b]) for b in range(256)]
    for value in ("the cat sat on the mat", "She said, 'no'."):
        ids = engine.encode(0, {"kind": "text", "text": value})
        assert b"".join(model["token_bytes"][i] for i in ids) == b" " + value.encode()
    assert model["roles"]["eos"] == [2]
    assert model["roles"]["bos"] == [1]
    assert model["special"] == [0, 1, 2]
