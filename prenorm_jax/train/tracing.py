"""A trace of some training steps by JAX's profiler: `--config.profile=10:13`."""

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.base.processes import count_processes


def parse_steps(profile: str | None, steps: float = float("inf")) -> range:
    """The steps, counted from 1 as in metrics.jsonl, that "FIRST:END" means: END is not among them. None means none.

    Raises PrenormError if it is of another form, or if a run of so many `steps` has none such.
    """
    if profile is None:
        return range(0)
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", profile)
    chosen = range(*map(int, match.groups())) if match else range(0)
    if not chosen or not 1 <= chosen.start <= steps:
        raise PrenormError(
            f"profile={profile!r} names no steps of 1 to {steps}: give FIRST:END, such as 10:13 for steps 10 to 12"
        )
    return chosen


@contextlib.contextmanager
def traced(
    train_step: Callable[..., Any],
    profile: str | None,
    start: int,
    end: int,
    folder: Path,
    untimed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[Callable]:
    """Gives `train_step` as it is to be called for steps `start` + 1 to `end`: the chosen ones are traced to `folder`.

    The trace holds nothing of the steps before the first, and the last to its end, however far the host is ahead. It
    ends sooner where the run does. Starting and ending it is `untimed`. If none of the steps to come is chosen, or the
    trace fails, that is said: it ends no run. Of many processes each has a folder in `folder`: those of one host would
    write the same files.
    """
    chosen, number = parse_steps(profile), start
    steps = range(max(chosen.start, start + 1), min(chosen.stop, end + 1))
    if chosen and not steps:
        say(f"warning: steps {profile} are not traced: this start trains steps {start + 1} to {end}")
    if count_processes() > 1:
        folder = folder / f"process_{jax.process_index()}"

    def step(*arguments: Any) -> Any:
        nonlocal number
        number += 1
        if number not in steps:
            return train_step(*arguments)
        if number == steps[0]:
            jax.block_until_ready(arguments)
            with untimed(), _or_say("the profiler does not start"):
                jax.profiler.start_trace(folder)
                trace.callback(stop)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            result = train_step(*arguments)
        if number == steps[-1]:
            jax.block_until_ready(result)
            trace.close()
        return result

    def stop() -> None:
        with untimed(), _or_say(f"steps {profile} are not traced"):
            jax.profiler.stop_trace()
            say(f"steps {steps[0]} to {number} are traced in {folder}")

    with contextlib.ExitStack() as trace:
        yield step


@contextlib.contextmanager
def _or_say(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # another trace under way, no room, no rights: each has exceptions of its own
        say(f"warning: {what}: {first_line(error)}")
