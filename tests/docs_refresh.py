"""Run the commands and Python blocks of docs/*.md in full; write their outputs and the figures.

    python tests/docs_refresh.py

A ``console`` block with ``head=N`` or ``tail=N`` keeps so many lines of each command's output. A
``text output`` block holds what the Python block before it printed.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from docs_blocks import ROOT, Block, blocks, commands

DOCS = ROOT / "docs"
# Later pages use the runs of earlier ones.
PAGES = ("tutorial", "loop", "topologies", "evidence", "packets", "own-parts", "benches")
FIGURES = {
    "trace_REF_667812e5.svg": "trace-threshold.svg",
    "trace_A2.3_667812e5.svg": "trace-trend.svg",
    "switch_count_cdf.svg": "switches.svg",
    "bandwidth_vs_accuracy.svg": "bandwidth.svg",
}


def execute(command: str) -> list[str]:
    """What a command prints to either stream, in lines without trailing spaces."""
    words = shlex.split(command)
    if words[0] == "dlmom-rs":
        words = [sys.executable, "-m", "dlmom_rs", *words[1:]]
    elif words[:1] == ["python"]:
        words = [sys.executable, str(ROOT / words[1]), *words[2:]]
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(f"exit status {done.returncode}: {command}\n{done.stdout}")
    return [line.rstrip() for line in done.stdout.rstrip().splitlines()]


def cut(lines: list[str], block: Block) -> list[str]:
    """The first and last lines that a block wants of an output."""
    head, tail = block.option("head"), block.option("tail")
    if head is None and tail is None:
        return lines
    first, last = int(head or 0), int(tail or 0)
    if len(lines) <= first + last:
        return lines
    return [*lines[:first], "...", *lines[len(lines) - last :]]


def refresh(path: Path, ran: set[str]) -> None:
    text = path.read_text(encoding="utf-8").splitlines()
    replaced: list[tuple[Block, list[str]]] = []
    names: dict[str, Any] = {"__name__": "docs"}
    printed = ""
    for block in blocks(path):
        if block.language == "console":
            output: list[str] = []
            for command in commands(block):
                if output:
                    output.append("")
                output += [*command.written, *cut(execute(command.line), block)]
                ran.add(command.line)
            replaced.append((block, output))
        elif block.language == "sh":
            for command in commands(block):
                line = command.line
                if line.startswith("dlmom-rs") and "path/to" not in line and line not in ran:
                    execute(line)
                    ran.add(line)
        elif block.language == "python":
            buffer = io.StringIO()
            with contextlib.redirect_stdout(buffer):
                exec(compile(block.text, path.name, "exec"), names)
            printed = buffer.getvalue()
        elif block.language == "text" and "output" in block.info.split():
            replaced.append((block, [line.rstrip() for line in printed.rstrip().splitlines()]))
        elif (name := block.option("suites")) is not None:
            Path(name).write_text(block.text, encoding="utf-8")
    for block, lines in reversed(replaced):
        text[block.start : block.start + len(block.lines)] = lines
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ran: set[str] = set()
        for page in PAGES:
            print(page, flush=True)
            refresh(DOCS / f"{page}.md", ran)
        for source, target in FIGURES.items():
            shutil.copyfile(Path("runs/first/figs") / source, DOCS / "figures" / target)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
