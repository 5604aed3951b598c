"""The Python interface: results, streams, own parts, and who may use an ensemble when."""

from __future__ import annotations

import copy
import dataclasses
import gc
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dlmom_rs
from dlmom_rs import (
    BeliefPacket,
    CancelToken,
    ConfigError,
    Controller,
    DeepLatentMoM,
    PacketError,
    Result,
    Transcript,
    consensus,
    parts,
)
from dlmom_rs.parts import CompressorLike, ConsensusLike, ControllerLike, Mode

QUESTION = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have?"
QUESTIONS = [QUESTION, "What is 5 plus 6?", "Ann has 9 pens. She loses 2. How many are left?"]
# Thresholds at which these experts think now and then, and budgets that keep tests short.
LATENT: dict[str, Any] = {
    "controller": {"alpha": 0.1, "alpha_unit": "nats"},
    "max_steps": 40,
    "answer_reserve": 8,
}
EXPLICIT: dict[str, Any] = {"controller": {"gate": "always_explicit"}, "max_steps": 16}
EXAMPLES = settings(max_examples=60, deadline=None)


@pytest.fixture(scope="module")
def ensemble() -> DeepLatentMoM:
    return DeepLatentMoM.from_pretrained(
        ["zoo:tiny-math", "zoo:tiny-general"],
        device="cpu",
        dtype="fp32",
        batch_size=4,
        max_len=128,
        threads=1,
    )


@pytest.fixture(scope="module")
def twins() -> DeepLatentMoM:
    """Two agents of one model."""
    return DeepLatentMoM.from_pretrained(
        ["zoo:tiny-math", "zoo:tiny-math"],
        device="cpu",
        dtype="fp32",
        batch_size=2,
        max_len=128,
        threads=1,
    )


def ask(ensemble: DeepLatentMoM, config: dict[str, Any] | None = None, **options: Any) -> Result:
    return ensemble.generate(QUESTION, config=LATENT if config is None else config, **options)


# --- results ---------------------------------------------------------------------------------


def test_packets_come_with_every_result(ensemble: DeepLatentMoM) -> None:
    plain = ask(ensemble)
    traced = ask(ensemble, trace=True)
    assert plain.trace is None
    assert traced.trace is not None
    assert dataclasses.replace(traced, trace=None) == plain
    assert plain.latent_steps > 0
    latent = [i for i, mode in enumerate(traced.trace["mode"]) if mode == "latent"]
    assert [step for step, _ in plain.packets] == latent
    assert len(plain.packets) == plain.latent_steps == sum(plain.latent_segments)
    for step, packet in plain.packets:
        assert packet.ids[:5] == traced.trace["top_ids"][step]
        assert packet.vocab == plain.vocab
        assert packet.k == 50
        assert packet.mass == pytest.approx(traced.trace["mass"][step])
    masses = [packet.mass for _, packet in plain.packets]
    assert plain.topk_mass == pytest.approx(np.mean(masses))


def test_a_result_is_equal_but_for_its_time(ensemble: DeepLatentMoM) -> None:
    result = ask(ensemble)
    assert dataclasses.replace(result, latency_s=1e9) == result
    assert dataclasses.replace(result, switches=99) != result
    assert result.total_steps == result.latent_steps + result.explicit_tokens


def test_a_batch_is_its_prompts_one_by_one(ensemble: DeepLatentMoM) -> None:
    together = ensemble.generate(QUESTIONS * 2, config=LATENT)
    assert isinstance(together, list)
    assert together[:3] == together[3:]
    assert together[:3] == [ensemble.generate(q, config=LATENT) for q in QUESTIONS]


def test_the_transcript_is_what_the_experts_took_in(ensemble: DeepLatentMoM) -> None:
    result = ask(ensemble, {**LATENT, "link": {"encoding": "compact"}})
    transcript = result.transcript()
    assert transcript.steps == [step for step, _ in result.packets]
    assert transcript.fingerprint == result.fingerprint != 0
    assert Transcript.from_bytes(transcript.to_bytes()) == transcript
    assert len(transcript.to_bytes("compact")) < 0.5 * len(transcript.to_bytes())
    exact = ask(ensemble)
    per_step = exact.downlink_bytes / exact.total_steps
    assert result.downlink_bytes / result.total_steps < 0.7 * per_step


def test_no_latent_step_gives_an_empty_transcript(ensemble: DeepLatentMoM) -> None:
    result = ask(ensemble, EXPLICIT)
    assert result.packets == []
    assert result.topk_mass is None
    assert len(result.transcript()) == 0


def test_nothing_to_ask_gives_nothing(ensemble: DeepLatentMoM) -> None:
    assert ensemble.generate([]) == []


def test_prompts_of_numpy_ids_are_token_prompts(ensemble: DeepLatentMoM) -> None:
    ids = ensemble._engine.encode(
        0, {"kind": "chat", "messages": [{"role": "user", "content": QUESTION}]}
    )
    assert ensemble.generate(list(np.array(ids)), config=LATENT) == ask(ensemble)


@pytest.mark.parametrize("prompt", [b"abc", {"role": "user"}, [["a", 1]], [[1, "a"]]])
def test_what_is_no_prompt_is_refused(ensemble: DeepLatentMoM, prompt: Any) -> None:
    with pytest.raises(TypeError, match="a prompt is text, token ids or a list of messages"):
        ensemble.generate(prompt)


# --- configuration ---------------------------------------------------------------------------


def test_the_default_link_depends_on_whether_a_model_is_shared(
    ensemble: DeepLatentMoM, twins: DeepLatentMoM
) -> None:
    assert ensemble.default_config()["link"]["message"] == "belief"
    assert twins.default_config()["link"]["message"] == "embed"
    assert ask(twins).latent_steps > 0
    with pytest.raises(ConfigError, match="a vector of one means nothing to the other"):
        ask(ensemble, {"link": {"message": "embed"}})


def test_a_small_vocabulary_bounds_k(ensemble: DeepLatentMoM) -> None:
    config = ensemble.default_config()
    assert config["k"] == 50 <= ensemble.info["models"][0]["vocab"]


def test_every_message_and_encoding_of_a_link_runs(twins: DeepLatentMoM) -> None:
    sizes = {}
    for message, encoding, k in [
        ("embed", "f32", 50),
        ("belief", "f32", 50),
        ("belief", "f16", 50),
        ("belief", "compact", 50),
        ("logits", "f32", -1),
    ]:
        link = {"message": message, "encoding": encoding}
        result = ask(twins, {**LATENT, "k": k, "link": link})
        assert result.latent_steps > 0
        sizes[message, encoding] = result.downlink_bytes / result.latent_steps
    assert len(set(sizes.values())) == len(sizes)


def test_a_choice_is_changed_by_field_or_replaced_whole(ensemble: DeepLatentMoM) -> None:
    by_field = ask(ensemble, {**LATENT, "consensus": {"theta": 2.0}})
    whole = ask(ensemble, {**LATENT, "consensus": {"method": "ties", "theta": 2.0, "eps": 1e-6}})
    assert by_field == whole != ask(ensemble)
    assert ask(ensemble, {**LATENT, "consensus": {"method": "mean"}}) != whole


def test_the_answer_reserve_follows_the_steps(ensemble: DeepLatentMoM) -> None:
    controller = {"gate": "always_latent"}
    for steps, reserve in ((16, 4), (3, 0)):
        config = {"controller": controller, "max_steps": steps}
        spelled = ask(ensemble, {**config, "answer_reserve": reserve}, trace=True)
        assert ask(ensemble, config, trace=True) == spelled


def test_consensus_on_packets_makes_the_message_a_packet(twins: DeepLatentMoM) -> None:
    short = ask(twins, {**LATENT, "link": {"support": "packet"}})
    assert short == ask(twins, {**LATENT, "link": {"support": "packet", "message": "belief"}})
    assert short.uplink_bytes < ask(twins).uplink_bytes


def test_the_trend_thresholds_follow_alpha(ensemble: DeepLatentMoM) -> None:
    trend = {"gate": "trend", "w": 3, "alpha": 0.4, "alpha_unit": "nats"}
    derived = ask(ensemble, {**LATENT, "controller": trend}, trace=True)
    spelled = {"convergence_threshold": 0.1, "slope_eps": 0.008, "var_eps": (0.1 * 0.4) ** 2}
    assert derived == ask(ensemble, {**LATENT, "controller": {**trend, **spelled}}, trace=True)
    kept = {"convergence_threshold": 0.39}
    assert derived != ask(ensemble, {**LATENT, "controller": {**trend, **kept}}, trace=True)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"kk": 3}, "kk: unknown field; did you mean k"),
        ({"controler": {}}, "controler: unknown field; did you mean controller"),
        ({"controller": {"gait": "trend"}}, r"controller\.gait: unknown field; did you mean gate"),
        ({"controller": {"alpha": "high"}}, r"controller\.alpha: 'high' is not a number"),
        ({"controller": {"alpha": None}}, r"controller\.alpha: None is not a number"),
        ({"controller": {"alpha": float("nan")}}, r"controller\.alpha: nan is not a finite"),
        ({"controller": {"cap": 1.5}}, r"controller\.cap: 1\.5 is not a whole number"),
        ({"controller": {"w": "x"}}, r"controller\.w: 'x' is not a number"),
        ({"controller": 3}, "controller: 3 is not a mapping"),
        ({"answer_cue": 3}, "answer_cue: 3 is not text"),
        ({"noise": {"tau": 1.0}}, r"noise\.tau: unknown field"),
        ({"noise": {"kind": "gumble"}}, "gumble"),
        ({"link": {"encoding": "f64"}}, "f64"),
        ({"link": {"mesage": "embed"}}, r"link\.mesage: unknown field; did you mean message"),
        ({"max_steps": True}, "max_steps: True is not a whole number"),
        ({"controls": {"drop_latent": 1}}, r"controls\.drop_latent: 1 is not true or false"),
        ({"k": [1]}, "k: "),
    ],
)
def test_a_wrong_field_is_named(
    ensemble: DeepLatentMoM, config: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        ensemble.generate("hello", config=config)
    with pytest.raises(ConfigError, match=words):
        ensemble.stream("hello", config=config)


@pytest.mark.parametrize("seed", [-1, 1 << 64, 1.0, True, None])
def test_a_wrong_seed_is_named(ensemble: DeepLatentMoM, seed: Any) -> None:
    with pytest.raises(ConfigError, match="seed: "):
        ensemble.generate("hello", seed=seed)


def test_numbers_may_be_numpys(ensemble: DeepLatentMoM) -> None:
    config = {
        "controller": {"alpha": np.float64(0.1), "alpha_unit": "nats"},
        "max_steps": np.int64(40),
        "answer_reserve": np.int32(8),
    }
    assert ask(ensemble, config, seed=np.int64(0)) == ask(ensemble)


# --- streams ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        LATENT,
        EXPLICIT,
        {**LATENT, "noise": {"kind": "gumbel", "tau": 0.7}, "sampling": {"temperature": 1.2}},
        {**LATENT, "max_steps": 3, "answer_reserve": 0},
    ],
)
def test_a_stream_is_the_result_step_by_step(
    ensemble: DeepLatentMoM, config: dict[str, Any]
) -> None:
    whole = ask(ensemble, config, seed=5, trace=True)
    stream = ensemble.stream(QUESTION, config=config, seed=5, trace=True)
    assert iter(stream) is stream
    events = list(stream)
    assert stream.result == whole
    assert "".join(event.text for event in events) == whole.text
    assert whole.trace is not None
    for name in (
        *("entropy", "observed", "mode", "reason", "noise_kl", "expert_entropy"),
        *("merged_entropy", "top_ids", "top_tokens"),
    ):
        assert [getattr(event, name) for event in events] == whole.trace[name], name
    for name in ("mass", "top_probs"):  # float32 values; a trace has them as short decimals
        for event, recorded in zip(events, whole.trace[name], strict=True):
            assert np.array_equal(np.float32(getattr(event, name)), np.float32(recorded)), name
    assert [e.step for e in events] == list(range(len(events)))
    assert [e.token for e in events if e.token is not None] == whole.tokens
    assert [(e.step, e.packet) for e in events if e.packet is not None] == whole.packets
    assert sum(e.switched for e in events) == whole.switches
    assert sum(e.uplink_bytes for e in events) == whole.uplink_bytes
    assert sum(e.downlink_bytes for e in events) == whole.downlink_bytes
    assert list(stream) == []
    stream.close()
    assert stream.result == whole


class Spell:
    """A consensus that makes the experts say given tokens one after another."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = iter(ids)

    def merge(self, rows: np.ndarray) -> np.ndarray:
        row = np.zeros(rows.shape[1], np.float32)
        row[next(self.ids)] = 50.0
        return row


def byte_ids(ensemble: DeepLatentMoM, data: bytes) -> list[int]:
    """Tokens of one byte each."""
    table = ensemble.info["models"][0]["token_bytes"]
    by_byte = {bytes(piece): i for i, piece in reversed(list(enumerate(table)))}
    return [by_byte[bytes([b])] for b in data]


@pytest.mark.parametrize("ended", [True, False])
def test_characters_come_when_their_last_byte_does(ensemble: DeepLatentMoM, ended: bool) -> None:
    data = "aé日🙂".encode() + b"\xff" + "ß".encode() + "日".encode()[:2]
    ids = byte_ids(ensemble, data)
    steps = len(ids)
    if ended:
        ids.append(ensemble.info["models"][0]["roles"]["eos"][0])
    config = {**EXPLICIT, "max_steps": steps + 5 if ended else steps}
    stream = ensemble.stream("hello", config=config, consensus=Spell(ids))
    pieces = [event.text for event in stream]
    assert pieces[:10] == ["a", "", "é", "", "", "日", "", "", "", "🙂"]
    assert stream.result.text == "".join(pieces) == data.decode(errors="replace")
    assert stream.result.stop == ("eos" if ended else "budget")


def test_the_cue_is_part_of_the_text(ensemble: DeepLatentMoM) -> None:
    config = {
        "controller": {"gate": "always_latent", "max_latent_steps": 2},
        "answer_cue": "\n#### é",
        "max_steps": 12,
        "answer_reserve": 4,
    }
    stream = ensemble.stream(QUESTION, config=config)
    events = list(stream)
    assert [e.mode for e in events[:4]] == ["latent", "latent", "explicit", "explicit"]
    assert events[2].reason == "latent_budget"
    assert (events[2].token, events[2].text) == (None, "\n#### é")
    assert "".join(e.text for e in events) == stream.result.text
    assert stream.result == ensemble.generate(QUESTION, config=config)


def test_a_prompt_that_cannot_be_run_is_a_result(ensemble: DeepLatentMoM) -> None:
    stream = ensemble.stream([])
    assert list(stream) == []
    assert stream.result.stop == "prompt"
    assert stream.result.error
    results = ensemble.generate([[1], []], config={"max_steps": 1})
    assert isinstance(results, list)
    assert results[0].stop == "budget"
    assert results[1] == stream.result


def by_close(stream: dlmom_rs.Stream) -> None:
    stream.close()
    stream.close()
    assert list(stream) == []
    with pytest.raises(RuntimeError, match="ended early"):
        _ = stream.result


def by_with(stream: dlmom_rs.Stream) -> None:
    with stream as same:
        assert same is stream
        next(stream)
    assert list(stream) == []


def by_nothing(stream: dlmom_rs.Stream) -> None:
    del stream


@pytest.mark.parametrize("leave", [by_close, by_with, by_nothing])
@pytest.mark.parametrize("steps", [0, 3])
def test_an_abandoned_stream_leaves_nothing_behind(
    ensemble: DeepLatentMoM, leave: Callable[[dlmom_rs.Stream], None], steps: int
) -> None:
    before = ask(ensemble)
    streams = [ensemble.stream(QUESTIONS[1], config=LATENT)]
    for _ in range(steps):
        next(streams[0])
    with pytest.raises(RuntimeError, match="has not finished"):
        _ = streams[0].result
    with pytest.raises(RuntimeError, match="busy with a stream"):
        ensemble.generate("hello")
    with pytest.raises(RuntimeError, match="busy with a stream"):
        ensemble.stream("hello")
    leave(streams.pop())
    gc.collect()
    assert ensemble._engine.memory()["kv_bytes"] >= 0
    with pytest.raises(ValueError, match="no open lane"):
        ensemble._engine.length(0, 0)
    assert ask(ensemble) == before


def test_the_last_event_frees_the_ensemble(ensemble: DeepLatentMoM) -> None:
    before = ask(ensemble)
    stream = ensemble.stream(QUESTION, config={**LATENT, "max_steps": 2, "answer_reserve": 0})
    next(stream)
    next(stream)
    assert stream.result.total_steps == 2
    assert ask(ensemble) == before
    assert list(stream) == []


# --- one use at a time -----------------------------------------------------------------------


class Gatekeeper:
    """A controller whose steps wait for the test."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()

    def observe(self, entropy: float, mode: Mode | None) -> Mode:
        del entropy, mode
        self.entered.set()
        assert self.go.wait(60)
        return "explicit"


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(work())
        except BaseException as error:
            answers.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, answers


def test_two_threads_cannot_use_an_ensemble_at_once(ensemble: DeepLatentMoM) -> None:
    keeper = Gatekeeper()
    thread, answers = in_thread(lambda: ask(ensemble, EXPLICIT, controller=lambda: keeper))
    assert keeper.entered.wait(60)
    for use in (
        lambda: ensemble.generate("hello"),
        lambda: ensemble.stream("hello"),
        lambda: ensemble.run(suite="A1", bench="tinygsm", out="nowhere"),
    ):
        with pytest.raises(RuntimeError, match=r"busy with generate\(\)"):
            use()
    keeper.go.set()
    thread.join()
    assert isinstance(answers[0], Result)
    assert ask(ensemble, EXPLICIT).text == answers[0].text


def test_two_threads_cannot_step_a_stream_at_once(ensemble: DeepLatentMoM) -> None:
    keeper = Gatekeeper()
    stream = ensemble.stream(QUESTION, config=EXPLICIT, controller=lambda: keeper)
    thread, answers = in_thread(lambda: next(stream))
    assert keeper.entered.wait(60)
    for use in (stream.close, lambda: next(stream)):
        with pytest.raises(RuntimeError, match="a step of the stream is under way"):
            use()
    keeper.go.set()
    thread.join()
    assert answers[0].step == 0
    assert next(stream).step == 1
    stream.close()


def test_a_part_cannot_use_the_ensemble_it_works_in(ensemble: DeepLatentMoM) -> None:
    class Curious:
        def observe(self, entropy: float, mode: Mode | None) -> Mode:
            del entropy, mode
            ensemble.generate("and what do you think?")
            return "explicit"

    with pytest.raises(RuntimeError, match=r"busy with generate\(\)"):
        ask(ensemble, controller=Curious)
    assert ask(ensemble).text


def test_a_part_cannot_close_the_stream_it_works_in(ensemble: DeepLatentMoM) -> None:
    streams: list[dlmom_rs.Stream] = []

    class Quitter:
        def observe(self, entropy: float, mode: Mode | None) -> Mode:
            del entropy, mode
            streams[0].close()
            return "explicit"

    streams.append(ensemble.stream(QUESTION, controller=Quitter))
    with pytest.raises(RuntimeError, match="a step of the stream is under way"):
        next(streams[0])
    assert list(streams[0]) == []
    assert ask(ensemble).text


FORKED = """
import os, sys
from dlmom_rs import BeliefPacket, Controller, DeepLatentMoM
ensemble = DeepLatentMoM.from_pretrained(
    "zoo:tiny-math", device="cpu", dtype="fp32", max_len=64, threads=1)
config = {"max_steps": 2, "answer_reserve": 0}
stream = ensemble.stream("hello", config=config)
next(stream)
child = os.fork()
if child == 0:
    failed = 1
    try:
        uses = [
            lambda: ensemble.generate("hello", config=config),
            lambda: ensemble.stream("hello"),
            lambda: ensemble.run(suite="A1", bench="tinygsm", out="nowhere"),
            lambda: ensemble.default_config(),
            lambda: ensemble.info,
            lambda: next(stream),
        ]
        for use in uses:
            try:
                use()
            except RuntimeError as error:
                assert "after os.fork() the child must load" in str(error), error
            else:
                raise AssertionError("not refused")
        stream.close()
        # Values belong to no process.
        assert Controller().observe(0.9).mode == "latent"
        assert BeliefPacket([1], [1.0], vocab=2).k == 1
        failed = 0
    finally:
        os._exit(failed)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert [event.step for event in stream] == [1]
assert ensemble.generate("hello", config=config) == stream.result
print("fine")
"""


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="this system has no fork")
def test_a_forked_child_is_refused_and_the_parent_goes_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "fine"


# --- cancelling ------------------------------------------------------------------------------


def test_a_thread_cancels_a_call(ensemble: DeepLatentMoM) -> None:
    before = ask(ensemble)
    keeper, token = Gatekeeper(), CancelToken()
    thread, answers = in_thread(
        lambda: ask(ensemble, EXPLICIT, controller=lambda: keeper, cancel=token)
    )
    assert keeper.entered.wait(60)
    assert not token.cancelled
    token.cancel()
    assert token.cancelled
    keeper.go.set()
    thread.join()
    assert isinstance(answers[0], dlmom_rs.Cancelled)
    assert isinstance(answers[0], dlmom_rs.DlmomError)
    assert ask(ensemble) == before


def test_a_cancelled_stream_ends(ensemble: DeepLatentMoM) -> None:
    token = CancelToken()
    stream = ensemble.stream(QUESTION, config=LATENT, cancel=token)
    next(stream)
    token.cancel()
    with pytest.raises(dlmom_rs.Cancelled):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)
    with pytest.raises(RuntimeError, match="ended early"):
        _ = stream.result
    with pytest.raises(dlmom_rs.Cancelled):
        ask(ensemble, cancel=token)
    assert ask(ensemble, cancel=CancelToken()) == ask(ensemble)


# --- own parts -------------------------------------------------------------------------------


class Above:
    """The threshold gate again."""

    def observe(self, entropy: float, mode: Mode | None) -> Mode:
        assert mode in (None, "latent", "explicit")
        return "latent" if entropy > 0.1 else "explicit"


class Turns:
    """Latent and explicit by turns."""

    def __init__(self) -> None:
        self.seen: list[Mode | None] = []

    def observe(self, entropy: float, mode: Mode | None) -> Mode:
        assert entropy >= 0
        self.seen.append(mode)
        return "explicit" if mode == "latent" else "latent"


class Mean:
    """The built-in `mean` again."""

    def merge(self, rows: np.ndarray) -> np.ndarray:
        assert rows.dtype == np.float32
        assert np.abs(rows.mean(axis=1)).max() < 1e-4
        rows[0] += 0.0  # the array is ours
        return (rows.astype(np.float64).sum(axis=0) / len(rows)).astype(np.float32)


class Spy:
    """A compressor that changes nothing and remembers what it was shown."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int, tuple[int, ...]]] = []

    def compress(
        self, keys: torch.Tensor, values: torch.Tensor, *, layer: int, agent: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert keys.shape == values.shape
        assert keys.dtype == torch.float32
        self.calls.append((agent, layer, tuple(keys.shape)))
        return keys, values


def test_an_own_gate_that_copies_the_threshold_changes_nothing(ensemble: DeepLatentMoM) -> None:
    builtin = ask(ensemble, trace=True)
    own = ask(ensemble, trace=True, controller=Above)
    assert builtin.trace is not None
    assert own.trace is not None
    forced = {"cap", "dwell", "latent_budget", "eos_certain", "answer_reserve"}
    assert set(own.trace["reason"]) <= forced | {"custom"}
    assert dataclasses.replace(own, trace=None) == dataclasses.replace(builtin, trace=None)


def test_every_sample_gets_a_controller_of_its_own(ensemble: DeepLatentMoM) -> None:
    made: list[Turns] = []

    def make() -> Turns:
        made.append(Turns())
        return made[-1]

    config = {**LATENT, "controller": {"cap": -1}}
    results = ensemble.generate(QUESTIONS, config=config, controller=make, trace=True)
    assert isinstance(results, list)
    assert len(made) == 3
    for turns, result in zip(made, results, strict=True):
        assert result.trace is not None
        # It was shown every mode but the last.
        assert turns.seen == [None, *result.trace["mode"][:-1]]
        bound = [reason != "custom" for reason in result.trace["reason"]]
        free = bound.index(True) if any(bound) else len(bound)
        wanted = ["latent", "explicit"] * len(bound)
        assert result.trace["mode"][:free] == wanted[:free]
        assert free > 1


def test_cap_and_budget_bind_an_own_controller(ensemble: DeepLatentMoM) -> None:
    for controller, switches, latent in (
        ({"cap": 3}, 3, 40),
        ({"cap": 0}, 0, 0),
        ({"cap": -1, "max_latent_steps": 2}, 99, 2),
    ):
        result = ask(ensemble, {**LATENT, "controller": controller}, controller=Turns)
        assert result.switches <= switches
        assert result.latent_steps <= latent
    assert ask(ensemble, {**LATENT, "controller": {"cap": -1}}, controller=Turns) != ask(ensemble)


def test_an_own_mean_is_the_built_in_one(ensemble: DeepLatentMoM) -> None:
    builtin = ask(ensemble, {**LATENT, "consensus": {"method": "mean"}}, trace=True)
    own = ask(ensemble, trace=True, consensus=Mean())
    assert (own.text, own.tokens) == (builtin.text, builtin.tokens)
    assert own.trace is not None
    assert builtin.trace is not None
    for name in ("mode", "reason", "token", "top_ids"):
        assert own.trace[name] == builtin.trace[name]
    # The built-in operator is merged by the fused kernel, whose exponentials are float32.
    for name in ("entropy", "merged_entropy", "mass"):
        assert own.trace[name] == pytest.approx(builtin.trace[name], abs=1e-6)
    assert ask(ensemble, trace=True) != builtin


def test_one_expert_has_nothing_to_merge() -> None:
    class Never:
        def merge(self, rows: np.ndarray) -> np.ndarray:
            raise AssertionError(rows.shape)

    single = DeepLatentMoM.from_pretrained(
        "zoo:tiny-math", device="cpu", dtype="fp32", batch_size=1, max_len=128, threads=1
    )
    assert ask(single, consensus=Never()) == ask(single)


def test_a_compressor_that_changes_nothing_changes_no_bit(ensemble: DeepLatentMoM) -> None:
    plain = ask(ensemble, trace=True)
    spy = Spy()
    assert ask(ensemble, trace=True, compressor=spy, compress_every=4) == plain
    prompt = plain.prompt_tokens[0]
    lengths = sorted({shape[1] for agent, _, shape in spy.calls if agent == 0})
    assert lengths[0] == prompt
    assert {b - a for a, b in pairwise(lengths)} == {4}
    agents = {agent for agent, _, _ in spy.calls}
    assert agents == {0, 1}
    layers = {layer for agent, layer, _ in spy.calls if agent == 0}
    assert layers == set(range(len(layers)))
    assert len(spy.calls) == len(set(spy.calls))
    # It is gone afterwards.
    count = len(spy.calls)
    assert ask(ensemble, trace=True) == plain
    assert len(spy.calls) == count


def test_a_compressor_changes_what_the_experts_think(ensemble: DeepLatentMoM) -> None:
    class Forget:
        def compress(
            self, keys: torch.Tensor, values: torch.Tensor, *, layer: int, agent: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            del layer, agent
            return keys, torch.zeros_like(values)

    plain = ask(ensemble)
    forgetful = ask(ensemble, compressor=Forget(), compress_every=1)
    assert forgetful.entropy != plain.entropy
    rarely = ask(ensemble, compressor=Forget(), compress_every=1000)
    assert rarely.entropy != forgetful.entropy
    assert ask(ensemble) == plain


def test_parts_work_in_streams(ensemble: DeepLatentMoM) -> None:
    own: dict[str, Any] = {
        "controller": Turns,
        "consensus": Mean(),
        "compressor": Spy(),
        "compress_every": 8,
    }
    stream = ensemble.stream(QUESTION, config=LATENT, **own)
    assert [e.mode for e in stream][:2] == ["latent", "explicit"]
    assert stream.result == ask(ensemble, **own)


class Broken:
    """A part that works twice and then raises."""

    def __init__(self, error: BaseException, after: int = 2) -> None:
        self.error = error
        self.left = after

    def count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise self.error

    def observe(self, entropy: float, mode: Mode | None) -> Mode:
        del entropy, mode
        self.count()
        return "explicit"

    def merge(self, rows: np.ndarray) -> np.ndarray:
        self.count()
        return rows[0]

    def compress(
        self, keys: torch.Tensor, values: torch.Tensor, *, layer: int, agent: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        del layer, agent
        self.count()
        return keys, values


def using(place: str, part: Any) -> dict[str, Any]:
    return {place: (lambda: part) if place == "controller" else part}


PLACES = pytest.mark.parametrize(
    ("place", "note"),
    [
        ("controller", "item 0: controller"),
        ("consensus", "consensus `Broken`"),
        ("compressor", "KV compression after backend call"),
    ],
)


@PLACES
def test_what_a_part_raises_comes_out_as_itself(
    ensemble: DeepLatentMoM, place: str, note: str
) -> None:
    class Mine(ValueError):  # the kind of error that the engine has meanings for
        pass

    before = ask(ensemble)
    error = Mine("no")
    with pytest.raises(Mine) as caught:
        ask(ensemble, **using(place, Broken(error)))
    assert caught.value is error
    assert any(note in text for text in error.__notes__), error.__notes__
    again = Mine("no")
    stream = ensemble.stream(QUESTION, config=LATENT, **using(place, Broken(again)))
    with pytest.raises(Mine) as caught:
        list(stream)
    assert caught.value is again
    assert ask(ensemble) == before


@PLACES
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_part_is_an_interrupt(
    ensemble: DeepLatentMoM, place: str, note: str, kind: type[BaseException]
) -> None:
    del note
    stop = kind("stop")
    with pytest.raises(kind) as caught:
        ask(ensemble, **using(place, Broken(stop)))
    assert caught.value is stop
    assert ask(ensemble).text


@pytest.mark.parametrize("answer", ["Latent", None, 1, "soft"])
def test_a_controller_must_name_a_mode(ensemble: DeepLatentMoM, answer: Any) -> None:
    class Odd:
        def observe(self, entropy: float, mode: str | None) -> Any:
            del entropy, mode
            return answer

    with pytest.raises(ValueError, match="it must be 'latent' or 'explicit'"):
        ask(ensemble, controller=Odd)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda rows: rows, r"shape \[2, \d+\], not \[\d+\]"),
        (lambda rows: rows[0, 1:], "shape"),
        (lambda rows: rows[0] * np.nan, "NaN or Inf"),
        (lambda _: None, "."),
    ],
)
def test_a_consensus_must_answer_with_one_row(
    ensemble: DeepLatentMoM, answer: Callable[[np.ndarray], Any], words: str
) -> None:
    class Odd:
        def merge(self, rows: np.ndarray) -> Any:
            return answer(rows)

    with pytest.raises((ValueError, TypeError), match=words):
        ask(ensemble, consensus=Odd())


def test_a_compressor_may_not_drop_positions(ensemble: DeepLatentMoM) -> None:
    class Evict:
        def compress(self, keys: Any, values: Any, *, layer: int, agent: int) -> Any:
            del layer, agent
            return keys[:, 1:], values[:, 1:]

    with pytest.raises(ValueError, match="not the number of positions"):
        ask(ensemble, compressor=Evict())
    assert ask(ensemble).text


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"controller": Turns()}, "controller: Turns cannot be called; give a class"),
        ({"controller": Controller}, "the built-in one is set by config"),
        ({"controller": Controller()}, "the built-in one is set by config"),
        ({"controller": object}, "object has no method observe"),
        ({"consensus": Mean}, "consensus: Mean is a class; give an object"),
        ({"consensus": object()}, "object has no method merge"),
        ({"compressor": Spy}, "compressor: Spy is a class; give an object"),
        ({"compressor": object()}, "object has no method compress"),
    ],
)
def test_a_part_of_the_wrong_kind_is_refused(
    ensemble: DeepLatentMoM, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(TypeError, match=words):
        ask(ensemble, **wrong)
    assert ask(ensemble).text


@pytest.mark.parametrize("every", [0, -1, 1.5])
def test_compress_every_is_a_count(ensemble: DeepLatentMoM, every: Any) -> None:
    with pytest.raises(ConfigError, match="compress_every"):
        ask(ensemble, compressor=Spy(), compress_every=every)


def test_parts_are_recognised_by_their_methods() -> None:
    assert isinstance(Turns(), ControllerLike)
    assert isinstance(Mean(), ConsensusLike)
    assert isinstance(Spy(), CompressorLike)
    assert not isinstance(Spy(), ConsensusLike)


def test_the_conformance_kit_knows_good_parts_from_bad() -> None:
    class Moody(Mean):
        def __init__(self) -> None:
            self.calls = 0

        def merge(self, rows: np.ndarray) -> np.ndarray:
            self.calls += 1
            return super().merge(rows) * self.calls

    class Remembers:
        seen = 0

        def observe(self, entropy: float, mode: Mode | None) -> Mode:
            del entropy, mode
            Remembers.seen += 1
            return "latent" if Remembers.seen % 3 else "explicit"

    parts.check(controller=Above, consensus=Mean())
    parts.check(controller=Turns)
    for bad, rule in (
        ({"consensus": Moody()}, "ConsensusIsPure"),
        ({"controller": Remembers}, "ControllerReplays"),
    ):
        with pytest.raises(dlmom_rs.ProtocolError, match=rule):
            parts.check(**bad)
    with pytest.raises(TypeError, match="no method merge"):
        parts.check(consensus=object())  # type: ignore[arg-type]


# --- the controller by itself ----------------------------------------------------------------

KNOBS = st.fixed_dictionaries(
    {},
    optional={
        "gate": st.sampled_from(["threshold", "trend", "always_latent", "always_explicit"]),
        "alpha": st.floats(0, 1),
        "cap": st.integers(-1, 6),
        "min_dwell_latent": st.integers(0, 4),
        "min_dwell_explicit": st.integers(0, 4),
        "max_latent_steps": st.integers(0, 12),
        "start": st.sampled_from(["gate", "latent"]),
    },
).map(lambda knobs: {**knobs, "w": 3})
ENTROPIES = st.lists(st.floats(0, 1), max_size=40)


@EXAMPLES
@given(KNOBS, ENTROPIES)
def test_replaying_is_observing(knobs: dict[str, Any], entropies: list[float]) -> None:
    controller = Controller(**knobs)
    assert controller.mode is None
    observed = [controller.observe(entropy) for entropy in entropies]
    fresh = Controller(**controller.knobs)
    assert fresh.replay(np.array(entropies)) == observed == controller.replay(entropies)
    assert (fresh.switches, fresh.latent_steps, fresh.mode) == (0, 0, None)
    assert controller.switches == sum(d.switched for d in observed)
    assert controller.latent_steps == sum(d.mode == "latent" for d in observed)
    assert controller.latent_steps <= controller.knobs["max_latent_steps"]
    if controller.knobs["cap"] >= 0:
        assert controller.switches <= controller.knobs["cap"]
    if observed:
        assert controller.mode == observed[-1].mode


@EXAMPLES
@given(st.floats(0, 1), ENTROPIES)
def test_the_threshold_gate_is_a_comparison(alpha: float, entropies: list[float]) -> None:
    controller = Controller(alpha=alpha, cap=-1, max_latent_steps=1000)
    modes = [decision.mode for decision in controller.replay(entropies)]
    assert modes == ["latent" if h > alpha else "explicit" for h in entropies]


def test_a_recorded_sample_replays_to_its_modes(ensemble: DeepLatentMoM) -> None:
    trend = {"gate": "trend", "w": 3, "alpha": 0.4, "alpha_unit": "nats"}
    for knobs in (LATENT["controller"], trend):
        trace = ask(ensemble, {**LATENT, "controller": knobs}, trace=True).trace
        assert trace is not None
        controller = Controller(**knobs)
        for step, entropy in enumerate(trace["observed"]):
            reason = trace["reason"][step]
            forced = reason if reason in ("eos_certain", "answer_reserve") else None
            decision = controller.observe(entropy, forced)
            assert (decision.mode, decision.reason) == (trace["mode"][step], reason)


def test_a_forced_exit_is_explicit() -> None:
    controller = Controller(gate="always_latent")
    assert controller.observe(0.9).mode == "latent"
    decision = controller.observe(0.9, "eos_certain")
    assert (decision.mode, decision.switched, decision.reason) == ("explicit", True, "eos_certain")
    assert repr(decision) == "Decision(mode='explicit', switched=True, reason='eos_certain')"
    assert controller.observe(0.9, force="answer_reserve").reason == "answer_reserve"
    with pytest.raises(ValueError, match='force is "now"'):
        controller.observe(0.9, "now")  # type: ignore[arg-type]


def test_an_entropy_must_be_finite() -> None:
    controller = Controller()
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be finite"):
            controller.observe(bad)
        with pytest.raises(ValueError, match=r"entropies\[1\]"):
            controller.replay([0.1, bad])
    assert controller.mode is None


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"gait": "trend"}, "gait: unknown field; did you mean gate"),
        ({"min_dwel_latent": 1}, "did you mean min_dwell_latent"),
        ({"zzz": 1}, "zzz: unknown field; there are alpha, "),
        ({"gate": "trnd"}, "gate: 'trnd': unknown variant"),
        ({"gate": "trend"}, "w is missing"),
        ({"gate": "trend", "w": 1}, "w is 1"),
        ({"alpha": -0.1}, "alpha is -0.1"),
        ({"alpha": "x"}, "alpha: 'x': invalid type"),
        ({"alpha": float("inf")}, "alpha: inf is not a finite number"),
        ({"cap": -2}, "cap is -2"),
        ({"cap": 0.5}, "cap: 0.5: invalid type"),
        ({"w": [3]}, "w: "),
    ],
)
def test_a_wrong_knob_is_named(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Controller(**knobs)


def test_a_controller_shows_its_knobs() -> None:
    controller = Controller(gate="trend", w=4, alpha=0.5)
    assert "gate='trend', w=4, alpha=0.5" in repr(controller)
    assert eval(repr(controller), {"Controller": Controller}).knobs == controller.knobs


# --- consensus by itself ---------------------------------------------------------------------


def ties(rows: np.ndarray, theta: float, eps: float) -> np.ndarray:
    """Appendix C in float64, one token at a time."""
    centred = rows.astype(np.float64)
    centred = centred - centred.mean(axis=1, keepdims=True)
    if len(centred) == 1:
        return centred[0]
    merged = []
    for column in centred.T:
        kept = [v if abs(v) >= theta else 0.0 for v in column]
        vote = sum(int(v > 0) - int(v < 0) for v in kept)
        agree = [v for v in kept if v * vote > 0]
        merged.append(sum(agree) / (max(len(agree), 1) + eps))
    return np.array(merged)


LOGITS = st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(0, 2**32 - 1)).map(
    lambda t: np.random.default_rng(t[2]).normal(scale=3.0, size=t[:2]).astype(np.float32)
)


@EXAMPLES
@given(LOGITS, st.floats(0, 3), st.floats(0, 0.5))
def test_ties_is_the_papers(rows: np.ndarray, theta: float, eps: float) -> None:
    merged = consensus(rows, theta=theta, eps=eps)
    assert merged.dtype == np.float32
    centred = rows.astype(np.float64) - rows.mean(axis=1, keepdims=True, dtype=np.float64)
    clear = (np.abs(np.abs(centred) - theta) > 1e-5).all(axis=0) & (np.abs(centred) > 1e-5).all(0)
    expected = ties(rows, theta, eps)
    np.testing.assert_allclose(merged[clear], expected[clear], atol=1e-5, rtol=1e-5)


@EXAMPLES
@given(LOGITS)
def test_mean_is_the_mean(rows: np.ndarray) -> None:
    expected = rows.astype(np.float64).mean(axis=0) - rows.astype(np.float64).mean()
    np.testing.assert_allclose(consensus(rows, method="mean"), expected, atol=1e-5)


def test_kinds_of_arrays_agree() -> None:
    rows = np.random.default_rng(3).normal(size=(3, 500)).astype(np.float32)
    expected = consensus(rows)
    for same in (
        list(rows),
        tuple(rows),
        rows.astype(np.float64),
        rows.tolist(),
        rows[:, ::-1][:, ::-1],
    ):
        np.testing.assert_array_equal(consensus(same), expected)
    tensor = torch.from_numpy(rows)
    for tensors in (tensor, list(tensor), tensor.double(), tensor.T.contiguous().T):
        merged = consensus(tensors)
        assert isinstance(merged, torch.Tensor)
        assert (merged.dtype, merged.device.type) == (torch.float32, "cpu")
        np.testing.assert_array_equal(merged.numpy(), expected)
    learned = tensor.clone().requires_grad_()
    assert not consensus(learned).requires_grad
    for dtype, numpy in ((torch.bfloat16, None), (torch.float16, np.float16)):
        low = tensor.to(dtype)
        exact = consensus(low.float().numpy())
        np.testing.assert_array_equal(consensus(low).numpy(), exact)
        if numpy is not None:
            np.testing.assert_array_equal(consensus(rows.astype(numpy)), exact)
    # The answer is the caller's own, and the input is left alone.
    merged = consensus(rows)
    merged[:] = 0
    np.testing.assert_array_equal(consensus(rows), expected)


@pytest.mark.parametrize("kind", [np.array, torch.tensor])
@pytest.mark.parametrize(
    ("logits", "words"),
    [
        ([1.0, 2.0], "shape"),
        ([[[1.0]]], "shape"),
        ([[1.0, float("nan")]], "expert 0 hold NaN or Inf"),
        ([[1.0, 2.0], [float("inf"), 0.0]], "expert 1 hold NaN or Inf"),
        ([[]], "at least 1"),
    ],
)
def test_wrong_logits_are_named(kind: Callable[[Any], Any], logits: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        consensus(kind(logits))


def test_wrong_lists_of_logits_are_named() -> None:
    for kind in (np.zeros, torch.zeros):
        with pytest.raises(ValueError, match="expert 1 have 4 entries, those of expert 0 3"):
            consensus([kind(3), kind(4)])
        with pytest.raises(ValueError, match="expert 0 have shape"):
            consensus([kind((1, 3)), kind((1, 3))])
    with pytest.raises(ValueError, match="at least 1"):
        consensus([])


@pytest.mark.parametrize(
    "logits",
    [
        np.zeros((1, 2), complex),
        np.zeros((1, 2), bool),
        np.array([["a"]]),
        np.zeros((1, 2), "V4"),
        torch.zeros(1, 2, dtype=torch.int64),
    ],
)
def test_logits_are_floats(logits: Any) -> None:
    with pytest.raises(TypeError, match="a float dtype is needed"):
        consensus(logits)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "tie"}, "unknown method 'tie'; did you mean ties"),
        ({"method": "vote"}, "there are arith, best, geo, mean, mixture, poe, ties"),
        ({"theta": -0.1}, "theta is -0.1"),
        ({"eps": float("nan")}, "eps is nan"),
    ],
)
def test_wrong_options_of_consensus_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        consensus([[0.0, 1.0]], **options)


# --- packets ---------------------------------------------------------------------------------


@st.composite
def packets(draw: st.DrawFn, vocab: int = 300) -> BeliefPacket:
    ids = draw(st.lists(st.integers(0, vocab - 1), min_size=1, max_size=20, unique=True))
    weights = np.array([draw(st.floats(1e-3, 1.0)) for _ in ids])
    mass = draw(st.floats(0.01, 1.0))
    return BeliefPacket(ids, (weights / weights.sum()).tolist(), vocab=vocab, mass=mass)


@EXAMPLES
@given(packets(), st.integers(0, 2**64 - 1), st.integers(0, 2**32 - 1))
def test_a_packet_survives_the_wire(packet: BeliefPacket, fingerprint: int, step: int) -> None:
    data = packet.to_bytes(fingerprint=fingerprint, step=step)
    assert BeliefPacket.from_bytes(data) == packet
    assert BeliefPacket.read_all(data + data) == [(step, packet)] * 2
    for encoding in ("f16", "bf16", "compact"):
        lossy = BeliefPacket.from_bytes(packet.to_bytes(encoding))
        near = dict(zip(lossy.ids, lossy.probs, strict=True))
        assert near == pytest.approx(dict(zip(packet.ids, packet.probs, strict=True)), abs=0.02)
        assert sum(near.values()) == pytest.approx(1.0, abs=1e-5)
    assert packet.entropy() == pytest.approx(-sum(p * np.log(p) for p in packet.probs), abs=1e-6)
    assert list(packet.probs) == sorted(packet.probs, reverse=True)
    assert (len(packet), hash(packet)) == (packet.k, hash(BeliefPacket.from_bytes(data)))
    with pytest.raises(PacketError):
        BeliefPacket.from_bytes(data[:-1])


@EXAMPLES
@given(st.lists(packets(), max_size=6), st.integers(0, 1000), st.integers(0, 2**64 - 1))
def test_a_transcript_survives_the_wire(
    held: list[BeliefPacket], first: int, fingerprint: int
) -> None:
    items = [(first + 3 * i, packet) for i, packet in enumerate(held)]
    transcript = Transcript(items, vocab=300, fingerprint=fingerprint)
    again = Transcript.from_bytes(transcript.to_bytes())
    assert again == transcript
    assert (again.vocab, again.fingerprint) == (300, fingerprint)
    assert [again[i] for i in range(len(again))] == items == list(again)  # type: ignore[call-overload]
    assert again.packets == held
    if items:
        assert again[-1] == items[-1]
        with pytest.raises(PacketError):
            Transcript([*items, items[-1]], vocab=300)
    with pytest.raises(IndexError):
        _ = again[len(items)]


def test_values_can_be_copied_and_pickled(ensemble: DeepLatentMoM) -> None:
    result = ask(ensemble)
    for value in (result.packets[0][1], result.transcript(), result):
        assert copy.deepcopy(value) == value
        assert pickle.loads(pickle.dumps(value)) == value
    assert dataclasses.asdict(result)["packets"] == result.packets


# --- runs ------------------------------------------------------------------------------------


def test_a_run_uses_the_ensembles_experts(
    ensemble: DeepLatentMoM, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    options: dict[str, Any] = {
        "bench": "tinygsm", "limit": 3, "max_steps": 24, "alpha": 0.1, "alpha_unit": "nats",
        "display": "none",
    }  # fmt: skip
    run = ensemble.run(suite=["A1"], only=["A1.3"], out=out, seeds=[3, 4], **options)
    assert run.path == out
    manifest = json.loads((out / "run.json").read_text())
    assert [m["name"] for m in manifest["models"]] == ["tiny-math", "tiny-general"]
    argv = manifest["argv"] if "argv" in manifest else manifest["invocations"][0]["argv"]
    for pair in (["--device", "cpu"], ["--dtype", "fp32"], ["--threads", "1"]):
        assert argv[argv.index(pair[0]) :][:2] == pair
    assert "--deterministic" not in argv
    rows = run.read()
    assert set(rows["experiment"]) == {"REF", "A1.3"}
    assert rows.height == 3 + 2 * 3
    assert dlmom_rs.read_run(run, "cells").equals(run.read("cells"))
    assert "text" in run.read(text=True).columns
    capfd.readouterr()

    with pytest.raises(dlmom_rs.RunRefused, match="exit status 2") as caught:
        ensemble.run(suite="A1", out=out, **options)
    assert caught.value.status == 2
    assert isinstance(caught.value, ConfigError)
    assert isinstance(caught.value, dlmom_rs.RunFailed)
    assert capfd.readouterr().err.startswith("error: ")
    with pytest.raises(dlmom_rs.RunRefused):
        ensemble.run(suite="A1", out=tmp_path / "other", no_such_option=1, **options)
    resumed = ensemble.run(
        suite=["A1"], only=["A1.3"], out=str(out), seeds=[3, 4], resume=True, **options
    )
    assert resumed == run
    assert resumed.read().height == 9
    for taken in ("experts", "model", "backend"):
        with pytest.raises(TypeError, match=taken):
            ensemble.run(suite="A1", out=out, **{**options, taken: "x"})
    assert ask(ensemble).text


# --- the package -----------------------------------------------------------------------------


def test_every_public_name_is_there_and_described() -> None:
    assert sorted(dlmom_rs.__all__) == dlmom_rs.__dir__()
    assert set(dlmom_rs._LAZY) == set(dlmom_rs.__all__)
    assert dlmom_rs.__doc__
    for name in dlmom_rs.__all__:
        value = getattr(dlmom_rs, name)
        if name != "__version__":
            assert f"``{name}``" in dlmom_rs.__doc__, name
            assert value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = dlmom_rs.Nothing


def test_what_needs_no_library_imports_none() -> None:
    code = (
        "import sys, dlmom_rs\n"
        "for name in dlmom_rs.__all__: getattr(dlmom_rs, name)\n"
        "import dlmom_rs.parts\n"
        "dlmom_rs.Controller().replay([0.1, 0.9])\n"
        "packet = dlmom_rs.BeliefPacket([1], [1.0], vocab=2)\n"
        "dlmom_rs.BeliefPacket.from_bytes(packet.to_bytes())\n"
        "heavy = {'torch', 'transformers', 'polars', 'numpy', 'matplotlib', 'rich', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "import numpy\n"
        "dlmom_rs.consensus(numpy.zeros((2, 3)))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
