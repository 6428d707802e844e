"""Loss of a checkpoint on the whole held-out split: `python eval.py --workdir=runs/ln [--norm=crmsnorm]`.

Where the data lie now is said as to train.py: --config.data.path, eval_path, tokenizer, cache. From another folder:
`python -m prenorm_jax.evaluate`.
"""

import json
from collections.abc import Sequence

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.flags import Parser, place
from prenorm_jax.base.processes import check_same, initialize, is_first, refused_alike


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line of `eval.py`, evaluates, prints. Raises PrenormError."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)

    from prenorm_jax.config import load_data  # here, as all that takes seconds
    from prenorm_jax.train.checks import check_config, check_has_data
    from prenorm_jax.train.evaluation import evaluate, load_as, mesh_for
    from prenorm_jax.train.flags import override
    from prenorm_jax.train.restore import check_data, check_vocabulary
    from prenorm_jax.train.run import Run
    from prenorm_jax.train.step import make_eval_step
    from prenorm_jax.train.workdir import PLACES, configure_jax, load_config

    initialize(args.coordinator, args.processes, args.process)
    with refused_alike():
        config = load_config(args.workdir)
        override(config, rest, parser, PLACES)
        configure_jax(config)
        check_config(config)
        check_has_data(args.workdir, config)
        mesh, norm, data = mesh_for(config), args.norm or config.model.norm, load_data(config)
        data.check_model(config)
    check_same("the norm or the data", (norm, data.digest))
    metadata, model, params = load_as(args.workdir, norm, args.step, mesh)
    step = metadata["step"]
    with refused_alike():
        place_of = f"{args.workdir} at step {step}"
        check_vocabulary(metadata, data.vocabulary, place_of)
        if not args.other_data:
            check_data(metadata, data, config, place_of, "--other-data evaluates on these")
    check_same("the checkpoint, the norm or the data", (step, norm, data.digest))
    run = Run.create(config, mesh).computing(model)
    result = evaluate(run, make_eval_step(run), params, data)

    if not is_first():
        return
    if args.json:
        said = {"workdir": args.workdir, "step": step, "norm": norm, "other_data": args.other_data}
        print(json.dumps(said | result))
        return
    *numbers, (_, count) = result.items()
    print(f"{args.workdir} at step {step} as {norm}: {count:,} {data.unit}s of the held-out split")
    if args.other_data:
        print(f"on other data than it was trained on: {data.description}")
    print("   ".join(f"{name.removeprefix('eval_').replace('_', ' ')} {value:.7g}" for name, value in numbers))
    print(f"(loss in nats per {data.unit})")


def _parser() -> Parser:
    parser = Parser("eval.py", __doc__)
    parser.add_argument("--workdir", required=True, type=place, help="folder of a run, or of a converted checkpoint")
    parser.add_argument("--norm", help="layernorm, rmsnorm or crmsnorm: convert first (default: the run's own)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the latest)")
    parser.add_argument("--other-data", action="store_true", help="allow data that are not those it was trained on")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--coordinator", help="of many processes: HOST:PORT of the first, for them to meet at")
    parser.add_argument("--processes", type=int, help="how many processes evaluate as one")
    parser.add_argument("--process", type=int, help="the number of this one, from 0")
    return parser


if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
