"""Command lines: argparse's, where what is wrong is one line that names what may be meant."""

import argparse
import difflib
import functools
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from prenorm_jax.base.errors import PrenormError


class Parser(argparse.ArgumentParser):
    """argparse's, but it raises PrenormError. No flag can be shortened: what is none is said, not guessed."""

    def __init__(self, prog: str, description: str, **options: Any):
        """`description`: its first line is what the command does, further ones are kept as they are."""
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, description=description, allow_abbrev=False, formatter_class=layout, **options)

    def error(self, message: str) -> None:
        """Raises PrenormError, where argparse prints how the command is used and ends the process."""
        raise PrenormError(f"command line: {message}; --help lists the flags")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's; but one that is nearly a flag is named before those that are missing."""
        args = sys.argv[1:] if args is None else args
        known = [flag for flag in self._option_string_actions if flag.startswith("--")]
        for name in (argument.split("=")[0] for argument in args if argument.startswith("--")):
            if name not in known and "." not in name and difflib.get_close_matches(name, known, cutoff=0.7):
                raise self.unknown(name)
        return super().parse_known_args(args, namespace)

    def print_help(self, file: Any = None) -> None:
        """Prints it at once, so that a pipe that is closed shows here."""
        print(self.format_help(), file=file, flush=True)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:
        """The values of the flags. Raises PrenormError."""
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            raise self.unknown(rest[0])
        return known

    def unknown(self, argument: str, others: Iterable[str] = ()) -> PrenormError:
        """What to say of an argument that is no flag: those among its flags and `others` that may be meant."""
        flags, name = [*self._option_string_actions, *others], argument.split("=")[0]
        if not name.startswith("-"):
            return PrenormError(f"command line: {argument!r} is not a flag; flags look like {flags[-1]}=VALUE")
        keys = {flag.lstrip("-").removeprefix("config."): flag for flag in flags}
        wanted = name.lstrip("-").removeprefix("config.")
        close = functools.partial(difflib.get_close_matches, cutoff=0.7)
        last = wanted.split(".")[-1]  # --norm may mean --config.model.norm
        near = [key for key in keys if key.split(".")[-1] == last] or close(wanted, keys)
        near = near or [key for key in keys if close(last, [key.split(".")[-1]])]
        meant = f"did you mean {' or '.join(keys[key] for key in near[:3])}?" if near else "--help lists the flags"
        return PrenormError(f"command line: no such flag: {name}; {meant}")


def place(given: str) -> str:
    """A file or folder of the command line, as argparse's `type`: `~` is the home folder."""
    path = os.path.expanduser(given)
    if not path or path.startswith("~"):
        raise argparse.ArgumentTypeError(f"{given!r} names no file or folder")
    return path
