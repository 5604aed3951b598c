"""The boundary between the Rust loop and the Python engine."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dlmom_rs
from dlmom_rs import DeepLatentMoM, _core
from dlmom_rs.bench import models


@pytest.fixture(scope="module")
def ensemble() -> DeepLatentMoM:
    return DeepLatentMoM.from_pretrained(
        ["zoo:tiny-math", "zoo:tiny-general"],
        device="cpu",
        dtype="fp32",
        batch_size=4,
        max_len=256,
        threads=1,
    )


LATENT: dict[str, Any] = {
    "controller": {"alpha": 0.3, "alpha_unit": "nats"},
    "max_steps": 60,
    "answer_reserve": 8,
}


def patched(
    monkeypatch: pytest.MonkeyPatch,
    model: DeepLatentMoM,
    fail: Callable[[int], BaseException | None],
) -> None:
    """Makes the engine's n-th ``advance`` raise what ``fail(n)`` gives."""
    original = model._engine.advance
    calls = 0

    def advance(feeds: Any) -> Any:
        nonlocal calls
        calls += 1
        error = fail(calls)
        if error is not None:
            raise error
        return original(feeds)

    monkeypatch.setattr(model._engine, "advance", advance)


def test_the_engine_keeps_the_backend_contract(ensemble: DeepLatentMoM) -> None:
    _core.conformance(ensemble._engine, 2e-4)


def test_the_contract_holds_with_two_tokenizers_in_separate_lanes(shared: Path) -> None:
    from dlmom_rs.engine.backend import Engine

    engine = Engine.load(
        [str(shared / "models" / "stories260k"), str(shared / "models" / "tinystories-656k-bf16")],
        [0, 1],
        device="cpu",
        dtype="fp32",
        slots=8,
        max_len=64,
        threads=1,
        trust_remote_code=False,
        deterministic=False,
        fast=False,
        attn=None,
    )
    _core.conformance(engine, 1e-3)


def test_the_kit_finds_a_broken_engine(
    ensemble: DeepLatentMoM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ensemble._engine, "truncate", lambda *_: None)
    with pytest.raises(dlmom_rs.ProtocolError, match="TruncateForgets"):
        _core.conformance(ensemble._engine, 2e-4)


def test_an_exception_comes_out_as_itself_with_a_note(
    ensemble: DeepLatentMoM, monkeypatch: pytest.MonkeyPatch
) -> None:
    class DeviceLost(RuntimeError):
        pass

    lost = DeviceLost("the device fell off the bus")
    patched(monkeypatch, ensemble, lambda n: lost if n >= 3 else None)
    with pytest.raises(DeviceLost) as caught:
        ensemble.generate("What is 2 plus 3?", config=LATENT)
    assert caught.value is lost
    assert any("backend call" in note for note in lost.__notes__)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_interruption_inside_the_backend_is_cancellation(
    ensemble: DeepLatentMoM, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    stop = kind("stop")
    patched(monkeypatch, ensemble, lambda n: stop if n == 4 else None)
    with pytest.raises(kind) as caught:
        ensemble.generate(["What is 2 plus 3?", "What is 4 plus 4?"], config=LATENT)
    assert caught.value is stop


def test_a_call_that_fails_once_changes_no_answer(
    ensemble: DeepLatentMoM, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = ["Tom has 3 apples. He buys 4 more. How many does he have?", "What is 5 plus 6?"]
    calm = ensemble.generate(questions, config=LATENT)
    patched(monkeypatch, ensemble, lambda n: RuntimeError("flaky") if n == 5 else None)
    shaken = ensemble.generate(questions, config=LATENT)
    assert isinstance(calm, list)
    assert isinstance(shaken, list)
    assert [(r.text, r.latent_steps, r.entropy) for r in calm] == [
        (r.text, r.latent_steps, r.entropy) for r in shaken
    ]


def test_wrong_logits_are_refused(ensemble: DeepLatentMoM, monkeypatch: pytest.MonkeyPatch) -> None:
    original = ensemble._engine.advance
    for spoil in (lambda t: t.double(), lambda t: t[:, :-1], lambda t: t.repeat(1, 2)[:, ::2]):
        monkeypatch.setattr(
            ensemble._engine,
            "advance",
            lambda calls, spoil=spoil: [(spoil(a), b) for a, b in original(calls)],
        )
        with pytest.raises(TypeError, match="float32, bfloat16 or float16, with contiguous rows"):
            ensemble.generate(["What is 2 plus 3 plus 4?"] * 2, config=LATENT)


def session(ensemble: DeepLatentMoM, *, items: int = 2, **options: Any) -> _core.Session:
    source = {"kind": "chat", "messages": [{"role": "user", "content": "What is 2 plus 3?"}]}
    jobs = [
        {
            "key": {"item_id": str(item), "seed": 0, "sample": 0},
            "prompts": [source] * options.pop("prompts", 2),
            "trace": False,
        }
        for item in range(items)
    ]
    config = {**ensemble.default_config(), "max_steps": 3, "answer_reserve": 0}
    return _core.Session(ensemble._engine, json.dumps(config), json.dumps(jobs), **options)


def test_a_session_goes_turn_by_turn(ensemble: DeepLatentMoM) -> None:
    running = session(ensemble, items=3, rows=2)
    seen: list[tuple[list[int], int]] = []
    more = True
    while more:
        more, events, finished = running.turn(True)
        seen.append(([json.loads(event)["step"] for event, _ in events], len(finished)))
    # Two rows for three samples: the third starts once a slot is free.
    assert seen == [
        ([0, 0], 0), ([1, 1], 0), ([2, 2], 2), ([0], 0), ([1], 0), ([2], 1), ([], 0),
    ]  # fmt: skip
    with pytest.raises(dlmom_rs.ProtocolError, match="the session has ended"):
        running.turn(False)
    running.close()


def test_a_closed_session_has_freed_its_lanes(ensemble: DeepLatentMoM) -> None:
    running = session(ensemble)
    _, events, _ = running.turn(False)
    assert events == []
    assert ensemble._engine.length(1, 1) > 0
    running.close()
    running.close()
    with pytest.raises(ValueError, match="no open lane"):
        ensemble._engine.length(1, 1)
    with pytest.raises(dlmom_rs.ProtocolError, match="the session has ended"):
        running.turn(False)


@pytest.mark.parametrize(
    ("config", "jobs", "words"),
    [("{", "[]", "config: "), ("{}", "[]", "config: "), (None, "[{}]", "jobs: ")],
)
def test_what_is_no_session_is_refused(
    ensemble: DeepLatentMoM, config: str | None, jobs: str, words: str
) -> None:
    config = json.dumps(ensemble.default_config()) if config is None else config
    with pytest.raises(dlmom_rs.ConfigError, match=words):
        _core.Session(ensemble._engine, config, jobs)


def test_a_job_needs_a_prompt_for_every_agent(ensemble: DeepLatentMoM) -> None:
    running = session(ensemble, items=1, prompts=1)
    with pytest.raises(dlmom_rs.ConfigError, match="item 0: 1 prompts for 2 agents"):
        running.turn(False)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"k": 0}, "k: 0"),
        ({"k": 4000}, "k: 4000"),
        ({"max_steps": 0}, "max_steps"),
        ({"controller": {"alpha": -1.0}}, "alpha"),
        ({"controller": {"cap": -2}}, "cap"),
        ({"controller": {"gate": "trend"}}, "w"),
        ({"controller": {"gait": "trend"}}, "gait"),
        ({"noise": {"kind": "gumbel", "tau": 0.0}}, "tau"),
        ({"sampling": {"top_p": 0.0}}, "top_p"),
        ({"answer_reserve": 999}, "answer_reserve"),
    ],
)
def test_a_bad_knob_is_named(ensemble: DeepLatentMoM, config: dict[str, Any], words: str) -> None:
    with pytest.raises(dlmom_rs.ConfigError, match=words):
        ensemble.generate("hello", config=config)


def test_prompts_come_in_three_forms(ensemble: DeepLatentMoM) -> None:
    question = "What is 5 plus 6?"
    one = ensemble.generate(question, config=LATENT)
    chat = ensemble.generate([{"role": "user", "content": question}], config=LATENT)
    ids = ensemble._engine.encode(
        0, {"kind": "chat", "messages": [{"role": "user", "content": question}]}
    )
    tokens = ensemble.generate(ids, config=LATENT)
    assert isinstance(one, dlmom_rs.Result)
    assert isinstance(chat, dlmom_rs.Result)
    assert isinstance(tokens, dlmom_rs.Result)
    assert one.text == chat.text == tokens.text
    assert one.total_steps == one.explicit_tokens + one.latent_steps


def test_an_empty_prompt_is_a_result_with_an_error(ensemble: DeepLatentMoM) -> None:
    result = ensemble.generate([[1], []], config=LATENT)
    assert isinstance(result, list)
    assert result[1].stop == "prompt"
    assert result[1].error


def test_different_vocabularies_are_refused_by_name(shared: Path) -> None:
    model = DeepLatentMoM.from_pretrained(
        [shared / "models" / "stories260k", shared / "models" / "tinystories-656k-bf16"],
        device="cpu",
        dtype="fp32",
        max_len=64,
        threads=1,
    )
    with pytest.raises(dlmom_rs.ConfigError, match=r"stories260k.*tinystories-656k"):
        model.generate([1, 2, 3], config=LATENT)


GREEDY: list[tuple[str, list[int], list[int]]] = [
    (
        "stories260k",
        [1, 403, 407, 261, 378],
        [432, 383, 286, 261, 376, 298, 315, 421, 395, 317, 426, 338, 401, 396, 267, 337],
    ),
    (
        "tinystories-656k-bf16",
        [1, 80, 147, 201, 282, 57],
        [313, 598, 303, 1049, 1468, 267, 628, 333, 94, 1210, 263, 251, 604, 94, 1030, 94],
    ),
]


@pytest.mark.parametrize(("name", "prompt", "expected"), GREEDY)
@pytest.mark.parametrize("rows", [1, 8])
def test_real_models_say_what_they_are_known_to_say(
    shared: Path, name: str, prompt: list[int], expected: list[int], rows: int
) -> None:
    model = DeepLatentMoM.from_pretrained(
        shared / "models" / name,
        device="cpu",
        dtype="fp32",
        batch_size=rows,
        max_len=128,
        threads=1,
    )
    explicit = {"controller": {"gate": "always_explicit"}, "max_steps": 48, "answer_reserve": 0}
    # Mates of other lengths, so that the batch is ragged.
    mates = [[1], prompt + prompt, prompt[:3], [1, *prompt[2:]]] if rows > 1 else []
    results = model.generate([prompt, *mates], config=explicit)
    assert isinstance(results, list)
    assert results[0].tokens[: len(expected)] == expected


@pytest.mark.parametrize("call", ["memory", "close"])
def test_an_interrupt_in_a_call_that_cannot_fail_is_not_lost(
    call: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """A signal's exception is raised in whatever the interpreter runs when it arrives."""
    # A shell's background jobs ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    ensemble = models.ensemble(["zoo:tiny-math"], 1, fast=True)
    engine = ensemble._engine
    whole = getattr(engine, call)
    calls = []

    def interrupted(*given: object) -> object:
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*given)

    monkeypatch.setattr(engine, call, interrupted)
    config = models.loop_config(ensemble, gate="always_explicit", max_steps=3, answer_reserve=0)
    sources = [models.asked(question) for question in models.questions(4)]
    with pytest.raises(KeyboardInterrupt):
        models.run(ensemble, sources, config, 1)
    assert len(calls) < 5
