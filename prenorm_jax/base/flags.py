"""Command lines with a configuration: `--config=FILE`, and a flag for every key of it, such as --config.steps=100."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from prenorm_jax.base.errors import PrenormError


def parse_flags(argv: list[str], own: Collection[str], default: Callable[[dict[str, str]], ConfigDict]) -> list[str]:
    """Parses absl flags into `flags.FLAGS`, with the configuration as `flags.FLAGS.config`.

    Args:
      argv: the command line, its first word the program's name.
      own: flags of the program that may also be written as two words.
      default: where there is no --config, makes the configuration from those of `own` that are given. May raise.

    Raises PrenormError for what absl, ml_collections or a config file does not like.
    """
    names = "|".join(["config", *own])
    argv = re.sub(rf"(^|\0)--?({names})\0", r"\1--\2=", "\0".join(argv)).split("\0")  # "--config x" as "--config=x"
    given = dict(match.groups() for arg in argv if (match := re.fullmatch(f"--?({names})=(.*)", arg)))
    if "config" in given:
        if not Path(given["config"].split(":")[0]).is_file():
            raise PrenormError(f"--config={given['config']}: no such file; those of this project are in configs/")
        config_flags.DEFINE_config_file("config")
    else:
        config_flags.DEFINE_config_dict("config", default(given))
    try:
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.model.keys()  # an error in the file shows only now
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
        raise PrenormError(f"command line: {rest[1]!r} is not a flag; flags look like --{next(iter(own))}=VALUE")
    return rest
