"""The files of a run's folder beside its checkpoints.

config.json      the run's configuration, every key
run.json         what the run is and was made with: parameters, data, device, versions, each start with its step, norm
                 and settings (`settings`), and the last step that is known to be saved
lock             held by the process that trains here
metrics.jsonl    one object a line: {step, loss, grad_norm, param_norm, learning_rate, tokens_per_s or images_per_s,
                 model_flops_per_s, mfu (where the device's peak is known)} or {step, eval_loss, ...}
tensorboard/     the same as event files
tokenizer.json   of an imported checkpoint: its source's tokenizer
source/          of an imported checkpoint: what it came with beside its weights (`interop/importing.py`)
profile/         what `config.profile` traced; of many processes, a folder for each
"""

import dataclasses
import glob
import os
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from prenorm_jax.base.allocator import keep_freed_memory
from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.base.files import flatten, read_json, write_json
from prenorm_jax.config import full_config
from prenorm_jax.models.config import EXECUTION, OF_CRMSNORM, ModelConfig
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.run import Run

SOURCE = "source"
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")

# What may differ when a run goes on: none of it changes which run it is. Under pre_ln, neither does the norm. Where the
# data lie may change because their content may not: `restore._load` sees to that. And `init_from` is of a run's start.
PLACES = {"data.path", "data.eval_path", "data.tokenizer", "data.cache"}
MAY_CHANGE = {"steps", "stop_at", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard"}
MAY_CHANGE |= PLACES | {"profile", "on_nonfinite", "grace_seconds", "init_from"}
MAY_CHANGE |= {"accumulate", "mesh.fsdp", "mesh.tensor", "mesh.largest_replicated"}
MAY_CHANGE |= {f"model.{key}" for key in EXECUTION}
OF_THE_NORM = {"model.norm", *(f"model.{key}" for key in OF_CRMSNORM)}

# Those of them that decide more of a step than its rounding, under some configurations: what they change.
CHANGED_BY = {"steps": "the learning rate's schedule"} | dict.fromkeys(("accumulate", "model.scan"), "dropout's masks")


def load_config(workdir: str | Path) -> ConfigDict:
    """The configuration of the run in `workdir`. Raises PrenormError if there is none."""
    path = Path(workdir) / "config.json"
    if not Path(workdir).is_dir():
        raise PrenormError(f"no such workdir: {workdir}")
    if not path.is_file():
        raise PrenormError(f"{workdir} holds no run: there is no config.json in it")
    stored = read_json(path)
    try:
        return full_config(stored, "not a configuration")
    except PrenormError as error:
        raise PrenormError(f"{path} is damaged: {error}; restore it from a copy") from error


def write_config(workdir: Path, config: ConfigDict) -> None:
    """Writes config.json: what was asked for, the model's keys resolved; without `stop_at`, which is of one start.

    Its paths are absolute, so that they are the same ones from another folder.
    """
    model = dataclasses.asdict(model_config(config.model))
    write_json(workdir / "config.json", absolute(config).to_dict() | {"model": model, "stop_at": None})


def absolute(config: ConfigDict) -> ConfigDict:
    """A copy whose files and folders are named by absolute paths."""
    config = config.copy_and_resolve_references()  # a plain copy shares the keys that are None
    data, here = config.data, str(Path.cwd())

    def made(given: str | None) -> str | None:
        path = Path(os.path.expanduser(given or ""))
        if not given or (glob.has_magic(given) and not path.exists() and glob.has_magic(here)):
            return given  # the folder's own name would become part of the pattern
        return str(path.absolute())

    for values, key in ((config, "init_from"), *((data, key) for key in ("path", "eval_path", "cache"))):
        if key in values:
            values[key] = made(values[key])
    if "tokenizer" in data and (data.tokenizer.endswith(".json") or Path(data.tokenizer).expanduser().is_file()):
        data.tokenizer = made(data.tokenizer)
    return config


def literal_config(config: ConfigDict) -> ConfigDict:
    """The form in which runs are compared: every model key resolved, and with `native` the tree that is trained.

    (A `pre_ln` run keeps the Pre-LN description, with the norm that is computed.)
    """
    run = Run.create(config)
    model = dataclasses.asdict(run.trained) | {"norm": run.computed.norm}
    result = absolute(config)
    with result.unlocked():
        result.model = ConfigDict(model)
        result.stop_at = None  # of this start, not of the run
        if run.computed.norm == "layernorm":  # the two parameterisations are one
            result.parameterization = "pre_ln"
    return result


def config_differences(old: ConfigDict, new: ConfigDict) -> list[str]:
    """ "key: old -> new" for each key in which two literal configs describe different runs."""
    old_values, new_values = flatten(old), flatten(new)
    pre_ln = old.parameterization == new.parameterization == "pre_ln"
    may_change = MAY_CHANGE | (OF_THE_NORM if pre_ln else set())  # the same Pre-LN tree is trained for all three
    return [
        f"{key}: {old_values.get(key)!r} -> {new_values.get(key)!r}"
        for key in sorted(old_values.keys() | new_values.keys())
        if key not in may_change and old_values.get(key) != new_values.get(key)
    ]


def settings(config: ConfigDict) -> dict[str, Any]:
    """Of the keys that may change those that decide, in this run, more of a step than its rounding: key -> value."""
    rates = ("stochastic_depth", *ModelConfig.rates)
    decides = {"the learning rate's schedule": config.optimizer.final_learning_rate != 1}
    decides["dropout's masks"] = any(config.model.get(rate) for rate in rates)
    values = flatten(config)
    return {key: values[key] for key, what in CHANGED_BY.items() if decides[what]}


def configure_jax(config: ConfigDict) -> None:
    """JAX's settings for a command. To be called before any array is made, and by one of many after they have met.

    64-bit mode if the model asks for float64. Memory that is freed is kept. And no steps queued up on the CPU: with
    several devices simulated on few cores, the collectives of one step can take all threads, waiting for others that
    then never run.
    """
    keep_freed_memory()
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "float64" in (config.model.get("dtype"), config.model.get("param_dtype")):
        jax.config.update("jax_enable_x64", True)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the second, without a word, for a platform that has no plugin
        asked = f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}"
        why = f" ({first_line(error)})" if str(error) else ""
        raise PrenormError(f"{asked}: no such device is found{why}; name another platform, as cpu, or none") from error


class RunRecord:
    """`run.json`: what is known about a run beside its configuration. One that is damaged is said, and starts anew."""

    def __init__(self, workdir: Path):
        self._workdir, self._path = workdir, workdir / "run.json"
        self._values: dict[str, Any] = {}
        if self._path.exists():
            try:
                self._values = _checked(read_json(self._path), self._path)
            except PrenormError as error:
                if self._path.is_dir():
                    raise
                say(f"warning: {error}; the run's history starts anew")

    @property
    def last_saved(self) -> int:
        """The last step whose checkpoint is known to be complete; 0 if none is."""
        return self._values.get("last_saved", 0)

    @property
    def first_step(self) -> int:
        """Where the training in this folder began: 0, or the step of a converted checkpoint."""
        return self._values["sessions"][0]["step"]

    def start(self, run: Run, step: int, counts: dict[str, int], data: str) -> None:
        """Adds a start at `step` on the data of this digest; says what of its steps is computed otherwise than before.

        To be called before the configuration is written: of a start that an earlier version recorded, it is the old one
        that tells the settings.
        """
        sessions, norm, now = self._values.get("sessions", []), run.computed.norm, settings(run.config)
        # Of the starts before, what this one goes on from.
        if before := next((session for session in reversed(sessions) if session["step"] < step), None):
            if before["norm"] != norm:
                say(f"the norm is switched from {before['norm']} to {norm} after step {step}")
            was = before.setdefault("settings", settings(load_config(self._workdir)))
            changed = [
                f"{key} {was[key]} -> {value} ({CHANGED_BY[key]})"
                for key, value in now.items()
                if was.get(key, value) != value
            ]
            if changed:
                say(f"computed otherwise after step {step}: {', '.join(changed)}")
        made_with = {"device": device_name(), "versions": {name: version(name) for name in LIBRARIES}}
        date = datetime.now(UTC).isoformat(timespec="seconds")
        session = {"step": step, "norm": norm, "settings": now, "date": date, **made_with}
        self._values |= {"norm": norm, "parameters": counts, "data": data, **made_with, "last_saved": step}
        self._values["sessions"] = [*sessions, session]
        write_json(self._path, self._values)

    def saved(self, steps: list[int]) -> None:
        """Notes that the checkpoints of these steps are complete."""
        if steps and steps[-1] > self.last_saved:
            self._values["last_saved"] = steps[-1]
            write_json(self._path, self._values)


def _checked(record: dict[str, Any], path: Path) -> dict[str, Any]:
    """What run.json holds. Raises PrenormError for values that would not be understood."""
    sessions = record.get("sessions", [])
    known = isinstance(sessions, list) and all(isinstance(session, dict) for session in sessions)
    for each in [{"step": record.get("last_saved", 0), "norm": ""}, *(sessions if known else [])]:
        known = known and type(each.get("step")) is int and isinstance(each.get("norm"), str)
        known = known and isinstance(each.get("settings", {}), dict)
    if not known:
        raise PrenormError(f"{path} is damaged: its starts or its last_saved are none; restore it from a copy")
    return record


def device_name() -> str:
    """Such as "2 × NVIDIA H100", or "1 × cpu"."""
    return f"{jax.device_count()} × {jax.devices()[0].device_kind}"
