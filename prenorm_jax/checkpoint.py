"""Checkpoints of a run, through Orbax: `workdir/checkpoints/<step>/{params, optimizer, metadata}`.

`metadata` (JSON) says what the tree is, so that a checkpoint can be read without the run's configuration:
    step                the updates made
    model               config.model that describes `params` literally; its `norm` is the variant the tree belongs to
    has_optimizer       whether there is an optimizer state (a converted checkpoint has none)
"""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax.traverse_util import unflatten_dict

from prenorm_jax.config import ModelConfig
from prenorm_jax.conversion import check_tree
from prenorm_jax.errors import PrenormError
from prenorm_jax.stream import abstract_params


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for a save that is still being written."""

    def __init__(self, workdir: str | Path, keep: int | None = None, read_only: bool = False):
        """Opens (and, unless `read_only`, creates) the folder; at most `keep` checkpoints stay, the latest."""
        self.directory = Path(workdir).absolute() / "checkpoints"
        # Orbax logs every save and every item it was not asked for; what matters here is raised.
        logging.getLogger("absl").setLevel(logging.ERROR)
        if read_only and not self.directory.is_dir():
            raise PrenormError(f"{workdir} holds no checkpoints (no folder {self.directory.name} in it)")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, read_only=read_only, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def resolve(self, step: int | None) -> int:
        """`step`, or the latest for None. Raises PrenormError if there is no such checkpoint."""
        steps = self.steps()
        if not steps:
            raise PrenormError(f"{self.directory.parent} holds no complete checkpoint yet")
        if step is not None and step not in steps:
            raise PrenormError(f"{self.directory.parent} has no checkpoint at step {step}; it has {steps}")
        return steps[-1] if step is None else step

    def save(self, step: int, params: Any, opt_state: Any, model: ModelConfig) -> None:
        """Starts writing in the background; returns once the arrays may change. `opt_state` None: there is none."""
        metadata = {"step": step, "model": dataclasses.asdict(model), "has_optimizer": opt_state is not None}
        items = {"params": ocp.args.StandardSave(params), "metadata": ocp.args.JsonSave(metadata)}
        if opt_state is not None:
            items["optimizer"] = ocp.args.StandardSave(opt_state)
        self._manager.save(step, args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Returns when every save is complete on disk."""
        self._manager.wait_until_finished()

    def metadata(self, step: int) -> dict[str, Any]:
        """What the module's docstring lists."""
        return self._restore(step, "metadata", ocp.args.JsonRestore())

    def params(self, step: int, sharding: jax.sharding.Sharding | None = None) -> tuple[ModelConfig, dict[str, Any]]:
        """The model config of the stored tree, and the tree, placed by `sharding` (None: the first device).

        Raises PrenormError if the tree is not exactly what its metadata describe.
        """
        model = ModelConfig.create(self.metadata(step)["model"])
        folder = self.directory / str(step) / "params"
        try:
            check_tree(ocp.StandardCheckpointer().metadata(folder).item_metadata.tree, model)
        except PrenormError as error:
            raise PrenormError(f"{folder}: {error}") from error
        abstract = unflatten_dict({path: leaf.value for path, leaf in abstract_params(model).items()})
        return model, self._restore(step, "params", ocp.args.StandardRestore(_placed(abstract, sharding)))

    def optimizer(self, step: int, abstract: Any, sharding: jax.sharding.Sharding | None = None) -> Any:
        """The optimizer state, in the shapes of `abstract`."""
        return self._restore(step, "optimizer", ocp.args.StandardRestore(_placed(abstract, sharding)))

    def _restore(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]


def _placed(abstract: Any, sharding: jax.sharding.Sharding | None) -> Any:
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract)
