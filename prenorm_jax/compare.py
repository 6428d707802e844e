"""Compares finished runs: `python -m prenorm_jax.compare runs/ln runs/rms runs/crms --out=report`."""

from collections.abc import Sequence

from prenorm_jax.base.console import run_command
from prenorm_jax.base.flags import Parser, place
from prenorm_jax.report.runs import compare
from prenorm_jax.report.runs_words import plain_text


def main(argv: Sequence[str] | None = None) -> None:
    """The command line. Raises the errors of `compare`."""
    parser = Parser("python -m prenorm_jax.compare", __doc__)
    parser.add_argument("workdirs", nargs="+", type=place, metavar="WORKDIR", help="where a run was trained")
    parser.add_argument("--out", default="report", type=place, help="folder to write, or a file name ending in .html")
    parser.add_argument("--title", help="title of the page")
    parser.add_argument("--reference", type=place, help="workdir to compare with; default: the first LayerNorm run")
    options = parser.parse_args(argv)
    report = compare(options.workdirs, options.out, options.title, options.reference)
    print(plain_text(report))
    print(report["files"]["html"])


if __name__ == "__main__":
    run_command(main)
