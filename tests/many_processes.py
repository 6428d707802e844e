"""What each of two real processes does in test_processes.py, in one interpreter: imports are most of what it costs.

`python tests/many_processes.py HOST:PORT NUMBER TEXT FOLDER`. Prints one JSON object a line for each stage.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from prenorm_jax.base.console import run_command
from prenorm_jax.base.errors import Interrupted, PrenormError
from prenorm_jax.base.processes import initialize, wait_for_all
from prenorm_jax.config import base_config
from prenorm_jax.evaluate import main as evaluate
from prenorm_jax.train.checkpoint import complete_steps
from prenorm_jax.train.loop import train
from prenorm_jax.train.workdir import configure_jax

PROCESSES, DEVICES = 2, 2  # and devices of each


def run_config(text: Path, **changes: object) -> ConfigDict:
    """A run so long that something must stop it. The mesh is for all devices of the processes."""
    config = base_config()
    config.update({"steps": 100_000, "batch_size": 8, "eval_every": 8, "checkpoint_every": 4, "log_every": 1})
    config.data.update({"path": str(text), "seq_len": 7})
    # ε well above rounding: a parameter without a gradient (a key's bias) is moved by the sign of its rounding else.
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 10, "eps": 1e-6})
    config.model.update({"depth": 1, "d_model": 16, "heads": 2, "max_len": 7, "vocab_size": 512})
    config.model.update({"dtype": "float64", "param_dtype": "float64"})
    config.update(changes)
    return config


def on_many(config: ConfigDict) -> ConfigDict:
    """With the parameters split over the devices of all processes."""
    config.mesh.fsdp = PROCESSES * DEVICES
    return config


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def steps_in(workdir: Path) -> int:
    """How many are logged."""
    return (workdir / "metrics.jsonl").read_text().count('"loss"')


def send_when(condition: Callable[[], bool], number: signal.Signals) -> None:
    """Sends this process the signal, in the middle of whatever it does, once the condition is met."""

    def watch() -> None:
        while not condition():
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()


def refusals(process: int, text: Path, folder: Path) -> None:
    nowhere = Path("/nowhere/at/all.txt")
    other, source = text if process == 0 else nowhere, str(folder / "alone")
    runs = {
        "by all": run_config(nowhere),
        "by one": run_config(other),
        "by one, while the other has checkpoints to read": run_config(other, init_from=source),
        "different": run_config(text, seed=process),
    }
    places = {
        "evaluating, by one": source if process == 0 else f"{source}-missing",
        "evaluating, by all": str(folder / "missing"),
    }
    attempts = {name: functools.partial(train, on_many(config), folder / "refused") for name, config in runs.items()}
    attempts |= {name: functools.partial(evaluate, [f"--workdir={place}"]) for name, place in places.items()}
    for name, attempt in attempts.items():
        try:
            attempt()
        except PrenormError as error:
            say(refused=name, error=str(error), shared=error.shared, there=(folder / "refused").exists())


def damage_the_part_of_the_second(workdir: Path, step: int) -> None:
    part = workdir / "checkpoints" / str(step) / "params" / "ocdbt.process_1" / "d"
    largest = max(part.iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)


def stages(coordinator: str, process: int, text: Path, folder: Path) -> None:
    initialize(coordinator, PROCESSES, process)
    configure_jax(run_config(text))
    refusals(process, text, folder)

    run = folder / "run"
    if process == 1:
        send_when(lambda: steps_in(run) >= 12, signal.SIGTERM)
    try:
        train(on_many(run_config(text)), run)
    except Interrupted as error:
        say(interrupted=str(error), steps=steps_in(run), saved=complete_steps(run / "checkpoints"))

    last = steps_in(run)
    wait_for_all("the checkpoint may be damaged")
    if process == 0:
        damage_the_part_of_the_second(run, last)
    else:
        send_when(lambda: steps_in(run) >= last + 8, signal.SIGKILL)
    wait_for_all("it is damaged")
    train(on_many(run_config(text)), run)


if __name__ == "__main__":
    address, number, *paths = sys.argv[1:]
    run_command(lambda: stages(address, int(number), *map(Path, paths)))
