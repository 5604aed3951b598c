"""Every example runs as it stands and shows what it is about."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"

EXPECTED: dict[str, list[str]] = {
    "ask.py": [
        r"^answer: '.+'$",
        r"^\d+ tokens printed, \d+ latent steps, \d+ switches, \d+ bytes up, \d+ bytes down$",
        r"^   0  (latent|explicit)  +\d\.\d{4}  .+$",
        r"^the stream came to the same result: True$",
    ],
    "own_parts.py": [
        r"^built-in parts +\d+ latent, +\d+ printed, entropy 0\.\d{4}: '.+'$",
        r"^own controller +\d+ latent, ",
        r"^own consensus +\d+ latent, ",
        r"^own compressor +\d+ latent, ",
        r"^the compressor was asked about [1-9]\d* layers$",
    ],
    "packets.py": [
        r"^BeliefPacket\(k=50, vocab=151665, ",
        r"^f32 +436\.0  0\.00e\+00$",
        r"^compact +1\d\d\.\d  \d\.\d+e-0[4-9]$",
        r"^transcript of 12 packets: \d{4} bytes, compact \d{4}$",
        r"^read back as it was: True$",
        r"^one flipped bit: .*checksum",
    ],
    "read_a_run.py": [
        r"^\| REF ",
        r"^12 samples with \d+ columns$",
        r"^│ A1\.3 +┆ 6 ",
        r"^│ REF +┆ 6 ",
    ],
}


def test_every_example_is_tested_here() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for pattern in EXPECTED[name]:
        assert re.search(pattern, done.stdout, re.MULTILINE), f"{pattern}\n{done.stdout}"
    # Nothing is left behind.
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", EXPECTED)
def test_an_example_says_what_it_shows(name: str) -> None:
    text = (EXAMPLES / name).read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert f"python examples/{name}" in text.split('"""')[1]
