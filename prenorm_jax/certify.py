"""Evidence that a checkpoint is its source's function: `python -m prenorm_jax.certify runs/gpt2-rms path/to/model`.

SOURCE is another library's checkpoint (a folder, a file, a name on the Hugging Face hub), or another workdir. Writes
WORKDIR/certificate.html, .json, .png and .npz. The exit status is 0 for PASS, 1 for FAIL, 2 for a wrong input.
"""

import json
import sys
from collections.abc import Sequence

from prenorm_jax.base.console import run_command, say
from prenorm_jax.base.flags import Parser, place


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line, certifies, prints; ends the process with status 1 for FAIL. Raises PrenormError."""
    parser = Parser("python -m prenorm_jax.certify", __doc__)
    parser.add_argument("workdir", type=place, help="folder of a run, or of a converted or imported checkpoint")
    parser.add_argument("source", type=place, help="what it should be: another library's checkpoint, or a workdir")
    parser.add_argument("--step", type=int, help="which checkpoint of WORKDIR (default: the latest)")
    parser.add_argument(
        "--length", type=int, help="tokens of each probe (default: all positions, where their logits fit)"
    )
    parser.add_argument(
        "--reference",
        default="auto",
        help="auto (default): the source's library where it is installed, else what it gave before, else our import of "
        "it | library | own",
    )
    parser.add_argument("--json", action="store_true", help="print what certificate.json holds instead of text")
    args = parser.parse_args(argv)

    from prenorm_jax.interop.certificate_page import plain_text  # here, as all that takes seconds
    from prenorm_jax.interop.certify import certify_checkpoint

    report = certify_checkpoint(args.workdir, args.source, args.step, args.length, args.reference)
    print(json.dumps(report) if args.json else plain_text(report))
    if not args.json:
        print(f"{args.workdir}/certificate.html")
    if report["verdict"] != "PASS":
        sys.stdout.flush()
        sys.exit(1)


if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
