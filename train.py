"""Trains a model: `python train.py --config=configs/gpt_stdlib.py --workdir=runs/ln --config.model.norm=layernorm`.

Called again with the same arguments it goes on from the last checkpoint. Without --config it goes on with the
configuration that the workdir holds. Every key of the configuration is a flag, such as --config.steps=100.
"""

from absl import app, flags, logging
from ml_collections import ConfigDict

from prenorm_jax.base.console import run_command
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.flags import parse_flags
from prenorm_jax.base.processes import initialize
from prenorm_jax.train.workdir import configure_jax, load_config

flags.DEFINE_string("workdir", None, "folder of the run: made if new, gone on with if not")
flags.DEFINE_string("coordinator", None, "of many processes: HOST:PORT of the first, for them to meet at")
flags.DEFINE_integer("processes", None, "how many processes train as one")
flags.DEFINE_integer("process", None, "the number of this one, from 0")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags. Raises PrenormError."""
    missing = PrenormError("--workdir is missing: name the folder of the run, such as --workdir=runs/ln")

    def held(given: dict[str, str]) -> ConfigDict:
        """The configuration that the workdir holds."""
        if not given.get("workdir"):
            raise missing
        return load_config(given["workdir"])

    rest = parse_flags(argv, ("workdir",), held)
    if not flags.FLAGS.workdir:
        raise missing
    return rest


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.FATAL)  # jax, datasets and orbax tell of what is installed, found and saved
    from prenorm_jax.train.loop import (
        train,  # here, because its imports take seconds and the flags are known to be right
    )

    given = flags.FLAGS
    configure_jax(given.config)

    def run() -> None:
        initialize(given.coordinator, given.processes, given.process)
        train(given.config, given.workdir)

    run_command(run)


if __name__ == "__main__":
    run_command(lambda: app.run(main, flags_parser=parse))
