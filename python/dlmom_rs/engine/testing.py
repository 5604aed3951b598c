"""Tiny random models with a tiny tokenizer, and calls in the engine's wire form, for tests.

No weights are shipped: a model is made from its config and a seed. The logits mean nothing, which
is enough to tell whether two ways of computing them agree.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from .backend import Engine
from .experts import quiet
from .packets import RawCall, RawSpan, RawStep
from .vocab import byte_of_char

#: Names of the special tokens of ``tiny_tokenizer``, after its 256 bytes and its merged pieces.
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("in", "g"), ("Ã", "©"))
#: One token: ids and probabilities of its packet's entries.
Packet = Sequence[tuple[int, float]]

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


#: Sizes of a model that a test can make at once, as keywords of a config; ``tiny_tokenizer`` fits.
SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 208,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


def tiny_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer of 266 ids: every byte, a few merges, three special tokens."""
    vocab = byte_of_char()
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return tokenizer


def save_tokenizer(folder: Path, tokenizer: Tokenizer | None = None, *, chat: bool = False) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    (tokenizer or tiny_tokenizer()).save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    if chat:
        config["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def save_model(
    folder: Path,
    config: PreTrainedConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    chat: bool = False,
) -> Path:
    """Write a model folder: random weights from a config, with ``tiny_tokenizer``. Returns it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        model.save_pretrained(folder)
    save_tokenizer(folder, chat=chat)
    return folder


def load(*folders: Path | str, agents: Sequence[int] | None = None, **options: Any) -> Engine:
    """An engine on the CPU in float32 at one thread with 8 slots of 128 positions, or as asked."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": "fp32",
        "slots": 8,
        "max_len": 128,
        "threads": 1,
        "trust_remote_code": False,
        "deterministic": False,
        "fast": False,
        "attn": None,
    }
    models_of = list(agents) if agents is not None else list(range(len(folders)))
    return Engine.load([str(f) for f in folders], models_of, **{**settings, **options})


def printed(ids: Sequence[int]) -> list[Packet]:
    """Tokens as one-entry packets."""
    return [[(token, 1.0)] for token in ids]


def encode_packets(
    packets: Sequence[Packet], k: int | None = None
) -> tuple[bytearray, bytearray, int]:
    """ids and probabilities of packets, row-major and padded to ``k`` entries; and ``k``."""
    width = max(len(packet) for packet in packets) if k is None else k
    ids = np.zeros((len(packets), width), "<i8")
    probs = np.zeros((len(packets), width), "<f4")
    for row, packet in enumerate(packets):
        ids[row] = packet[0][0]  # padding repeats a valid id
        for column, (token, p) in enumerate(packet):
            ids[row, column], probs[row, column] = token, p
    return bytearray(ids.tobytes()), bytearray(probs.tobytes()), width


def span(slot: int, packets: Sequence[Packet], k: int | None = None) -> RawSpan:
    """A span that appends packets to a slot."""
    ids, probs, width = encode_packets(packets, k)
    return slot, ids, probs, len(packets), width, None


def step(rows: dict[int, Packet], k: int | None = None) -> RawStep:
    """A step that appends one packet to each slot, in the dict's order."""
    ids, probs, width = encode_packets(list(rows.values()), k)
    return list(rows), ids, probs, width, []


def prefill(
    engine: Engine, slot: int, packets: Sequence[Packet], agent: int = 0, *, hidden: bool = False
) -> Tensor:
    """Append a span to one lane, keeping its hidden state or not; its last logits [V]."""
    call: RawCall = (agent, [span(slot, packets)], None, [slot] if hidden else [])
    logits = engine.advance([call])[0][0]
    assert logits is not None
    return logits[0]


def advance(
    engine: Engine, rows: dict[int, Packet], agent: int = 0, *, hidden: Sequence[int] = ()
) -> dict[int, Tensor]:
    """Append one packet to each slot's lane in one step; logits [V] by slot."""
    logits = engine.advance([(agent, [], step(rows), list(hidden))])[0][1]
    assert logits is not None
    return dict(zip(rows, logits, strict=True))
