"""The training loop: data in, steps, metrics and checkpoints out."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import Interrupted, SharedError
from prenorm_jax.base.files import flatten, only_process
from prenorm_jax.base.processes import check_same, is_first, of_first, refused_alike, wait_for_all
from prenorm_jax.base.trees import count
from prenorm_jax.config import load_data
from prenorm_jax.data import Data, prefetch
from prenorm_jax.train.checkpoint import Checkpoints, complete_steps
from prenorm_jax.train.checks import check_config, check_workdir
from prenorm_jax.train.evaluation import evaluate
from prenorm_jax.train.metrics import MetricsWriter, NonFinite, drop_after
from prenorm_jax.train.nonfinite import describe_nonfinite
from prenorm_jax.train.restore import load_init_from, start_state
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import TrainState, make_eval_step, make_train_step
from prenorm_jax.train.stop import StopSignals
from prenorm_jax.train.tracing import traced
from prenorm_jax.train.utilisation import Utilisation
from prenorm_jax.train.workdir import RunRecord, device_name, write_config


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains from the last checkpoint in `workdir`, or from step 0, to `config.steps`.

    Raises PrenormError, before anything is written, if the configuration is wrong, is not that of the run in `workdir`,
    or does not fit its data.
    """
    workdir = Path(workdir)
    with refused_alike():
        run = Run.create(config)
        check_config(config)
        record = RunRecord(workdir)
        is_new = check_workdir(workdir, config, record)
        run = dataclasses.replace(run, mesh=make_mesh(config))
        data = load_data(config)
        data.check_model(config)
        training = _Training(run, data, workdir, record)
        given = load_init_from(run) if config.init_from and is_new else None
    check_same("their configuration", flatten(config))
    check_same("their data", data.digest)
    check_same("the checkpoints that they find", complete_steps(workdir / "checkpoints"))
    if is_first():
        workdir.mkdir(parents=True, exist_ok=True)
    wait_for_all("the workdir is there")
    check_same("whether they see the workdir", workdir.is_dir())
    with (
        only_process(workdir),
        StopSignals(config.grace_seconds) as signals,
        Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints,
    ):
        if not (workdir / "config.json").exists():  # before anything else: it says whose folder this is
            write_config(workdir, config)
        state = start_state(run, checkpoints, data, given)
        start, end = int(state.step), min(config.steps, config.stop_at or config.steps)
        if start >= end:
            say(f"{workdir} is at step {start} of {end} already: raise --config.steps (or stop_at) to go on")
            return
        training.begin(state, checkpoints)
        training.take_steps(state.replace(nonfinite=jnp.zeros_like(state.nonfinite)), end, signals)


class _Training:
    """One start of a run: from the step of a state to that of another."""

    def __init__(self, run: Run, data: Data, workdir: Path, record: RunRecord):
        """Makes the programs, which compile at their first call."""
        self._run, self._data, self._workdir, self._record = run, data, workdir, record
        self._train_step, self._eval_step = make_train_step(run), make_eval_step(run)
        self._to_computed = jax.jit(run.computed_params, out_shardings=run.computed_formats)
        self._utilisation = Utilisation.of(run)

    def begin(self, state: TrainState, checkpoints: Checkpoints) -> None:
        """Writes and says what is started, and drops the metrics of steps after the state's."""
        run, start = self._run, int(state.step)
        self._checkpoints, self._skipped_before = checkpoints, int(state.nonfinite)
        write_config(self._workdir, run.config)
        computed = jax.eval_shape(run.computed_params, state.params)
        counts = {"trained": count(state.params), "computed": count(computed)}
        self._record.start(run, start, counts)
        model = run.computed
        of = f" from {counts['trained']:,} of its Pre-LN form ({run.config.parameterization})" * run.converts
        say(f"data: {self._data.description}")
        say(
            f"model: {model.norm}, {model.depth} blocks, d_model {model.d_model}, {counts['computed']:,} parameters{of}"
            f"; on {device_name()}"
        )
        say(f"speed: {self._utilisation.describe()}")
        say(f"{'going on' if start else 'starting'} at step {start} of {run.config.steps} in {self._workdir}")
        drop_after(self._workdir / "metrics.jsonl", start, first=self._record.first_step)

    def take_steps(self, state: TrainState, end: int, signals: StopSignals) -> None:
        """Trains, evaluates and saves up to step `end`, or until a signal asks to stop."""
        config, start, result, stop = self._run.config, int(state.step), {}, ""
        try:
            with (
                MetricsWriter(self._workdir, start, config, self._data, self._utilisation) as metrics,
                traced(self._train_step, config.profile, start, end, self._workdir / "profile") as train_step,
            ):
                rows = self._run.local_rows
                batches = prefetch(lambda step: self._data.train_batch(config, step, rows), range(start, end))
                for done, batch in enumerate(batches, start + 1):
                    state, step_metrics = train_step(state, self._run.global_batch(batch))
                    metrics.add(done, step_metrics)
                    if _due(done, config.eval_every, config.steps):
                        with metrics.pause():
                            params = self._to_computed(state.params)
                            result = evaluate(self._run, self._eval_step, params, self._data)
                            metrics.write(done, result)
                    stop = signals.agreed(due=_due(done, config.log_every, end))
                    if _due(done, config.checkpoint_every, end) or stop:
                        with metrics.pause():
                            self._save(done, state, int(state.nonfinite))
                    if stop:
                        break
        except NonFinite as error:
            self._save_good(state)
            raise SharedError(describe_nonfinite(error, self._run, state, self._data)) from error
        self._saved()
        if stop and done < end:
            raise Interrupted(f"{stop} at step {done}: saved in {self._workdir}; the same command goes on from there")
        if skipped := self._skipped_before + int(state.nonfinite):
            say(f"{skipped} steps were skipped: their loss, gradient or update was not finite")
        last = f"; eval loss {result['eval_loss']:.4f}" if done == config.steps else ""
        say(f"done: {done} of {config.steps} steps in {self._workdir}{last}")

    def _save(self, done: int, state: TrainState, skipped: int) -> None:
        skipped += self._skipped_before
        model, data = self._run.trained, self._data
        self._checkpoints.save(done, state.params, state.opt_state, model, skipped, data.digest, data.vocabulary)
        self._record.saved(self._checkpoints.steps())  # the ones before: this one is being written

    def _saved(self) -> None:
        self._checkpoints.wait()
        self._record.saved(self._checkpoints.steps())

    def _save_good(self, state: TrainState) -> None:
        """Saves the last good state, unless it is saved already."""
        self._checkpoints.wait()  # so that what is still being written is among the steps, for all processes
        good = int(state.step)
        if not of_first(good in self._checkpoints.steps()):
            self._save(good, state, skipped=0)
        self._saved()


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)
