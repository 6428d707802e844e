"""How far each norm's rounding is from float64: `python -m prenorm_jax.numerics runs/ln --out=numerics`.

Of a run's checkpoint, on its held-out data: the stream at each norm, the coordinates that crmsnorm should have, and the
errors of logits and gradients of every variant in every dtype. With --synthetic of streams that are made up.
Where the data lie now is said as to train.py: --config.data.path, eval_path, tokenizer, cache.
"""

import datetime
from argparse import Namespace
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.errors import PrenormError, check_range
from prenorm_jax.base.files import check_folder
from prenorm_jax.base.flags import Parser, place


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line; prints a table and sentences, writes a page, figures and JSON. Raises PrenormError."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if bool(args.workdir) == args.synthetic:
        what = "exclude each other: give one" if args.synthetic else "are missing: give one"
        raise PrenormError(f"a WORKDIR and --synthetic {what}")

    from prenorm_jax.bench import numerics_report as report  # here, as all that takes seconds
    from prenorm_jax.bench.numerics import DTYPES

    dtypes = tuple(dict.fromkeys(args.dtypes.split(",") if args.dtypes else DTYPES))
    if wrong := [dtype for dtype in dtypes if dtype not in DTYPES]:
        raise PrenormError(f"--dtypes={args.dtypes}: {wrong[0] or 'nothing'} is not among {', '.join(DTYPES)}")
    check_range("--rows", args.rows, at_least=1)
    check_folder(Path(args.out))
    if args.synthetic:
        if rest:
            raise parser.unknown(rest[0])
        result = _synthetic(dtypes)
        print(report.synthetic_text(result))
        files = report.write_synthetic(result, Path(args.out))
    else:
        result = report.with_words(_of_run(args, rest, parser, dtypes))
        print(report.plain_text(result))
        files = report.write(result, Path(args.out))
    for path in files:
        print(path)


def _of_run(args: Namespace, rest: Sequence[str], parser: Parser, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """The report of a run's checkpoint."""
    from prenorm_jax.bench.numerics import first_examples, measure
    from prenorm_jax.config import load_data
    from prenorm_jax.train.checkpoint import Checkpoints
    from prenorm_jax.train.checks import check_config
    from prenorm_jax.train.flags import override
    from prenorm_jax.train.restore import check_data, check_vocabulary
    from prenorm_jax.train.workdir import PLACES, configure_jax, load_config

    config = load_config(args.workdir)
    override(config, rest, parser, PLACES)
    configure_jax(config)
    check_config(config)
    data = load_data(config)
    data.check_model(config)
    with Checkpoints(args.workdir, read_only=True) as checkpoints:
        read = lambda step: (checkpoints.metadata(step), *checkpoints.params(step))  # noqa: E731
        metadata, model, params = checkpoints.of(args.step, read)
    place_of = f"{args.workdir} at step {metadata['step']}"
    check_vocabulary(metadata, data.vocabulary, place_of)
    if not args.other_data:
        check_data(metadata, data, config, place_of, "--other-data measures on these")
    examples, inputs = first_examples(config, data, args.rows)
    own = (config.model.coordinates, config.model.coordinates_entry) if config.model.norm == "crmsnorm" else None
    about = f"{model.family.upper()}, {model.depth} blocks, width {model.d_model}, {model.norm} parameters"
    result = _header(f"Rounding of {place_of}", dtypes) | {"workdir": args.workdir, "step": metadata["step"]}
    result |= {"model": about, "norm": model.norm, "data": data.description, "inputs": inputs}
    return result | measure(params, model, examples, dtypes, own)


def _synthetic(dtypes: tuple[str, ...]) -> dict[str, Any]:
    from prenorm_jax.bench.streams import measure

    return _header("Rounding of the norms on streams that are made up", dtypes) | measure(dtypes)


def _header(title: str, dtypes: tuple[str, ...]) -> dict[str, Any]:
    from prenorm_jax.train.workdir import device_name

    versions = {name: version(name) for name in ("jax", "flax", "numpy")}
    when = {"date": datetime.date.today().isoformat(), "device": device_name(), "versions": versions}
    return {"title": title, **when, "dtypes": list(dtypes)}


def _parser() -> Parser:
    parser = Parser("python -m prenorm_jax.numerics", __doc__)
    parser.add_argument("workdir", nargs="?", type=place, metavar="WORKDIR", help="folder of a run, or of a conversion")
    parser.add_argument("--synthetic", action="store_true", help="instead: streams that are made up")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the latest)")
    parser.add_argument("--rows", type=int, help="sequences or images, the first held out (default: some 2,048 tokens)")
    parser.add_argument("--dtypes", help="with commas between them (default: float32,bfloat16,float16)")
    parser.add_argument("--other-data", action="store_true", help="allow data that are not those it was trained on")
    parser.add_argument("--out", type=place, default="numerics", help="folder for page, figures, JSON (%(default)s)")
    return parser


if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
