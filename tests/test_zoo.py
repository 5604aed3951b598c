"""The shipped tiny experts: their problems, their tokenizer, their weights and what they can do."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmom_rs import zoo
from dlmom_rs.zoo import problems
from dlmom_rs.zoo.problems import KINDS, Draws, Item, Kind

MODELS = [zoo.path(name) for name in zoo.names()]
LLAMA = zoo.path("tiny-llama")
SHARING = [m for m in MODELS if m != LLAMA]
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def exact(a: int, op: str, b: int) -> int:
    """``a op b`` in integers; AssertionError unless a division comes out even."""
    if op == "/":
        quotient, rest = divmod(a, b)
        assert rest == 0
        return quotient
    return {"+": a + b, "-": a - b, "*": a * b}[op]


def test_the_zoo_has_four_experts_sorted_by_name() -> None:
    assert zoo.names() == ["tiny-code", "tiny-general", "tiny-llama", "tiny-math"]
    assert all((folder / "model.safetensors").is_file() for folder in MODELS)


def test_unknown_names_get_a_suggestion() -> None:
    with pytest.raises(ValueError, match="did you mean 'tiny-math'"):
        zoo.path("tiny_maths")
    with pytest.raises(ValueError, match="no expert named 'qqq'"):
        zoo.path("qqq")


def test_importing_the_zoo_loads_neither_torch_nor_transformers() -> None:
    import subprocess
    import sys

    code = (
        "import sys, dlmom_rs.zoo, dlmom_rs.zoo.problems; "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_draws_are_the_documented_stream() -> None:
    # Pinned: a change here would silently change every generated problem and the shipped test set.
    d = Draws(7, "math", "test")
    assert [d.below(1000) for _ in range(6)] == [63, 979, 263, 223, 119, 804]
    assert sorted(Draws(1).sample(range(10), 10)) == list(range(10))
    with pytest.raises(ValueError, match="n >= 1"):
        d.below(0)


@settings(deadline=None)
@given(seed=st.integers(0, 2**63), low=st.integers(-50, 50), width=st.integers(0, 50))
def test_draws_stay_in_range(seed: int, low: int, width: int) -> None:
    assert low <= Draws(seed).between(low, low + width) <= low + width


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), split=st.sampled_from(["train", "test"]))
def test_every_equation_is_true_and_the_last_is_the_answer(
    seed: int, split: problems.Split
) -> None:
    for item in problems.take("math", split, 10, seed):
        *lines, final = item.answer.split("\n")
        results = []
        for line in lines:
            found = EQUATION.findall(line)
            assert len(found) == 1, line
            a, op, b, c = found[0]
            assert exact(int(a), op, int(b)) == int(c)
            results.append(c)
        assert 1 <= item.steps == len(lines) <= problems.MAX_STEPS
        assert final == f"#### {results[-1]}" == f"#### {item.gold}"
        assert problems.final_answer(item.answer) == item.gold
        assert "{" not in item.question + item.answer


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_a_step_uses_numbers_that_are_known_by_then(seed: int) -> None:
    for item in problems.take("math", "train", 12, seed):
        # Constants of the language: half and twice, percentages, minutes of an hour, counted lists.
        known = {*map(int, re.findall(r"\d+", item.question)), 2, 3, 4, 5, 10, 60}
        for a, _, b, c in EQUATION.findall(item.answer):
            assert {int(a), int(b)} <= known, item
            known.add(int(c))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(KINDS))
def test_the_stream_is_deterministic_and_without_repeats(seed: int, kind: Kind) -> None:
    items = problems.take(kind, "train", 40, seed)
    assert items == problems.take(kind, "train", 40, seed)
    assert len({item.question for item in items}) == len(items)
    assert all(item.kind == kind for item in items)


@settings(max_examples=15, deadline=None)
@given(seeds=st.tuples(st.integers(0, 2**32), st.integers(0, 2**32)), kind=st.sampled_from(KINDS))
def test_train_and_test_never_share_a_key_or_a_question(seeds: tuple[int, int], kind: Kind) -> None:
    train = problems.take(kind, "train", 150, seeds[0])
    test = problems.take(kind, "test", 40, seeds[1])
    assert all(problems.split_of(item) == "train" for item in train)
    assert all(problems.split_of(item) == "test" for item in test)
    assert not {i.key for i in train} & {i.key for i in test}
    assert not {i.question for i in train} & {i.question for i in test}


def test_tinygsm_is_disjoint_from_a_large_sample_of_training_problems() -> None:
    test = problems.tinygsm_items()
    train = problems.take("math", "train", 8_000, seed=11)
    assert not {i.key for i in train} & {i.key for i in test}
    assert not {i.question for i in train} & {i.question for i in test}


def test_the_key_of_a_word_problem_is_its_chain_of_equations() -> None:
    for item in problems.take("math", "test", 50, seed=3):
        assert item.key == "; ".join(match[0] for match in EQUATION.finditer(item.answer))


def test_asking_for_more_questions_than_there_are_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only = problems.take("code", "test", 1, seed=0)
    monkeypatch.setitem(problems._MAKERS, "code", lambda _: only[0])
    assert problems.take("code", "test", 1, seed=0) == only
    with pytest.raises(ValueError, match="only 1 different test questions of kind 'code', not 2"):
        problems.take("code", "test", 2, seed=0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_code_items_are_valid_python(seed: int) -> None:
    import ast

    for item in problems.take("code", "train", 20, seed):
        function = ast.parse(item.question + item.answer).body[0]
        assert isinstance(function, ast.FunctionDef)
        assert ast.get_docstring(function)
        assert isinstance(function.body[-1], ast.Return)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_choices_have_four_options_and_name_the_right_one(seed: int) -> None:
    for item in problems.take("choice", "train", 20, seed):
        options = re.findall(r"^\(?([A-D])[.)] (.+)$", item.question, flags=re.MULTILINE)
        assert [letter for letter, _ in options] == ["A", "B", "C", "D"]
        assert len({text for _, text in options}) == 4
        right = dict(options)[item.gold]
        assert right in item.answer.split("\n")[0]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_look_ups_can_be_read_off(seed: int) -> None:
    for item in problems.take("lookup", "train", 20, seed):
        assert re.search(rf"\b{re.escape(item.gold)}\b", item.question)


def options_of(question: str) -> list[str]:
    """The four options of a question laid out as in ARC, without their letters."""
    stem, *lines = question.split("\n")
    assert stem[-1] in "?."
    assert [line[:3] for line in lines] == ["A. ", "B. ", "C. ", "D. "]
    options = [line[3:] for line in lines]
    assert len(set(options)) == 4
    return options


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mc_answers_list_the_options_and_then_recall_the_fact(seed: int) -> None:
    for item in problems.take("mc", "train", 20, seed):
        assert "{" not in item.question + item.answer
        options = options_of(item.question)
        *told, say, final = item.answer.split("\n")
        assert final == f"#### {item.gold}"
        assert [line[-2:] for line in told] == [" A", " B", " C", " D"]
        assert all(line.startswith(o) for o, line in zip(options, told, strict=True))
        # The last word of the fact stands at the end of one line above, with the same letter.
        last = say.split(" ")[-2]
        assert (
            [line[-1] for line in told if line.split(" ")[-2] == last] == [item.gold] == [say[-1]]
        )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_exactly_one_option_has_the_trait(seed: int) -> None:
    for item in problems.take("traits", "train", 20, seed):
        assert "{" not in item.question + item.answer
        options = options_of(item.question)
        *told, say, final = item.answer.split("\n")
        assert final == f"#### {item.gold}"
        found = [re.fullmatch(r"([A-D])\. (\w+), (\w+) ([A-D])", line) for line in told]
        lines = [match.groups() for match in found if match]
        assert [(a, b, d) for a, b, _, d in lines] == [
            (letter, option, letter) for letter, option in zip("ABCD", options, strict=True)
        ]
        asked = re.fullmatch(r"So (\w+) ([A-D])", say)
        assert asked is not None
        assert [a for a, _, trait, _ in lines if trait == asked[1]] == [item.gold] == [asked[2]]


def test_what_is_told_of_numbers_is_true() -> None:
    checked = 0
    for item in problems.take("traits", "train", 3_000, seed=6):
        stem = item.question.split("\n")[0]
        constants = [int(n) for n in re.findall(r"\d+", stem)]
        for line in item.answer.split("\n"):
            found = re.fullmatch(r"[A-D]\. (\d+), (even|odd|greater|less|fits|not) [A-D]", line)
            if found is None:
                continue
            value, told = int(found[1]), found[2]
            checked += 1
            if told in ("even", "odd"):
                assert told == ("even", "odd")[value % 2]
            elif told in ("greater", "less"):
                assert value != constants[0]
                assert (told == "greater") == (value > constants[0])
            else:
                assert (told == "fits") == (value % constants[0] == 0)
    assert checked > 1_500


def test_a_word_has_one_trait_of_its_family() -> None:
    for family in problems._TRAITS:
        words = [word for group in family.words.values() for word in group]
        assert len(words) == len(set(words))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    problems.main(["--write", "--out", str(folder)])
    return folder


BENCH_FILES = [problems.TINYGSM_PATH, problems.TINYCODE_PATH, problems.TINYMC_PATH]


@pytest.mark.parametrize("shipped", BENCH_FILES, ids=lambda p: p.stem)
def test_the_benches_are_what_their_command_writes(written: Path, shipped: Path) -> None:
    assert (written / shipped.name).read_bytes() == shipped.read_bytes()


def rows_of(path: Path) -> list[dict]:  # type: ignore[type-arg]
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_tinygsm_has_the_schema_of_gsm8k() -> None:
    rows = rows_of(problems.TINYGSM_PATH)
    assert len(rows) == 500
    assert all(list(row) == ["question", "answer"] for row in rows)
    assert all(re.search(r"\n#### \d+$", row["answer"]) for row in rows)
    assert len({row["question"] for row in rows}) == 500


def test_tinycode_has_the_schema_of_humaneval() -> None:
    rows = rows_of(problems.TINYCODE_PATH)
    assert len({row["prompt"] for row in rows}) == len(rows) == 200
    for i, row in enumerate(rows):
        assert list(row) == ["task_id", "prompt", "canonical_solution", "test", "entry_point"]
        assert row["task_id"] == f"tinycode/{i}"
        assert row["prompt"].startswith(f"def {row['entry_point']}(")
        assert re.fullmatch(r"    return .+\n", row["canonical_solution"])
        assert row["test"].startswith("def check(candidate):\n")
        assert row["test"].count("\n    assert candidate(") >= 5


def test_tinymc_has_the_schema_of_arc_and_its_prompt_is_the_question() -> None:
    rows = rows_of(problems.TINYMC_PATH)
    assert len(rows) == 300
    for i, (row, item) in enumerate(zip(rows, problems.tinymc_items(), strict=True)):
        assert list(row) == ["id", "question", "choices", "answerKey"]
        assert row["id"] == f"tinymc-{i}"
        assert row["choices"]["label"] == ["A", "B", "C", "D"]
        assert row["answerKey"] == item.gold
        options = [f"{a}. {b}" for a, b in zip("ABCD", row["choices"]["text"], strict=True)]
        assert "\n".join([row["question"], *options]) == item.question
    # No letter is a good guess for all.
    letters = [row["answerKey"] for row in rows]
    assert max(letters.count(letter) for letter in "ABCD") <= 100


@pytest.mark.parametrize(
    ("kind", "items"), [("code", problems.tinycode_items), ("traits", problems.tinymc_items)]
)
def test_the_benches_are_disjoint_from_training_problems(
    kind: Kind, items: Callable[[], list[Item]]
) -> None:
    # What the experts were trained on: the streams of their recipes' seeds, a large part of them.
    test = items()
    for seed in (12, 13, 14, 112, 212):
        train = problems.take(kind, "train", 3_000, seed)
        assert not {i.key for i in train} & {i.key for i in test}
        assert not {i.question for i in train} & {i.question for i in test}


def mutants(body: str) -> set[str]:
    """Wrong versions of the body of a function: other constants, other operators, other calls."""
    found = set()
    for match in re.finditer(r"\d+", body):
        other = {
            int(match[0]) + 1,
            max(0, int(match[0]) - 1),
            int(match[0][0]),
            int(match[0][::-1]),
        }
        for number in other - {int(match[0])}:
            found.add(f"{body[: match.start()]}{number}{body[match.end() :]}")
    swaps = (
        (" + ", " - "), (" - ", " + "), (" * ", " + "), (" // ", " / "), (" % ", " // "),
        (" > ", " >= "), (" < ", " <= "), ("==", "!="), ("max", "min"), ("min", "max"),
        ("upper", "lower"), ("lower", "upper"), ("starts", "ends"), ("ends", "starts"),
        (" and ", " or "), (" or ", " and "), ("sum", "max"), ("len", "max"), ("[0]", "[-1]"),
        ("[-1]", "[0]"), ("[::-1]", "[1:]"), ("[:", "[-"), ("sorted", "list"), ("abs", ""),
        (" in ", " not in "), (" ** ", " * "), ("x * x", "x + x"), ("'a'", "'e'"),
    )  # fmt: skip
    return found | {body.replace(old, new) for old, new in swaps if old in body}


def test_the_reference_passes_its_asserts_and_no_mutant_does() -> None:
    pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import passes

    rows = rows_of(problems.TINYCODE_PATH)
    assert all(passes(rows, [row["canonical_solution"] for row in rows]))
    wrong = [(row, text) for row in rows for text in sorted(mutants(row["canonical_solution"]))]
    marks = passes([row for row, _ in wrong], [text for _, text in wrong])
    assert len(marks) > 500
    assert [text for (_, text), mark in zip(wrong, marks, strict=True) if mark] == []


def test_runaway_programs_fail_and_leave_the_others_their_turn() -> None:
    pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import passes

    rows = rows_of(problems.TINYCODE_PATH)[:6]
    texts = ["    while True: pass", "    import os; os._exit(0)", "    raise SystemExit(0)",
             "    return (", "    print('1')", rows[5]["canonical_solution"]]  # fmt: skip
    assert passes(rows, texts, seconds=0.5) == [False] * 5 + [True]


def test_the_qwen_experts_share_one_tokenizer_bytes_and_all() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({hashlib.sha256((m / name).read_bytes()).hexdigest() for m in SHARING}) == 1
        assert (LLAMA / name).read_bytes() != (SHARING[0] / name).read_bytes()


@pytest.mark.parametrize("expert", ["tiny-math", "tiny-llama"])
def test_the_tokenizers_are_what_the_trainer_makes(tmp_path: Path, expert: str) -> None:
    # A new kind of problem, or a change to an old one, must not move a single token.
    pytest.importorskip("torch")
    from dlmom_rs.zoo import train

    made = train.train_llama_tokenizer() if expert == "tiny-llama" else train.train_tokenizer()
    train.save_tokenizer(made, tmp_path, train.RECIPES[expert].family)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (zoo.path(expert) / name).read_bytes()


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(zoo.path("tiny-math"))


@pytest.fixture(scope="module")
def llama_tokenizer():  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(LLAMA)


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_transformers_cuts_text_as_the_shipped_file_says(folder: Path) -> None:
    # transformers rebuilds the pipeline of a Qwen2 or Llama tokenizer instead of reading it, so a
    # file with one of its own would silently be cut differently by every other reader.
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    for kind in KINDS:
        for item in problems.take(kind, "test", 30, seed=4):
            chat = [
                {"role": "user", "content": item.question},
                {"role": "assistant", "content": item.answer},
            ]
            text = auto.apply_chat_template(chat, tokenize=False)
            assert auto.encode(text, add_special_tokens=False) == plain.encode(text).ids


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_llama_tokenizer(llama_tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    text = llama_tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    ids = llama_tokenizer.encode(text, add_special_tokens=False)
    assert llama_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < 1500 for i in ids)


@settings(deadline=None)
@given(number=st.integers(0, 999), before=st.sampled_from(["", " ", "$", "x", "\n#### "]))
def test_a_number_of_up_to_three_digits_is_one_llama_token(
    llama_tokenizer,  # type: ignore[no-untyped-def]
    number: int,
    before: str,
) -> None:
    tokens = llama_tokenizer.tokenize(f"{before}{number}")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [str(number)]
    twice = llama_tokenizer.tokenize(f"{before}{number:03}{number:03}")
    digits = [t for t in twice if any(c.isdigit() for c in t)]
    assert "".join(digits) == f"{number:03}" * 2


def test_the_llama_tokenizer_has_1500_tokens_and_its_roles(llama_tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert len(llama_tokenizer) == 1500
    roles = ["<|pad|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"]  # fmt: skip
    assert llama_tokenizer.convert_tokens_to_ids(roles) == [0, 1, 2, 3, 4]
    assert llama_tokenizer.eos_token == "<|eot_id|>"
    assert llama_tokenizer.bos_token == "<|begin_of_text|>"
    assert llama_tokenizer.pad_token == "<|pad|>"
    ids = [2, 900, 4]
    assert llama_tokenizer.decode(ids, skip_special_tokens=True) == llama_tokenizer.decode([900])


def test_the_llama_chat_template_is_that_of_llama_3(llama_tokenizer) -> None:  # type: ignore[no-untyped-def]
    pytest.importorskip("torch")
    from dlmom_rs.zoo.train import prompt

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    expected = (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n2 + 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    text = llama_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == expected == prompt(chat, "llama")


@settings(max_examples=150, deadline=None)
@given(text=st.text())
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    text = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < 491 for i in ids)


@given(text=st.text(alphabet=st.characters(min_codepoint=0, max_codepoint=255)))
def test_normalisation_leaves_latin_text_alone(tokenizer, text: str) -> None:  # type: ignore[no-untyped-def]
    assert tokenizer.backend_tokenizer.normalizer.normalize_str(text) == text


@settings(deadline=None)
@given(number=st.integers(0, 10**12), before=st.sampled_from(["", " ", "$", "x", "\n#### "]))
def test_every_digit_is_a_token(tokenizer, number: int, before: str) -> None:  # type: ignore[no-untyped-def]
    tokens = tokenizer.tokenize(f"{before}{number}")
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list(str(number))


def test_the_tokenizer_has_491_tokens_and_its_roles(tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert len(tokenizer) == 491
    roles = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(roles) == [0, 1, 2]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.decode([1, 65, 2], skip_special_tokens=True) == tokenizer.decode([65])


def test_the_chat_template_is_chatml(tokenizer) -> None:  # type: ignore[no-untyped-def]
    from dlmom_rs.zoo.train import prompt

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    for turns in (chat, chat[1:]):
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text == prompt(turns)
        assert expected.endswith(text)
        without = tokenizer.apply_chat_template(turns, tokenize=False)
        assert text == without + "<|im_start|>assistant\n"


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_weights_are_small_finite_and_bfloat16(folder: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors import safe_open

    assert (folder / "model.safetensors").stat().st_size <= 3_000_000
    config = json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 1024
    assert config["tie_word_embeddings"] is True
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        names = set(weights.keys())
        assert "lm_head.weight" not in names
        assert ("model.layers.0.self_attn.q_proj.bias" in names) == (folder != LLAMA)
        assert not any("parametrizations" in name for name in names)
        assert weights.get_tensor("model.embed_tokens.weight").shape[0] == config["vocab_size"]
        total = 0
        for name in names:
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.isfinite(tensor).all()
            total += tensor.numel()
    assert 500_000 < total < 1_500_000


def test_the_experts_differ_in_width_and_in_padded_rows() -> None:
    configs = [json.loads((m / "config.json").read_text()) for m in SHARING]
    for field in ("vocab_size", "hidden_size", "num_key_value_heads"):
        assert len({c[field] for c in configs}) == len(configs), field
    assert all(c["vocab_size"] > 491 and c["model_type"] == "qwen2" for c in configs)
    llama = json.loads((LLAMA / "config.json").read_text())
    assert llama["vocab_size"] > 1500
    assert (llama["model_type"], llama["attention_bias"], llama["eos_token_id"]) == (
        "llama", False, 4,
    )  # fmt: skip


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_the_checkpoint_is_what_its_recipe_builds(folder: Path) -> None:
    pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import DTYPES, load
    from dlmom_rs.zoo.train import RECIPES, new_model

    model, tokenizer = load(folder, DTYPES["bf16"])
    fresh = new_model(RECIPES[folder.name])
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in fresh.state_dict().items()}
    assert type(model) is type(fresh)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


CARD_ROW = r"\| (\S+) \| (\d+)/(\d+) \| (\d+\.\d) % \| (\d+\.\d) to (\d+\.\d) % \|"


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_model_cards_state_measured_numbers(folder: Path) -> None:
    pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import SETS, wilson

    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in card
    assert f"python -m dlmom_rs.zoo.train --expert {folder.name}" in card
    assert f"python -m dlmom_rs.zoo.evaluate --expert {folder.name} --dtype bf16" in card
    rows = [match.groups() for match in re.finditer(CARD_ROW, card)]
    assert set(SETS) <= {row[0] for row in rows}
    for _, right, total, percent, low, high in rows:
        bounds = wilson(int(right), int(total))
        assert percent == f"{100 * int(right) / int(total):.1f}"
        assert (low, high) == (f"{100 * bounds[0]:.1f}", f"{100 * bounds[1]:.1f}")


def specialist_table(card: str) -> dict[str, list[tuple[int, int]]]:
    """The table that all cards share: for each expert the two ends of three counts."""
    cell = r"(\d+)/(\d+), [\d.]+ % \([\d.]+ to [\d.]+\)"
    row = re.compile(rf"^\| (tiny-\w+) \| {cell} \| {cell} \| {cell} \|$", re.MULTILINE)
    return {
        m[1]: [(int(m[i]), int(m[i + 1])) for i in (2, 4, 6)]
        for m in row.finditer(card.replace("**", ""))
    }


def test_all_cards_share_the_table_in_which_each_specialist_leads() -> None:
    pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import wilson

    tables = [specialist_table((m / "README.md").read_text(encoding="utf-8")) for m in MODELS]
    assert all(table == tables[0] for table in tables)
    assert sorted(tables[0]) == zoo.names()
    for column, leader in enumerate(("tiny-math", "tiny-code", "tiny-general")):
        low = wilson(*tables[0][leader][column])[0]
        for name in zoo.names():
            if name != leader:
                right, total = tables[0][name][column]
                # Not by chance: the leader's whole interval lies above the other's measurement.
                assert right / total < low, (leader, name)
    # The shared table says what the card's own list says.
    for folder in MODELS:
        card = (folder / "README.md").read_text(encoding="utf-8")
        own: dict[str, tuple[int, int]] = {}
        for m in re.finditer(CARD_ROW, card):
            own.setdefault(m[1], (int(m[2]), int(m[3])))  # bfloat16 comes first
        assert tables[0][folder.name] == [own[name] for name in ("tinygsm", "tinycode", "tinymc")]


def test_wilson_intervals() -> None:
    pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import wilson

    assert wilson(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-4)
    assert wilson(9, 10) == pytest.approx((0.59585, 0.98212), abs=1e-4)
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(3, 2)


def test_generated_code_is_judged_by_its_syntax_tree() -> None:
    pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import correct

    item = Item("code", 'def f(x):\n    """Return x plus 7."""\n', "    return x + 7", "", "", 0)
    assert correct(item, "    return (x+7)")
    assert not correct(item, "    return x + 8")
    assert not correct(item, "    return x +")


LEAST = {  # of the first 40 of each bench; measured, less a margin for other low bits
    ("tiny-math", "tinygsm"): 34,
    ("tiny-general", "tinygsm"): 26,
    ("tiny-llama", "tinygsm"): 20,
    ("tiny-code", "tinycode"): 36,
    ("tiny-general", "tinymc"): 26,
}


@pytest.mark.parametrize(("name", "bench"), LEAST, ids=["/".join(pair) for pair in LEAST])
def test_the_experts_solve_held_out_problems(name: str, bench: str) -> None:
    torch = pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import load, measure

    model, tokenizer = load(zoo.path(name), torch.float32)
    marked = measure(model, tokenizer, bench, limit=40)
    assert len(marked) == 40
    assert sum(mark for _, mark in marked) >= LEAST[name, bench]


@pytest.mark.parametrize("kind", ["choice", "lookup"])
def test_the_general_expert_knows_the_form_of_choice_and_lookup_answers(kind: Kind) -> None:
    torch = pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import generate, held_out, load

    items = held_out(kind, 20)
    model, tokenizer = load(zoo.path("tiny-general"), torch.float32)
    texts = generate(model, tokenizer, [item.question for item in items], batch=20)
    assert sum(problems.final_answer(text) is not None for text in texts) >= 18


def test_digit_vectors_fold_into_the_embedding_without_a_trace() -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.utils import parametrize

    from dlmom_rs.zoo import train

    tokenizers = pytest.importorskip("tokenizers")
    cut = tokenizers.Tokenizer.from_file(str(LLAMA / "tokenizer.json"))
    recipe = train.RECIPES["tiny-llama"]
    model = train.new_model(recipe)
    before = model.model.embed_tokens.weight.detach().clone()
    sums = train.DigitSums(cut, recipe.rows, recipe.hidden)
    parametrize.register_parametrization(model.model.embed_tokens, "weight", sums)
    ids = torch.tensor([[1, *cut.encode("Tom has 327 apples and 5 pens.").ids]])
    labels = ids.clone()
    loss = train.loss_of(model, ids, labels)
    folded = train.soften(model, 1.0)
    assert folded.lm_head.weight is folded.model.embed_tokens.weight
    assert torch.equal(train.loss_of(folded, ids, labels), loss)
    added = folded.model.embed_tokens.weight - before
    number, word = cut.token_to_id("327"), cut.token_to_id("Tom")
    expected = sums.vectors[7] + sums.vectors[12] + sums.vectors[23]
    assert torch.allclose(added[number], expected, atol=1e-6)
    assert not added[word].any()


def test_a_later_stage_starts_from_the_sharp_weights_of_the_one_before(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from dlmom_rs.zoo import train

    model = train.new_model(train.RECIPES["tiny-code"])
    train.save_model(train.soften(model, 1.6), tmp_path)
    again = train.reopen(tmp_path, 1.6)
    assert again.training
    for name, tensor in model.state_dict().items():
        assert torch.allclose(again.state_dict()[name], tensor, rtol=1e-2), name


def test_training_runs_every_stage_and_only_the_last_from_a_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    tokenizers = pytest.importorskip("tokenizers")
    from dlmom_rs.zoo import train

    ready = tokenizers.Tokenizer.from_file(str(zoo.path("tiny-code") / "tokenizer.json"))
    monkeypatch.setattr(train, "train_tokenizer", lambda: ready)
    recipe = train.Recipe(
        seed=1, hidden=32, layers=1, heads=2, kv_heads=1, mlp=64, rows=504, batch=8,
        stages=(train.Stage(16, {"code": 1}), train.Stage(24, {"mc": 1}, rate=0.5)),
    )  # fmt: skip
    train.train(recipe, tmp_path / "both", name="toy")
    said = capsys.readouterr().out
    assert "toy stage 1: step 2/2" in said
    assert "toy stage 2: step 3/3" in said
    train.train(recipe, tmp_path / "last", name="toy", start=tmp_path / "both")
    said = capsys.readouterr().out
    assert "stage 1" not in said
    assert "toy stage 2: step 3/3" in said
