"""Chains, groups, controls, presets, pilots and drift on the shipped experts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from dlmom_rs import ConfigError, DeepLatentMoM

from .conftest import ROOT, Done, rows_of

Call = Callable[..., Done]

QUESTION = "Tom has 3 apples. He buys 4 more apples. How many apples does Tom have?"
CHAIN = ["--model", "zoo:tiny-general"]
PAIR = ["--experts", "zoo:tiny-math", "zoo:tiny-general"]
PRESETS = sorted(path.stem for path in (ROOT / "configs" / "presets").glob("*.yaml"))


def command(out: Path, *more: object) -> list[str]:
    base: dict[str, object] = {
        "--bench": "tinygsm", "--limit": 6, "--device": "cpu", "--dtype": "fp32", "--threads": 1,
        "--max-steps": 120, "--batch-size": 8, "--pilot-items": 6, "--display": "none",
        "--out": out,
    }  # fmt: skip
    left = [word for flag, value in base.items() if flag not in more for word in (flag, value)]
    return [str(word) for word in ["run", *left, *more]]


def good(done: Done) -> str:
    assert done.status == 0, done.err
    return done.out


def error_line(done: Done) -> str:
    assert done.status == 2, done
    lines = done.err.strip().splitlines()
    assert lines[-1].startswith("error: "), done.err
    assert not [line for line in lines if line.startswith(("Traceback", "thread"))]
    return lines[-1]


def manifest(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Controls and two variants of a chain at a pilot's quantile, drift included."""
    from dlmom_rs import _core

    out = tmp_path_factory.mktemp("runs") / "controlled"
    arguments = command(
        out, *CHAIN, "--suite", "A2", "C1", "C2", "--only", "A2.3", "C1.1", "C1.3", "C1.5", "C1.7",
        "C1.8", "C1.9", "C2.1", "C2.2", "C2.3", "C2.4", "--alpha-unit", "quantile", "--drift", 2,
    )  # fmt: skip
    assert _core.main(["dlmom-rs", *arguments]) == 0
    return out


@pytest.fixture
def copy(controlled: Path, tmp_path: Path) -> Path:
    target = tmp_path / "copy"
    shutil.copytree(controlled, target)
    return target


# --- chains ----------------------------------------------------------------------------------


def test_a_generalist_hands_over_to_a_specialist(controlled: Path) -> None:
    seats = manifest(controlled)["context"]["topology"]["seats"]
    assert [seat["role"] for seat in seats] == ["generalist", "specialist"]
    assert seats[0]["prompt"]["system"] != seats[1]["prompt"]["system"]
    for row in rows_of(controlled, "REF").values():
        assert row["handoffs"] == 1
        assert row["handoff_triggers"] in (["convergence"], ["latent_budget"])
        assert len(row["forward_tokens_per_agent"]) == 2
        assert all(row["forward_tokens_per_agent"])
    traces = (controlled / "traces" / "REF.jsonl").read_text(encoding="utf-8").splitlines()
    for line in map(json.loads, traces):
        assert [h["from"] for h in line["handoffs"]] == [0]
        handed = line["handoffs"][0]["step"]
        assert set(line["agent"][: handed + 1]) == {0}
        assert set(line["agent"][handed + 1 :]) == {1}


def test_the_bound_on_handoffs_is_kept_and_changes_what_happens(
    dlmom: Call, tmp_path: Path
) -> None:
    texts = {}
    for bound in (0, 1, 2):
        out = tmp_path / str(bound)
        good(
            dlmom(
                *command(out, *CHAIN, "--suite", "A1", "--only", "REF", "--limit", 30),
                *("--alpha-unit", "nats", "--alpha", "0.1", "--max-handoffs", bound),
            )
        )
        rows = rows_of(out, "REF")
        handoffs = [row["handoffs"] for row in rows.values()]
        assert max(handoffs) == bound
        assert min(handoffs) >= min(bound, 1)
        texts[bound] = [row["text"] for row in rows.values()]
        for row in rows.values():
            assert len(row["handoff_triggers"]) == row["handoffs"]
            # A second handoff takes place only where the Specialist gave no answer.
            assert row["handoff_triggers"][1:] in ([], ["failure"])
            if row["stop"] == "handoffs":
                assert row["answer"] is None
                assert row["handoffs"] == bound
    assert texts[0] != texts[1] != texts[2]


@pytest.mark.parametrize("handoff", ["text", "kv"])
def test_text_and_caches_are_handed_over_too(dlmom: Call, tmp_path: Path, handoff: str) -> None:
    out = tmp_path / handoff
    good(
        dlmom(
            *command(out, *CHAIN, "--suite", "A1", "--only", "REF", "--limit", 2),
            *("--alpha-unit", "nats", "--alpha", "0.1", "--handoff", handoff),
        )
    )
    line = json.loads((out / "traces" / "REF.jsonl").read_text(encoding="utf-8").splitlines()[0])
    record = line["handoffs"][0]
    assert record["payload"] == handoff
    assert record["bytes"] > 0
    if handoff == "kv":
        # Every position of four layers, two KV heads of width 20, keys and values of 4 bytes.
        assert record["bytes"] % record["positions"] == 0


def test_a_cache_is_not_handed_to_another_model(dlmom: Call, tmp_path: Path) -> None:
    done = dlmom(
        *command(tmp_path / "o", *PAIR, "--suite", "A1", "--topology", "sequential"),
        *("--handoff", "kv"),
    )
    line = error_line(done)
    assert "handoff: kv from tiny-math to tiny-general" in line
    assert "is not" in line


def test_experts_of_a_chain_may_be_different_models(dlmom: Call, tmp_path: Path) -> None:
    out = tmp_path / "two"
    good(
        dlmom(
            *command(out, *PAIR, "--suite", "A1", "--only", "REF", "--limit", 2),
            *("--topology", "sequential", "--alpha-unit", "nats", "--alpha", "0.1"),
        )
    )
    assert all(row["handoffs"] == 1 for row in rows_of(out, "REF").values())


def test_two_lines_of_a_file_make_groups(dlmom: Call, tmp_path: Path) -> None:
    file = tmp_path / "groups.yaml"
    file.write_text(
        "name: two-and-one\nkind: hierarchical\n"
        "groups: {readers: [0, 1], writer: [2]}\nmeta: {method: mean}\n",
        encoding="utf-8",
    )
    assert "hierarchical, 3 agents" in good(dlmom("validate", file))
    experts = ["--experts", "zoo:tiny-math", "zoo:tiny-general", "zoo:tiny-code"]
    rows = {}
    for name, topology in (("flat", "lockstep"), ("groups", file)):
        out = tmp_path / name
        good(
            dlmom(
                *command(out, *experts, "--suite", "A1", "--only", "REF", "--limit", 3),
                *("--topology", topology),
            )
        )
        rows[name] = [r["text"] for _, r in sorted(rows_of(out, "REF").items())]
    assert rows["flat"] != rows["groups"]


# --- controls, pilots, drift -----------------------------------------------------------------


def test_every_control_changes_something_that_is_recorded(controlled: Path) -> None:
    def facts(cell: str) -> list[Any]:
        return [
            (row["text"], row["latent_steps"], row["noise_js"], row["entropy"])
            for _, row in sorted(rows_of(controlled, cell).items())
        ]

    reference = facts("REF")
    cells = [c["id"] for c in manifest(controlled)["cells"] if c["kind"] == "run"]
    assert len(cells) == 12
    for cell in cells[1:]:
        assert facts(cell) != reference, cell
    modes = {
        cell: [row["mode_runs"] for _, row in sorted(rows_of(controlled, cell).items())]
        for cell in ("REF", "C1.7", "C1.9")
    }
    for ours, theirs in zip(modes["C1.7"], modes["REF"], strict=True):
        # The same modes, as long as both last.
        assert ours[:3] == theirs[:3]
    assert all(len(runs) == 1 for runs in modes["C1.9"])


def test_a_pilot_is_recorded_and_read_on_resume(copy: Path, dlmom: Call) -> None:
    pilot = manifest(copy)["pilot"]
    ids = {key[0] for key in rows_of(copy, "REF")}
    assert len(pilot["items"]) == 6
    assert not ids & set(pilot["items"])
    assert len(pilot["quantiles"]) == 501
    assert pilot["quantiles"] == sorted(pilot["quantiles"])
    raw = copy / "raw" / "C1.3.jsonl"
    before = rows_of(copy, "C1.3")
    lines = raw.read_text(encoding="utf-8").splitlines()
    raw.write_text("\n".join(lines[:3]) + "\n", encoding="utf-8")
    words = command(
        copy, *CHAIN, "--suite", "C1", "--only", "C1.3", "--alpha-unit", "quantile", "--drift", 2,
        "--resume",
    )  # fmt: skip
    good(dlmom(*words))
    assert rows_of(copy, "C1.3") == before
    assert manifest(copy)["pilot"] == pilot
    changed = manifest(copy)
    changed["pilot"] = None
    (copy / "run.json").write_text(json.dumps(changed), encoding="utf-8")
    line = error_line(dlmom(*words))
    assert "REF ran with the pilot's quantiles, and run.json does not hold them" in line


def test_drift_is_zero_of_the_reference_and_measured_by_kind(controlled: Path) -> None:
    schema = json.loads(
        (ROOT / "configs" / "schema" / "drift-line.schema.json").read_text(encoding="utf-8")
    )
    kinds: dict[str, dict[str, list[Any]]] = {}
    for path in sorted((controlled / "drift").glob("*.jsonl")):
        for line in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            jsonschema.validate(line, schema)
            kinds.setdefault(path.stem, {}).setdefault(line["kind"], []).append(line)
    assert list(kinds["REF"]) == ["free"]
    for line in kinds["REF"]["free"]:
        assert line["steps"] > 0
        assert set(line["divergences"]["kl"]) == {0.0}
    assert set(kinds["C1.1"]) == {"free", "one_step"}
    assert set(kinds["A2.3"]) == {"free", "decisions"}
    assert set(kinds["C2.1"]) == {"free"}
    assert sum(line["changed"] for line in kinds["A2.3"]["decisions"]) > 0
    assert max(kl for line in kinds["C1.1"]["one_step"] for kl in line["divergences"]["kl"]) > 0.1
    drifts = [row["drift"] for row in rows_of(controlled, "C1.1").values()]
    assert [drift is not None for drift in drifts].count(True) == 2
    summary = json.loads((controlled / "summary" / "A2.3.json").read_text(encoding="utf-8"))
    assert {d["kind"] for d in summary["drift"]} == {"free", "decisions"}


def test_every_decision_replays_and_the_folder_is_valid(controlled: Path, dlmom: Call) -> None:
    said = good(dlmom("replay", controlled))
    assert "equal the recording" in said
    assert "in 12 cells" in said
    good(dlmom("validate", controlled))
    shown = good(dlmom("show", controlled, "REF"))
    assert "tiny-general (generalist) + tiny-general (specialist)" in shown
    assert "-> tiny-general (specialist)" in shown
    assert "1 handoffs (" in shown


def test_cells_are_compared_item_by_item(controlled: Path, dlmom: Call) -> None:
    found = json.loads(good(dlmom("compare", controlled, "--json")))["comparisons"]
    assert {line["against"] for line in found} == {"REF"}
    assert len(found) == 11
    for line in found:
        assert line["delta"] == pytest.approx(line["accuracy"] - line["accuracy_against"])
        assert line["bootstrap"]["lo"] <= line["delta"] <= line["bootstrap"]["hi"]
        assert line["p_value"] <= line["p_adjusted"] <= 1
    against = json.loads(
        good(dlmom("compare", controlled, "--against", "C1.9", "--only", "C1.5", "--json"))
    )["comparisons"]
    assert [(line["cell"], line["against"]) for line in against] == [("C1.5", "C1.9")]


def test_the_drift_figure_is_drawn(copy: Path, dlmom: Call) -> None:
    good(dlmom("plot", copy))
    assert (copy / "figs" / "drift_histogram.png").stat().st_size > 5000


def test_noise_is_calibrated_to_a_divergence(dlmom: Call) -> None:
    words = ["--bench", "tinygsm", "--device", "cpu", "--dtype", "fp32", "--threads", 1]
    done = dlmom(
        "calibrate", *CHAIN, *words, "--alpha-unit", "nats", "--alpha", "0.1", "--pilot-items", 8,
        "--max-steps", 60, "--batch-size", 8, "--target-kl", 0.05, "--json",
    )  # fmt: skip
    found = json.loads(good(done))
    assert found["kl"] == pytest.approx(0.05, rel=0.02)
    strengths = {cell["id"]: cell["kl"] for cell in found["cells"]}
    # More concentration, less noise.
    assert strengths["A1.5"] > strengths["A1.6"] > strengths["A1.7"] > 0
    assert strengths["A1x.4"] > strengths["A1x.6"] > strengths["A1.5"]


# --- presets ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs(dlmom: Call, tmp_path: Path, preset: str) -> None:
    out = tmp_path / preset
    text = (ROOT / "configs" / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
    needed = yaml.safe_load(text).get("topology")
    topology = [] if needed else ["--topology", "lockstep"]
    done = dlmom(*command(out, *CHAIN, *topology, "--preset", preset, "--limit", 2))
    good(done)
    # The paper's knobs are the reference pipeline's.
    rows = rows_of(out, "REF" if preset == "paper" else preset)
    assert len(rows) == 2
    assert all(row["failure"] != "backend_error" for row in rows.values())
    latent = sum(row["latent_steps"] for row in rows.values())
    assert (latent > 0) == (preset != "paper")
    known = "is left out" in done.err
    assert known == (preset in ("soft_thinking", "stochastic_soft_thinking", "swir"))
    good(dlmom("replay", out))
    good(dlmom("validate", out))


# --- words that are wrong --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--preset", "swirl"], "unknown preset `swirl`; did you mean `swir`?"),
        (["--preset", "cipher", "--topology", "panel"], "needs topology debate"),
        (["--topology", "sequentially"], "unknown topology `sequentially`"),
        (["--alpha-unit", "quantile", "--alpha", "1.5"], "1.5 is no quantile"),
        (["--max-switches", "-2"], "--max-switches: -2 is not a count"),
        (["--drift", "1", "--batch-size", "1"], "--drift: a comparison needs 2 rows"),
        (["--pilot-items", "0"], "--pilot-items: 0 leaves no item"),
        (["--handoff", "kv", "--topology", "lockstep"], "only a sequential topology"),
    ],
)
def test_wrong_words_give_one_line(
    dlmom: Call, tmp_path: Path, words: list[str], says: str
) -> None:
    done = dlmom(*command(tmp_path / "o", *CHAIN, "--suite", "A1", *words))
    assert says in error_line(done)
    assert not (tmp_path / "o").exists()


def test_controls_need_latent_steps_to_take_packets_from(dlmom: Call, tmp_path: Path) -> None:
    done = dlmom(*command(tmp_path / "o", *CHAIN, "--suite", "C1", "--topology", "lockstep"))
    assert "took latent steps on 0 of 6 pilot items" in error_line(done)


# --- from Python -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> DeepLatentMoM:
    return DeepLatentMoM.from_pretrained(
        "zoo:tiny-general",
        topology="sequential",
        device="cpu",
        dtype="fp32",
        batch_size=2,
        max_len=160,
        threads=1,
    )


THINKING: dict[str, Any] = {
    "controller": {"gate": "always_latent", "max_latent_steps": 4},
    "max_steps": 40,
    "answer_reserve": 8,
}


def test_a_chain_answers_from_python(pair: DeepLatentMoM) -> None:
    result = pair.generate(QUESTION, config=THINKING, trace=True)
    assert [(h["from"], h["to"]) for h in result.handoffs] == [(0, 1)]
    assert result.handoffs[0]["trigger"] == "latent_budget"
    assert result.handoffs[0]["positions"] == 2
    assert len(result.prompt_tokens) == len(result.forward_tokens) == 2
    assert result.trace is not None
    assert set(result.trace["agent"]) == {0, 1}
    silent = pair.generate(QUESTION, config={**THINKING, "topology": {"max_handoffs": 0}})
    assert silent.handoffs == []
    assert silent.forward_tokens[1] == 0


def test_the_texts_of_the_answering_agents_steps_are_the_answer(pair: DeepLatentMoM) -> None:
    config = {
        "topology": {"handoff": "text"},
        "controller": {"gate": "always_explicit"},
        "max_steps": 60,
        "answer_reserve": 0,
    }
    with pair.stream(QUESTION, config=config) as steps:
        events = list(steps)
        result = steps.result
    assert {event.agent for event in events} == {0, 1}
    notes = "".join(event.text for event in events if event.agent == 0)
    assert notes
    assert "".join(event.text for event in events if event.agent == 1) == result.text
    assert result.handoffs[0]["payload"] == "text"
    assert result.handoffs[0]["positions"] > 0


def test_hidden_states_are_messages_of_agents_that_move_singly(pair: DeepLatentMoM) -> None:
    config = {**THINKING, "link": {"message": "hidden"}}
    result = pair.generate(QUESTION, config=config)
    assert result.latent_steps > 0
    assert result.text != pair.generate(QUESTION, config=THINKING).text or result.entropy
    with pytest.raises(ConfigError, match="noise needs packets"):
        pair.generate(QUESTION, config={**config, "noise": {"kind": "gumbel", "tau": 1.0}})


def test_presets_are_configurations_to_start_from(pair: DeepLatentMoM) -> None:
    with pytest.warns(UserWarning, match=r"swir: .* is left out"):
        config = pair.default_config("swir")
    assert config["controller"]["gate"] == "reference"
    assert config["lock_text"] is None
    assert config["triggers"]["converge_after"] == 2
    config["max_steps"] = 30
    config["answer_reserve"] = 0
    assert pair.generate(QUESTION, config=config).error is None
    with pytest.raises(ConfigError, match="did you mean `swir`"):
        pair.default_config("swirr")
    with pytest.raises(ConfigError, match="needs topology debate"):
        pair.default_config("cipher")


def test_topologies_are_named_or_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown topology `panels`; did you mean `panel`"):
        DeepLatentMoM.from_pretrained("zoo:tiny-general", topology="panels")
    with pytest.raises(ConfigError, match="is nobody's model"):
        DeepLatentMoM.from_pretrained(
            ["zoo:tiny-math", "zoo:tiny-general", "zoo:tiny-code"], topology="sequential"
        )
    file = tmp_path / "role.yaml"
    file.write_text(
        "name: x\nkind: sequential\nagents: [{role: writer}, {role: solver}]\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="no prompt is called `writer`"):
        DeepLatentMoM.from_pretrained("zoo:tiny-general", topology=file)
