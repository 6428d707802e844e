"""Loss over every token or image of the held-out split."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prenorm_jax.base.processes import refused_alike
from prenorm_jax.data import Data
from prenorm_jax.equivalence.convert import convert_config, convert_params
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.train.arrays import put_everywhere
from prenorm_jax.train.checkpoint import Checkpoints
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh, params_formats, params_sharding, to_formats


def evaluate(run: Run, eval_step: Callable[..., Any], params: Any, data: Data) -> dict[str, float]:
    """What `data.summarize` says of the whole evaluation split: every token or image counts once."""
    batches = data.eval_batches(run.config, run.local_rows)
    sums = jax.device_get([eval_step(params, run.global_batch(batch)) for batch in batches])
    return data.summarize({key: float(np.sum([batch[key] for batch in sums], dtype=np.float64)) for key in sums[0]})


def load_as(
    workdir: str | Path, norm: str, step: int | None, mesh: Mesh | None = None
) -> tuple[dict[str, Any], ModelConfig, dict[str, Any]]:
    """The metadata of a run's checkpoint (step None: the latest), and its model and parameters as those of `norm`.

    With a mesh the parameters are sharded over it, and so is Pre-LN's conversion; that of others, whose equivalents
    need not exist, is done whole. Raises PrenormError if there is no such checkpoint or norm, or no equivalent.
    """

    def read(step: int) -> tuple[dict[str, Any], ModelConfig, ModelConfig, bool, dict[str, Any]]:
        stored = checkpoints.model(step)
        with refused_alike():
            model = stored if norm == stored.norm else convert_config(stored, to=norm)
        split = mesh is not None and stored.norm in (norm, "layernorm")
        _, params = checkpoints.params(step, params_sharding(stored, mesh) if split else None)
        return checkpoints.metadata(step), stored, model, split, params

    with Checkpoints(workdir, read_only=True) as checkpoints:
        metadata, stored, model, split, params = checkpoints.of(step, read)
    formats = None if mesh is None else params_formats(model, mesh)
    if norm != stored.norm:
        convert = functools.partial(convert_params, config=stored, to=norm)
        with refused_alike():  # of a split tree all is refused while it is traced, by all
            params = (jax.jit(convert, out_shardings=formats) if split else convert)(params)
    if mesh is not None:
        params = (to_formats if split else put_everywhere)(params, formats)
    return metadata, model, params


def mesh_for(config: ConfigDict) -> Mesh:
    """The run's mesh, if there are devices for it; else one of those there are. Changes `config` to what fits it."""
    count, config.accumulate = jax.device_count(), 1
    if count % (config.mesh.fsdp * config.mesh.tensor):
        config.mesh.fsdp, config.mesh.tensor = count, 1
    config.batch_size += -config.batch_size % (count // config.mesh.tensor)  # what is missing weighs nothing
    return make_mesh(config)
