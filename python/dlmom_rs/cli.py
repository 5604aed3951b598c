"""Entry point of the ``dlmom-rs`` and ``dlmom`` commands."""

from __future__ import annotations

import sys
from typing import NoReturn

from dlmom_rs import _core


def main() -> NoReturn:
    """Run the command line on ``sys.argv`` and exit with its status.

    Exit status: 0 success, 1 a failure while running, 2 bad usage or input, 130 interrupted.
    """
    try:
        status = _core.main(sys.argv)
    except KeyboardInterrupt:
        status = 130
    sys.stdout.flush()
    sys.exit(status)
