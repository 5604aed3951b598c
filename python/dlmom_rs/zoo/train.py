"""Train a shipped expert from nothing: tokenizer, weights, and what ``transformers`` loads.

``python -m dlmom_rs.zoo.train --expert tiny-math --out DIR``. Needs a CPU only; see the model
cards for times. With the same arguments, versions and thread count the result is the same.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dlmom_rs.zoo import names
from dlmom_rs.zoo.problems import Draws, Item, Kind, take

if TYPE_CHECKING:
    import numpy.typing as npt
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

VOCAB_SIZE = 491
MAX_POSITIONS = 1024
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen2's own way of cutting text, every digit apart. Another would be cheaper here, but
# transformers builds this one for every Qwen2 checkpoint, whatever its tokenizer.json says.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_SYSTEM_OPENINGS = (
    "You are a helpful assistant.", "You are a careful expert.", "You are a specialist.",
    "You are a generalist.", "You solve problems step by step.", "You are a critic.",
    "You plan the solution.", "You check the answer.", "Answer the question.",
    "You are good at mathematics.", "You write code.", "You know many things.",
)  # fmt: skip
_SYSTEM_ENDINGS = (
    "Think step by step.", "Be brief.", "Put the answer after ####.", "Give the final answer.",
    "Work with the other experts.", "Read the question with care.", "Verify every step.",
    "Do not guess.", "Explain your reasoning.", "Finish the task.",
)  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What one expert is made of. ``rows`` is the padded height of its embedding matrix.

    ``mix`` gives, for each kind of problem, its parts of the training examples. ``temperature``
    is folded into the saved checkpoint by :func:`soften`.
    """

    seed: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    rows: int
    examples: int
    mix: dict[Kind, int]
    learning_rate: float = 3e-3
    matrix_rate: float = 8e-3
    batch: int = 64
    temperature: float = 1.6


RECIPES: dict[str, Recipe] = {
    "tiny-math": Recipe(
        seed=11, hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, rows=496,
        examples=130_000, mix={"math": 100},
    ),
    "tiny-general": Recipe(
        seed=12, hidden=160, layers=4, heads=5, kv_heads=1, mlp=416, rows=512,
        examples=120_000, mix={"math": 70, "code": 10, "choice": 10, "lookup": 10},
    ),
}  # fmt: skip


def train_tokenizer() -> Tokenizer:
    """The byte-level BPE that all experts share; any NFC text encodes and decodes unchanged."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    texts = ["".join(chr(c) for c in range(32, 127)), *_SYSTEM_OPENINGS, *_SYSTEM_ENDINGS]
    counts: tuple[tuple[Kind, int], ...] = (
        ("math", 20_000), ("code", 3_000), ("choice", 3_000), ("lookup", 3_000),
    )  # fmt: skip
    for kind, count in counts:
        for item in take(kind, "train", count, seed=1):
            texts.append(f"user\n{item.question}")
            texts.append(f"assistant\n{item.answer}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT, START, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``tokenizer.json``, its configuration and the chat template to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [START, END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": MAX_POSITIONS,
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def new_model(recipe: Recipe) -> Qwen2ForCausalLM:
    """A freshly initialised model of ``recipe``, f32, seeded."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    config = Qwen2Config(
        vocab_size=recipe.rows,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.mlp,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.kv_heads,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        initializer_range=0.02,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config)


def messages(item: Item, draws: Draws) -> list[dict[str, str]]:
    """The chat of one training example. One in five has a system message.

    Ensembles give every agent a role prompt; an expert that never saw a system turn would be lost.
    """
    chat = [{"role": "user", "content": item.question}]
    if draws.chance(1, 5):
        role = draws.pick(_SYSTEM_OPENINGS)
        if draws.chance(1, 2):
            role = f"{role} {draws.pick(_SYSTEM_ENDINGS)}"
        chat.insert(0, {"role": "system", "content": role})
    return chat


def prompt(chat: list[dict[str, str]]) -> str:
    """The rendering of ``chat`` by the chat template, ready for the assistant's turn."""
    turns = "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in chat)
    return f"{turns}{START}assistant\n"


Example = tuple["npt.NDArray[np.uint16]", int]


def examples(recipe: Recipe, tokenizer: Tokenizer, count: int) -> list[Example]:
    """``count`` training examples in random order: token ids and the length of their prompt."""
    total = sum(recipe.mix.values())
    items = [
        item
        for kind, parts in recipe.mix.items()
        for item in take(kind, "train", count * parts // total, recipe.seed)
    ]
    draws = Draws(recipe.seed, "examples")
    items = draws.sample(items, len(items))
    data: list[Example] = []
    # In chunks and as small arrays: encodings and Python integers would take gigabytes.
    for start in range(0, len(items), 4096):
        chunk = items[start : start + 4096]
        heads = tokenizer.encode_batch_fast([prompt(messages(item, draws)) for item in chunk])
        tails = tokenizer.encode_batch_fast([f"{item.answer}{END}" for item in chunk])
        for h, t in zip(heads, tails, strict=True):
            data.append((np.array(h.ids + t.ids, dtype=np.uint16), len(h.ids)))
    return data


def batches(
    data: Sequence[Example], size: int, draws: Draws
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield ``(ids, labels)``, int64 ``[size, longest]``; labels are -100 on prompt and padding.

    Examples are sorted by length inside pools of 64 batches, which leaves almost no padding, and
    the batches of a pool come in random order.
    """
    for start in range(0, len(data), size * 64):
        pool = sorted(data[start : start + size * 64], key=lambda e: len(e[0]))
        starts = list(range(0, len(pool) - size + 1, size))
        for at in draws.sample(starts, len(starts)):
            rows = pool[at : at + size]
            longest = max(len(ids) for ids, _ in rows)
            ids = torch.zeros(size, longest, dtype=torch.long)
            labels = torch.full((size, longest), -100, dtype=torch.long)
            for i, (row, head) in enumerate(rows):
                ids[i, : len(row)] = torch.from_numpy(row.astype(np.int64))
                labels[i, head : len(row)] = ids[i, head : len(row)]
            yield ids, labels


def rate_share(step: int, steps: int) -> float:
    """The share of the peak learning rate at ``step``.

    Linear warm-up over the first 2 % (at most 200 steps), then a cosine down to 1 %.
    """
    warm = max(1, min(200, steps // 50))
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))


def new_optimizers(model: Qwen2ForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding, biases and norms.

    Muon reaches the same loss from far fewer examples, and examples are what a CPU runs out of.
    """
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=recipe.matrix_rate,
            weight_decay=0.05,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    return optimizers


def loss_of(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats over the labelled positions."""
    # Right padding under a causal mask cannot reach a real position, so no mask is needed.
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != -100
    logits = model.lm_head(hidden[wanted])
    return torch.nn.functional.cross_entropy(logits.float(), targets[wanted])


def train(
    recipe: Recipe, folder: Path, count: int, name: str = "expert", save_minutes: float = 0.0
) -> None:
    """Train one expert on ``count`` examples and write its checkpoint to ``folder``.

    With ``save_minutes > 0`` a running average of the weights is also written to ``folder`` that
    often: before the learning rate has come down, it is far better than the weights themselves.
    """
    began = time.monotonic()
    tokenizer = train_tokenizer()
    save_tokenizer(tokenizer, folder)
    data = examples(recipe, tokenizer, count)
    model: Any = new_model(recipe)
    size = sum(p.numel() for p in model.parameters())
    tokens = sum(len(ids) for ids, _ in data)
    print(
        f"{name}: {size:,} parameters, {len(data):,} examples, {tokens:,} tokens "
        f"({time.monotonic() - began:.0f} s to prepare)",
        flush=True,
    )
    optimizers = new_optimizers(model, recipe)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    steps = sum(
        min(recipe.batch * 64, len(data) - s) // recipe.batch
        for s in range(0, len(data), recipe.batch * 64)
    )
    began = saved = time.monotonic()
    running = 0.0
    for step, (ids, labels) in enumerate(batches(data, recipe.batch, Draws(recipe.seed, "order"))):
        share = rate_share(step, steps)
        loss = loss_of(model, ids, labels)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * share
            optimizer.step()
        average.update_parameters(model)
        running += float(loss.detach())
        if (step + 1) % 50 == 0 or step + 1 == steps:
            spent = time.monotonic() - began
            print(
                f"{name}: step {step + 1}/{steps} loss {running / (step % 50 + 1):.4f} "
                f"rate {share:.3f} {spent:.0f} s of about {spent * steps / (step + 1):.0f} s",
                flush=True,
            )
            running = 0.0
        if save_minutes and time.monotonic() - saved > 60 * save_minutes:
            save_model(soften(average.module, recipe.temperature), folder)
            saved = time.monotonic()
    save_model(soften(model, recipe.temperature), folder)
    print(f"{name}: wrote {folder} after {time.monotonic() - began:.0f} s", flush=True)


def soften(model: Any, temperature: float) -> Any:
    """A copy of ``model`` whose logits are divided by ``temperature``, through the final norm.

    Generated solutions have one wording, so a trained expert is certain at nearly every step and a
    mode controller has nothing to act on. The most probable token stays the same up to rounding.
    """
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.model.norm.weight /= temperature
    return copied


def save_model(model: Any, folder: Path) -> None:
    """Write a bfloat16 copy of ``model`` with its configurations to ``folder``."""
    from transformers import GenerationConfig

    small = copy.deepcopy(model).to(torch.bfloat16)
    small.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=2, pad_token_id=0, max_new_tokens=256
    )
    small.save_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``, set to pad on the left."""
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "left"
    return tokenizer


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the trainer."""
    parser = argparse.ArgumentParser(prog="python -m dlmom_rs.zoo.train", description=__doc__)
    parser.add_argument("--expert", choices=names(), required=True)
    parser.add_argument("--out", type=Path, help="folder of the checkpoint (default: ./EXPERT)")
    parser.add_argument("--examples", type=int, help="training examples (default: the recipe's)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--save-minutes", type=float, default=0.0, help="also save this often while training"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.expert]
    count = args.examples or recipe.examples
    train(recipe, args.out or Path(args.expert), count, args.expert, args.save_minutes)


if __name__ == "__main__":
    main()
