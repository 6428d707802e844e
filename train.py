"""Trains a model: `python train.py --config=configs/gpt_stdlib.py --workdir=runs/ln --config.model.norm=layernorm`.

Called again with the same arguments it goes on from the last checkpoint. Without --config it goes on with the
configuration that the workdir holds. Every key of the configuration is a flag, such as --config.steps=100.
"""

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.flags import Parser, place
from prenorm_jax.base.processes import initialize


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line says; None: that of this process. Raises PrenormError."""
    from prenorm_jax.train.flags import parse
    from prenorm_jax.train.workdir import configure_jax

    parser = Parser("train.py", __doc__, add_help=False)
    parser.add_argument("--workdir", type=place, help="folder of the run: made if new, gone on with if not")
    parser.add_argument("--coordinator", help="of many processes: HOST:PORT of the first, for them to meet at")
    parser.add_argument("--processes", type=int, help="how many processes train as one")
    parser.add_argument("--process", type=int, help="the number of this one, from 0")
    args, config = parse(parser, argv, _held)
    if not args.workdir:
        raise _NO_WORKDIR
    logging.disable(logging.ERROR)  # jax, datasets and orbax tell of what is installed, found and saved
    from prenorm_jax.train.loop import train  # here: its imports take seconds, and the flags are known to be right

    initialize(args.coordinator, args.processes, args.process)
    configure_jax(config)
    train(config, args.workdir)


_NO_WORKDIR = PrenormError("--workdir is missing: name the folder of the run, such as --workdir=runs/ln")


def _held(args: Namespace) -> ConfigDict:
    """The configuration that the workdir holds."""
    from prenorm_jax.train.flags import config_files
    from prenorm_jax.train.workdir import load_config

    if not args.workdir:
        raise _NO_WORKDIR
    if not (Path(args.workdir) / "config.json").exists() and not (Path(args.workdir) / "checkpoints").exists():
        files = f": {', '.join(found)}" if (found := config_files()) else ", such as one of configs/"
        raise PrenormError(f"{args.workdir} holds no run to go on with; a new one needs --config=FILE{files}")
    return load_config(args.workdir)


if __name__ == "__main__":
    say("importing the libraries and reading the data")  # JAX alone takes seconds, which is why nothing above needs it
    run_command(main)
