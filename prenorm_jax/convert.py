"""Converts a checkpoint: `python -m prenorm_jax.convert runs/ln runs/ln-as-crms --to=crmsnorm`.

SOURCE may also be another library's: a folder with config.json and weights, one of its files, or a name on the Hugging
Face hub. TARGET is then a workdir of any norm. What was imported goes back with --format=source.
"""

from collections.abc import Sequence
from typing import Any

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.base.flags import Parser, place

# The flags that each kind of conversion takes, beside those that all do.
_TAKES = {
    "of a run": {"step", "materialize", "reset_optimizer", "coordinates", "keep_affine"},
    "of another library's checkpoint": {"dtype", "dropout", "coordinates", "keep_affine"},
    "to another library's format": {"step", "dtype", "format"},
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, converts. Raises PrenormError."""
    args = vars(_parser().parse_args(argv))
    source, target, to = (args.pop(name) for name in ("source", "target", "to"))

    from prenorm_jax.interop.files import is_foreign  # here, as all that takes seconds
    from prenorm_jax.models.config import NORMS

    check_choice("--to", to, NORMS)
    if args["format"] is not None:
        from prenorm_jax.interop.export import export_checkpoint

        given = _given(args, "to another library's format")
        export_checkpoint(source, target, to, given.pop("format"), **given)
    elif is_foreign(source):
        from prenorm_jax.interop.importing import import_checkpoint

        given = _given(args, "of another library's checkpoint")
        check_choice("--dropout", dropout := given.pop("dropout", "0"), ("0", "keep"))
        import_checkpoint(source, target, to, keep_dropout=dropout == "keep", **given)
    else:
        from prenorm_jax.train.convert_run import convert

        convert(source, target, to, **_given(args, "of a run"))


def _given(args: dict[str, Any], kind: str) -> dict[str, Any]:
    """The flags that were given. Raises PrenormError for one that this kind of conversion has no use for."""
    given = {name: value for name, value in args.items() if value not in (None, False)}
    if wrong := sorted(given.keys() - _TAKES[kind]):
        raise PrenormError(f"--{wrong[0].replace('_', '-')} says nothing of a conversion {kind}: leave it out")
    return given


def _parser() -> Parser:
    parser = Parser("python -m prenorm_jax.convert", __doc__)
    parser.add_argument(
        "source",
        type=place,
        help="folder of a run, or of a converted checkpoint; another library's folder, file or name",
    )
    parser.add_argument("target", type=place, help="folder to write: must not exist")
    parser.add_argument("--to", required=True, help="layernorm | rmsnorm | crmsnorm")
    parser.add_argument("--step", type=int, help="which checkpoint of a run (default: the latest)")
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
    parser.add_argument(
        "--keep-affine",
        action="store_true",
        help="norms keep scales and biases, which are else folded into what they feed; not --to=crmsnorm",
    )
    parser.add_argument(
        "--format",
        help="of an imported run: source, its source's format; llama, mistral, timm-rmsnorm, if it is one",
    )
    parser.add_argument(
        "--dtype",
        help="of another library's checkpoint: float64 | float32 | bfloat16 | float16 | keep, the source's (default: "
        "that, but float32 for a narrower one); with --format: keep (default: the run's, if anything was done to it)",
    )
    parser.add_argument(
        "--dropout", help="of another library's checkpoint: 0 (default) | keep, that of its config.json"
    )
    return parser


if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
