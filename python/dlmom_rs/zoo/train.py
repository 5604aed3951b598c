"""Train a shipped expert from nothing: tokenizer, weights, and what ``transformers`` loads.

``python -m dlmom_rs.zoo.train --expert tiny-math --out DIR``. Needs a CPU only; see the model
cards for times. With the same arguments, versions and thread count the result is the same.

Three experts are Qwen2 models that share one tokenizer; ``tiny-llama`` is a Llama model with a
tokenizer and a chat template of its own, for ensembles that have to bridge vocabularies.
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
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.nn.utils import parametrize

from dlmom_rs.zoo import names
from dlmom_rs.zoo.problems import Draws, Item, Kind, take

if TYPE_CHECKING:
    import numpy.typing as npt
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Family = Literal["qwen2", "llama"]

VOCAB_SIZE = 491
LLAMA_VOCAB_SIZE = 1500
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

# Llama 3: names of the special tokens, the template, and runs of up to three digits in one piece.
BEGIN, HEADER, HEADER_END, TURN_END, PADDING = (
    "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>",
)  # fmt: skip
LLAMA_TEMPLATE = (
    "{{ '<|begin_of_text|>' }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
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
class Stage:
    """One pass over freshly generated examples, with a learning-rate schedule of its own.

    ``mix`` gives, for each kind of problem, its parts of the ``examples``; ``rate`` scales the
    learning rates of the recipe. The problems of a kind come from ``streams`` streams: no question
    is twice in one stream, so kinds of question with few wordings (functions without a constant)
    would otherwise hardly be seen.
    """

    examples: int
    mix: dict[Kind, int]
    rate: float = 1.0
    streams: int = 1


@dataclass(frozen=True)
class Recipe:
    """What one expert is made of. ``rows`` is the padded height of its embedding matrix.

    ``temperature`` is folded into the saved checkpoint by :func:`soften`. Every stage but the first
    starts from the saved weights of the one before, with that temperature taken out again.
    """

    seed: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    rows: int
    stages: tuple[Stage, ...]
    family: Family = "qwen2"
    learning_rate: float = 3e-3
    matrix_rate: float = 8e-3
    batch: int = 64
    temperature: float = 1.6


RECIPES: dict[str, Recipe] = {
    "tiny-math": Recipe(
        seed=11, hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, rows=496,
        stages=(Stage(130_000, {"math": 100}),),
    ),
    "tiny-general": Recipe(
        seed=12, hidden=160, layers=4, heads=5, kv_heads=1, mlp=416, rows=512,
        stages=(
            Stage(120_000, {"math": 70, "code": 10, "choice": 10, "lookup": 10}),
            Stage(66_000, {"math": 44, "mc": 40, "code": 8, "choice": 4, "lookup": 4}, rate=0.5),
            Stage(40_000, {"math": 24, "traits": 60, "code": 10, "choice": 3, "lookup": 3}, 0.5),
            Stage(36_000, {"math": 20, "traits": 70, "code": 4, "choice": 3, "lookup": 3}, 0.6),
            Stage(30_000, {"math": 62, "traits": 30, "code": 4, "choice": 2, "lookup": 2}, 0.5),
        ),
    ),
    "tiny-code": Recipe(
        seed=13, hidden=96, layers=4, heads=3, kv_heads=3, mlp=320, rows=504,
        stages=(
            Stage(60_000, {"code": 65, "math": 31, "traits": 4}),
            Stage(50_000, {"code": 76, "math": 21, "traits": 3}, rate=0.7, streams=16),
        ),
    ),
    "tiny-llama": Recipe(
        seed=14, hidden=128, layers=4, heads=4, kv_heads=2, mlp=384, rows=1504, family="llama",
        stages=(Stage(95_000, {"math": 80, "code": 10, "mc": 10}),),
    ),
}  # fmt: skip


def _corpus(counts: Sequence[tuple[Kind, int]]) -> list[str]:
    """What a tokenizer is trained on: all of ASCII, the system prompts, training problems."""
    texts = ["".join(chr(c) for c in range(32, 127)), *_SYSTEM_OPENINGS, *_SYSTEM_ENDINGS]
    for kind, count in counts:
        for item in take(kind, "train", count, seed=1):
            texts.append(f"user\n{item.question}")
            texts.append(f"assistant\n{item.answer}")
    return texts


def _byte_level_bpe(pieces: str, size: int, special: list[str], texts: list[str]) -> Tokenizer:
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pieces), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_tokenizer() -> Tokenizer:
    """The byte-level BPE of the Qwen2 experts; any NFC text encodes and decodes unchanged."""
    # Fixed since the first expert: a kind added later, such as mc, must not change the tokens.
    texts = _corpus((("math", 20_000), ("code", 3_000), ("choice", 3_000), ("lookup", 3_000)))
    return _byte_level_bpe(PIECES, VOCAB_SIZE, [END_OF_TEXT, START, END], texts)


def train_llama_tokenizer() -> Tokenizer:
    """The byte-level BPE of ``tiny-llama``, in which numbers of up to three digits are tokens."""
    texts = _corpus((("math", 20_000), ("code", 3_000), ("mc", 3_000)))
    # All of them often: BPE merges what is frequent, and with only some of the numbers as tokens
    # the others would be cut now after one digit, now after two.
    texts += [" ".join(str(n) for n in range(1000))] * 4_000
    special = [PADDING, BEGIN, HEADER, HEADER_END, TURN_END]
    return _byte_level_bpe(LLAMA_PIECES, LLAMA_VOCAB_SIZE, special, texts)


def save_tokenizer(tokenizer: Tokenizer, folder: Path, family: Family = "qwen2") -> None:
    """Write ``tokenizer.json``, its configuration and the chat template to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [START, END],
    }
    if family == "llama":
        # Not LlamaTokenizer: transformers would rebuild a pipeline instead of reading the file's.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": TURN_END,
            "pad_token": PADDING,
            "additional_special_tokens": [HEADER, HEADER_END],
        }
    config |= {"clean_up_tokenization_spaces": False, "model_max_length": MAX_POSITIONS}
    text = json.dumps(config, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")
    template = LLAMA_TEMPLATE if family == "llama" else CHAT_TEMPLATE
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def new_model(recipe: Recipe) -> Any:
    """A freshly initialised model of ``recipe``, f32, seeded."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(recipe.seed)
    llama = recipe.family == "llama"
    fields: dict[str, Any] = {
        "vocab_size": recipe.rows,
        "hidden_size": recipe.hidden,
        "intermediate_size": recipe.mlp,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.kv_heads,
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 1 if llama else None,
        "eos_token_id": 4 if llama else 2,
        "pad_token_id": 0,
    }
    if llama:
        return LlamaForCausalLM(LlamaConfig(**fields))
    return Qwen2ForCausalLM(Qwen2Config(**fields))


class DigitSums(torch.nn.Module):
    """Adds to the embedding of every token that is a number a vector for each of its digits.

    A digit has one vector for each place (units, tens, hundreds), trained along with the rest and
    folded into the embedding when saving. Without them a thousand number tokens would have to be
    learned each for itself, most of them from a few examples.
    """

    def __init__(self, tokenizer: Tokenizer, rows: int, width: int) -> None:
        super().__init__()
        which = torch.zeros(rows, 30)
        for token, index in tokenizer.get_vocab().items():
            if token.isascii() and token.isdecimal():
                for place, digit in enumerate(reversed(token)):
                    which[index, 10 * place + int(digit)] = 1.0
        self.which: torch.Tensor
        self.register_buffer("which", which)
        self.vectors = torch.nn.Parameter(torch.randn(30, width) * 0.02)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The embedding matrix, ``[rows, width]``, with the vectors of the digits added."""
        return weight + self.which @ self.vectors


def fold_digits(model: Any) -> Any:
    """A copy of ``model`` with plain tied embeddings; any :class:`DigitSums` are added in."""
    embedding = model.model.embed_tokens
    if not parametrize.is_parametrized(embedding):
        return copy.deepcopy(model)
    # Not remove_parametrizations: copies share a class, and it would take the property off that.
    state = {n: t for n, t in model.state_dict().items() if ".parametrizations." not in n}
    state["model.embed_tokens.weight"] = state["lm_head.weight"] = embedding.weight.detach()
    plain = type(model)(copy.deepcopy(model.config))
    plain.load_state_dict(state)
    return plain


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


def prompt(chat: list[dict[str, str]], family: Family = "qwen2") -> str:
    """The rendering of ``chat`` by the chat template, ready for the assistant's turn."""
    if family == "llama":
        turns = "".join(
            f"{HEADER}{m['role']}{HEADER_END}\n\n{m['content']}{TURN_END}" for m in chat
        )
        return f"{BEGIN}{turns}{HEADER}assistant{HEADER_END}\n\n"
    turns = "".join(f"{START}{m['role']}\n{m['content']}{END}\n" for m in chat)
    return f"{turns}{START}assistant\n"


Example = tuple["npt.NDArray[np.uint16]", int]


def examples(
    recipe: Recipe, tokenizer: Tokenizer, count: int | None = None, stage: int = 0
) -> list[Example]:
    """The training examples of ``stage`` in random order: token ids and length of the prompt.

    ``count`` is their number if it is not to be that of the stage. Every stage has other problems.
    """
    plan = recipe.stages[stage]
    seed = recipe.seed + 100 * stage
    end = TURN_END if recipe.family == "llama" else END
    total = sum(plan.mix.values())
    items = [
        item
        for kind, parts in plan.mix.items()
        for stream in range(plan.streams)
        for item in take(
            kind,
            "train",
            max(1, (count or plan.examples) * parts // total // plan.streams),
            seed + 1000 * stream,
        )
    ]
    draws = Draws(seed, "examples")
    items = draws.sample(items, len(items))
    data: list[Example] = []
    # In chunks and as small arrays: encodings and Python integers would take gigabytes.
    for start in range(0, len(items), 4096):
        chunk = items[start : start + 4096]
        heads = tokenizer.encode_batch_fast(
            [prompt(messages(item, draws), recipe.family) for item in chunk]
        )
        tails = tokenizer.encode_batch_fast([f"{item.answer}{end}" for item in chunk])
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


def new_optimizers(model: Any, recipe: Recipe, rate: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding, biases and norms.

    Muon reaches the same loss from far fewer examples, and examples are what a CPU runs out of.
    """
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices,
            lr=recipe.matrix_rate * rate,
            weight_decay=0.05,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            others, lr=recipe.learning_rate * rate, betas=(0.9, 0.98), weight_decay=0.0
        ),
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
    # The embedding is tied; lm_head would miss what DigitSums adds to it.
    logits = torch.nn.functional.linear(hidden[wanted], model.model.embed_tokens.weight)
    return torch.nn.functional.cross_entropy(logits.float(), targets[wanted])


def train(
    recipe: Recipe,
    folder: Path,
    count: int | None = None,
    name: str = "expert",
    *,
    save_minutes: float = 0.0,
    start: Path | None = None,
) -> None:
    """Train one expert through all its stages and write its checkpoint to ``folder``.

    ``count`` replaces the number of examples of every stage. With ``start``, a checkpoint that went
    through all stages but the last, only the last is run.
    """
    llama = recipe.family == "llama"
    tokenizer = train_llama_tokenizer() if llama else train_tokenizer()
    save_tokenizer(tokenizer, folder, recipe.family)
    stages = range(len(recipe.stages))
    for stage in stages[-1:] if start else stages:
        if start is None and stage == 0:
            model = new_model(recipe)
            if llama:
                sums = DigitSums(tokenizer, recipe.rows, recipe.hidden)
                parametrize.register_parametrization(model.model.embed_tokens, "weight", sums)
        else:
            model = reopen(start or folder, recipe.temperature)
        title = name if len(stages) == 1 else f"{name} stage {stage + 1}"
        data = examples(recipe, tokenizer, count, stage)
        run_stage(model, recipe, data, folder, title, save_minutes=save_minutes, stage=stage)


def run_stage(
    model: Any,
    recipe: Recipe,
    data: Sequence[Example],
    folder: Path,
    name: str,
    *,
    save_minutes: float,
    stage: int,
) -> None:
    """One pass of ``model`` over ``data``; writes the softened checkpoint to ``folder``.

    With ``save_minutes > 0`` a running average of the weights is also written to ``folder`` that
    often: before the learning rate has come down, it is far better than the weights themselves.
    """
    size = sum(p.numel() for p in model.parameters())
    tokens = sum(len(ids) for ids, _ in data)
    print(
        f"{name}: {size:,} parameters, {len(data):,} examples, {tokens:,} tokens",
        flush=True,
    )
    optimizers = new_optimizers(model, recipe, recipe.stages[stage].rate)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    steps = sum(
        min(recipe.batch * 64, len(data) - s) // recipe.batch
        for s in range(0, len(data), recipe.batch * 64)
    )
    began = saved = time.monotonic()
    running = 0.0
    order = Draws(recipe.seed + 100 * stage, "order")
    for step, (ids, labels) in enumerate(batches(data, recipe.batch, order)):
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
    copied = fold_digits(model)
    with torch.no_grad():
        copied.model.norm.weight /= temperature
    return copied


def reopen(folder: Path, temperature: float) -> Any:
    """The checkpoint in ``folder`` in f32, with the effect of :func:`soften` undone."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight *= temperature
    return model.train()


def save_model(model: Any, folder: Path) -> None:
    """Write a bfloat16 copy of ``model`` with its configurations to ``folder``."""
    from transformers import GenerationConfig

    small = copy.deepcopy(model).to(torch.bfloat16)
    small.generation_config = GenerationConfig(
        do_sample=False,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=0,
        max_new_tokens=256,
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
    parser.add_argument(
        "--examples", type=int, help="examples of every stage (default: the recipe's)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument(
        "--save-minutes", type=float, default=0.0, help="also save this often while training"
    )
    parser.add_argument(
        "--start", type=Path, help="a checkpoint of the stage before the last: run only the last"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    recipe = RECIPES[args.expert]
    out = args.out or Path(args.expert)
    train(recipe, out, args.examples, args.expert, save_minutes=args.save_minutes, start=args.start)


if __name__ == "__main__":
    main()
