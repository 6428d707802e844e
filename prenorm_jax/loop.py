"""The training loop: data in, steps, metrics and checkpoints out."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from prenorm_jax.checkpoint import Checkpoints
from prenorm_jax.data.batches import train_batch
from prenorm_jax.data.text import TextData, load_text
from prenorm_jax.errors import PrenormError
from prenorm_jax.evaluate import evaluate
from prenorm_jax.metrics import MetricsWriter
from prenorm_jax.optim import make_optimizer
from prenorm_jax.sharding import make_mesh, replicated, split_batch
from prenorm_jax.step import (
    RunModels,
    TrainState,
    computed_params,
    count,
    init_state,
    make_eval_step,
    make_train_step,
    run_models,
)
from prenorm_jax.workdir import config_differences, literal_config, load_config, read_json, write_json

LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains from the last checkpoint in `workdir`, or from step 0, to `config.steps`.

    Raises PrenormError, before anything is written, if the configuration is wrong, is not that of the run in `workdir`,
    or does not fit its data.
    """
    workdir = Path(workdir)
    models = run_models(config)
    _check_config(config)
    _check_workdir(workdir, config)
    mesh = make_mesh(config.batch_size)
    data = load_text(config.data)
    _check_data(config, data)

    train_step = make_train_step(config, models, mesh)
    eval_step = make_eval_step(models.computed, mesh)
    to_computed = jax.jit(lambda params: computed_params(params, models))
    workdir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(workdir, keep=config.keep_checkpoints) as checkpoints:
        state = _start(config, models, checkpoints, replicated(mesh))
        start = int(state.step)
        if start >= config.steps:
            say(f"{workdir} is at step {start} of config.steps={config.steps} already: raise it to go on")
            return
        write_json(workdir / "config.json", literal_config(config).to_dict())
        _record_start(workdir, models, state)
        say(f"data: {data.description}")
        say(f"model: {_describe(models, config.parameterization, state)}; on {device_name()}")
        say(f"{'going on' if start else 'starting'} at step {start} of {config.steps} in {workdir}")

        with MetricsWriter(workdir, start, config) as metrics:
            for step in range(start, config.steps):
                batch = train_batch(data.train, config.seed, step, config.batch_size, config.data.seq_len)
                state, step_metrics = train_step(state, jax.device_put(batch, split_batch(mesh)))
                done = step + 1
                metrics.add(done, step_metrics)
                if _due(done, config.eval_every, config.steps):
                    with metrics.pause():
                        params = to_computed(state.params)
                        result = evaluate(eval_step, params, data, config, split_batch(mesh))
                        metrics.write(done, result)
                if _due(done, config.checkpoint_every, config.steps):
                    with metrics.pause():
                        checkpoints.save(done, state.params, state.opt_state, models.trained)
        checkpoints.wait()
    say(f"done: {config.steps} steps in {workdir}; eval loss {result['eval_loss']:.4f}")


def _due(done: int, every: int, steps: int) -> bool:
    return done == steps or (every > 0 and done % every == 0)


def say(line: str) -> None:
    """One line to stderr, where the progress bar is too: stdout is for results."""
    print(line, file=sys.stderr, flush=True)


def _check_config(config: ConfigDict) -> None:
    for key in ("steps", "batch_size", "log_every", "keep_checkpoints"):
        if config[key] < 1:
            raise PrenormError(f"{key}={config[key]} must be at least 1")
    if config.data.seq_len < 1 or config.data.seq_len > config.model.max_len:
        raise PrenormError(
            f"data.seq_len={config.data.seq_len} must be at least 1 and at most model.max_len={config.model.max_len}"
        )
    make_optimizer(config)


def _check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Raises unless `workdir` is new or holds this very run."""
    if workdir.exists() and not workdir.is_dir():
        raise PrenormError(f"--workdir={workdir} is a file: name a folder")
    if not (workdir / "config.json").exists():
        if (workdir / "checkpoints").exists():
            raise PrenormError(f"{workdir} holds checkpoints but no config.json: name another workdir")
        return
    differences = config_differences(load_config(workdir), literal_config(config))
    if differences:
        raise PrenormError(
            f"{workdir} holds a run with another config ({'; '.join(differences)}): name another workdir, or leave out "
            "--config to go on with the one it holds"
        )


def _check_data(config: ConfigDict, data: TextData) -> None:
    if data.vocab_size > config.model.vocab_size:
        raise PrenormError(
            f"model.vocab_size={config.model.vocab_size} is too small for the tokenizer {config.data.tokenizer!r}: "
            f"it needs {data.vocab_size}"
        )


def _start(config: ConfigDict, models: RunModels, checkpoints: Checkpoints, sharding: NamedSharding) -> TrainState:
    """The state at step 0, or that of the latest checkpoint."""
    if not checkpoints.steps():
        return jax.jit(lambda: init_state(config, models), out_shardings=sharding)()
    step = checkpoints.resolve(None)
    model, params = checkpoints.params(step, sharding)
    if model != models.trained:
        raise PrenormError(f"the checkpoint at step {step} is of another model than the config.json beside it: {model}")
    if checkpoints.metadata(step)["has_optimizer"]:
        abstract = jax.eval_shape(lambda: init_state(config, models).opt_state)
        opt_state = checkpoints.optimizer(step, abstract, sharding)
    else:
        say("this checkpoint was converted and carries no optimizer state: its moments start anew")
        opt_state = jax.jit(make_optimizer(config).init, out_shardings=sharding)(params)
    return TrainState(jax.device_put(jnp.int32(step), sharding), params, opt_state)


def device_name() -> str:
    """Such as "2 × NVIDIA H100", or "1 × cpu"."""
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"


def _parameter_counts(models: RunModels, state: TrainState) -> dict[str, int]:
    computed = jax.eval_shape(lambda params: computed_params(params, models), state.params)
    return {"trained": count(state.params), "computed": count(computed)}


def _describe(models: RunModels, parameterization: str, state: TrainState) -> str:
    counts, model = _parameter_counts(models, state), models.computed
    trained = (
        ""
        if models.trained == models.computed
        else f" from {counts['trained']:,} of its Pre-LN form ({parameterization})"
    )
    return f"{model.norm}, {model.depth} blocks, d_model {model.d_model}, {counts['computed']:,} parameters{trained}"


def _record_start(workdir: Path, models: RunModels, state: TrainState) -> None:
    """Adds this start to run.json."""
    path = workdir / "run.json"
    sessions = read_json(path).get("sessions", []) if path.exists() else []
    start = {
        "step": int(state.step),
        "norm": models.computed.norm,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    summary = {
        "norm": models.computed.norm,
        "parameters": _parameter_counts(models, state),
        "device": start["device"],
        "versions": start["versions"],
    }
    write_json(path, summary | {"sessions": [*sessions, start]})
