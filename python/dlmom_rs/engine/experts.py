"""Loading one model from a folder or the hub: weights checked, tokenizer described, path chosen."""

import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from . import families
from .attention import BLOCKS, register
from .errors import ModelError, WeightsError
from .families import Family
from .masks import MaskPlan
from .vocab import Vocabulary, build_vocabulary, load_tokenizer

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass
class Expert:
    """One loaded model: its weights, vocabulary, path and what to report about it."""

    name: str
    source: str
    folder: Path
    revision: str | None
    model: Any
    vocabulary: Vocabulary
    family: Family
    attention: str
    dtype: torch.dtype
    device: torch.device
    rows: int
    hidden: int
    context: int | None
    parameters: int
    weights_sha256: str
    #: whether one forward's rows influence each other's bits through shared expert batches
    routed: bool
    #: where a forward under way leaves the hidden states of its last positions, [rows, hidden]
    captured: list[torch.Tensor] | None = field(default=None, repr=False)

    @cached_property
    def embeddings(self) -> nn.Module:
        """The module that turns ids into input embeddings, scaling included."""
        module: nn.Module = self.model.get_input_embeddings()
        return module

    def watch(self) -> None:
        """Let forwards leave what their head is given in ``captured``, where that is a list."""

        def note(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            if self.captured is not None:
                self.captured.append(inputs[0][:, -1])

        self.model.get_output_embeddings().register_forward_pre_hook(note)

    @property
    def cache_keyword(self) -> str:
        """The name under which the model's forward takes a cache.

        ``cache`` from transformers 5.24 on, where ``past_key_values`` is deprecated.
        """
        accepted = inspect.signature(self.model.forward).parameters
        return "cache" if "cache" in accepted else "past_key_values"

    def mask_plan(self) -> MaskPlan:
        """How this model's masks are made."""
        return MaskPlan(
            self.family.windows, self.family.per_type, self.attention == "eager", self.dtype
        )

    def info(self, row_slot: bool, reason: str | None, position_bytes: int) -> dict[str, Any]:
        """What the engine reports of this model; the path is decided by the self-test.

        ``position_bytes`` are those of the keys and values of one position, over all layers.
        """
        v = self.vocabulary
        dtypes = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
        return {
            "name": self.name,
            "source": self.source,
            "architecture": type(self.model).__name__,
            "parameters": self.parameters,
            "vocab": v.size,
            "rows": self.rows,
            "hidden": self.hidden,
            "context": self.context,
            "fingerprint": v.fingerprint,
            "token_bytes": v.token_bytes,
            "special": v.special,
            "roles": v.roles,
            "chat": v.chat is not None,
            "weights_sha256": self.weights_sha256,
            "revision": self.revision,
            "dtype": dtypes[self.dtype],
            "path": "row_slot" if row_slot else "per_row",
            "path_reason": reason,
            "attention": self.attention,
            "kv_bytes_per_position": position_bytes,
        }


def one_line(error: BaseException) -> str:
    """The first non-empty line of an error's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def resolve(source: str, trust_remote_code: bool) -> tuple[str, Path, str | None]:
    """Find a model: (name, folder, hub revision or None).

    ``zoo:NAME`` is a shipped model; an existing folder is itself; ``owner/name`` or
    ``owner/name@revision`` is fetched from the hub (safetensors and tokenizer files only).
    """
    if source.startswith("zoo:"):
        from dlmom_rs import zoo

        name = source.removeprefix("zoo:")
        try:
            return name, Path(zoo.path(name)), None
        except (KeyError, ValueError, OSError) as error:
            raise ModelError(f"{source}: {one_line(error)}") from error
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder.resolve().name, folder, None
    if folder.exists():
        raise ModelError(f"{source}: not a folder; a model is a folder with config.json")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(@[\w./-]+)?", source) or source.startswith("."):
        raise ModelError(f"{source}: no such folder")
    from huggingface_hub import snapshot_download

    repo, _, revision = source.partition("@")
    patterns = [*HUB_FILES, *(["*.py"] if trust_remote_code else [])]
    try:
        found = Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except Exception as error:
        raise ModelError(
            f"{source}: neither a folder nor available from the hub: {one_line(error)}"
        ) from error
    return repo, found, found.name


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by name, each with a readable header.

    Raises ModelError naming the file that is absent, truncated or not safetensors.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    elif index.is_file():
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index}: not a readable weight index: {one_line(error)}") from error
        files = [folder / name for name in sorted(names)]
    else:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
        hint = "; only pickled weights, which are not loaded" if pickled else ""
        raise ModelError(f"{folder}: no safetensors weights (expected {SINGLE}){hint}")
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file}: unreadable safetensors file: {one_line(error)}") from error
    return files


def weights_digest(files: list[Path]) -> str:
    """sha256 of the weights: of the file where there is one, else of its ``sha256sum`` listing."""
    sums = []
    for file in files:
        with file.open("rb") as handle:
            sums.append(hashlib.file_digest(handle, "sha256").hexdigest())
    if len(sums) == 1:
        return sums[0]
    listing = "".join(f"{s}  {f.name}\n" for s, f in zip(sums, files, strict=True))
    return hashlib.sha256(listing.encode()).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no loading report: what matters of it is raised as an error here."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(50)  # the standard library's CRITICAL
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json")
    try:
        return AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'}: {one_line(error)}") from error


def choose_attention(config: Any, asked: str | None, name: str) -> str:
    """The attention implementation to load with: sdpa, or eager where the family has no sdpa.

    ``blocks`` is sdpa at first: whether a model can take it shows once it is loaded. Raises
    ModelError for an unknown name and for sdpa or blocks asked of a family without sdpa.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if asked not in (None, "sdpa", "eager", BLOCKS):
        raise ModelError(f"unknown attention {asked!r}: expected sdpa, eager or {BLOCKS}")
    try:
        known: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        supported = bool(known._supports_sdpa)
    except KeyError:  # code shipped with the model
        supported = True
    if asked in ("sdpa", BLOCKS) and not supported:
        raise ModelError(f"{name}: type {config.model_type!r} has no {asked} attention; use eager")
    if asked == BLOCKS:
        return "sdpa"
    return asked or ("sdpa" if supported else "eager")


def take_blocks(model: Any) -> bool:
    """Switch a model that was loaded with sdpa to ``blocks``; False where its code cannot."""
    if not model._can_set_attn_implementation():
        return False
    register()
    model.set_attn_implementation(BLOCKS)
    return bool(model.config._attn_implementation == BLOCKS)


def check_loaded(folder: Path, loading: dict[str, Any]) -> None:
    """Raise ModelError naming weights that are absent, unknown or of another shape.

    transformers only logs these, and initialises absent ones at random. Tied weights that a file
    holds once are not listed as absent.
    """
    for key, what in (
        ("missing_keys", "missing"),
        ("unexpected_keys", "unexpected"),
        ("mismatched_keys", "of another shape"),
        ("error_msgs", "with errors"),
    ):
        names = sorted(str(n[0] if isinstance(n, tuple) else n) for n in loading.get(key) or ())
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if names[8:] else "")
            raise ModelError(f"{folder}: weights {what}: {shown}")


def check_finite(folder: Path, model: nn.Module) -> None:
    """Raise WeightsError naming parameters and buffers that hold NaN or Inf."""
    bad = []
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and tensor.numel():
            low, high = torch.aminmax(tensor)  # both are NaN where any element is
            if not bool(torch.isfinite(low) & torch.isfinite(high)):
                bad.append(name)
    if bad:
        shown = ", ".join(bad[:8]) + (f" and {len(bad) - 8} more" if bad[8:] else "")
        raise WeightsError(f"{folder}: weights hold NaN or Inf: {shown}")


#: Alignment of fresh CPU tensors, in bytes.
ALIGNMENT = 64


def align(model: nn.Module) -> None:
    """Copy CPU weights that lie at odd addresses to aligned ones.

    Weights mapped from a file lie where its header ends, and matrix kernels round differently at
    other alignments: the same weights in another file would give other last bits.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def context_length(config: Any) -> int | None:
    """The longest sequence the model's positions allow, or None where it states none."""
    for name in ("max_position_embeddings", "n_positions", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def load_expert(
    source: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool,
    attn: str | None,
    blocks: bool = False,
) -> Expert:
    """Load one model, frozen and in eval mode, on ``device`` in ``dtype``.

    ``blocks`` prefers the attention of that name to sdpa where ``attn`` asks for nothing and the
    model shares a batch.

    Raises ModelError for anything wrong with the folder, WeightsError for NaN or Inf weights.
    """
    from transformers import AutoModelForCausalLM

    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    name, folder, revision = resolve(source, trust_remote_code)
    with quiet():
        config = _config(folder, trust_remote_code)
        families.refuse(config, str(folder))
        files = weight_files(folder)
        tokenizer, chat = load_tokenizer(folder, trust_remote_code)
        attention = choose_attention(config, attn, str(folder))
        try:
            model, loading = from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                attn_implementation=attention,
                output_loading_info=True,
            )
        except Exception as error:
            raise ModelError(f"{folder}: cannot be loaded: {one_line(error)}") from error
    check_loaded(folder, loading)
    model.eval().requires_grad_(False).to(device)
    align(model)
    check_finite(folder, model)
    text_config = model.config.get_text_config()
    family = families.decide(text_config, model, str(folder))
    wanted = attn == BLOCKS or (blocks and attn is None and attention == "sdpa")
    if wanted and family.row_slot and take_blocks(model):
        attention = BLOCKS
    elif attn == BLOCKS:
        why = family.reason or "its code does not let its attention be replaced"
        raise ModelError(f"{folder}: no {BLOCKS} attention: {why}")
    vocabulary = build_vocabulary(tokenizer, folder, model.generation_config, chat)
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    rows = min(int(table.shape[0]), int(head.shape[0]))
    if vocabulary.size > rows:
        raise ModelError(
            f"{folder}: the tokenizer has {vocabulary.size} ids, the model only {rows} rows"
        )
    expert = Expert(
        name=name,
        source=source,
        folder=folder,
        revision=revision,
        model=model,
        vocabulary=vocabulary,
        family=family,
        attention=attention,
        dtype=dtype,
        device=device,
        rows=int(table.shape[0]),
        hidden=int(table.shape[1]),
        context=context_length(text_config),
        parameters=sum(p.numel() for p in model.parameters()),
        weights_sha256=weights_digest(files),
        routed=families.expert_layers(text_config),
    )
    expert.watch()
    return expert
