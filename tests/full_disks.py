"""Runs whose disk is full or fills up: `full_disks.py PART FOLDER TEXT`, for test_damage.py, which mounts the disks."""

import os
import sys
import threading
import time
from pathlib import Path

import jax
from commands import SMALL, evaluate, few_devices, here, losses_of, steps_written

import train
from prenorm_jax.base.console import run_command

part, folder, text = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
small, large = folder / "small", folder / "large"
FLAGS = ["train.py", *SMALL, f"--config.data.path={text}", "--config.tensorboard=False"]
LONG = [*FLAGS, "--config.steps=100000", "--config.log_every=1", "--config.eval_every=0", "--config.checkpoint_every=0"]


def fill(disk: Path, leave: int = 0) -> None:
    """Leaves so many bytes of it."""
    size = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    with (disk / "filler").open("wb") as filler:
        os.posix_fallocate(filler.fileno(), 0, size - leave)


def fill_under_way(run: Path) -> None:
    """Fills the disk once the run has trained 20 steps."""

    def wait_and_fill() -> None:
        while steps_written(run) < 20:
            time.sleep(0.02)
        fill(run.parent)

    threading.Thread(target=wait_and_fill, daemon=True).start()


def end_as(arguments: list[str]) -> None:
    """Runs the command and ends this process with it, as the command's own process would end."""
    sys.argv = arguments
    with few_devices(1), jax.enable_x64(False):
        run_command(train.main)


if part == 1:
    fill_under_way(large / "plain")
    errors = here(*LONG, f"--workdir={large / 'plain'}", status=2).stderr
    assert "metrics.jsonl cannot be written (No space left on device)" in errors.splitlines()[-1], errors
    assert "TensorBoard" not in errors, errors
    (large / "filler").unlink()

    here(*FLAGS, f"--workdir={small / 'run'}", "--config.stop_at=3")
    fill(small, leave=2**16)  # room for the small files, too little for a checkpoint
    end_as([*FLAGS, f"--workdir={small / 'run'}"])
else:
    assert evaluate(small / "run")["step"] == 3
    (small / "filler").unlink()
    here(*FLAGS, f"--workdir={small / 'run'}")
    assert list(losses_of(small / "run")) == [1, 2, 3, 4, 5, 6]

    fill_under_way(large / "run")
    end_as([*LONG, f"--workdir={large / 'run'}", "--config.tensorboard=True"])
