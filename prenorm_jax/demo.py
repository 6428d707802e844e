"""The whole path once: train under the three norms, convert, evaluate, compare. `make demo` runs it from a clone.

It calls the same commands that a user would, prints each, and fails if what they show is not what the README claims.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from prenorm_jax.base.console import run_command
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import check_folder
from prenorm_jax.base.flags import Parser, place

NORMS = ("layernorm", "rmsnorm", "crmsnorm")

# source run, converted folder, norm: there, and back again from the smallest form.
CONVERSIONS = (
    ("layernorm", "layernorm-as-rmsnorm", "rmsnorm"),
    ("layernorm", "layernorm-as-crmsnorm", "crmsnorm"),
    ("layernorm-as-crmsnorm", "crmsnorm-back-as-layernorm", "layernorm"),
)

QUICK = ("steps=60", "eval_every=30", "checkpoint_every=30")
QUICK += ("data.seq_len=64", "data.holdout=0.005", "model.depth=2", "model.d_model=64")
SAME_LOSS = 1e-5  # relative, between a checkpoint and its conversion: float32


def run(*arguments: object, capture: bool = False, devices: int = 1) -> str:
    """Runs a command of this project, shown as a user would type it. Raises PrenormError if it fails.

    `devices` above 1 are simulated on the CPU.
    """
    arguments = tuple(map(str, arguments))
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"} if devices > 1 else {}
    print("\n$", *(f"{name}={value}" for name, value in flags.items()), shlex.join(["python", *arguments]), flush=True)
    stdout = subprocess.PIPE if capture else None
    environment = os.environ | flags
    done = subprocess.run([sys.executable, *arguments], stdout=stdout, text=True, check=False, env=environment)
    if done.returncode:
        raise PrenormError(f"the command above ended with status {done.returncode}")
    return done.stdout or ""


def evaluate(workdir: Path, *flags: str) -> float:
    """The held-out loss by eval.py."""
    result = json.loads(run("eval.py", f"--workdir={workdir}", "--json", *flags, capture=True))
    print(f"loss {result['eval_loss']:.7f}, perplexity {result['eval_perplexity']:.5f}")
    return result["eval_loss"]


def compare(workdir: Path, names: Sequence[str]) -> dict[str, dict]:
    """The rows of report.json, by the names of the runs."""
    run("-m", "prenorm_jax.compare", *(workdir / name for name in names), f"--out={workdir / 'report'}")
    return {row["name"]: row for row in json.loads((workdir / "report" / "report.json").read_text())["runs"]}


def demo(workdir: Path, quick: bool) -> None:
    """Runs everything in `workdir`; goes on where an earlier call stopped. Raises PrenormError."""
    if not Path("train.py").exists():
        raise PrenormError("train.py is not here: run the demo from the folder of a clone")
    start = time.monotonic()
    overrides = [f"--config.{change}" for change in QUICK] if quick else []
    for norm in NORMS:
        flags = [f"--workdir={workdir / norm}", f"--config.model.norm={norm}", *overrides]
        run("train.py", "--config=configs/gpt_stdlib.py", *flags)

    for source, target, norm in CONVERSIONS:
        shutil.rmtree(workdir / target, ignore_errors=True)
        run("-m", "prenorm_jax.convert", workdir / source, workdir / target, f"--to={norm}")

    expected = evaluate(workdir / "layernorm")
    losses = {"layernorm --norm=crmsnorm": evaluate(workdir / "layernorm", "--norm=crmsnorm")}
    losses |= {target: evaluate(workdir / target) for _, target, _ in CONVERSIONS}
    worst = max(abs(loss - expected) / expected for loss in losses.values())

    conclude(workdir / "report" / "report.html", compare(workdir, NORMS), expected, worst, time.monotonic() - start)


def switch_demo(workdir: Path) -> None:
    """One run whose norm is switched every 25 steps, beside a Pre-LN run, and one that sums in another order."""
    config = ["--config=configs/gpt_stdlib.py", "--config.steps=100", "--config.eval_every=50"]
    run("train.py", *config, f"--workdir={workdir / 'pre-ln'}")
    run("train.py", *config, f"--workdir={workdir / 'pre-ln-2-devices'}", devices=2)
    for stop, norm in ((25, "layernorm"), (50, "rmsnorm"), (75, "crmsnorm"), (100, "layernorm")):
        flags = [f"--workdir={workdir / 'switched'}", f"--config.model.norm={norm}", f"--config.stop_at={stop}"]
        run("train.py", *config, *flags)
    rows = compare(workdir, ("pre-ln", "pre-ln-2-devices", "switched"))
    reordered, switched = (rows[name]["max_abs_delta"] for name in ("pre-ln-2-devices", "switched"))
    print(f"pre-ln-2-devices: at most {reordered:.1e} nats from Pre-LN on one device, over 100 steps")
    print(f"switched: at most {switched:.1e}")
    if switched > 10 * max(reordered, 1e-6):
        raise PrenormError("the switched run departs further than rounding: something is broken")


def conclude(page: Path, rows: dict[str, dict], expected: float, worst: float, seconds: float) -> None:
    """Says what was shown; raises PrenormError if it is not what ought to be."""
    if worst > SAME_LOSS:
        raise PrenormError(
            f"a converted checkpoint's held-out loss differs by {worst:.1e} (relative), over {SAME_LOSS}"
        )
    departed = [norm for norm in NORMS[1:] if rows[norm]["relation"] not in ("follows {} closely", "equals {}")]
    if departed:
        raise PrenormError(f"{departed[0]} departs from the Pre-LN curve: see {page}")
    finals = ", ".join(f"{rows[norm]['final_eval_loss']:.5f} ({norm})" for norm in NORMS)
    deltas = " and ".join(f"{rows[norm]['max_abs_delta']:.1e} ({norm})" for norm in NORMS[1:])
    print(
        f"""
What this showed, in {seconds / 60:.1f} minutes:
  - One Transformer trained as Pre-LN, as Pre-RMSNorm and as Pre-CRMSNorm follows one loss curve. The largest distance
    from Pre-LN at any step is {deltas} nats per token, from float32 rounding alone.
    Held-out loss at the end: {finals}.
  - The Pre-LN checkpoint, converted to each other norm and back again, keeps its held-out loss of {expected:.5f}:
    the largest relative difference is {worst:.1e}.
The curves: {page}   (and .png, .json beside it)"""
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Parses the command line."""
    parser = Parser("python -m prenorm_jax.demo", __doc__)
    parser.add_argument("--workdir", type=place, default="runs/demo")
    parser.add_argument("--quick", action="store_true", help="a smaller model and fewer steps: about two minutes")
    parser.add_argument("--switch", action="store_true", help="instead: the norm switched every 25 steps of one run")
    args = parser.parse_args(argv)
    check_folder(Path(args.workdir), "--workdir")
    if args.switch:
        switch_demo(Path(args.workdir))
    else:
        demo(Path(args.workdir), args.quick)


if __name__ == "__main__":
    run_command(main)
