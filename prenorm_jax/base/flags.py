"""Command lines with a configuration: `--config=FILE`, and a flag for every key of it, such as --config.steps=100."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from prenorm_jax.base.errors import PrenormError


def parse_flags(
    given: flags.FlagValues,
    argv: Sequence[str] | None,
    default: Callable[[dict[str, str]], ConfigDict],
    usage: str,
) -> None:
    """Parses absl flags into `given`, with the configuration as `given.config`.

    Args:
      given: defines the program's own flags. Not absl's `flags.FLAGS`: that one can be parsed once in a process.
      argv: the command line after the program's name; None: that of this process.
      default: where there is no --config, makes the configuration from the program's own flags that are given. May
        raise.
      usage: for --help, which prints it above the flags and ends the process.

    Raises PrenormError for what absl, ml_collections or a config file does not like.
    """
    if argv is None:
        argv = sys.argv[1:]
    if {"--help", "-help", "-h"} & set(argv):
        print(f"{usage.strip()}\n\nflags:\n{given.get_help()}")
        sys.exit()
    first_own = next(iter(given))
    names = "|".join(["config", *(name for name in given if not given[name].boolean)])
    argv = re.sub(rf"(^|\0)--?({names})\0", r"\1--\2=", "\0".join(argv)).split("\0")  # "--config x" as "--config=x"
    argv = ["", *filter(None, argv)]  # absl wants a program's name
    written = dict(match.groups() for arg in argv if (match := re.fullmatch(f"--?({names})=(.*)", arg)))
    if "config" in written:
        if not Path(written["config"].split(":")[0]).is_file():
            raise PrenormError(f"--config={written['config']}: no such file; those of this project are in configs/")
        config_flags.DEFINE_config_file("config", flag_values=given, sys_argv=argv)
    else:
        config_flags.DEFINE_config_dict("config", default(written), flag_values=given, sys_argv=argv)
    try:
        rest = given(argv)
        given.config.model.keys()  # an error in the file shows only now
    except (AttributeError, KeyError) as error:
        reason = str(error).replace("\\n", ". ").replace("\\", "").strip("'\"")  # it comes quoted, twice
        raise PrenormError(
            f"command line or config file: no such key: {reason}; prenorm_jax/config.py lists the keys"
        ) from error
    except Exception as error:  # a config file is a program: anything can be wrong with it
        lines = str(error).strip().splitlines()  # ending in the error itself, after the stack trace of a config file
        reason = lines[-1].removeprefix("prenorm_jax.base.errors.PrenormError: ") if len(lines) > 3 else " ".join(lines)
        raise PrenormError(f"command line or config file: {reason}") from error
    if len(rest) > 1:
        raise PrenormError(f"command line: {rest[1]!r} is not a flag; flags look like --{first_own}=VALUE")
