"""What is refused before a run begins: a configuration that makes no sense, and a workdir that holds another run."""

from pathlib import Path

from ml_collections import ConfigDict

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError, check_choice, check_range
from prenorm_jax.config import data_kind
from prenorm_jax.models import registry
from prenorm_jax.train.checkpoint import check_place, complete_steps
from prenorm_jax.train.optim import make_optimizer
from prenorm_jax.train.tracing import parse_steps
from prenorm_jax.train.workdir import SOURCE, RunRecord, config_differences, literal_config, load_config

_INT32 = 2**31  # what steps and sizes are counted in


def check_config(config: ConfigDict) -> None:
    """Raises PrenormError naming the first key that is wrong. (`Run.create` checks the model, `Data` the data.)"""
    if not registry.family(config.model.family).config_class.trains:
        raise PrenormError(
            f"model.family={config.model.family!r} has no loss here, to train by or to evaluate: it converts, is "
            "certified and exported, and fills masks and gives embeddings from Python (docs/checkpoints.md)"
        )
    for key in ("steps", "batch_size", "log_every", "keep_checkpoints", "grace_seconds", "stop_at"):
        check_range(key, config[key], at_least=1, below=_INT32)
    for key in ("eval_every", "checkpoint_every"):
        check_range(key, config[key], at_least=0, below=_INT32)
    check_range("seed", config.seed, at_least=0, below=2**32)
    check_range("optimizer.warmup_steps", config.optimizer.warmup_steps, at_least=0, below=_INT32)
    for key in ("fsdp", "tensor"):
        check_range(f"mesh.{key}", config.mesh[key], at_least=1, below=_INT32)
    check_range("mesh.largest_replicated", config.mesh.largest_replicated, at_least=0)
    for key in ("learning_rate", "final_learning_rate", "weight_decay", "clip", "eps"):
        check_range(f"optimizer.{key}", config.optimizer[key], at_least=0)
    for key in ("b1", "b2"):
        check_range(f"optimizer.{key}", config.optimizer[key], at_least=0, below=1)
    data_kind(config).check(config)
    parse_steps(config.profile, config.steps)
    check_choice("on_nonfinite", config.on_nonfinite, ("stop", "skip"))
    make_optimizer(config)


def check_has_data(workdir: str | Path, config: ConfigDict) -> None:
    """Raises PrenormError for an imported checkpoint, which comes without data, unless some are named."""
    if (Path(workdir) / SOURCE).is_dir() and not (config.data.path or config.data.hub):
        raise PrenormError(
            f"{workdir} was imported, and what it was trained on is not known: name data to train and evaluate on with "
            "--config.data.path=FILE --config.data.eval_path=FILE"
        )


def check_workdir(workdir: Path, config: ConfigDict, record: RunRecord) -> bool:
    """Raises PrenormError unless `workdir` is new or holds this very run; whether it has no checkpoint yet."""
    check_has_data(workdir, config)
    checkpoints = complete_steps(workdir / "checkpoints")
    if workdir.exists() and not workdir.is_dir():
        raise PrenormError(f"--workdir={workdir} is a file: name a folder")
    check_place(workdir)
    if not (workdir / "config.json").exists():
        if any((workdir / "checkpoints").glob("*")):  # an empty one is of a start that came no further
            raise PrenormError(f"{workdir} holds checkpoints but no config.json: name another workdir")
        return True
    asked = literal_config(config)
    try:
        held = literal_config(load_config(workdir))
    except PrenormError as error:
        path = workdir / "config.json"
        raise error if str(path) in str(error) else PrenormError(f"{path} is damaged: {error}") from error
    if differences := config_differences(held, asked):
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
