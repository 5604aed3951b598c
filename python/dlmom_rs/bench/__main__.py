"""``python -m dlmom_rs.bench [--only NAME...] [--json FILE] [--rounds N] [--threads N]``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dlmom_rs import environment

from . import consensus, refill, step, suite
from .timing import Entry

BENCHES: dict[str, Callable[[int, int], Iterator[Entry]]] = {
    "consensus": consensus.entries,
    "step": step.entries,
    "refill": refill.entries,
    "suite": suite.entries,
}


def _number(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m dlmom_rs.bench", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(BENCHES), metavar="NAME", default=None)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every entry to FILE")
    parser.add_argument("--rounds", type=_number, default=7, help="turns of each variant")
    parser.add_argument("--threads", type=_number, default=1, help="of torch and of the kernel")
    return parser.parse_args(argv)


def _line(entry: Entry) -> str:
    facts = "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in entry.facts.items()
    )
    return (
        f"{entry.name:<28} {entry.ours:>10.4g} {entry.unit:<9} against {entry.baseline:>10.4g} "
        f"({entry.against}): {entry.ratio:.2f}x  {facts}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run benchmarks, one line each; 2 where the file cannot be written."""
    args = _parse(argv)
    if args.json is not None and not args.json.parent.is_dir():
        print(f"error: --json: {args.json.parent} is no folder", file=sys.stderr)
        return 2
    found: list[dict[str, Any]] = []
    for name in args.only or BENCHES:
        for entry in BENCHES[name](args.rounds, args.threads):
            print(_line(entry), flush=True)
            found.append({"bench": name, **entry.as_dict()})
            if args.json is not None:
                facts = {"environment": environment.collect(), "rounds": args.rounds}
                facts |= {"threads": args.threads, "entries": found}
                args.json.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
