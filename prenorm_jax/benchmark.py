"""Times the norms against each other: `python -m prenorm_jax.benchmark --model=gpt:6x384 --batch=8 --length=256`."""

from collections.abc import Sequence
from pathlib import Path

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.errors import PrenormError, check_range
from prenorm_jax.base.files import check_folder
from prenorm_jax.base.flags import Parser, place


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line; prints a table, writes JSON and PNG. Raises PrenormError."""
    import jax  # here, as all that takes seconds

    from prenorm_jax.bench import compiled, report, timing
    from prenorm_jax.bench.contenders import CONTENDERS, Setting
    from prenorm_jax.bench.tasks import TASKS, contenders_of

    parser = Parser("python -m prenorm_jax.benchmark", __doc__)
    tasks = "; ".join(f"{name}: {what}" for name, what in TASKS.items())
    parser.add_argument("--model", default="gpt:6x384", help="gpt:DEPTHxWIDTH, gpt3:Small, vit:S/16, ... (%(default)s)")
    parser.add_argument("--depth", type=int, help="blocks, instead of the model's own number")
    parser.add_argument("--batch", type=int, default=8, help="sequences or images (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence (%(default)s)")
    parser.add_argument("--task", default="step", help="%(default)s by default; " + tasks)
    parser.add_argument("--only", default=",".join(CONTENDERS), help="contenders, with commas between (%(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="calls of each contender, in turn (%(default)s)")
    parser.add_argument("--in-a-row", type=int, default=1, help="calls that are waited for at once (%(default)s)")
    parser.add_argument("--dtype", default="float32", help="of the computation (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="defaults to see that it runs: tiny model, five rounds")
    parser.add_argument("--topology", help="TPUs that need not be there, as v5e:2x2: the compiler's cycles, not time")
    parser.add_argument("--out", type=place, default="benchmark", help="folder for JSON and picture (%(default)s)")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(model="gpt:2x64", batch=8, length=32, rounds=5)
        args = parser.parse_args(argv)
    for key in ("batch", "length", "rounds", "depth", "in-a-row"):
        check_range(f"--{key}", getattr(args, key.replace("-", "_")), at_least=1)
    only = {name for name in args.only.split(",") if name}
    if not only or only - set(CONTENDERS):
        wrong = ", ".join(sorted(only - set(CONTENDERS))) or "nothing"
        raise PrenormError(f"--only={args.only}: {wrong} is not among {', '.join(CONTENDERS)}")
    names = contenders_of(args.task, [name for name in CONTENDERS if name in only])
    out = Path(args.out)
    check_folder(out)
    setting = Setting(args.model, args.batch, args.length, args.dtype, args.depth)
    if args.topology:
        result = compiled.estimate(args.topology, setting, args.task, names)
    else:
        result = timing.benchmark(setting, args.task, names, args.rounds, args.in_a_row)
    print(report.table(result))
    where = args.topology.replace(":", "-") if args.topology else jax.default_backend()
    stem = f"{args.model}-{args.task}-{where}".replace(":", "-").replace("/", "-")
    stem += f"-{args.in_a_row}-in-a-row" if args.in_a_row > 1 else ""
    for path in report.write(result, out, stem):
        print(path)


if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
