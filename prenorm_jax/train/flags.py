"""The configuration on a command line: `--config=FILE`, and a flag for every key, such as --config.steps=100."""

import re
import runpy
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import flatten
from prenorm_jax.base.flags import Parser, place
from prenorm_jax.config import base_config, describe_keys, full_config


def parse(
    parser: Parser, argv: Sequence[str] | None, without: Callable[[Namespace], ConfigDict]
) -> tuple[Namespace, ConfigDict]:
    """The parser's flags, and the configuration: that of --config, else what `without` makes of the flags; changed.

    The parser is made with add_help=False: --help, which ends the process, also lists the keys of the configuration.
    Raises PrenormError, also for what is wrong in a config file, and what `without` raises.
    """
    helped = "this help; with --config the keys have the values of that file"
    files = f"; {', '.join(found)}" if (found := config_files()) else ""
    asked = f"the configuration of a new run; a size comes after a colon, as in configs/gpt3.py:6.7B{files}"
    parser.add_argument("--config", metavar="FILE", type=place, help=asked)
    parser.add_argument("-h", "--help", action="store_true", help=helped)
    args, rest = parser.parse_known_args(argv)
    if args.help:
        keys = describe_keys(read_config(args.config) if args.config else base_config())
        print(f"{parser.format_help()}\nkeys of the configuration, each a flag:\n{keys}", flush=True)
        sys.exit()
    config = read_config(args.config) if args.config else without(args)
    override(config, rest, parser)
    return args, config


def config_files() -> list[str]:
    """Those of this project, where it is run from a clone."""
    return sorted(map(str, Path("configs").glob("*.py")))


def read_config(given: str) -> ConfigDict:
    """What `get_config` of a file gives, every key; FILE:ARGUMENT gives it an argument. Raises PrenormError."""
    file, *argument = given.split(":", 1)
    if not Path(file).is_file():
        raise PrenormError(f"--config={given}: no such file; those of this project are in configs/")
    try:
        config = runpy.run_path(file)["get_config"](*argument)
        values = config.to_dict() if isinstance(config, ConfigDict) else None
    except (Exception, SystemExit) as error:  # a config file is a program: anything can be wrong with it
        kind = "" if isinstance(error, PrenormError) else f"{type(error).__name__}: "
        raise PrenormError(f"--config={given}: {kind}{' '.join(str(error).split()) or 'it says no more'}") from error
    if values is None:
        raise PrenormError(f"--config={given}: its get_config returns no ConfigDict, but a {type(config).__name__}")
    found, keys = flatten(values).keys(), flatten(base_config(full_config(values, f"--config={given}").model.family))
    if wrong := sorted(found ^ keys):
        what = "no key of a configuration is" if wrong[0] in found else "it lacks"
        raise PrenormError(f"--config={given}: {what} {wrong[0]}: begin with base_config() of prenorm_jax.config")
    return config  # as it is: keys that follow others still do


def override(config: ConfigDict, given: Sequence[str], parser: Parser, keys: Collection[str] | None = None) -> None:
    """Changes the configuration as the flags say that the parser left over; only these keys (None: all).

    Raises PrenormError for what is no such flag, or no value of its key.
    """
    known = {f"--config.{key}": key for key in flatten(config)}
    rest, unset = [], flatten(base_config(config.model.family))
    for argument in given:
        name = re.sub(r"^--?(no(?=config\.))?", "--", argument.split("=")[0])
        if argument.startswith("-") and name not in known:
            raise parser.unknown(argument, [flag for flag, key in known.items() if keys is None or key in keys])
        if keys is not None and known.get(name, "") not in keys and argument.startswith("-"):
            raise PrenormError(f"{name} cannot be changed here: only {', '.join(sorted(keys))} can, where data lie")
        key, value = known.get(name), argument.partition("=")[2]
        if value == "None" and key in unset and unset[key] is None:  # as --help shows it
            config.update_from_flattened_dict({key: None})
            continue
        rest.append(argument)
    scratch = flags.FlagValues()
    argv = ["", *rest]  # absl wants a program's name
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=scratch, sys_argv=argv)
        _, *rest = scratch(argv)
    except Exception as error:
        raise PrenormError(f"command line: {' '.join(str(error).split())}") from error
    if rest:
        raise parser.unknown(rest[0])
