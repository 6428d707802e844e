"""Converts a run's checkpoint: `python -m prenorm_jax.convert runs/ln runs/ln-as-crms --to=crmsnorm`."""

from collections.abc import Sequence

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.flags import Parser, place


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line."""
    from prenorm_jax.models.config import NORMS  # here, as all that takes seconds
    from prenorm_jax.train.convert_run import convert

    parser = Parser("python -m prenorm_jax.convert", __doc__)
    parser.add_argument("source", type=place, help="folder of a run, or of a converted checkpoint")
    parser.add_argument("target", type=place, help="folder to write: must not exist")
    parser.add_argument("--to", required=True, help=" | ".join(NORMS))
    parser.add_argument("--step", type=int, help="which checkpoint (default: the latest)")
    parser.add_argument(
        "--materialize",
        action="store_true",
        help="allow --to the norm of a pre_ln run: writes the parameters that its Pre-LN ones stand for",
    )
    parser.add_argument("--reset-optimizer", action="store_true", help="of a native run: start it anew")
    parser.add_argument(
        "--coordinates",
        help="of crmsnorm's stream: drop | reflect, maybe with an entry, as reflect:7 (default: what rounds the least)",
    )
    convert(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
