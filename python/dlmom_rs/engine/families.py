"""Which families the row-slot path serves, decided from the config alone.

The table was made by comparing each family's row-slot logits with a lone ``DynamicCache`` on ragged
rows; the load-time self-test repeats that comparison for the model at hand. Families outside the
table run one row at a time on a cache of their own, or are refused.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import get_layer_types_and_kwargs

from .errors import ModelError

#: Families given one mask tensor, which already includes the window where there is one.
SINGLE_MASK = frozenset(
    (
        "llama",
        "mistral",
        "phi3",
        "gemma",
        "gpt2",
        "gpt_neox",
        "olmo2",
        "deepseek_v3",
        "granite",
        "qwen3_moe",
    )
)
#: Families whose modelling code takes a dict of masks by layer type.
MASK_PER_TYPE = frozenset(
    ("qwen2", "qwen3", "gemma2", "gemma3_text", "olmo3", "smollm3", "cohere2", "gpt_oss")
)
#: Families no path here serves: recurrent state cannot be rolled back, chunked attention is not
#: a mask per position, and Mamba2 silently ignores the cache it is given.
REFUSED = frozenset(
    ("mamba", "mamba2", "falcon_mamba", "qwen3_next", "llama4", "llama4_text", "jamba", "zamba2")
)

#: Rotary types whose angles depend on the longest position in the batch, so on a row's mates.
BATCH_DEPENDENT_ROPE = frozenset(("dynamic", "longrope"))

ATTENTION_TYPES = frozenset(("full_attention", "sliding_attention"))


@dataclass(frozen=True)
class Family:
    """The path of one model. ``reason`` says why it is not the row-slot path."""

    row_slot: bool
    reason: str | None
    per_type: bool
    windows: dict[str, int | None]
    layers: int


def rope_types(model: nn.Module) -> set[str]:
    """The rotary types of every rotary module of a loaded model."""
    found: set[str] = set()
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, str):
            found.add(kind)
        elif isinstance(kind, dict):
            found.update(str(value) for value in kind.values())
    return found


def expert_layers(config: PreTrainedConfig) -> bool:
    """Whether the model routes tokens to experts (mixture-of-experts feed-forward layers)."""
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def refuse(config: PreTrainedConfig, name: str) -> None:
    """Raise ModelError for a family that neither path can serve, before its weights are read."""
    kind = str(config.model_type)
    if kind in REFUSED or getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{name}: models of type {kind!r} are not supported "
            "(recurrent or chunked state cannot be kept per row)"
        )


def decide(config: PreTrainedConfig, model: Any, name: str) -> Family:
    """Choose the path of a loaded model.

    Raises ModelError where even one row at a time would be wrong: stateful (recurrent) models and
    layers that are neither full nor sliding-window attention.
    """
    kind = str(config.model_type)
    refuse(config, name)
    types, kwargs = get_layer_types_and_kwargs(config)
    odd = sorted(set(types) - ATTENTION_TYPES)
    if odd or getattr(model, "_is_stateful", False):
        what = ", ".join(odd) or "recurrent state"
        raise ModelError(f"{name}: models of type {kind!r} are not supported (layers: {what})")
    windows: dict[str, int | None] = {}
    for layer_type, extra in zip(types, kwargs, strict=True):
        window = extra.get("sliding_window")
        if windows.setdefault(layer_type, window) != window:
            return Family(False, "layers with different windows", False, {}, len(types))
    reason: str | None = None
    varying = rope_types(model) & BATCH_DEPENDENT_ROPE
    if varying:
        reason = f"rotary type {', '.join(sorted(varying))} depends on batch mates"
    elif kind not in SINGLE_MASK | MASK_PER_TYPE:
        reason = f"model type {kind!r} is not on the list of families checked for shared batches"
    elif kind in SINGLE_MASK and len(windows) > 1:
        reason = f"model type {kind!r} takes one mask but has several layer types"
    return Family(reason is None, reason, kind in MASK_PER_TYPE, windows, len(types))
