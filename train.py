"""Trains a model: `python train.py --config=configs/gpt_stdlib.py --workdir=runs/ln --config.model.norm=layernorm`.

Called again with the same arguments it goes on from the last checkpoint. Without --config it goes on with the
configuration that the workdir holds. Every key of the configuration is a flag, such as --config.steps=100.
"""

import re
from pathlib import Path

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from prenorm_jax.errors import PrenormError, run_command
from prenorm_jax.workdir import load_config, use_precision_of

flags.DEFINE_string("workdir", None, "folder of the run: made if new, gone on with if not")


def parse(argv: list[str]) -> list[str]:
    """Parses the flags, turning what absl and ml_collections raise into one line."""
    given = dict(match.groups() for arg in argv if (match := re.fullmatch("--?(config|workdir)=(.*)", arg)))
    if "config" in given:
        if not Path(given["config"].split(":")[0]).is_file():
            raise PrenormError(f"--config={given['config']}: no such file; those of this project are in configs/")
        config_flags.DEFINE_config_file("config")
    else:
        config_flags.DEFINE_config_dict("config", load_config(given["workdir"]) if "workdir" in given else ConfigDict())
    try:
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.keys()  # an error in the file shows only now
    except (flags.Error, AttributeError, KeyError, TypeError, OSError) as error:
        raise PrenormError(f"command line: {' '.join(str(error).split())}") from error
    if len(rest) > 1:
        raise PrenormError(f"command line: {rest[1]!r} is not a flag; flags look like --workdir=runs/ln")
    if flags.FLAGS.workdir is None:
        raise PrenormError("--workdir is missing: name the folder of the run, such as --workdir=runs/ln")
    return rest


def main(argv: list[str]) -> None:
    del argv
    logging.set_verbosity(logging.ERROR)  # jax, datasets and orbax tell of what is installed, found and saved
    from prenorm_jax.loop import train  # here, because its imports take seconds and the flags are known to be right

    config = flags.FLAGS.config
    use_precision_of(config)
    run_command(lambda: train(config, flags.FLAGS.workdir))


if __name__ == "__main__":
    run_command(lambda: app.run(main, flags_parser=parse))
