"""Where a run's numbers go: `metrics.jsonl`, TensorBoard event files and the progress that is shown."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import Unwritable
from prenorm_jax.base.files import write_whole
from prenorm_jax.base.processes import count_processes, is_first
from prenorm_jax.data import Data
from prenorm_jax.train.events import Events
from prenorm_jax.train.utilisation import Utilisation

SHOWN_SECONDS = 30  # between two lines of progress, where there is no terminal for a bar


class NonFinite(Exception):
    """The loss, the gradient norm or the norm of the new parameters of training step `step` is not finite."""

    def __init__(self, step: int, values: dict[str, float]):
        super().__init__(step, values)
        self.step, self.values = step, values


class StepClock:
    """The time that steps take: from the end of one to that of another, without what is no step."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap or the start. To be called when a step has ended."""
        before, self._since = self._since, time.perf_counter()
        return self._since - before

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """While entered, it stands still: for what is no step. No step is under way."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._since += time.perf_counter() - begin


class MetricsWriter:
    """Writes one line a training step and one an evaluation. A context manager.

    The numbers of a step are fetched from the device `log_every` steps at a time, and where steps are queued the
    newest's only with the next fetch, so that the device always has a step to work on. `tokens_per_s` (of images:
    `images_per_s`), `model_flops_per_s` and, where the peak is known, `mfu` are of the steps fetched together: their
    number over the time from the end of the last one before them to that of their own last. What is no step, such as
    evaluating, saving and compiling, is left out. The last step before a pause, fetched alone, would be timed over
    next to nothing: its rate is that of all since the fetch before the last. The first step of a start, whose program
    runs for the first time, is fetched alone and has no rate. A step's tokens are those of its whole
    batch, however many passes it takes. With `config.on_nonfinite` "stop" a step whose numbers are not finite is not
    written, but raises `NonFinite`. All of many processes fetch; the first writes.
    """

    def __init__(
        self, workdir: Path, start: int, config: ConfigDict, data: Data, utilisation: Utilisation, clock: StepClock
    ):
        """Opens the files, to go on after step `start`. Call `drop_after` first. The clock runs since then."""
        self._file = (workdir / "metrics.jsonl" if is_first() else Path(os.devnull)).open("a")
        writes_events = config.tensorboard and is_first()
        self._events = Events(workdir / "tensorboard", start + 1) if writes_events else None
        self._progress = Progress(start, config.steps)
        self._log_every = config.log_every
        self._stop = config.on_nonfinite == "stop"
        self._unit, self._units_per_step = data.unit, data.units_per_batch(config)
        self._utilisation = utilisation
        self._queued = int(jax.default_backend() != "cpu")  # steps that a fetch leaves to the next: see configure_jax
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._clock, self._before = clock, (0.0, 0)  # seconds and steps fetched together before, since the last pause
        self._is_first = True  # what is fetched next

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        try:
            if error is None or _leaves_numbers(error):
                try:
                    self._fetch(wait=True)
                except Exception as unfetched:
                    if error is None or isinstance(unfetched, NonFinite):
                        raise
        finally:
            self._progress.close()
            if self._events is not None:
                self._events.close()
            # What could not be written at first is tried again here; the error under way says it already.
            with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                self._file.close()

    @property
    def behind(self) -> bool:
        """Whether steps were added that have no line."""
        return bool(self._pending)

    def add(self, step: int, values: dict[str, jax.Array], wait: bool = False) -> None:
        """Takes the (not yet computed) numbers of training step `step`, and with `wait` waits for them."""
        self._pending.append((step, values))
        self._progress.update()
        if wait or step % self._log_every == 0 or self._progress.due:
            self._fetch(wait)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Writes and says the result of an evaluation. Raises Unwritable if the line cannot be written."""
        self._write(step, values)
        *numbers, _ = values.items()  # the last is how much there was to evaluate
        words = (f"{name.removeprefix('eval_').replace('_', ' ')} {value:.5g}" for name, value in numbers)
        self._progress.say(step, "held-out " + ", ".join(words))

    def _write(self, step: int, values: dict[str, Any]) -> None:
        # JSON has no NaN: what is not finite is null.
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **line}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise Unwritable(
                f"{self._file.name} cannot be written ({error.strerror}): make room, or mend what is wrong, and give "
                "the same command again: it goes on from the last complete checkpoint"
            ) from error
        if self._events is not None:
            self._events.write(step, values)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Stops the clock, for work that is no training step; everything added before is written first."""
        self._fetch(wait=True)
        if self._events is not None:
            self._events.flush()
        yield
        self._clock.lap()

    def _fetch(self, wait: bool = False) -> None:
        count = len(self._pending) - (0 if wait else self._queued)
        ready = self._pending[:count]
        if not ready:
            return
        fetched = jax.device_get([values for _, values in ready])
        seconds, steps = self._clock.lap(), len(ready)
        before, self._before = self._before, (0.0, 0) if wait else (seconds, steps)
        if wait:
            seconds, steps = seconds + before[0], steps + before[1]
        units_per_s = self._units_per_step * steps / seconds
        rates = {f"{self._unit}s_per_s": units_per_s, **self._utilisation.rates(seconds / steps)}
        if self._is_first:
            self._is_first, self._before, rates = False, (0.0, 0), {}
        for (step, _), arrays in zip(ready, fetched, strict=True):
            values = jax.tree.map(float, arrays)
            if self._stop and not all(map(math.isfinite, values.values())):
                raise NonFinite(step, values)
            self._write(step, values | rates)
        self._pending = self._pending[count:]
        loss = float(fetched[-1]["loss"])
        used = (
            f"{rates['mfu']:.1%} mfu" if "mfu" in rates else f"{rates.get('model_flops_per_s', 0) / 1e9:,.3g} GFLOP/s"
        )
        speed = f", {units_per_s:,.0f} {self._unit}s/s, {used}" if rates else ""
        self._progress.show(ready[-1][0], f"loss {loss:.4f}{speed}")


def _leaves_numbers(error: BaseException) -> bool:
    """Whether the numbers of the steps before an error in the loop are still to be had, and to be written."""
    return isinstance(error, Exception) and not isinstance(error, NonFinite | Unwritable) and count_processes() == 1


class Progress:
    """How far a run is, on stderr: a bar on a terminal, elsewhere a line every `SHOWN_SECONDS`, and one at the end."""

    def __init__(self, start: int, steps: int):
        self._steps, self._is_shown = steps, is_first()
        # tqdm's own rate has evaluations and saves in it.
        bar = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        on_terminal = self._is_shown and sys.stderr.isatty()
        self._bar = tqdm(total=steps, initial=start, dynamic_ncols=True, bar_format=bar, disable=not on_terminal)
        self._shown, self._last = -math.inf, ""  # when, and what was not shown since

    @property
    def due(self) -> bool:
        """Whether it is time for the next line."""
        return self._is_shown and self._bar.disable and time.monotonic() > self._shown + SHOWN_SECONDS

    def update(self) -> None:
        """One step more."""
        self._bar.update()

    def show(self, step: int, text: str) -> None:
        """What is known of the last step fetched."""
        self._bar.set_postfix_str(text, refresh=False)
        if self._bar.disable:
            self._last = f"step {step} of {self._steps}: {text}"
        if self.due:
            self._say_last()

    def say(self, step: int, text: str) -> None:
        """A line of its own, above the bar, after what is known of the steps before."""
        if self._is_shown:
            self._say_last()
            tqdm.write(f"step {step} of {self._steps}: {text}", file=sys.stderr)

    def close(self) -> None:
        """Shows the last step."""
        self._say_last()
        self._bar.close()

    def _say_last(self) -> None:
        if self._last:
            say(self._last)
            self._shown, self._last = time.monotonic(), ""


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
        except (ValueError, TypeError, KeyError, RecursionError):
            damaged += bool(line) and number < len(lines)
    if damaged:
        say(f"warning: {path} had {damaged} damaged lines, now left out")
    if missing := len(set(range(first + 1, step + 1)) - trained):
        say(f"warning: {path} lacks {missing} of the {step - first} steps before this one; they are not trained again")
    if lines:
        write_whole(path, b"".join(kept))
