"""TensorBoard's event files: a copy of a run's numbers, for viewing."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from prenorm_jax.base.console import say


@contextlib.contextmanager
def _hidden(module: str) -> Iterator[None]:
    """While entered, the module cannot be imported, unless it was before."""
    hides = module not in sys.modules
    if hides:
        sys.modules[module] = None
    yield
    if hides:
        del sys.modules[module]


with _hidden("torch"):  # tensorboardX imports it where it is installed, for arrays that are none of ours: seconds
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

FLUSH_SECONDS = 10  # between two flushes, each of which waits for the disk


class Events:
    """One event file. If it cannot be written, that is said, and the run goes on without it."""

    def __init__(self, folder: Path, step: int):
        """Opens it: what was written of `step` and later, by a run that was interrupted, is not to be shown."""
        self._writer: EventsWriter | None = None
        with self._or_none():
            folder.mkdir(exist_ok=True)
            self._writer = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
            self._write(step, session_log=SessionLog(status=SessionLog.START))
            self.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step."""
        if self._writer is not None:
            with self._or_none():
                for name, value in values.items():
                    self._write(step, summary=scalar(name, value))
                if time.monotonic() > self._flushed + FLUSH_SECONDS:
                    self.flush()

    def flush(self) -> None:
        """Returns when what was written is on disk."""
        if self._writer is not None:
            with self._or_none():
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Ends the file."""
        if self._writer is not None:
            with self._or_none():
                self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        # Written as it comes. (The usual SummaryWriter has a thread and a queue: where the disk is full the thread
        # dies, the queue fills up, and the training waits for ever.)
        self._writer.write_event(Event(step=step, wall_time=time.time(), **content))

    @contextlib.contextmanager
    def _or_none(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            writer, self._writer = self._writer, None
            # Else what it could not write is tried again, and complained about, when the interpreter ends.
            with contextlib.suppress(OSError, AttributeError):
                writer._py_recordio_writer.close()
            say(f"warning: no more TensorBoard events: {error.strerror}; metrics.jsonl has all numbers")
