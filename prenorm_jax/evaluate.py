"""Loss over every token of the held-out split, and the body of `eval.py`."""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prenorm_jax.checkpoint import Checkpoints
from prenorm_jax.conversion import convert_config, convert_params
from prenorm_jax.data import Data, load_data
from prenorm_jax.distributed import (
    check_same,
    global_batch,
    initialize,
    is_first,
    local_rows,
    put_everywhere,
    refused_alike,
)
from prenorm_jax.model_config import ModelConfig
from prenorm_jax.sharding import lay_out, make_mesh, params_format, params_sharding, split_batch
from prenorm_jax.step import make_eval_step
from prenorm_jax.workdir import configure_jax, load_config


def evaluate(
    eval_step: Callable[..., Any], params: Any, data: Data, config: ConfigDict, sharding: jax.sharding.Sharding
) -> dict[str, float]:
    """What `data.summarize` says of the whole evaluation split: every token or image counts once."""
    batches = data.eval_batches(config, local_rows(sharding, config.batch_size))
    sums = [eval_step(params, global_batch(batch, sharding, config.batch_size)) for batch in batches]
    sums = jax.device_get(sums)
    return data.summarize({key: float(np.sum([batch[key] for batch in sums], dtype=np.float64)) for key in sums[0]})


def load_as(
    workdir: str | Path, norm: str, step: int | None, mesh: Mesh | None = None
) -> tuple[int, ModelConfig, dict[str, Any]]:
    """The step of a run's checkpoint (None: the latest), and what it holds as the model and parameters of `norm`.

    With a mesh the parameters are split over it, and so is Pre-LN's conversion; that of others, whose equivalents need
    not exist, is done whole. Raises PrenormError if there is no such checkpoint or norm, or no equivalent.
    """
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = checkpoints.resolve(step)
        stored = checkpoints.model(step)
        model = stored if norm == stored.norm else convert_config(stored, to=norm)
        split = mesh is not None and stored.norm in (norm, "layernorm")
        _, params = checkpoints.params(step, params_sharding(stored, mesh) if split else None)
    formats = None if mesh is None else params_format(model, mesh)
    if norm != stored.norm:
        convert = functools.partial(convert_params, config=stored, to=norm)
        params = (jax.jit(convert, out_shardings=formats) if split else convert)(params)
    if mesh is not None:
        params = (lay_out if split else put_everywhere)(params, formats)
    return step, model, params


def mesh_for(config: ConfigDict) -> Mesh:
    """The run's mesh, if there are devices for it; else one of those there are. Changes `config` to what fits it."""
    count, config.accumulate = jax.device_count(), 1
    if count % (config.mesh.fsdp * config.mesh.tensor):
        config.mesh.fsdp, config.mesh.tensor = count, 1
    config.batch_size += -config.batch_size % (count // config.mesh.tensor)  # what is missing weighs nothing
    return make_mesh(config)


def main() -> None:
    """Parses the command line of `eval.py`, evaluates, prints. Raises PrenormError."""
    parser = argparse.ArgumentParser(description="Loss of a checkpoint on the whole held-out split.")
    parser.add_argument("--workdir", required=True, help="folder of a run, or of a converted checkpoint")
    parser.add_argument("--norm", help="layernorm, rmsnorm or crmsnorm: convert first (default: the run's own)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the latest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--coordinator", help="of many processes: HOST:PORT of the first, for them to meet at")
    parser.add_argument("--processes", type=int, help="how many processes evaluate as one")
    parser.add_argument("--process", type=int, help="the number of this one, from 0")
    args = parser.parse_args()

    initialize(args.coordinator, args.processes, args.process)
    with refused_alike():
        config = load_config(args.workdir)
        configure_jax(config)
        mesh = mesh_for(config)
        norm = args.norm or config.model.norm
        step, model, params = load_as(args.workdir, norm, args.step, mesh)
        data = load_data(config)
    check_same("the checkpoint, the norm or the data", (step, norm, data.digest))
    result = evaluate(make_eval_step(config, model, mesh), params, data, config, split_batch(mesh))

    if not is_first():
        return
    if args.json:
        print(json.dumps({"workdir": args.workdir, "step": step, "norm": norm, **result}))
        return
    *numbers, (_, count) = result.items()
    print(f"{args.workdir} at step {step} as {norm}: {count:,} {data.unit}s of the held-out split")
    print("   ".join(f"{name.removeprefix('eval_').replace('_', ' ')} {value:.7g}" for name, value in numbers))
    print(f"(loss in nats per {data.unit})")
