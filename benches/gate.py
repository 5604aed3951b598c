"""Instruction counts of fixed work, against those recorded: ``make bench-gate``.

Times of a shared machine vary by more than a regression; instructions under callgrind do not. A
count that grew by more than a hundredth fails. ``--update`` records the counts instead, ``--out
FILE`` also writes what was counted.

Needs valgrind. Counts depend on the compiler, so the file names the one they belong to, and another
one is an error that says how to record anew.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT / "benches" / "instructions.json"
#: Hundredths by which a count may grow.
TOLERANCE = 1
#: Package, example and arguments of every work, by name.
WORKS = {
    "consensus": ("dlmom-kernels", "fixed_work", []),
    "attention": ("dlmom-kernels", "fixed_attention", []),
    "packet": ("dlmom-benches", "fixed_protocol", ["packet"]),
    "controller": ("dlmom-benches", "fixed_protocol", ["controller"]),
    "round": ("dlmom-benches", "fixed_protocol", ["round"]),
}


def fail(message: str) -> NoReturn:
    """One line on standard error, exit code 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def compiler() -> str:
    """The compiler that the counts belong to."""
    version = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=True)
    return f"{version.stdout.split(' (')[0].strip()}, {platform.machine()}"


def target_directory() -> Path:
    """Where cargo builds."""
    done = subprocess.run(
        ["cargo", "metadata", "--format-version", "1", "--no-deps", "--locked"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    return Path(json.loads(done.stdout)["target_directory"])


def count(binary: Path, arguments: list[str]) -> int:
    """Instructions that a program executes."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"--callgrind-out-file={folder}/out"
        command = ["valgrind", "--tool=callgrind", out, str(binary), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode != 0 or found is None:
        fail(f"{binary.name} {' '.join(arguments)}: {done.stderr.strip().splitlines()[-1]}")
    return int(found[1])


def main() -> int:
    """Count, then compare or record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", action="store_true", help="record the counts")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the counts to FILE")
    args = parser.parse_args()
    if shutil.which("valgrind") is None:
        fail("valgrind is not installed (Debian: apt install valgrind)")
    for package, example, _ in WORKS.values():
        command = ["cargo", "build", "--release", "--locked", "--quiet", "-p", package]
        subprocess.run([*command, "--example", example], check=True, cwd=ROOT)
    examples = target_directory() / "release" / "examples"
    counts = {
        name: count(examples / example, arguments)
        for name, (_, example, arguments) in WORKS.items()
    }
    found = {"compiler": compiler(), "instructions": counts}
    text = json.dumps(found, indent=2) + "\n"
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    if args.update:
        RECORDED.write_text(text, encoding="utf-8")
        print(text, end="")
        return 0
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    if recorded["compiler"] != found["compiler"]:
        fail(
            f"the counts in {RECORDED.name} are of {recorded['compiler']}, this is "
            f"{found['compiler']}: record them anew with --update, from a commit that is known"
        )
    worse = 0
    for name, now in counts.items():
        before = recorded["instructions"][name]
        more = 100 * (now - before) > TOLERANCE * before
        worse += more
        change = 100 * (now / before - 1)
        verdict = "MORE" if more else "ok"
        print(f"{name:<12} {before:>14,} -> {now:>14,}  {change:+.2f} %  {verdict}")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
