"""Trains a model: `python train.py --config=configs/gpt_stdlib.py --workdir=runs/ln --config.model.norm=layernorm`.

Called again with the same arguments it goes on from the last checkpoint. Without --config it goes on with the
configuration that the workdir holds. Every key of the configuration is a flag, such as --config.steps=100.
"""

import re
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from prenorm_jax.distributed import initialize
from prenorm_jax.errors import PrenormError, run_command
from prenorm_jax.workdir import configure_jax, load_config

flags.DEFINE_string("workdir", None, "folder of the run: made if new, gone on with if not")
flags.DEFINE_string("coordinator", None, "of many processes: HOST:PORT of the first, for them to meet at")
flags.DEFINE_integer("processes", None, "how many processes train as one")
flags.DEFINE_integer("process", None, "the number of this one, from 0")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags, turning what absl, ml_collections and a config file raise into one line."""
    line = re.sub(r"(^|\0)--?(config|workdir)\0", r"\1--\2=", "\0".join(argv))  # "--config x" as "--config=x"
    argv = line.split("\0")
    given = dict(match.groups() for arg in argv if (match := re.fullmatch("--?(config|workdir)=(.*)", arg)))
    if not given.get("workdir"):
        raise PrenormError("--workdir is missing: name the folder of the run, such as --workdir=runs/ln")
    if "config" in given:
        if not Path(given["config"].split(":")[0]).is_file():
            raise PrenormError(f"--config={given['config']}: no such file; those of this project are in configs/")
        config_flags.DEFINE_config_file("config")
    else:
        config_flags.DEFINE_config_dict("config", load_config(given["workdir"]))
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
        raise PrenormError(
            f"command line or config file: {lines[-1] if len(lines) > 3 else ' '.join(lines)}"
        ) from error
    if len(rest) > 1:
        raise PrenormError(f"command line: {rest[1]!r} is not a flag; flags look like --workdir=runs/ln")
    return rest


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.FATAL)  # jax, datasets and orbax tell of what is installed, found and saved
    from prenorm_jax.loop import train  # here, because its imports take seconds and the flags are known to be right

    given = flags.FLAGS
    configure_jax(given.config)

    def run() -> None:
        initialize(given.coordinator, given.processes, given.process)
        train(given.config, given.workdir)

    run_command(run)


if __name__ == "__main__":
    run_command(lambda: app.run(main, flags_parser=parse))
