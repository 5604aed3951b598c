"""Measure a shipped expert by plain greedy decoding with ``transformers``.

``python -m dlmom_rs.zoo.evaluate --expert tiny-math --dtype bf16`` prints, for the shipped benches
``tinygsm``, ``tinycode`` and ``tinymc`` and for held-out items of the other kinds, the accuracy
with its Wilson 95 % interval. Nothing of the ensemble code takes part, so the numbers are an
independent base line for it.

For ``tinycode`` the generated functions really run, in a child process with limits of time, memory
and CPU. That keeps an accident of a tiny model harmless; it is no sandbox against malice.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dlmom_rs.zoo import names, path
from dlmom_rs.zoo.problems import (
    Item,
    Kind,
    final_answer,
    take,
    tinycode_items,
    tinycode_row,
    tinygsm_items,
    tinymc_items,
)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HELD_OUT_SEED = 77
HELD_OUT_ITEMS = 300
BENCHES = ("tinygsm", "tinycode", "tinymc")
SETS = (*BENCHES, "code", "choice", "lookup", "mc")

# Reads programs from standard input as a JSON list and writes one line, 0 or 1, for each.
_CHILD = """
import json, signal, sys
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
except (ImportError, ValueError, OSError):
    pass
def stop(*_):
    raise TimeoutError
alarm = getattr(signal, "SIGALRM", None)
if alarm is not None:
    signal.signal(alarm, stop)
report = sys.stdout
for program, seconds in json.load(sys.stdin):
    sys.stdout = None
    try:
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        exec(program, {"__name__": "tinycode"})
        passed = 1
    except BaseException:
        passed = 0
    finally:
        if alarm is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
    report.write(f"{passed}\\n")
    report.flush()
"""


def wilson(right: int, total: int) -> tuple[float, float]:
    """The Wilson 95 % interval of a proportion. ValueError unless ``0 <= right <= total > 0``."""
    if not 0 <= right <= total or total == 0:
        raise ValueError(f"not a proportion: {right} of {total}")
    z = 1.959963984540054
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def correct(item: Item, text: str) -> bool:
    """Whether the generated ``text`` answers ``item``.

    Code counts if it parses to the same syntax tree as the reference; nothing is run here.
    """
    if item.kind != "code":
        return final_answer(text) == item.gold
    try:
        return ast.dump(ast.parse(item.question + text)) == ast.dump(
            ast.parse(item.question + item.answer)
        )
    except (SyntaxError, ValueError):
        return False


def passes(
    rows: Sequence[dict[str, str]], texts: Sequence[str], seconds: float = 2.0
) -> list[bool]:
    """Whether each generated body passes the ``test`` of its row (HumanEval's schema).

    All run in one child process, each for at most ``seconds``. Where the child dies or hangs in
    code that no alarm interrupts, that program has failed and a new child takes the rest.
    """
    programs = [
        [f"{row['prompt']}{text}\n\n{row['test']}\ncheck({row['entry_point']})\n", seconds]
        for row, text in zip(rows, texts, strict=True)
    ]
    marks: list[bool] = []
    while len(marks) < len(programs):
        left = programs[len(marks) :]
        with tempfile.TemporaryDirectory() as empty:
            try:
                done = subprocess.run(
                    [sys.executable, "-I", "-c", _CHILD],
                    input=json.dumps(left).encode(),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    timeout=10 + seconds * len(left) / 4,
                    cwd=empty,
                    check=False,
                ).stdout
            except subprocess.TimeoutExpired as error:
                done = error.stdout or b""
        found = [line == b"1" for line in done.splitlines()[: len(left)]]
        marks += found if len(found) == len(left) else [*found, False]
    return marks


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model, in evaluation mode and ``dtype``, and its tokenizer, padding on the left."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval(), tokenizer


def generate(
    model: Any,
    tokenizer: Any,
    questions: Sequence[str],
    *,
    batch: int = 100,
    max_new_tokens: int = 224,
    system: str | None = None,
) -> list[str]:
    """Greedy answers to ``questions``, in their order; each is the text before the end token.

    ``system`` is put before every question as a system message.
    """
    texts = [""] * len(questions)
    opening = [{"role": "system", "content": system}] if system else []
    prompts = [
        tokenizer.apply_chat_template(
            [*opening, {"role": "user", "content": q}], tokenize=False, add_generation_prompt=True
        )
        for q in questions
    ]
    # Long questions have long answers: batches of similar items waste little.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        encoded = tokenizer(
            [prompts[i] for i in rows],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
            return_token_type_ids=False,
        )
        with torch.inference_mode():
            out = model.generate(**encoded, do_sample=False, max_new_tokens=max_new_tokens)
        tails = out[:, encoded["input_ids"].shape[1] :]
        answers = tokenizer.batch_decode(tails, skip_special_tokens=True)
        for i, answer in zip(rows, answers, strict=True):
            texts[i] = answer
    return texts


def held_out(kind: Kind, count: int = HELD_OUT_ITEMS) -> list[Item]:
    """The first ``count`` test items of ``kind``; for ``math`` and ``traits`` of its bench."""
    if kind == "math":
        return tinygsm_items()[:count]
    if kind == "traits":
        return tinymc_items()[:count]
    return take(kind, "test", count, HELD_OUT_SEED)


def items_of(name: str) -> list[Item]:
    """All items of one of ``SETS``. KeyError for another name."""
    benches = {"tinygsm": tinygsm_items, "tinycode": tinycode_items, "tinymc": tinymc_items}
    kinds: dict[str, Kind] = {"code": "code", "choice": "choice", "lookup": "lookup", "mc": "mc"}
    return benches[name]() if name in benches else held_out(kinds[name])


def measure(
    model: Any,
    tokenizer: Any,
    name: str,
    limit: int | None = None,
    system: str | None = None,
) -> list[tuple[Item, bool]]:
    """The items of the set ``name``, at most ``limit``, and whether the model gets them right.

    ``tinycode`` is right if it passes its asserts; ``code`` if it parses to the reference's syntax
    tree; the rest if the final answer is the reference's.
    """
    items = items_of(name)[:limit]
    texts = generate(model, tokenizer, [item.question for item in items], system=system)
    if name == "tinycode":
        marks = passes([tinycode_row(i, item) for i, item in enumerate(items)], texts)
    else:
        marks = [correct(item, text) for item, text in zip(items, texts, strict=True)]
    return list(zip(items, marks, strict=True))


def report(
    folder: Path,
    dtype: str,
    limit: int | None = None,
    system: str | None = None,
    sets: Sequence[str] = SETS,
) -> dict[str, tuple[int, int]]:
    """Print and return ``{set: (right, total)}`` for the checkpoint in ``folder``.

    ``sets`` are from ``SETS``; with ``tinygsm`` come its parts ``tinygsm/<steps>``. ``limit`` cuts
    every set short.
    """
    model, tokenizer = load(folder, DTYPES[dtype])
    counts: dict[str, tuple[int, int]] = {}
    for name in sets:
        marked = measure(model, tokenizer, name, limit, system)
        counts[name] = (sum(mark for _, mark in marked), len(marked))
        if name == "tinygsm":
            for steps in sorted({item.steps for item, _ in marked}):
                those = [mark for item, mark in marked if item.steps == steps]
                counts[f"tinygsm/{steps}"] = (sum(those), len(those))
    for title, (right, total) in counts.items():
        low, high = wilson(right, total)
        print(
            f"{title:12} {right:4d}/{total:<4d} {100 * right / total:5.1f} % "
            f"[{100 * low:.1f}, {100 * high:.1f}]",
            flush=True,
        )
    return counts


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of the evaluation."""
    parser = argparse.ArgumentParser(prog="python -m dlmom_rs.zoo.evaluate", description=__doc__)
    parser.add_argument("--expert", choices=names(), action="append", help="default: all")
    parser.add_argument("--folder", type=Path, help="a checkpoint elsewhere, instead of --expert")
    parser.add_argument("--set", choices=SETS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bf16")
    parser.add_argument("--limit", type=int, help="items of each set")
    parser.add_argument("--system", help="a system message before every question")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    folders = [args.folder] if args.folder else [path(n) for n in args.expert or names()]
    for folder in folders:
        print(f"{folder.name} ({args.dtype}, greedy)", flush=True)
        report(folder, args.dtype, args.limit, args.system, args.set or SETS)


if __name__ == "__main__":
    main()
