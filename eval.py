"""Evaluates a checkpoint on the held-out split: `python eval.py --workdir=runs/ln [--norm=crmsnorm]`."""

from prenorm_jax.base.console import run_command, say
from prenorm_jax.evaluate import main

if __name__ == "__main__":
    say("importing the libraries")
    run_command(main)
