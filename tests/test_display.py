"""The live panel and the environment record."""

from __future__ import annotations

import json

import pytest
from rich.console import Console

from dlmom_rs.display import RichDisplay


def progress(done: int, **more: object) -> str:
    cell = {
        "id": "A1.3",
        "done": done,
        "total": 20,
        "session": done,
        "correct": done // 2,
        "failures": 0,
        "coverage": 0.25,
        "active": 4,
        "rate": 2.0,
        "eta_s": 1.0,
    }
    return json.dumps({**cell, **more})


def test_the_panel_shows_place_accuracy_coverage_and_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dlmom_rs.display as module

    monkeypatch.setattr(
        module, "Console", lambda stderr: Console(stderr=stderr, force_terminal=True, width=120)
    )
    panel = RichDisplay()
    panel.start(json.dumps({"id": "A1.3", "index": 2, "cells": 7, "total": 20, "done": 0}))
    panel.update(progress(10))
    panel.line(json.dumps("a [line] to keep"))
    panel.finish(progress(20, failures=3))
    panel.stop("null")
    shown = capsys.readouterr().err
    for word in ("A1.3", "20/20", "acc 50.0 %", "latent 25.0 %", "3 failed", "a [line] to keep"):
        assert word in shown, word


def test_events_of_an_unknown_cell_are_ignored() -> None:
    panel = RichDisplay()
    panel.update(progress(1))
    panel.stop("null")


def test_the_environment_names_versions_and_devices() -> None:
    import torch

    from dlmom_rs import environment

    facts = json.loads(environment.as_json())
    assert facts["torch"] == torch.__version__
    assert {"uname", "python", "transformers", "hip", "cuda", "cpu", "devices", "rocminfo"} <= set(
        facts
    )
    assert len(facts["devices"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert "node" not in facts["uname"], "the name of a machine decides nothing"
