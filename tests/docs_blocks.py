"""Fenced blocks of Markdown files and the commands in them.

For `test_docs.py` and `docs_refresh.py`.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"^(?P<fence>```+)(?P<info>[^`]*)$")


@dataclass(frozen=True)
class Block:
    """A fenced block; ``start`` is the index of its first line inside the fence."""

    language: str
    info: str
    start: int
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines) + "\n"

    def option(self, name: str) -> str | None:
        """The value of ``name=VALUE`` behind the language."""
        for word in self.info.split():
            key, _, value = word.partition("=")
            if key == name:
                return value
        return None


def documents() -> list[Path]:
    """The pages whose commands are run."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found: list[Block] = []
    fence = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        mark = _FENCE.match(line)
        if fence:
            if mark and mark["fence"] == fence and not mark["info"]:
                fence = ""
            else:
                found[-1].lines.append(line)
        elif mark:
            fence = mark["fence"]
            language, _, info = mark["info"].strip().partition(" ")
            found.append(Block(language, info, number + 1, []))
    assert not fence, f"{path.name}: a block is not closed"
    return found


@dataclass(frozen=True)
class Command:
    """A command in one line, and the lines it is written in."""

    line: str
    written: list[str]


def commands(block: Block) -> list[Command]:
    """Commands of a ``sh``, ``console`` or unmarked block; a backslash joins lines.

    In a ``console`` block they follow ``$``, and the rest is output.
    """
    found: list[Command] = []
    written: list[str] = []
    for line in block.lines:
        if not written and block.language == "console" and not line.startswith("$ "):
            continue
        written.append(line)
        if line.endswith("\\"):
            continue
        text = " ".join(part.removesuffix("\\").strip() for part in written)
        if block.language == "console":
            text = text.removeprefix("$ ")
        words = shlex.split(text, comments=True)
        if words:
            found.append(Command(shlex.join(words), written))
        written = []
    return found
