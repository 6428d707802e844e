"""The one exception that users are meant to read, and the checks and commands that raise and print it."""

import operator
import re
from typing import Any


class PrenormError(ValueError):
    """Bad input: the message is one clear line that names the offending thing and the remedy.

    Commands print it without a stack trace and exit with `status` (see `run_command`).
    """

    status = 2
    shared = False  # whether all of many processes raise it: then the first alone prints it (`console.end`)


class SharedError(PrenormError):
    """One that all of many processes raise."""

    shared = True


class Unwritable(PrenormError):
    """The folder of a run cannot be written to any more: its last complete checkpoint is what is left."""


class Interrupted(SharedError):
    """A run was asked to stop and saved first: the same command goes on with it.

    The status is 75 (EX_TEMPFAIL, "try again"), or 76 where there was no time to save.
    """

    status = 75
    status_unsaved = 76


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises PrenormError naming `key` unless the value is one of the choices."""
    if value not in choices:
        raise PrenormError(f"{key}={value!r} is not one of {', '.join(choices)}")


def check_range(key: str, value: float | None, at_least: float, below: float = float("inf")) -> None:
    """Raises PrenormError naming `key` unless at_least <= value < below (or value is None)."""
    if value is not None and not at_least <= value < below:
        limit = f" and below {below}" if below < float("inf") else " and finite" if value == below else ""
        raise PrenormError(f"{key}={value} must be at least {at_least}{limit}")


def check_integer(key: str, value: Any) -> None:
    """Raises PrenormError naming `key` unless the value is an integer, of Python, NumPy or JAX (or None)."""
    try:
        operator.index(0 if value is None else value)
    except TypeError as error:
        raise PrenormError(f"{key}={value!r} must be an integer") from error


def first_line(error: BaseException) -> str:
    """An error's message as one line, or its type where it has none; 300 characters at most.

    Of a longer message the beginning of the first line and the end of the last stay: what failed, and mostly why.
    """
    lines = [" ".join(line.split()) for line in str(error).splitlines() if any(map(str.isalnum, line))]
    whole = " ".join(lines) or type(error).__name__
    return whole if len(whole) <= 300 else f"{lines[0][:199]} … {lines[-1][-98:]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was exhausted: the host's, or a device's in the words of XLA."""
    words = r"RESOURCE_EXHAUSTED|(?i:out of memory|bad_alloc)"
    return isinstance(error, MemoryError) or bool(isinstance(error, RuntimeError) and re.search(words, str(error)))
