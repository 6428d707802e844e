"""The one exception that users are meant to read."""

from __future__ import annotations

import sys
from collections.abc import Callable


class PrenormError(ValueError):
    """Bad input: the message is one clear line that names the offending thing and the remedy.

    Commands print it without a stack trace and exit with status 2 (see `run_command`).
    """


def run_command(command: Callable[[], None]) -> None:
    """Runs a command line's body; turns a `PrenormError` into one line on stderr and exit status 2."""
    try:
        command()
    except PrenormError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
