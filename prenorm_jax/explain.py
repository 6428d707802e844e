"""What a conversion would do to a checkpoint, and why: `python -m prenorm_jax.explain path/to/model`.

SOURCE is another library's checkpoint (a folder, a file, a name on the Hugging Face hub), or a workdir. Its config.json
and the names and shapes of its tensors are read, no weights. What cannot be converted is said with the reason, and the
exit status is then 2.
"""

import json
from collections.abc import Sequence

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.flags import Parser, place


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, explains. Raises PrenormError."""
    parser = Parser("python -m prenorm_jax.explain", __doc__)
    parser.add_argument("source", type=place, help="another library's folder, file or name; or a workdir")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args(argv)

    from prenorm_jax.interop.explain import explain, plain_text  # here, as all that takes seconds

    report = explain(args.source)
    print(json.dumps(report, indent=2) if args.json else plain_text(report))


if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
