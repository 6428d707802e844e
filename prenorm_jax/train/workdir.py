"""The files of a run's folder beside its checkpoints.

config.json      the run's configuration, every key
run.json         what the run is and was made with: parameters, device, versions, each start with its step and norm, and
                 the last step that is known to be saved
lock             held by the process that trains here
metrics.jsonl    one object a line: {step, loss, grad_norm, param_norm, learning_rate, tokens_per_s or images_per_s,
                 model_flops_per_s, mfu (where the device's peak is known)} or {step, eval_loss, ...}
tensorboard/     the same as event files
profile/         what `config.profile` traced; of many processes, a folder for each
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from prenorm_jax.base.allocator import keep_freed_memory
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.files import read_json, write_json
from prenorm_jax.config import base_config
from prenorm_jax.models.config import EXECUTION
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.run import Run

# What may differ when a run goes on: none of it changes which run it is. Under pre_ln, neither does the norm. Where the
# data lie may change because their content may not: `restore._load` sees to that.
MAY_CHANGE = (
    "data.path",
    "data.eval_path",
    "data.tokenizer",
    "data.cache",
    "steps",
    "stop_at",
    "eval_every",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "tensorboard",
    "profile",
    "on_nonfinite",
    "grace_seconds",
    "accumulate",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.largest_replicated",
    *(f"model.{key}" for key in EXECUTION),
)


def load_config(workdir: str | Path) -> ConfigDict:
    """The configuration of the run in `workdir`. Raises PrenormError if there is none."""
    path = Path(workdir) / "config.json"
    if not Path(workdir).is_dir():
        raise PrenormError(f"no such workdir: {workdir}")
    if not path.is_file():
        raise PrenormError(f"{workdir} holds no run: there is no config.json in it")
    stored = read_json(path)
    try:
        family = stored.get("model", {}).get("family", "gpt")
        config = base_config(family)  # for the types of keys that are None, and keys that came later
        config.update(stored)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise PrenormError(f"{path} is damaged: {' '.join(str(error).split())}; restore it from a copy") from error
    return config


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json: what was asked for, the model's keys resolved; without `stop_at`, which is of one start."""
    model = dataclasses.asdict(model_config(config.model))
    write_json(workdir / "config.json", config.to_dict() | {"model": model, "stop_at": None})


def literal_config(config: ConfigDict) -> ConfigDict:
    """The form in which runs are compared: every model key resolved, and with `native` the tree that is trained.

    (A `pre_ln` run keeps the Pre-LN description, with the norm that is computed.)
    """
    run = Run.create(config)
    model = dataclasses.asdict(run.trained) | {"norm": run.computed.norm}
    result = config.copy_and_resolve_references()  # a plain copy shares the keys that are None
    with result.unlocked():
        result.model = ConfigDict(model)
        result.stop_at = None  # of this start, not of the run
        if run.computed.norm == "layernorm":  # the two parameterisations are one
            result.parameterization = "pre_ln"
    return result


def config_differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """ "key: old -> new" for each key in which two literal configs describe different runs."""
    old_values, new_values = flat_config(old), flat_config(new)
    may_change = set(MAY_CHANGE)
    if old.parameterization == new.parameterization == "pre_ln":
        may_change.add("model.norm")  # the trained parameters are the same Pre-LN tree for all three
    return [
        f"{key}: {old_values.get(key)!r} -> {new_values.get(key)!r}"
        for key in sorted(old_values.keys() | new_values.keys())
        if key not in may_change and old_values.get(key) != new_values.get(key)
    ]


def flat_config(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"model.norm": "layernorm", ...}."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flat_config(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def configure_jax(config: ConfigDict) -> None:
    """JAX's settings for a command. To be called before any array is made.

    64-bit mode if the model asks for float64. Memory that is freed is kept. And no steps queued up on the CPU: with
    several devices simulated on few cores, the collectives of one step can take all threads, waiting for others that
    then never run.
    """
    keep_freed_memory()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "float64" in (config.model.get("dtype"), config.model.get("param_dtype")):
        jax.config.update("jax_enable_x64", True)
