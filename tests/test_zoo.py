"""The shipped tiny experts: their problems, their tokenizer, their weights and what they can do."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmom_rs import zoo
from dlmom_rs.zoo import problems
from dlmom_rs.zoo.problems import KINDS, Draws, Item, Kind

MODELS = [zoo.path(name) for name in zoo.names()]
EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def exact(a: int, op: str, b: int) -> int:
    """``a op b`` in integers; AssertionError unless a division comes out even."""
    if op == "/":
        quotient, rest = divmod(a, b)
        assert rest == 0
        return quotient
    return {"+": a + b, "-": a - b, "*": a * b}[op]


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


def test_tinygsm_is_what_its_command_writes(tmp_path: Path) -> None:
    shipped = problems.TINYGSM_PATH.read_bytes()
    problems.main(["--write", "--out", str(tmp_path / "again.jsonl")])
    assert (tmp_path / "again.jsonl").read_bytes() == shipped
    rows = [json.loads(line) for line in shipped.decode().splitlines()]
    assert len(rows) == 500
    assert all(list(row) == ["question", "answer"] for row in rows)
    assert all(re.search(r"\n#### \d+$", row["answer"]) for row in rows)
    assert len({row["question"] for row in rows}) == 500


def test_the_experts_share_one_tokenizer_bytes_and_all() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert len({hashlib.sha256((m / name).read_bytes()).hexdigest() for m in MODELS}) == 1


@pytest.fixture(scope="module")
def tokenizer():  # type: ignore[no-untyped-def]
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(MODELS[0])


def test_transformers_cuts_text_as_the_shipped_file_says(tokenizer) -> None:  # type: ignore[no-untyped-def]
    # transformers rebuilds the pipeline of a Qwen2 tokenizer instead of reading it, so a file with
    # one of its own would silently be cut differently by every other reader.
    tokenizers = pytest.importorskip("tokenizers")
    plain = tokenizers.Tokenizer.from_file(str(MODELS[0] / "tokenizer.json"))
    for kind in KINDS:
        for item in problems.take(kind, "test", 30, seed=4):
            text = f"<|im_start|>user\n{item.question}<|im_end|>\n{item.answer}"
            assert tokenizer.encode(text, add_special_tokens=False) == plain.encode(text).ids


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
        assert "model.layers.0.self_attn.q_proj.bias" in names
        assert weights.get_tensor("model.embed_tokens.weight").shape[0] == config["vocab_size"]
        total = 0
        for name in names:
            tensor = weights.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            assert torch.isfinite(tensor).all()
            total += tensor.numel()
    assert 700_000 < total < 1_500_000


def test_the_experts_differ_in_width_and_in_padded_rows() -> None:
    configs = [json.loads((m / "config.json").read_text()) for m in MODELS]
    for field in ("vocab_size", "hidden_size", "num_key_value_heads"):
        assert len({c[field] for c in configs}) == len(configs), field
    assert all(c["vocab_size"] > 491 for c in configs)


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_model_cards_state_measured_numbers(folder: Path) -> None:
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "Apache-2.0" in card
    assert "python -m dlmom_rs.zoo.train" in card
    assert "python -m dlmom_rs.zoo.evaluate" in card
    for kind in ("tinygsm", *KINDS[1:]):
        assert re.search(rf"\| {kind} \| \d+/\d+ \| \d+\.\d % \| \d+\.\d to \d+\.\d %", card), kind


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


@pytest.mark.parametrize(
    ("name", "kind", "least"),
    [("tiny-math", "math", 31), ("tiny-general", "math", 25), ("tiny-general", "code", 30)],
)
def test_the_experts_solve_held_out_problems(name: str, kind: Kind, least: int) -> None:
    torch = pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import correct, generate, held_out, load

    items = held_out(kind, 40)
    model, tokenizer = load(zoo.path(name), torch.float32)
    texts = generate(model, tokenizer, [item.question for item in items], batch=40)
    right = sum(correct(item, text) for item, text in zip(items, texts, strict=True))
    assert least <= right


@pytest.mark.parametrize("kind", ["choice", "lookup"])
def test_the_general_expert_knows_the_form_of_choice_and_lookup_answers(kind: Kind) -> None:
    # Its card says that it has learned their form and hardly their substance.
    torch = pytest.importorskip("torch")
    from dlmom_rs.zoo.evaluate import generate, held_out, load

    items = held_out(kind, 20)
    model, tokenizer = load(zoo.path("tiny-general"), torch.float32)
    texts = generate(model, tokenizer, [item.question for item in items], batch=20)
    assert sum(problems.final_answer(text) is not None for text in texts) >= 18
