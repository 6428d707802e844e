"""Trains a model: `python train.py --config=configs/gpt_stdlib.py --workdir=runs/ln --config.model.norm=layernorm`.

Called again with the same arguments it goes on from the last checkpoint. Without --config it goes on with the
configuration that the workdir holds. Every key of the configuration is a flag, such as --config.steps=100.
"""

import logging
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.flags import parse_flags
from prenorm_jax.base.processes import initialize


def parse(argv: Sequence[str] | None) -> flags.FlagValues:
    """The command line's flags. Raises PrenormError."""
    given = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder of the run: made if new, gone on with if not", given)
    flags.DEFINE_string("coordinator", None, "of many processes: HOST:PORT of the first, for them to meet at", given)
    flags.DEFINE_integer("processes", None, "how many processes train as one", flag_values=given)
    flags.DEFINE_integer("process", None, "the number of this one, from 0", flag_values=given)
    missing = PrenormError("--workdir is missing: name the folder of the run, such as --workdir=runs/ln")

    def held(written: dict[str, str]) -> ConfigDict:
        """The configuration that the workdir holds."""
        from prenorm_jax.train.workdir import load_config

        if not written.get("workdir"):
            raise missing
        return load_config(written["workdir"])

    parse_flags(given, argv, held, __doc__)
    if not given.workdir:
        raise missing
    return given


def main(argv: Sequence[str] | None = None) -> None:
    """Trains as the command line says; None: that of this process. Raises PrenormError."""
    given = parse(argv)
    logging.disable(logging.ERROR)  # jax, datasets and orbax tell of what is installed, found and saved
    from prenorm_jax.train.loop import train  # here: its imports take seconds, and the flags are known to be right
    from prenorm_jax.train.workdir import configure_jax

    configure_jax(given.config)
    initialize(given.coordinator, given.processes, given.process)
    train(given.config, given.workdir)


if __name__ == "__main__":
    say("importing the libraries and reading the data")  # JAX alone takes seconds, which is why nothing above needs it
    run_command(main)
