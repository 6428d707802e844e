"""Where a run's numbers go: `metrics.jsonl`, TensorBoard event files and the progress bar."""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tensorboardX import SummaryWriter
from tqdm import tqdm

from prenorm_jax.data import Data


class NonFinite(Exception):
    """The loss or the gradient norm of training step `step` is not finite."""

    def __init__(self, step: int, values: dict[str, float]):
        super().__init__(step, values)
        self.step, self.values = step, values


class MetricsWriter:
    """Writes one line a training step and one an evaluation. A context manager.

    The numbers of a step are fetched from the device `log_every` steps at a time, and the newest step's only with the
    next fetch, so that the device always has a step to work on. `tokens_per_s` (of images: `images_per_s`) is of the steps fetched
    together, evaluation and checkpointing left out. With `config.on_nonfinite` "stop" a step whose numbers are not finite is not
    written, but raises `NonFinite`.
    """

    def __init__(self, workdir: Path, start: int, config: ConfigDict, data: Data):
        """Opens the files; drops what an interrupted run wrote after `start`, the step of its last checkpoint."""
        path = workdir / "metrics.jsonl"
        _drop_after(path, start)
        self._file = path.open("a")
        self._events = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1) if config.tensorboard else None
        self._bar = tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True)
        self._log_every = config.log_every
        self._stop = config.on_nonfinite == "stop"
        self._unit, self._units_per_step = data.unit, data.units_per_batch(config)
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._clock = time.perf_counter()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if exception[0] is None:
                self._fetch(len(self._pending))
        finally:
            self._bar.close()
            self._file.close()
            if self._events is not None:
                self._events.close()

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the (not yet computed) numbers of training step `step`."""
        self._pending.append((step, values))
        self._bar.update()
        if step % self._log_every == 0:
            self._fetch(len(self._pending) - 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line and the same to TensorBoard."""
        # JSON has no NaN: what is not finite is null.
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock, for work that is no training step; everything added before is written first."""
        self._fetch(len(self._pending))
        yield
        self._clock = time.perf_counter()

    def _fetch(self, count: int) -> None:
        ready, self._pending = self._pending[:count], self._pending[count:]
        if not ready:
            return
        fetched = jax.device_get([values for _, values in ready])
        seconds, self._clock = time.perf_counter() - self._clock, time.perf_counter()
        units_per_s = self._units_per_step * len(ready) / seconds
        for (step, _), arrays in zip(ready, fetched, strict=True):
            values = {name: float(value) for name, value in arrays.items()}
            if self._stop and not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise NonFinite(step, values)
            self.write(step, values | {f"{self._unit}s_per_s": units_per_s})
        loss = float(fetched[-1]["loss"])
        self._bar.set_postfix_str(f"loss {loss:.4f}, {units_per_s:,.0f} {self._unit}s/s", refresh=False)


def _drop_after(path: Path, step: int) -> None:
    """Keeps the lines up to `step`; a line that a crash cut short goes too."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            continue
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(kept))
    os.replace(temporary, path)
