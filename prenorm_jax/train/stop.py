"""Being asked to stop: SIGTERM (a machine is taken away), SIGINT (Ctrl-C), SIGHUP (a terminal is closed)."""

from __future__ import annotations

import os
import signal
import threading
import time

import numpy as np

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import Interrupted
from prenorm_jax.base.processes import count_processes, gather


class StopSignals:
    """While entered: the signals are noted in `received`, for the loop to save and stop. Under nohup SIGHUP is not.

    If the process is still there `grace` seconds after the first one, or at the second, it ends at once: what the last
    complete checkpoint holds is then what is left.
    """

    def __init__(self, grace: float):
        self._grace, self.received = grace, ""
        self._steps, self._time = 0, time.monotonic()  # since many processes last agreed
        self._wait = self._pace = 1  # steps from then until they agree again, and what this one says next of it

    def __enter__(self) -> StopSignals:
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        wanted = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._receive) for number in wanted}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received:
            self._timer.cancel()

    def agreed(self, due: bool) -> str:
        """The name of the signal to stop for after this step; "" if none. To be called once a step.

        A single process stops as soon as it is asked to. Many must stop at the same step: they wait for each other, and
        all stop if one was asked to, where `due`, which is true at the same steps in all, and after about each quarter
        of `grace`, by the first one's clock. What is left of `grace` is for the step under way and the save.
        """
        if count_processes() == 1:
            return self.received
        self._steps += 1
        if not due and self._steps < self._wait:
            return ""
        number = signal.Signals[self.received] if self.received else 0
        answers = gather(np.array([number, self._pace], np.int32))  # returns when the devices have come here, too
        self._wait = int(answers[0, 1])
        before, self._time = self._time, time.monotonic()
        seconds = max(self._time - before, 1e-3) / self._steps  # a step; the first with all before it
        self._pace = min(max(1, int(self._grace / 4 / seconds)), 10**6)
        self._steps = 0
        number = int(answers[:, 0].max())
        return signal.Signals(number).name if number else ""

    def _receive(self, number: int, _frame: object) -> None:
        if self.received:
            self._give_up()
        self.received = signal.Signals(number).name
        self._timer = threading.Timer(self._grace, self._give_up)
        self._timer.daemon = True
        self._timer.start()
        say(f"\n{self.received}: saving before it stops, for at most {self._grace} s; once more ends it at once")

    def _give_up(self) -> None:
        say("error: ended without saving; the same command goes on from the last complete checkpoint")
        os._exit(Interrupted.status_unsaved)
