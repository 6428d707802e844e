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
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import write_whole
from prenorm_jax.base.processes import is_first
from prenorm_jax.data import Data
from prenorm_jax.train.utilisation import Utilisation


class NonFinite(Exception):
    """The loss, the gradient norm or the norm of the new parameters of training step `step` is not finite."""

    def __init__(self, step: int, values: dict[str, float]):
        super().__init__(step, values)
        self.step, self.values = step, values


class MetricsWriter:
    """Writes one line a training step and one an evaluation. A context manager.

    The numbers of a step are fetched from the device `log_every` steps at a time, and the newest step's only with the
    next fetch, so that the device always has a step to work on. `tokens_per_s` (of images: `images_per_s`),
    `model_flops_per_s` and, where the peak is known, `mfu` are of the steps fetched together, evaluation and
    checkpointing left out; a step's tokens are those of its whole batch, however many passes it takes. With
    `config.on_nonfinite` "stop" a step whose numbers are not finite is not written, but raises `NonFinite`. All of many
    processes fetch; the first writes.
    """

    def __init__(self, workdir: Path, start: int, config: ConfigDict, data: Data, utilisation: Utilisation):
        """Opens the files, to go on after step `start`. Call `drop_after` first."""
        self._file = (workdir / "metrics.jsonl" if is_first() else Path(os.devnull)).open("a")
        self._events: EventsWriter | None = None
        if config.tensorboard and is_first():
            with self._or_no_events():
                (workdir / "tensorboard").mkdir(exist_ok=True)
                self._events = EventsWriter(str(workdir / "tensorboard" / "events"), filename_suffix=f".{os.getpid()}")
                # What was written after this step, by a run that was interrupted, is not to be shown.
                self._event(start + 1, session_log=SessionLog(status=SessionLog.START))
        self._bar = tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True, disable=not is_first())
        self._log_every = config.log_every
        self._stop = config.on_nonfinite == "stop"
        self._unit, self._units_per_step = data.unit, data.units_per_batch(config)
        self._utilisation = utilisation
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._clock = time.perf_counter()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            if kind is None:
                self._fetch(len(self._pending))
        finally:
            self._bar.close()
            if self._events is not None:
                with self._or_no_events():
                    self._events.close()
            # What could not be written at first is tried again here; the error under way says it already.
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                self._file.close()

    def add(self, step: int, values: dict[str, jax.Array]) -> None:
        """Takes the (not yet computed) numbers of training step `step`."""
        self._pending.append((step, values))
        self._bar.update()
        if step % self._log_every == 0:
            self._fetch(len(self._pending) - 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes one line and the same to TensorBoard. Raises PrenormError if the line cannot be written."""
        # JSON has no NaN: what is not finite is null.
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise PrenormError(
                f"{self._file.name} cannot be written ({error.strerror}): make room, or mend what is wrong, and give "
                "the same command again: it goes on from the last complete checkpoint"
            ) from error
        if self._events is not None:
            with self._or_no_events():
                for name, value in values.items():
                    self._event(step, summary=scalar(name, value))
                self._events.flush()

    def _event(self, step: int, **content: Any) -> None:
        # Written as it comes. (The usual SummaryWriter has a thread and a queue: where the disk is full the thread
        # dies, the queue fills up, and the training waits for ever.)
        self._events.write_event(Event(step=step, wall_time=time.time(), **content))

    @contextlib.contextmanager
    def _or_no_events(self) -> Iterator[None]:
        """TensorBoard's file is a copy for viewing: if it cannot be written, the run goes on without it."""
        try:
            yield
        except OSError as error:
            writer, self._events = self._events, None
            # Else what it could not write is tried again, and complained about, when the interpreter ends.
            with contextlib.suppress(OSError, AttributeError):
                writer._py_recordio_writer.close()
            say(f"warning: no more TensorBoard events: {error.strerror}; metrics.jsonl has all numbers")

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
        rates = {f"{self._unit}s_per_s": units_per_s, **self._utilisation.rates(seconds / len(ready))}
        for (step, _), arrays in zip(ready, fetched, strict=True):
            values = jax.tree.map(float, arrays)
            if self._stop and not all(map(math.isfinite, values.values())):
                raise NonFinite(step, values)
            self.write(step, values | rates)
        loss = float(fetched[-1]["loss"])
        used = f"{rates['mfu']:.1%} mfu" if "mfu" in rates else f"{rates['model_flops_per_s'] / 1e9:,.0f} GFLOP/s"
        self._bar.set_postfix_str(f"loss {loss:.4f}, {units_per_s:,.0f} {self._unit}s/s, {used}", refresh=False)


def drop_after(path: Path, step: int, first: int) -> None:
    """Keeps the lines of metrics.jsonl up to `step`; what an interrupted run wrote after its last checkpoint goes.

    Says so if lines are damaged, other than the last, which a crash may have cut short, or if training steps after
    `first` are missing.
    """
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    kept, trained, damaged = [], set(), 0
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            if entry["step"] <= step:
                kept.append(line + b"\n")
                trained |= {entry["step"]} if "loss" in entry else set()
        except (ValueError, TypeError, KeyError):
            damaged += bool(line) and number < len(lines)
    if damaged:
        say(f"warning: {path} had {damaged} damaged lines, now left out")
    if missing := len(set(range(first + 1, step + 1)) - trained):
        say(f"warning: {path} lacks {missing} of the {step - first} steps before this one; they are not trained again")
    if lines:
        write_whole(path, b"".join(kept))
