"""Commands as a user types them, in this process or as processes of their own; and what the tests ask of a workdir."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from conftest import QUICK_TO_COMPILE
from ml_collections import ConfigDict

from prenorm_jax.base.console import run_command
from prenorm_jax.config import base_config
from prenorm_jax.train.checkpoint import Checkpoints

ROOT = Path(__file__).parents[1]
SMALL = [
    "--config=configs/gpt_stdlib.py",
    "--config.steps=6",
    "--config.batch_size=4",
    "--config.eval_every=3",
    "--config.checkpoint_every=3",
    "--config.data.seq_len=16",
    "--config.model.depth=1",
    "--config.model.d_model=12",
    "--config.model.heads=2",
]


def clean_environment(devices: int = 1, x64: bool = False) -> dict[str, str]:
    """That of a user, not of these tests; but it compiles quickly, and what one command compiled the next finds.

    (In the cache that conftest.py names.)
    """
    left_out = ("XLA_FLAGS", "JAX_ENABLE_X64", "PYTHONDONTWRITEBYTECODE")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices} {QUICK_TO_COMPILE}"
    return environment | ({"JAX_ENABLE_X64": "1"} if x64 else {})


def command(
    *arguments: object, status: int = 0, devices: int = 1, x64: bool = False, **environment: object
) -> subprocess.CompletedProcess:
    """In a process of its own, as `python ARGUMENTS`, from the clone's root."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment(devices, x64) | {name: str(value) for name, value in environment.items()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    if status:
        check_one_line(done.stderr)
    return done


def check_one_line(stderr: str) -> None:
    """An error is the last line, without a stack trace."""
    assert "Traceback" not in stderr
    assert stderr.strip().splitlines()[-1].startswith("error: ")


@contextlib.contextmanager
def few_devices(count: int) -> Iterator[None]:
    """As if this process had no more: programs for fewer compile sooner."""
    found = jax.devices()[:count]
    with mock.patch.object(jax, "devices", lambda: found), mock.patch.object(jax, "device_count", lambda: count):
        yield


@dataclass
class Printed:
    """What a command printed, as of `subprocess.CompletedProcess`."""

    stdout: str
    stderr: str


def here(*arguments: object, status: int = 0, devices: int = 1, x64: bool = False) -> Printed:
    """The same command in this process, which spares it the imports: its `main` by `run_command`, as at its file's end.

    With as many devices, and in 64-bit mode or not, as `command` would have it, whatever this process has.
    """
    name, *flags = (str(argument) for argument in arguments if argument != "-m")
    module = {"train.py": "train", "eval.py": "prenorm_jax.evaluate"}.get(name, name)
    main = importlib.import_module(module).main
    stdout, stderr = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    ended = 0
    with (
        contextlib.chdir(ROOT),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        warnings.catch_warnings(),
        jax.enable_x64(x64),
        mock.patch.object(sys, "argv", [name, *flags]),
        few_devices(devices),
    ):
        warnings.filterwarnings(
            "ignore", "the load_module", DeprecationWarning
        )  # of ml_collections, at each config file
        try:
            run_command(main)
        except SystemExit as end:
            ended = end.code or 0
        finally:
            logging.disable(logging.NOTSET)
    printed = Printed(*(stream.buffer.getvalue().decode() for stream in (stdout, stderr)))
    assert ended == status, printed
    if status:
        check_one_line(printed.stderr)
    return printed


def error_of(*arguments: object) -> str:
    """The one line that a refused command prints."""
    printed = here(*arguments, status=2).stderr
    assert len(printed.strip().splitlines()) == 1, printed
    return printed


def evaluate(workdir: Path, *flags: str, x64: bool = False, devices: int = 1) -> dict:
    """What eval.py says of a run."""
    return json.loads(here("eval.py", f"--workdir={workdir}", "--json", *flags, x64=x64, devices=devices).stdout)


def lines_of(workdir: Path) -> list[dict]:
    """metrics.jsonl."""
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses_of(workdir: Path) -> dict[int, float]:
    """The loss of each step, each of which is written once."""
    lines = [line for line in lines_of(workdir) if "loss" in line]
    assert len({line["step"] for line in lines}) == len(lines), "a step is written twice"
    return {line["step"]: line["loss"] for line in lines}


def steps_written(workdir: Path) -> int:
    """How many steps metrics.jsonl tells of so far."""
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def wait_until(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 120) -> None:
    """While the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


DAMAGES = ("flip", "cut", "delete", "zero", "junk", "folder")


def damage(path: Path, how: str) -> None:
    """Of a file: a bit flipped, cut to half, deleted, zeroed, filled with junk, or a folder in its place."""
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 0x10
    elif how == "cut":
        content = content[: len(content) // 2]
    elif how == "zero":
        content = bytes(len(content))
    elif how == "junk":
        content = np.random.default_rng(0).bytes(len(content))
    else:
        path.unlink()
        if how == "folder":
            path.mkdir()
        return
    path.write_bytes(content)


def make_text(folder: Path) -> Path:
    """Four small documents."""
    rng = np.random.default_rng(0)
    for i in range(4):
        words = rng.choice(["def", "return", "norm", "stream", "(x)", "\n"], size=300)
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


def small_run(text: Path, **changes: object) -> ConfigDict:
    """A configuration for `train` in this process, in float64. Changes are of the run's keys or of the model's."""
    config = base_config()
    config.update({"steps": 100, "batch_size": 8, "eval_every": 0, "checkpoint_every": 0, "tensorboard": False})
    config.data.update({"path": str(text), "seq_len": 7})
    # ε well above rounding: a parameter without a gradient (a key's bias) is moved by the sign of its rounding else.
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 10, "eps": 1e-6})
    config.model.update(
        {"depth": 1, "d_model": 12, "heads": 2, "max_len": 7, "dtype": "float64", "param_dtype": "float64"}
    )
    for key, value in changes.items():
        (config.model if key in config.model else config)[key] = value
    return config


def digests(workdir: Path, step: int) -> dict[str, str]:
    """Of the parameters and of the optimizer's state, as the checkpoint says."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.metadata(step)["digests"]
