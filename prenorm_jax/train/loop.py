"""The training loop: data in, steps, metrics and checkpoints out."""

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import Interrupted, SharedError, Unwritable
from prenorm_jax.base.files import flatten, only_process
from prenorm_jax.base.processes import (
    check_same,
    count_processes,
    is_first,
    lost_process,
    of_first,
    refused_alike,
    wait_for_all,
)
from prenorm_jax.base.trees import count
from prenorm_jax.config import load_data
from prenorm_jax.data import Data, prefetch
from prenorm_jax.train.checkpoint import Checkpoints, complete_steps
from prenorm_jax.train.checks import check_config, check_workdir
from prenorm_jax.train.evaluation import evaluate
from prenorm_jax.train.failures import Place, memory_named, refusal
from prenorm_jax.train.metrics import MetricsWriter, NonFinite, StepClock, drop_after
from prenorm_jax.train.nonfinite import describe_nonfinite
from prenorm_jax.train.restore import load_init_from, start_state
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import TrainState, make_eval_step, make_train_step
from prenorm_jax.train.stop import StopSignals
from prenorm_jax.train.tracing import traced
from prenorm_jax.train.utilisation import Utilisation
from prenorm_jax.train.workdir import RunRecord, device_name, write_config

Values = dict[str, jax.Array]


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains from the last checkpoint in `workdir`, or from step 0, to `config.steps`.

    Raises PrenormError, before anything is written, if the configuration is wrong, is not that of the run in `workdir`,
    or does not fit its data. Whatever ends the steps, the last good state is saved first where there is one.
    """
    with memory_named(config):
        _train(config, Path(workdir))


def _train(config: ConfigDict, workdir: Path) -> None:
    with refused_alike():
        run = Run.create(config)
        check_config(config)
        record = RunRecord(workdir)
        is_new = check_workdir(workdir, config, record)
        run = dataclasses.replace(run, mesh=make_mesh(config))
        data = load_data(config)
        data.check_model(config)
        training = _Training(run, data, workdir, record)
    check_same("their configuration", flatten(config))
    check_same("their data", data.digest)
    check_same("the checkpoints that they find", complete_steps(workdir / "checkpoints"))
    given = load_init_from(run) if config.init_from and is_new else None
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
    wait_for_all("the workdir is there")
    check_same("whether they see the workdir", workdir.is_dir())
    with (
        only_process(workdir),
        StopSignals(config.grace_seconds) as signals,
        Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints,
    ):
        state = start_state(run, checkpoints, data, given)
        start, end = int(state.step), min(config.steps, config.stop_at or config.steps)
        if start >= end:
            say(f"{workdir} is at step {start} of {end} already: raise --config.steps (or stop_at) to go on")
            return
        training.begin(state, checkpoints)
        training.take_steps(end, signals)


class _Training:
    """One start of a run: from the step of a state to that of another."""

    def __init__(self, run: Run, data: Data, workdir: Path, record: RunRecord):
        """Makes the programs, which are not compiled yet."""
        self._run, self._data, self._workdir, self._record = run, data, workdir, record
        self._train_step, self._eval_step = make_train_step(run), make_eval_step(run)
        self._to_computed = jax.jit(run.computed_params, out_shardings=run.computed_formats)
        self._utilisation = Utilisation.of(run)

    def begin(self, state: TrainState, checkpoints: Checkpoints) -> None:
        """Says what is started."""
        run, start = self._run, int(state.step)
        self._checkpoints, self._skipped_before = checkpoints, int(state.nonfinite)
        self._state = state.replace(nonfinite=jnp.zeros_like(state.nonfinite))
        self._place, self._is_claimed = Place(self._workdir), False
        self._metrics: MetricsWriter | None = None
        computed = jax.eval_shape(run.computed_params, state.params)
        self._counts = {"trained": count(state.params), "computed": count(computed)}
        model = run.computed
        of = f" from {self._counts['trained']:,} of its Pre-LN form ({run.config.parameterization})" * run.converts
        say(f"data: {self._data.description}")
        say(
            f"model: {model.norm}, {model.depth} blocks, d_model {model.d_model}, "
            f"{self._counts['computed']:,} parameters{of}; on {device_name()}"
        )
        say(f"speed: {self._utilisation.describe()}")
        say(f"{'going on' if start else 'starting'} at step {start} of {run.config.steps} in {self._workdir}")
        if run.config.steps < (warmup := run.config.optimizer.warmup_steps):
            say(f"warning: the {run.config.steps} steps end within optimizer.warmup_steps={warmup}, below the peak")

    def _claim(self, start: int) -> None:
        """Writes what is started, and drops the metrics of steps after it.

        Only now that a step was taken: a folder whose model cannot be trained stays free for another. And before
        anything is saved: config.json, the last of them, says whose folder this is.
        """
        self._place.check()
        self._record.start(self._run, start, self._counts, self._data.digest)
        drop_after(self._workdir / "metrics.jsonl", start, first=self._record.first_step)
        write_config(self._workdir, self._run.config)
        self._is_claimed = True

    def take_steps(self, end: int, signals: StopSignals) -> None:
        """Trains, evaluates and saves up to step `end`, or until a signal asks to stop."""
        config, start = self._run.config, int(self._state.step)
        try:
            done, result, stop = self._take_steps(start, end, signals)
            self._saved()
        except Exception as error:
            self._save_before(error)
            raise
        if stop and done < end:
            raise Interrupted(f"{stop} at step {done}: saved in {self._workdir}; the same command goes on from there")
        if skipped := self._skipped_before + int(self._state.nonfinite):
            say(f"steps skipped, for a loss, gradient or update that was not finite: {skipped:,}")
        last = f"; eval loss {result['eval_loss']:.4f}" if done == config.steps else ""
        say(f"done: {done} of {config.steps} steps in {self._workdir}{last}")

    def _take_steps(self, start: int, end: int, signals: StopSignals) -> tuple[int, dict[str, float], str]:
        """The last step taken, the last evaluation, and the signal that asked to stop."""
        config, data, rows, result = self._run.config, self._data, self._run.local_rows, {}
        host_batches = prefetch(lambda step: data.train_batch(config, step, rows), range(start, end))
        batches = map(self._run.global_batch, host_batches)
        first = next(batches)
        compiled, clock = self._compiled(first), StepClock()
        with traced(compiled, config.profile, start, end, self._workdir / "profile", clock.stopped) as train_step:
            steps = self._steps(train_step, itertools.chain([first], batches))
            del first  # it would lie on the devices to the end
            of_first_step = jax.block_until_ready(next(steps))
            with clock.stopped():
                self._claim(start)
            with MetricsWriter(self._workdir, start, config, data, self._utilisation, clock) as self._metrics:
                for done, values in enumerate(itertools.chain([of_first_step], steps), start + 1):
                    self._metrics.add(done, values, wait=done == start + 1)
                    if _due(done, config.eval_every, config.steps):
                        with self._metrics.pause():
                            params = self._to_computed(self._state.params)
                            result = evaluate(self._run, self._eval_step, params, data)
                            self._metrics.write(done, result)
                    if is_logged := _due(done, config.log_every, end):
                        self._place.check()
                    stop = signals.agreed(due=is_logged)
                    if _due(done, config.checkpoint_every, end) or stop:
                        with self._metrics.pause():
                            self._save(done, int(self._state.nonfinite))
                    if stop:
                        break
        return done, result, stop

    def _compiled(self, batch: Any) -> Callable[..., tuple[TrainState, Values]]:
        say("compiling the training step")
        begin = time.monotonic()
        compiled = self._train_step.lower(self._state, batch).compile()
        say(f"compiled in {time.monotonic() - begin:.1f} s, which no rate counts")
        return compiled

    def _steps(self, train_step: Callable[..., tuple[TrainState, Values]], batches: Iterator[Any]) -> Iterator[Values]:
        for batch in batches:
            self._state, values = train_step(self._state, batch)
            yield values

    def _save(self, done: int, skipped: int) -> None:
        self._place.check()
        skipped += self._skipped_before
        model, data = self._run.trained, self._data
        params, opt_state = self._state.params, self._state.opt_state
        self._checkpoints.save(done, params, opt_state, model, skipped, data.digest, data.vocabulary)
        if jax.default_backend() == "cpu":  # what is written in the background takes the cores that train
            self._checkpoints.wait()
        self._place.check()  # again: Orbax makes the folders that it does not find
        self._record.saved(self._checkpoints.steps())  # of one that is still being written, those before

    def _saved(self) -> None:
        self._checkpoints.wait()
        self._place.check()
        self._record.saved(self._checkpoints.steps())

    def _save_before(self, error: Exception) -> None:
        """Saves the last good state before an error in the loop ends the run, and raises it with the way on.

        Returns for one that is to be raised as it is: where there is nothing to save, or what ends the run is unknown.
        Of many processes that do not all have this error none can save: it takes them all.
        """
        if lost_process(error):
            return
        if self._is_claimed:
            self._place.check()
        if isinstance(error, NonFinite):
            self._save_good()
            raise SharedError(describe_nonfinite(error, self._run, self._state, self._data)) from error
        refused = refusal(error, self._run.config)
        if self._is_claimed and not isinstance(error, Unwritable) and count_processes() == 1:
            way_on = self._save_or_not()
            if refused is None:
                say(way_on)
            else:
                refused.args = (f"{refused}; {way_on}",)
        if refused is not None and refused is not error:
            raise refused from error

    def _save_or_not(self) -> str:
        """Saves the last good state if it is still there and all before it is written; says from where it goes on."""
        try:
            if self._metrics and not self._metrics.behind:
                self._save_good()
        except Exception as unsaved:  # of a step that failed the state may be gone
            if lost_process(unsaved):
                raise
        steps = self._checkpoints.steps()
        if not steps:
            return "nothing is saved yet: the same command starts anew"
        return f"step {steps[-1]} is saved: the same command goes on from there"

    def _save_good(self) -> None:
        """Saves the last good state, unless it is saved already."""
        self._checkpoints.wait()  # so that what is still being written is among the steps, for all processes
        good = int(self._state.step)
        if not of_first(good in self._checkpoints.steps()):
            skips = self._run.config.on_nonfinite == "skip"  # else the steps that are counted are no part of it
            self._save(good, int(self._state.nonfinite) if skips else 0)
        self._saved()


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)
