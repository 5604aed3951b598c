"""What the pages show runs, what they link to exists.

Every command of a fenced block in README.md and docs/*.md runs here on few items, in one folder for
all pages, each distinct command once. Python blocks run as they stand.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Done
from .docs_blocks import Block, blocks, commands, documents

Call = Callable[..., Done]

NOT_RUN = {
    "make ": "sets up, builds or tests the whole project; these tests run inside it",
    "source ": "changes the shell that it is typed in",
    "DLMOM_UPDATE_GENERATED=1 cargo test ": "rewrites files of the repository; `cargo test` checks",
    "python -m dlmom_rs.bench": "takes minutes; tests/test_bench.py runs its parts",
    "python tests/docs_refresh.py": "runs every command of the pages in full, rewrites the pages",
}
"""Commands that are shown and not run, by how they begin, with the reason."""

ITEMS = 2
STEPS = 64
FIGURE_BYTES = 150_000


@dataclass
class Workshop:
    """The folder the commands run in, and which have run."""

    folder: Path
    ran: set[str] = field(default_factory=set)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """A folder with what the pages call the reader's own: models and files of benchmarks."""
    from dlmom_rs import zoo

    folder = tmp_path_factory.mktemp("docs")
    own = folder / "path" / "to"
    own.mkdir(parents=True)
    (own / "model-a").symlink_to(zoo.path("tiny-math"))
    (own / "model-b").symlink_to(zoo.path("tiny-general"))
    data = ROOT / "python" / "dlmom_rs" / "data"
    for target, source in (
        ("test.jsonl", "tinygsm.jsonl"),
        ("HumanEval.jsonl", "tinycode.jsonl"),
        ("arc.jsonl", "tinymc.jsonl"),
    ):
        lines = (data / source).read_text(encoding="utf-8").splitlines()[: 2 * ITEMS]
        (own / target).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Workshop(folder)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Leaves torch's thread count as it was."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def reset(words: list[str], option: str, *values: str) -> None:
    """Gives ``option`` other values, or appends it."""
    if option in words:
        at = words.index(option)
        end = at + 1
        while end < len(words) and not words[end].startswith("--"):
            end += 1
        del words[at:end]
    words += [option, *values]


def scaled(words: list[str]) -> list[str]:
    """The arguments of ``dlmom-rs`` for a quick run of the same kind."""
    words = list(words)
    if words[0] == "run":
        reset(words, "--pilot" if "--pilot" in words else "--limit", str(ITEMS))
        reset(words, "--seeds", "0")
        reset(words, "--display", "none")
        if "--drift" in words:
            reset(words, "--drift", "1")
    if "--item" in words:
        # The item shown need not be among the few of a quick run.
        traces = (Path(words[1]) / "traces" / "REF.jsonl").read_text(encoding="utf-8")
        reset(words, "--item", json.loads(traces.splitlines()[0])["item_id"])
    if words[0] in ("run", "generate"):
        reset(words, "--threads", "1")
        reset(words, "--max-steps", str(STEPS))
        reset(words, "--device", "cpu")
    return words


def run_script(path: Path, arguments: list[str]) -> str:
    """What a Python program prints, run in this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
    return printed.getvalue()


def run_module(name: str, arguments: list[str]) -> str:
    """What ``python -m`` prints, run in this process."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", [name, *arguments])
        runpy.run_module(name, run_name="__main__")
    return printed.getvalue()


def run_command(dlmom: Call, command: str) -> str:
    """Runs a scaled command; the test fails with its standard error."""
    words = shlex.split(command)
    if words[0].startswith(".venv/bin/"):
        words[0] = words[0].removeprefix(".venv/bin/")
    if words[:3] == ["python", "-m", "dlmom_rs"]:
        words[:3] = ["dlmom-rs"]
    if words[0] in ("dlmom-rs", "dlmom"):
        done = dlmom(*scaled(words[1:]))
        assert done.status == 0, f"{command}\n{done.err}"
        assert "Traceback" not in done.err, f"{command}\n{done.err}"
        return done.out
    if words[:3] == ["python", "-m", "dlmom_rs.zoo.evaluate"]:
        reset(words, "--limit", str(ITEMS))
        reset(words, "--threads", "1")
        return run_module(words[2], words[3:])
    if words[0] == "python" and words[1].startswith("examples/"):
        return run_script(ROOT / words[1], words[2:])
    pytest.fail(f"a command that no test runs and NOT_RUN does not list: {command}")


def listed(command: str) -> bool:
    return any(f"{command} ".startswith(start) for start in NOT_RUN)


def compare(block: Block, written: list[str], printed: str) -> None:
    """Holds the output of a block marked ``exact`` to what was printed now.

    ``exact=N`` compares the first N words of a line.
    """
    if not any(word.partition("=")[0] == "exact" for word in block.info.split()):
        return
    count = int(block.option("exact") or 0) or None
    short = [line.split()[:count] for line in printed.rstrip().splitlines()]
    assert [line.split()[:count] for line in written] == short, (
        "an output in the pages is out of date; python tests/docs_refresh.py rewrites it"
    )


@pytest.mark.parametrize("page", documents(), ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_and_python_blocks_run(
    dlmom: Call, workshop: Workshop, monkeypatch: pytest.MonkeyPatch, page: Path
) -> None:
    monkeypatch.chdir(workshop.folder)
    names: dict[str, Any] = {"__name__": "docs"}
    printed = ""
    for block in blocks(page):
        if block.language in ("sh", "console", ""):
            for command in commands(block):
                if listed(command.line) or command.line in workshop.ran:
                    continue
                output = run_command(dlmom, command.line)
                workshop.ran.add(command.line)
                compare(block, block.lines[len(command.written) :], output)
        elif block.language == "python":
            buffer = io.StringIO()
            with contextlib.redirect_stdout(buffer):
                exec(compile(block.text, str(page), "exec"), names)
            printed = buffer.getvalue()
        elif block.language == "text" and "output" in block.info.split():
            compare(block, block.lines, printed)
        elif (name := block.option("suites")) is not None:
            Path(name).write_text(block.text, encoding="utf-8")


def test_nothing_is_listed_as_not_run_in_vain() -> None:
    shown = [
        command.line
        for page in documents()
        for block in blocks(page)
        if block.language in ("sh", "console", "")
        for command in commands(block)
    ]
    for start in NOT_RUN:
        assert any(f"{line} ".startswith(start) for line in shown), f"no page shows {start!r}"


def test_every_example_is_run_by_a_page() -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in documents())
    for example in (ROOT / "examples").glob("*.py"):
        assert f"python examples/{example.name}" in text, example.name


# Links.


def markdown_files() -> list[Path]:
    """Every Markdown file of the repository, as git knows it; else those in its usual places."""
    try:
        done = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        found = [ROOT / line for line in done.stdout.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        found = [
            *ROOT.glob("*.md"),
            *(ROOT / "docs").rglob("*.md"),
            *(ROOT / "crates").glob("*/*.md"),
        ]
    return sorted(path for path in found if path.is_file())


def prose(path: Path) -> str:
    """A page without its fenced blocks and inline code."""
    kept: list[str] = []
    fenced = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            kept.append(line)
    return re.sub(r"`[^`\n]*`", "", "\n".join(kept))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    fenced = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        if fenced or not re.match(r"#{1,6} ", line):
            continue
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("#").strip())
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        name, count = slug, 0
        while name in found:
            count += 1
            name = f"{slug}-{count}"
        found.add(name)
    return found


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(\s*([^)\s]+)(?:\s+\"[^\"]*\")?\s*\)", prose(path))


@pytest.mark.parametrize("page", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_and_anchors_resolve(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        at = (page.parent / target).resolve() if target else page
        assert at.exists(), f"{page.name}: {link}"
        assert at.is_relative_to(ROOT), f"{page.name}: {link} leaves the repository"
        if anchor:
            assert at.suffix == ".md", f"{page.name}: {link} has an anchor"
            assert anchor in anchors(at), f"{page.name}: {link}; there are {sorted(anchors(at))}"


def test_figures_are_small_and_shown() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    shown: set[Path] = set()
    for page in pages:
        for image in re.findall(r"!\[[^\]]+\]\(([^)\s]+)\)", prose(page)):
            path = (page.parent / image).resolve()
            assert path.is_file(), f"{page.name}: {image}"
            assert path.stat().st_size < FIGURE_BYTES, image
            shown.add(path)
    there = {path for path in (ROOT / "docs" / "figures").iterdir() if path.is_file()}
    assert there, "docs/figures is empty"
    assert there <= shown, f"no page shows {sorted(p.name for p in there - shown)}"


def test_every_page_is_reached_from_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    reached = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
    for page in (ROOT / "docs").rglob("*.md"):
        assert page == index or page in reached, page.relative_to(ROOT)


def test_pages_name_no_place_on_a_machine() -> None:
    files = [*(ROOT / "docs").rglob("*.md"), *(ROOT / "docs" / "figures").iterdir()]
    for path in [ROOT / "README.md", *files]:
        text = path.read_text(encoding="utf-8")
        found = re.search(r"(?<![\w.])/(home|root|tmp|work|Users|mnt|var)/", text)
        assert found is None, f"{path.name}: {found and text[found.start() :][:60]!r}"


def test_the_helpers_read_blocks_and_commands(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```console head=2\n$ a b \\\n    --c d  # why\nout\n$ e\n```\n"
        "```\nmake x   # y\n```\n```text output exact=3\nz\n```\n"
    )
    first, second, third = blocks(page)
    assert [command.line for command in commands(first)] == ["a b --c d", "e"]
    assert (first.option("head"), first.option("tail")) == ("2", None)
    assert [command.line for command in commands(second)] == ["make x"]
    assert (third.language, third.option("exact"), third.lines) == ("text", "3", ["z"])
    words = ["run", "--seeds", "0", "1", "--limit", "60", "--out", "x"]
    assert shlex.join(scaled(words)) == (
        "run --out x --limit 2 --seeds 0 --display none --threads 1 --max-steps 64 --device cpu"
    )
