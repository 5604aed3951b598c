"""Every file under configs/ means the same to PyYAML and to the Rust parser.

The Rust side records what it reads and writes in golden files, which its own test keeps up to date,
so that this test needs no built extension.
"""

import json
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
GOLDEN_DIR = ROOT / "crates/dlmom-runs/tests/golden"
GOLDEN = json.loads((GOLDEN_DIR / "configs.json").read_text(encoding="utf-8"))
FILES = sorted(p for suffix in ("yaml", "yml") for p in CONFIGS.rglob(f"*.{suffix}"))


def typed(value: object) -> object:
    """The value with its types spelled out: 1, 1.0, True and "1" are four different things."""
    if isinstance(value, dict):
        return [(typed(key), typed(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [typed(item) for item in value]
    return (type(value).__name__, value)


def test_the_golden_file_names_every_file() -> None:
    assert sorted(GOLDEN) == [p.relative_to(CONFIGS).as_posix() for p in FILES]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(CONFIGS).as_posix())
def test_pyyaml_reads_what_rust_reads(path: Path) -> None:
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert typed(loaded) == typed(GOLDEN[path.relative_to(CONFIGS).as_posix()])


def test_pyyaml_reads_what_rust_wrote() -> None:
    emitted = json.loads((GOLDEN_DIR / "emitted.json").read_text(encoding="utf-8"))
    assert len(emitted) > 50
    for case in emitted:
        assert typed(yaml.safe_load(case["yaml"])) == typed(case["value"])


def test_the_papers_suites_hold_no_other_keys() -> None:
    suites = yaml.safe_load((CONFIGS / "suites.yaml").read_text(encoding="utf-8"))
    assert suites["defaults"] == {
        "alpha": 0.60,
        "w": None,
        "cap": 10,
        "k": 50,
        "tau": None,
        "lambda": None,
    }
    keys = {
        name: {key for cell in cells for key in cell} for name, cells in suites["suites"].items()
    }
    assert keys == {
        "A1": {"id", "soft_mode", "tau", "lambda"},
        "A2": {"id", "gate", "w", "cap"},
        "A3": {"id", "comm", "k"},
        "A4": {"id", "kv"},
    }
