"""What a tokenizer's ids mean in bytes, which of them end a text, and prompts to ids.

``tokenizer.json`` read by the ``tokenizers`` library is the reference; transformers' own wrapper
may disagree with it on leading spaces and unknown characters, and is used for chat templates only.
"""

import hashlib
import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from .errors import ModelError

#: Tokens that end a text in the families we know, where a vocabulary has them as added tokens.
END_TOKENS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|endoftext|>",
    "</s>",
    "<|end|>",
    "<end_of_turn>",
    "<eos>",
)
#: The space of SentencePiece pieces.
METASPACE = "\u2581"


def byte_of_char() -> dict[str, int]:
    """The inverse of GPT-2's map from bytes to printable characters (``bytes_to_unicode``)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


def _decoders(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The decoder's steps, flattened, as in tokenizer.json."""
    if tokenizer.decoder is None:
        return []
    state = json.loads(tokenizer.decoder.__getstate__())
    return state["decoders"] if state.get("type") == "Sequence" else [state]


def byte_style(tokenizer: Tokenizer) -> str:
    """How pieces become bytes, from the decoder: ``byte_level``, ``metaspace`` or ``plain``."""
    steps = _decoders(tokenizer)
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level"
    if kinds & {"Metaspace", "ByteFallback"}:
        return "metaspace"
    for step in steps:
        if step.get("type") == "Replace" and METASPACE in json.dumps(step, ensure_ascii=False):
            return "metaspace"
    return "plain"


def _metaspace_bytes(piece: str) -> bytes:
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        try:
            return bytes([int(piece[3:5], 16)])
        except ValueError:
            pass
    return piece.replace(METASPACE, " ").encode()


@dataclass
class Vocabulary:
    """The ids 0..V of one tokenizer.

    ``token_bytes[id]`` is what the id prints, empty for special tokens and for ids without a token.
    ``fingerprint`` is the first 8 bytes, little-endian, of the sha256 over every id's record
    ``u32 id, u8 special, u32 length, content`` (little-endian). A special token's content there is
    its name, not the nothing it prints, so vocabularies that differ only there still differ.
    """

    tokenizer: Tokenizer
    size: int
    token_bytes: list[bytes]
    special: list[int]
    roles: dict[str, list[int]]
    fingerprint: int
    #: transformers' tokenizer, only where there is a chat template
    chat: Any = field(default=None, repr=False)

    def encode_text(self, text: str, *, specials: bool = True) -> list[int]:
        """Ids of a text; ``specials`` lets the tokenizer's post-processor add its BOS."""
        return list(self.tokenizer.encode(text, add_special_tokens=specials).ids)

    def encode(self, source: dict[str, Any]) -> list[int]:
        """Ids of a prompt source: kinds ``chat``, ``text`` and ``tokens``.

        Raises ValueError for an empty or malformed source.
        """
        kind = source.get("kind")
        if kind == "tokens":
            ids = [int(i) for i in source.get("ids", [])]
            bad = next((i for i in ids if not 0 <= i < self.size), None)
            if bad is not None:
                raise ValueError(f"prompt token {bad} is outside the vocabulary of {self.size} ids")
        elif kind == "text":
            text = source.get("text", "")
            ids = self.encode_text(text) if text else []
        elif kind == "chat":
            ids = self._encode_chat(source.get("messages", []))
        else:
            raise ValueError(f"unknown prompt kind {kind!r}: expected chat, text or tokens")
        if not ids:
            raise ValueError("the prompt is empty")
        return ids

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if not all("role" in m and "content" in m for m in messages):
            raise ValueError("every chat message needs a role and a content")
        if not any(m["content"] for m in messages):
            return []
        if self.chat is None:
            return self.encode_text("\n\n".join(m["content"] for m in messages if m["content"]))
        return self.encode_text(self._render(messages), specials=False)

    def _render(self, messages: list[dict[str, str]]) -> str:
        """The chat template's text. Templates write their own BOS."""
        from jinja2.exceptions import TemplateError

        def apply(turns: list[dict[str, str]]) -> str:
            return str(
                self.chat.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            )

        try:
            return apply(messages)
        except TemplateError as error:
            # Some families (Gemma) refuse a system turn: it then opens the first user turn.
            if len(messages) > 1 and messages[0]["role"] == "system":
                first = {**messages[1]}
                first["content"] = messages[0]["content"] + "\n\n" + first["content"]
                try:
                    return apply([first, *messages[2:]])
                except TemplateError:
                    pass
            raise ValueError(f"the chat template refused the messages: {error}") from error


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, (list, tuple)) else [int(value)]


def _named(entry: Any) -> str | None:
    """A token's text from tokenizer_config.json: a string, or a dict with its content."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def _configured(path: Path) -> dict[str, str]:
    """Role names to token texts from tokenizer_config.json and special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = path / name
        if not file.is_file():
            continue
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{file}: not readable as JSON: {error}") from error
        for role in ("eos", "bos", "pad"):
            text = _named(data.get(f"{role}_token"))
            if text is not None:
                found.setdefault(role, text)
    return found


def _roles(
    tokenizer: Tokenizer, path: Path, generation: Any, added: dict[int, Any], size: int
) -> dict[str, list[int]]:
    configured = _configured(path)
    roles: dict[str, list[int]] = {}
    for role in ("eos", "bos", "pad"):
        ids = _as_ids(getattr(generation, f"{role}_token_id", None))
        text = configured.get(role)
        token = tokenizer.token_to_id(text) if text is not None else None
        if token is not None:
            ids.append(token)
        if role == "eos":
            # Only as added tokens: a byte-level vocabulary may hold "</s>" as an ordinary piece.
            ids.extend(i for i, token in added.items() if token.content in END_TOKENS)
        roles[role] = sorted({i for i in ids if 0 <= i < size})
    return roles


def build_vocabulary(
    tokenizer: Tokenizer, path: Path, generation: Any, chat: Any = None
) -> Vocabulary:
    """Describe a tokenizer. ``generation`` is the model's generation config (for its role ids)."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pieces = tokenizer.get_vocab(with_added_tokens=True)
    if not pieces:
        raise ModelError(f"{path}: the tokenizer has no tokens")
    size = max(pieces.values()) + 1
    added = dict(tokenizer.get_added_tokens_decoder())
    roles = _roles(tokenizer, path, generation, added, size)
    ends = {i for ids in roles.values() for i in ids}
    special = {i for i, token in added.items() if token.special or i in ends}
    style, table = byte_style(tokenizer), byte_of_char()

    def printed(index: int, piece: str) -> bytes:
        if index in added:
            return str(added[index].content).encode()
        if style == "byte_level":
            if all(char in table for char in piece):
                return bytes(table[char] for char in piece)
            return piece.encode()
        if style == "metaspace":
            return _metaspace_bytes(piece)
        return tokenizer.decode([index], skip_special_tokens=False).encode()

    content = [b""] * size
    for piece, index in pieces.items():
        content[index] = printed(index, piece)
    digest = hashlib.sha256()
    for index, value in enumerate(content):
        digest.update(struct.pack("<IBI", index, index in special, len(value)))
        digest.update(value)
    return Vocabulary(
        tokenizer=tokenizer,
        size=size,
        token_bytes=[b"" if i in special else value for i, value in enumerate(content)],
        special=sorted(special),
        roles=roles,
        fingerprint=int.from_bytes(digest.digest()[:8], "little"),
        chat=chat,
    )


def load_tokenizer(path: Path, trust_remote_code: bool) -> tuple[Tokenizer, Any]:
    """The tokenizer of a model folder, and transformers' wrapper where it has a chat template.

    Raises ModelError where there is no tokenizer or it cannot be read.
    """
    file = path / "tokenizer.json"
    others = ("tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if not file.is_file() and not any((path / name).is_file() for name in others):
        raise ModelError(f"{path}: no tokenizer (looked for tokenizer.json, {', '.join(others)})")
    templated = any((path / n).is_file() for n in ("chat_template.jinja", "chat_template.json"))
    config = path / "tokenizer_config.json"
    if not templated and config.is_file():
        templated = '"chat_template"' in config.read_text(encoding="utf-8")
    wrapper: Any = None
    tokenizer: Any = None
    try:
        if templated or not file.is_file():
            from transformers import AutoTokenizer

            wrapper = AutoTokenizer.from_pretrained(
                path, local_files_only=True, trust_remote_code=trust_remote_code
            )
        if file.is_file():
            tokenizer = Tokenizer.from_file(str(file))
        else:
            tokenizer = getattr(wrapper, "backend_tokenizer", None)
    except Exception as error:  # tokenizers raises bare Exception
        line = str(error).strip().splitlines()
        raise ModelError(
            f"{path}: the tokenizer cannot be read: {line[0] if line else error!r}"
        ) from error
    if tokenizer is None:
        raise ModelError(f"{path}: the tokenizer has no fast form (tokenizer.json)")
    has_template = wrapper is not None and getattr(wrapper, "chat_template", None)
    return tokenizer, wrapper if has_template else None
