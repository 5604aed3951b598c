"""The stub of the compiled module says what the module has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALLOWLIST = ROOT / "tests" / "stubtest_allowlist.txt"


# The stub needs no more than the package's own types, and mypy itself checks those.
CONFIG = """
[mypy]
python_version = 3.11
ignore_errors = True
[mypy-torch.*,numpy.*,polars.*]
follow_imports = skip
"""


def stubtest(package: Path, work: Path) -> subprocess.CompletedProcess[str]:
    """Compares the stub in ``package`` with the built module."""
    config = work / "mypy.ini"
    config.write_text(CONFIG, encoding="utf-8")
    return subprocess.run(
        [
            *(sys.executable, "-m", "mypy.stubtest", "dlmom_rs._core"),
            *("--allowlist", str(ALLOWLIST)),
            *("--mypy-config-file", str(config)),
        ],
        cwd=work,
        env={**os.environ, "MYPYPATH": str(package.parent)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_stub_matches_the_module(tmp_path: Path) -> None:
    done = stubtest(ROOT / "python" / "dlmom_rs", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Success: no issues found in 1 module" in done.stdout


def test_a_stub_that_differs_is_found(tmp_path: Path) -> None:
    package = tmp_path / "python" / "dlmom_rs"
    shutil.copytree(
        ROOT / "python" / "dlmom_rs",
        package,
        ignore=shutil.ignore_patterns("models", "data", "*.so", "__pycache__"),
    )
    stub = package / "_core.pyi"
    text = stub.read_text(encoding="utf-8")
    stub.write_text(text.replace("def cancel(self)", "def stop(self)"), encoding="utf-8")
    done = stubtest(package, tmp_path)
    assert done.returncode == 1
    assert "CancelToken.stop is not present at runtime" in done.stdout
    assert "CancelToken.cancel is not present in stub" in done.stdout


def test_every_line_of_the_allowlist_has_a_reason() -> None:
    lines = ALLOWLIST.read_text(encoding="utf-8").splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if line and not line.startswith("#"):
            assert before.startswith("# "), line


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "python" / "dlmom_rs" / "py.typed").is_file()
