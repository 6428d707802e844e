"""The training loop: data in, steps, metrics and checkpoints out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import Interrupted, PrenormError, SharedError, check_choice, check_range
from prenorm_jax.base.files import only_process
from prenorm_jax.base.processes import check_same, is_first, of_first, refused_alike, wait_for_all
from prenorm_jax.base.trees import count
from prenorm_jax.data import Data, load_data, prefetch
from prenorm_jax.train.arrays import global_batch, local_rows
from prenorm_jax.train.checkpoint import Checkpoints, complete_steps
from prenorm_jax.train.evaluation import evaluate
from prenorm_jax.train.metrics import MetricsWriter, NonFinite, drop_after
from prenorm_jax.train.optim import make_optimizer
from prenorm_jax.train.record import RunRecord, device_name
from prenorm_jax.train.restore import load_init_from, start_state
from prenorm_jax.train.sharding import make_mesh, params_format, split_batch
from prenorm_jax.train.step import (
    Params,
    RunModels,
    TrainState,
    computed_params,
    make_eval_step,
    make_gradients,
    make_train_step,
    run_models,
)
from prenorm_jax.train.stop import StopSignals
from prenorm_jax.train.tracing import parse_steps, traced
from prenorm_jax.train.utilisation import Utilisation
from prenorm_jax.train.workdir import config_differences, flat_config, literal_config, load_config, write_config


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains from the last checkpoint in `workdir`, or from step 0, to `config.steps`.

    Raises PrenormError, before anything is written, if the configuration is wrong, is not that of the run in `workdir`,
    or does not fit its data.
    """
    workdir = Path(workdir)
    with refused_alike():
        models = run_models(config)
        _check_config(config)
        record = RunRecord(workdir)
        is_new = _check_workdir(workdir, config, record)
        mesh = make_mesh(config)
        data = load_data(config)
        data.check_model(config)

        train_step = make_train_step(config, models, mesh)
        eval_step = make_eval_step(config, models.computed, mesh)
        computed_sharding = params_format(models.computed, mesh)
        to_computed = jax.jit(lambda params: computed_params(params, models), out_shardings=computed_sharding)
        end = min(config.steps, config.stop_at or config.steps)
        given = load_init_from(config, models) if config.init_from and is_new else None
    check_same("their configuration", flat_config(config))
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
        state = start_state(config, models, checkpoints, data, mesh, given)
        start = int(state.step)
        if start >= end:
            say(f"{workdir} is at step {start} of {end} already: raise --config.steps (or stop_at) to go on")
            return
        write_config(workdir, config)
        counts = _parameter_counts(models, state)
        record.start(models, start, counts)
        say(f"data: {data.description}")
        say(f"model: {_describe(models, config.parameterization, counts)}; on {device_name()}")
        utilisation = Utilisation.of(config, mesh.size)
        say(f"speed: {utilisation.describe()}")
        say(f"{'going on' if start else 'starting'} at step {start} of {config.steps} in {workdir}")

        drop_after(workdir / "metrics.jsonl", start, first=record.first_step)
        skipped_before = int(state.nonfinite)
        state = state.replace(nonfinite=jnp.zeros_like(state.nonfinite))

        def save(done: int, skipped: int) -> None:
            skipped += skipped_before
            checkpoints.save(done, state.params, state.opt_state, models.trained, skipped, data.digest)
            record.saved(checkpoints.steps())  # the ones before: this one is being written

        try:
            with (
                MetricsWriter(workdir, start, config, data, utilisation) as metrics,
                traced(train_step, config.profile, start, end, workdir / "profile") as train_step,
            ):
                rows = local_rows(split_batch(mesh), config.batch_size)
                batches = prefetch(lambda step: data.train_batch(config, step, rows), range(start, end))
                for step, batch in zip(range(start, end), batches, strict=True):
                    batch = global_batch(batch, split_batch(mesh), config.batch_size)
                    state, step_metrics = train_step(state, batch)
                    done = step + 1
                    metrics.add(done, step_metrics)
                    if _due(done, config.eval_every, config.steps):
                        with metrics.pause():
                            result = evaluate(eval_step, to_computed(state.params), data, config, split_batch(mesh))
                            metrics.write(done, result)
                    stop = signals.agreed(due=_due(done, config.log_every, end))
                    if _due(done, config.checkpoint_every, end) or stop:
                        with metrics.pause():
                            save(done, int(state.nonfinite))
                    if stop:
                        break
        except NonFinite as error:
            checkpoints.wait()  # so that what is still being written is among the steps, for all processes
            good = int(state.step)
            if not of_first(good in checkpoints.steps()):
                save(good, skipped=0)
            checkpoints.wait()
            record.saved(checkpoints.steps())
            raise SharedError(_describe_nonfinite(error, config, models, state, data, mesh)) from error
        checkpoints.wait()
        record.saved(checkpoints.steps())
        if stop and done < end:
            raise Interrupted(f"{stop} at step {done}: saved in {workdir}; the same command goes on from there")
    if skipped := skipped_before + int(state.nonfinite):
        say(f"{skipped} steps were skipped: their loss, gradient or update was not finite")
    say(
        f"done: {done} of {config.steps} steps in {workdir}"
        + (f"; eval loss {result['eval_loss']:.4f}" if done == config.steps else "")
    )


def _describe_nonfinite(
    error: NonFinite, config: ConfigDict, models: RunModels, state: TrainState, data: Data, mesh: Mesh
) -> str:
    """Where it happened, and in which parameter it is worst."""
    step = error.step - 1
    batch = data.train_batch(config, step, local_rows(split_batch(mesh), config.batch_size))
    batch = global_batch(batch, split_batch(mesh), config.batch_size)
    grads = jax.jit(make_gradients(config, models, mesh))(state.params, batch, np.int32(step))[1]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in error.values.items() if name != "learning_rate")
    first = step * config.batch_size
    return (
        f"step {error.step} is not finite ({numbers}): examples {first} to {first + config.batch_size - 1}, "
        f"{worst_leaf(grads, state.params)}; the state before it, step {int(state.step)}, is saved; "
        "--config.on_nonfinite=skip goes on without such steps"
    )


def worst_leaf(grads: Params, params: Params) -> str:
    """Says which leaf has the most gradients that are not finite or, if none has or all are, the largest numbers.

    A loss that is not finite gives no finite gradient anywhere: then the largest parameter is the better hint.
    """
    grads, params = (_extremes(tree) for tree in (grads, params))
    if min(bad for bad, _ in grads.values()) == 1:
        worst = max(params, key=lambda path: params[path][1])
        return f"no gradient is finite, the largest parameter is in {worst} ({params[worst][1]:.3g})"
    worst = max(grads, key=grads.__getitem__)
    bad, largest = grads[worst]
    return f"worst gradient in {worst} ({bad:.0%} not finite, up to {largest:.3g})"


@jax.jit
def _leaf_extremes(tree: Params) -> Any:
    return jax.tree.map(lambda x: (1 - jnp.isfinite(x).mean(), jnp.abs(x).max()), tree)


def _extremes(tree: Params) -> dict[str, tuple[float, float]]:
    """For each leaf the share of its numbers that are not finite, and its largest."""
    extremes = flatten_dict(jax.device_get(_leaf_extremes(tree)))
    return {"/".join(path): (float(bad), float(largest)) for path, (bad, largest) in extremes.items()}


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def _check_config(config: ConfigDict) -> None:
    for key in ("steps", "batch_size", "log_every", "keep_checkpoints"):
        check_range(key, config[key], at_least=1)
    check_range("grace_seconds", config.grace_seconds, at_least=1)
    for key in ("eval_every", "checkpoint_every"):
        check_range(key, config[key], at_least=0)
    check_range("seed", config.seed, at_least=0, below=2**32)
    for key in ("learning_rate", "final_learning_rate", "warmup_steps", "weight_decay", "clip", "eps"):
        check_range(f"optimizer.{key}", config.optimizer[key], at_least=0)
    for key in ("b1", "b2"):
        check_range(f"optimizer.{key}", config.optimizer[key], at_least=0, below=1)
    if "seq_len" in config.data:
        check_range("data.seq_len", config.data.seq_len, at_least=1)
    for key in config.get("augment", {}):
        check_range(f"augment.{key}", config.augment[key], at_least=0)
    if "augment" in config:
        check_choice("loss", config.loss, ("softmax", "sigmoid"))
        if config.loss == "sigmoid" and config.augment.label_smoothing:
            raise PrenormError("loss=sigmoid takes no augment.label_smoothing: set it to 0")
        if config.augment.shift and config.augment.min_area < 1:
            raise PrenormError("augment.shift and augment.min_area<1 exclude each other: set one crop alone")
        check_range("augment.label_smoothing", config.augment.label_smoothing, at_least=0, below=1)
        if not 0 < config.augment.min_area <= 1:
            raise PrenormError(f"augment.min_area={config.augment.min_area} must be above 0 and at most 1")
    check_range("stop_at", config.stop_at, at_least=1)
    parse_steps(config.profile, config.steps)
    if config.on_nonfinite not in ("stop", "skip"):
        raise PrenormError(f"on_nonfinite={config.on_nonfinite!r} is not one of stop, skip")
    make_optimizer(config)


def _check_workdir(workdir: Path, config: ConfigDict, record: RunRecord) -> bool:
    """Raises unless `workdir` is new or holds this very run; whether it has no checkpoint yet."""
    checkpoints = complete_steps(workdir / "checkpoints")
    if workdir.exists() and not workdir.is_dir():
        raise PrenormError(f"--workdir={workdir} is a file: name a folder")
    if not (workdir / "config.json").exists():
        if (workdir / "checkpoints").exists():
            raise PrenormError(f"{workdir} holds checkpoints but no config.json: name another workdir")
        return True
    differences = config_differences(literal_config(load_config(workdir)), literal_config(config))
    if differences:
        raise PrenormError(
            f"{workdir} holds a run with another config ({'; '.join(differences)}): name another workdir, or leave out "
            "--config to go on with the one it holds"
        )
    if record.last_saved and not checkpoints:
        raise PrenormError(
            f"{workdir} was saved at step {record.last_saved}, but there is no checkpoint in it any more: restore its "
            "folder checkpoints, or start anew in another workdir"
        )
    if record.last_saved > max(checkpoints, default=0):
        last = max(checkpoints)
        say(f"warning: {workdir} was saved at step {record.last_saved}, but its last checkpoint is of step {last}")
    return not checkpoints


def _parameter_counts(models: RunModels, state: TrainState) -> dict[str, int]:
    computed = jax.eval_shape(lambda params: computed_params(params, models), state.params)
    return {"trained": count(state.params), "computed": count(computed)}


def _describe(models: RunModels, parameterization: str, counts: dict[str, int]) -> str:
    model = models.computed
    trained = (
        ""
        if models.trained == models.computed
        else f" from {counts['trained']:,} of its Pre-LN form ({parameterization})"
    )
    return f"{model.norm}, {model.depth} blocks, d_model {model.d_model}, {counts['computed']:,} parameters{trained}"
