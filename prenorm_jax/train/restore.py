"""The state a run starts with: its last good checkpoint, another run's parameters, or step 0."""

import os
from shlex import quote
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import flatten
from prenorm_jax.base.processes import refused_alike
from prenorm_jax.data import Data
from prenorm_jax.equivalence.fit import fit_params, model_differences
from prenorm_jax.models.config import EXECUTION
from prenorm_jax.models.stacking import stack_blocks, unstack_blocks
from prenorm_jax.train.arrays import put_everywhere
from prenorm_jax.train.checkpoint import Checkpoints, Damaged
from prenorm_jax.train.optim import make_optimizer
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import params_sharding, to_formats, tree_sharding
from prenorm_jax.train.step import TrainState, abstract_state, init_state, state_formats
from prenorm_jax.train.workdir import PLACES


def start_state(run: Run, checkpoints: Checkpoints, data: Data, given: Any = None) -> TrainState:
    """The state of the last checkpoint that can be read; only if there is none at all, step 0.

    Checkpoints that cannot be read are moved aside, unless no other is left: then PrenormError, and nothing changes.
    For a checkpoint of another model, or of a run on other data: PrenormError too. `given` are parameters to start with
    at step 0 (`load_init_from`); None: the seed's.
    """
    damaged: dict[int, str] = {}
    for step in reversed(checkpoints.steps()):
        try:
            state = _load(run, step, checkpoints, data)
        except Damaged as error:
            damaged[step] = str(error)
            continue
        for bad, why in damaged.items():
            say(f"warning: {why}; moved to {checkpoints.set_aside(bad)}")
        if damaged:
            say(f"warning: falling back to step {step}")
        return state
    if damaged:
        raise PrenormError(
            f"no checkpoint in {checkpoints.directory} can be read: {'; '.join(damaged.values())}; nothing changed: "
            "restore them from a copy, or start anew in another workdir"
        )
    formats = state_formats(run)
    if given is None:
        return jax.jit(lambda: init_state(run), out_shardings=formats)()
    return _state(run, formats, 0, 0, put_everywhere(given, formats.params))


def _load(run: Run, step: int, checkpoints: Checkpoints, data: Data) -> TrainState:
    metadata, place = checkpoints.metadata(step), checkpoints.directory / str(step)
    other = f"start another run in another workdir with --config.init_from={quote(str(checkpoints.directory.parent))}"
    check_data(metadata, data, run.config, str(place), other)
    model = checkpoints.model(step)
    if differences := model_differences(run.trained, model, ignored=EXECUTION):
        raise PrenormError(f"{place} is of another model than the run's ({'; '.join(differences)}): move it away")
    formats = state_formats(run)
    _, params = checkpoints.params(step, params_sharding(model, run.mesh))
    stored = run
    if model.scan != run.trained.scan:
        stored_config = run.config.copy_and_resolve_references()
        stored_config.model.scan = model.scan
        stored = Run.create(stored_config)
    abstract = abstract_state(stored).opt_state
    opt_state = checkpoints.optimizer(step, abstract, tree_sharding(abstract, model, run.mesh))
    if model.scan != run.trained.scan:
        restack = stack_blocks if run.trained.scan else unstack_blocks
        params = jax.jit(restack, out_shardings=formats.params)(params)
        if opt_state is not None:
            opt_state = jax.jit(restack, out_shardings=formats.opt_state)(opt_state)
    if opt_state is None:
        say("this checkpoint was converted and carries no optimizer state: its moments start anew")
    return _state(run, formats, step, metadata["nonfinite"], params, opt_state)


def check_data(metadata: dict[str, Any], data: Data, config: ConfigDict, place: str, other: str) -> None:
    """Raises PrenormError unless the data are those of the checkpoint at `place`; `other`: what else can be done."""
    if metadata["data"] not in (None, data.digest):
        values = flatten(config)
        keys = [f"--config.{key}=" for key in sorted(PLACES) if values.get(key) not in (None, "bytes")]
        moved = f"say where they lie now ({', '.join(keys)}), " if keys else ""
        raise PrenormError(
            f"the data are not those that {place} was trained on, but {data.description}: restore them as they were, "
            f"damaged files too, {moved}or {other}"
        )


def check_vocabulary(metadata: dict[str, Any], vocabulary: str | None, place: str) -> None:
    """Raises PrenormError unless these are the ids of the tokens that the checkpoint was trained on, if that is known.

    (Checkpoints of earlier releases do not say.)
    """
    if metadata.get("vocabulary") not in (None, vocabulary):
        raise PrenormError(
            f"the tokenizer is not that of {place}: restore it, or say where it lies (--config.data.tokenizer=FILE)"
        )


def _state(run: Run, formats: TrainState, step: int, nonfinite: int, params: Any, opt_state: Any = None) -> TrainState:
    """The state in these formats; of `opt_state` None, with a new optimizer."""
    params = to_formats(params, formats.params)
    if opt_state is None:
        opt_state = jax.jit(make_optimizer(run.config).init, out_shardings=formats.opt_state)(params)
    counts = put_everywhere((np.int32(step), np.int32(nonfinite)), (formats.step, formats.nonfinite))
    return TrainState(*counts, params, to_formats(opt_state, formats.opt_state))


def load_init_from(run: Run) -> Any:
    """The parameters of the last checkpoint of `config.init_from`, whatever its norm, as those of the trained model."""
    with Checkpoints(os.path.expanduser(run.config.init_from), read_only=True) as source:
        step, (model, params) = source.of(None, lambda step: (step, source.params(step)))
    say(f"parameters from {run.config.init_from} at step {step} ({model.norm})")
    with refused_alike():
        return fit_params(params, model, run.trained)
