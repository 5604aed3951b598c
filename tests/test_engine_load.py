"""Loading: what is reported of a model, and one clear line for every way a folder can be wrong."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers

from dlmom_rs.engine import device, experts
from dlmom_rs.engine.errors import ModelError, WeightsError
from dlmom_rs.engine.testing import (
    SPECIALS,
    advance,
    load,
    prefill,
    printed,
    save_model,
    save_tokenizer,
    tiny_tokenizer,
)
from dlmom_rs.engine.vocab import build_vocabulary, byte_style

VOCAB = 266
TEXT = "the thing\n in a café: 数 \t\x00 🙂"


def config(rows: int = 272, **more: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        **{
            "vocab_size": rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
            "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": 263,
            "pad_token_id": None, **more,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("load") / "tiny", config())


@pytest.fixture
def folder(shipped: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(shipped, tmp_path / "model"))


def test_info(shipped: Path) -> None:
    info = load(shipped, max_len=50).info()
    model = info["models"][0]
    assert model["name"] == "tiny"
    assert model["source"] == str(shipped)
    assert model["architecture"] == "LlamaForCausalLM"
    assert (model["vocab"], model["rows"], model["hidden"]) == (VOCAB, 272, 32)
    assert (model["context"], model["dtype"], model["path"]) == (64, "fp32", "row_slot")
    file = shipped / "model.safetensors"
    assert model["parameters"] == sum(t.numel() for t in load_file(file).values())
    assert model["weights_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert model["revision"] is None
    assert model["path_reason"] is None
    assert model["chat"] is False
    assert model["special"] == [263, 264, 265]
    # generation config says 263; the tokenizer says <|im_end|>; <|endoftext|> is a known end.
    assert model["roles"] == {"eos": [263, 265], "bos": [], "pad": [263]}
    assert len(model["token_bytes"]) == VOCAB
    assert 0 <= model["fingerprint"] < 2**64
    assert (info["agents"], info["device"], info["threads"]) == ([0], "cpu", 1)
    assert info["bit_invariant"], info["bit_invariance_reason"]


def test_fast_gives_invariance_up(shipped: Path) -> None:
    info = load(shipped, fast=True, slots=3).info()
    assert (info["slots"], info["bit_invariant"]) == (3, False)
    assert "fast" in info["bit_invariance_reason"]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision(shipped: Path, dtype: str) -> None:
    engine = load(shipped, dtype=dtype)
    assert engine.info()["models"][0]["dtype"] == dtype
    assert engine.info()["models"][0]["path"] == "row_slot"
    engine.open([(0, 0, 20)])
    logits = prefill(engine, 0, printed([1, 2]))
    # The kernel reads halves as they are.
    assert logits.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert bool(torch.isfinite(logits).all())


def test_tied_weights_stored_under_either_name(tmp_path: Path) -> None:
    saved = save_model(tmp_path / "tied", config(tie_word_embeddings=True))
    reference = load(saved)
    assert (
        reference.info()["models"][0]["parameters"]
        == 272 * 32 + 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32) + 32
    )
    weights = load_file(saved / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    results = []
    for engine in (reference, load(saved)):
        engine.open([(0, 0, 20)])
        results.append(prefill(engine, 0, printed([4, 5, 6])))
    assert torch.equal(*results)


def test_one_vocabulary_with_different_padding(tmp_path: Path, shipped: Path) -> None:
    """Qwen2.5 has 151,936 or 152,064 rows for the same tokens: the padding never comes out."""
    padded = save_model(tmp_path / "padded", config(320, hidden_size=64))
    engine = load(shipped, padded)
    one, two = engine.info()["models"]
    assert (one["rows"], two["rows"]) == (272, 320)
    assert one["fingerprint"] == two["fingerprint"]
    engine.open([(0, 0, 20), (0, 1, 20)])
    for agent in (0, 1):
        assert prefill(engine, 0, printed([1, 2, 3]), agent).shape == (VOCAB,)
        assert advance(engine, {0: [(4, 1.0)]}, agent)[0].shape == (VOCAB,)
    with pytest.raises(ValueError, match="token 266 is outside"):
        prefill(engine, 0, printed([266]))


def spoil_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return spoil


def truncate(file: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / file
        path.write_bytes(path.read_bytes()[:-100])

    return spoil


def only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()


def shard_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}), encoding="utf-8")


def more_tokens_than_rows(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"more{i}" for i in range(10)])
    save_tokenizer(folder, tokenizer)


def text(file: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content, encoding="utf-8")


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "bad config": (text("config.json", "{"), "config.json"),
    "unknown type": (text("config.json", '{"model_type": "nonesuch"}'), "nonesuch"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no safetensors weights"),
    "pickled": (only_pickle, "only pickled weights"),
    "truncated": (truncate("model.safetensors"), "model.safetensors: unreadable"),
    "not safetensors": (text("model.safetensors", "hello"), "model.safetensors: unreadable"),
    "no shard": (shard_missing, "00002-of-00002.safetensors: unreadable"),
    "no tokenizer": (no_tokenizer, "no tokenizer"),
    "bad tokenizer": (truncate("tokenizer.json"), "the tokenizer cannot be read"),
    "bad tokenizer config": (text("tokenizer_config.json", "{"), "not readable as JSON"),
    "too many tokens": (more_tokens_than_rows, "276 ids, the model only 272 rows"),
    "missing": (
        spoil_weights(lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        "weights missing: model.layers.1.mlp.up_proj.weight",
    ),
    "unexpected": (
        spoil_weights(lambda w: w.update(stray=torch.zeros(2))),
        "weights unexpected: stray",
    ),
    "shape": (spoil_weights(lambda w: w.update({"model.norm.weight": torch.ones(5)})), "model"),
}


@pytest.mark.parametrize("name", sorted(BAD))
def test_bad_folders(folder: Path, name: str) -> None:
    spoil, message = BAD[name]
    spoil(folder)
    with pytest.raises(ModelError, match=message) as caught:
        load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_weights_that_are_not_finite(folder: Path, value: float, dtype: str) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["model.layers.0.mlp.up_proj.weight"][3, 5] = value

    spoil_weights(change)(folder)
    with pytest.raises(WeightsError, match=r"NaN or Inf: model\.layers\.0\.mlp\.up_proj") as caught:
        load(folder, dtype=dtype)
    assert str(folder) in str(caught.value)


def test_bad_arguments(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "hip", None)
    for options, message in (
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "cuda"}, "torch sees no GPU"),
        ({"device": "hip"}, "needs a ROCm build"),
    ):
        with pytest.raises(ModelError, match=message):
            load(shipped, **options)
    for options, message in (
        ({"slots": 0}, "must be positive"),
        ({"max_len": 0}, "must be positive"),
        ({"threads": 0}, "threads must be positive"),
        ({"agents": [1]}, "agents name model 1"),
        ({"agents": []}, "at least one"),
    ):
        with pytest.raises(ValueError, match=message):
            load(shipped, **options)
    with pytest.raises(ModelError, match="no such folder"):
        load(tmp_path / "absent")
    with pytest.raises(ModelError, match="not a folder"):
        load(shipped / "config.json")
    with pytest.raises(ModelError, match="no expert named 'nonesuch'"):
        load("zoo:nonesuch")


def test_hub_names(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    def fetch(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision))
        assert "*.bin" not in allow_patterns
        if repo == "some/absent":
            raise OSError("offline\nand more")
        return str(shipped)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert experts.resolve("some/model@v1", False) == ("some/model", shipped, "tiny")
    with pytest.raises(ModelError, match=r"neither a folder nor available from the hub: offline$"):
        experts.resolve("some/absent", False)
    assert asked == [("some/model", "v1"), ("some/absent", None)]


def test_threads_and_auto_device(shipped: Path) -> None:
    assert device.physical_cores() >= 1
    assert load(shipped, threads=2).info()["threads"] == 2
    assert load(shipped, threads=None).info()["threads"] == device.physical_cores()
    torch.set_num_threads(1)
    if not torch.cuda.is_available() and not torch.backends.mps.is_available():
        assert load(shipped, device="auto").info()["device"] == "cpu"


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_byte_level_ids_print_their_text(value: str) -> None:
    vocabulary = VOCABULARY
    ids = vocabulary.encode_text(value)
    kept = [i for i in ids if i not in vocabulary.special]
    if len(kept) == len(ids):
        assert b"".join(vocabulary.token_bytes[i] for i in ids) == value.encode()


VOCABULARY = build_vocabulary(tiny_tokenizer(), Path(), None)


def test_byte_level_vocabulary() -> None:
    assert byte_style(VOCABULARY.tokenizer) == "byte_level"
    ids = VOCABULARY.encode_text(TEXT)
    assert b"".join(VOCABULARY.token_bytes[i] for i in ids) == TEXT.encode()
    assert ids[0] != ord("t")  # merged pieces were used
    special = [VOCABULARY.tokenizer.token_to_id(name) for name in SPECIALS]
    assert special == VOCABULARY.special
    assert all(VOCABULARY.token_bytes[i] == b"" for i in special)
    renamed = tiny_tokenizer().to_str().replace("<|im_start|>", "<|other|>")
    other = build_vocabulary(Tokenizer.from_str(renamed), Path(), None)
    assert other.token_bytes == VOCABULARY.token_bytes
    assert other.fingerprint != VOCABULARY.fingerprint


def test_sentencepiece_vocabulary() -> None:
    pieces = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "t", "h", "e"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    pieces += ["▁t", "▁th"]
    tokenizer = Tokenizer(
        models.BPE(
            {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    vocabulary = build_vocabulary(tokenizer, Path(), None)
    assert byte_style(tokenizer) == "metaspace"
    assert vocabulary.token_bytes[2 + 0x41] == b"A"
    ids = vocabulary.encode_text("the thé")
    assert b"".join(vocabulary.token_bytes[i] for i in ids) == " the thé".encode()
    assert vocabulary.roles["eos"] == [1]


def test_ordinary_pieces_that_look_like_ends_are_not(tmp_path: Path) -> None:
    vocab = {**tiny_tokenizer().get_vocab(with_added_tokens=False), "</s>": 263}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    vocabulary = build_vocabulary(tokenizer, tmp_path, None)
    assert vocabulary.roles["eos"] == []
    assert vocabulary.token_bytes[263] == b"</s>"


def test_encode(shipped: Path, tmp_path: Path) -> None:
    chatty = save_model(tmp_path / "chat", config(), chat=True)
    engine = load(shipped, chatty)
    assert [m["chat"] for m in engine.info()["models"]] == [False, True]
    pieces = engine.info()["models"][0]["token_bytes"]
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    plain = engine.encode(0, {"kind": "chat", "messages": messages})
    assert b"".join(pieces[i] for i in plain) == b"a\n\nb"
    chat = engine.encode(1, {"kind": "chat", "messages": messages})
    assert chat[0] == 264
    assert chat.count(265) == 2
    assert b"".join(pieces[i] for i in chat) == b"system\na\nuser\nb\nassistant\n"
    assert engine.encode(0, {"kind": "tokens", "ids": [3, 265]}) == [3, 265]
    assert engine.encode(0, {"kind": "text", "text": "\n"}) == [10]
    bad = {
        "is empty": [
            {"kind": "text", "text": ""},
            {"kind": "tokens", "ids": []},
            {"kind": "chat", "messages": []},
            {"kind": "chat", "messages": [{"role": "user", "content": ""}]},
        ],
        "token 266 is outside": [{"kind": "tokens", "ids": [1, 266]}],
        "65 tokens, tiny has a context of 64": [{"kind": "text", "text": "x" * 65}],
        "unknown prompt kind 'speech'": [{"kind": "speech"}],
        "needs a role": [{"kind": "chat", "messages": [{"content": "x"}]}],
    }
    for message, sources in bad.items():
        for source in sources:
            with pytest.raises(ValueError, match=message):
                engine.encode(0, source)
    assert len(engine.encode(0, {"kind": "text", "text": "x" * 64})) == 64
    with pytest.raises(ValueError, match="model 2 is outside"):
        engine.encode(2, {"kind": "text", "text": "x"})


def test_templates_without_a_system_role(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "strict", config(), chat=True)
    file = folder / "tokenizer_config.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    data["chat_template"] = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
        "{% endif %}[{{ m.content }}]{% endfor %}"
    )
    file.write_text(json.dumps(data), encoding="utf-8")
    engine = load(folder)
    pieces = engine.info()["models"][0]["token_bytes"]
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    ids = engine.encode(0, {"kind": "chat", "messages": [system, user]})
    assert b"".join(pieces[i] for i in ids) == b"[s\n\nu]"
    with pytest.raises(ValueError, match="template refused the messages: no system"):
        engine.encode(0, {"kind": "chat", "messages": [user, system]})


def test_a_lane_cannot_outgrow_the_context(shipped: Path) -> None:
    engine = load(shipped, max_len=500)
    with pytest.raises(ValueError, match="the context of tiny is 64"):
        engine.open([(0, 0, 65)])
    engine.open([(0, 0, 64)])


def test_weights_at_odd_addresses_are_copied(shipped: Path) -> None:
    model = load(shipped, max_len=50)._experts[0].model
    weight = model.model.embed_tokens.weight
    odd = torch.empty(weight.numel() + 1)[1:].view_as(weight)
    odd.copy_(weight)
    kept = weight.detach().clone()
    weight.data = odd
    assert weight.data_ptr() % experts.ALIGNMENT
    experts.align(model)
    assert all(p.data_ptr() % experts.ALIGNMENT == 0 for p in model.parameters())
    assert torch.equal(weight, kept)
