"""Checkpoints of a run, through Orbax: `workdir/checkpoints/<step>/{params, optimizer, metadata}`.

`metadata` (JSON) says what the tree is, so that a checkpoint can be read without the run's configuration:
    step                the batches used
    nonfinite           those of them whose update was skipped
    model               config.model that describes `params` literally; its `norm` is the variant the tree belongs to
    data                a digest of what the run is trained and evaluated on; None: unknown
    digests             of `params` and, unless it was converted, of `optimizer` (`checksum.py`): what was saved is what
                        is loaded
    digest              of all this
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from absl import logging
from flax.traverse_util import unflatten_dict

from prenorm_jax.base.errors import PrenormError, SharedError, first_line
from prenorm_jax.base.files import write_whole
from prenorm_jax.base.processes import count_processes, first_said, is_first, lost_process, wait_for_all
from prenorm_jax.equivalence.convert import check_tree
from prenorm_jax.equivalence.stored import PART, part, tiles
from prenorm_jax.models import coordinates as stream
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.checksum import digest
from prenorm_jax.train.leaves import NewLeaves, NotRead, NotWritten, StoredLeaves

# Larger arrays are stored in chunks of at most this, each of which can be read without the others.
CHUNK_BYTES = 2**24


def json_digest(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def complete_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in `directory` that were written to their end, ascending; they may be damaged."""
    return sorted(int(path.name) for path in directory.glob("*") if path.name.isdigit() and path.is_dir())


def _ignore_late_callbacks(unraisable: Any) -> None:
    """After a write that failed, TensorStore's others report to an event loop that Orbax has closed: no news."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


class Damaged(SharedError):
    """A checkpoint that cannot be read, or does not hold what was saved."""


@contextlib.contextmanager
def _damaged_for_all() -> Iterator[None]:
    """What is found damaged in it by one process, which alone reads its part, is damaged for all, in the same words.

    So no process waits for one that has turned to another checkpoint. Nothing in it may wait for the others.
    """
    why = ""
    try:
        yield
    except Damaged as error:
        why = str(error)
        if count_processes() == 1:
            raise
    if why := first_said(why):
        raise Damaged(why)


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for a save that is still being written."""

    def __init__(self, workdir: str | Path, keep: int | None = None, read_only: bool = False):
        """Opens (and, unless `read_only`, creates) the folder; at most `keep` checkpoints stay, the latest."""
        self.directory = Path(workdir).absolute() / "checkpoints"
        self._read_only = read_only
        # Orbax logs every save, every item it was not asked for, and errors with their traces: here they are raised.
        logging.set_verbosity(logging.FATAL)
        sys.unraisablehook = _ignore_late_callbacks
        if read_only and not self.directory.parent.is_dir():
            raise PrenormError(f"no such workdir: {workdir}")
        if read_only and not self.directory.is_dir():
            raise PrenormError(f"{workdir} holds no checkpoints (no folder {self.directory.name} in it)")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            read_only=read_only,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=not read_only,  # of a save that was killed
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        if error is not None and count_processes() > 1 and not getattr(error, "shared", False):
            return  # closing waits for the other processes, and they for this one: it is about to end
        try:
            self._manager.close()
        except Exception as error:
            if kind is None:  # else the exception under way says more
                raise self._not_written(error) from error

    def steps(self) -> list[int]:
        """The steps that have a complete checkpoint, ascending."""
        return complete_steps(self.directory)

    def resolve(self, step: int | None) -> int:
        """`step`, or the latest for None. Raises PrenormError if there is no such checkpoint."""
        steps = self.steps()
        if not steps:
            raise PrenormError(f"{self.directory.parent} holds no complete checkpoint yet")
        if step is not None and step not in steps:
            raise PrenormError(f"{self.directory.parent} has no checkpoint at step {step}; it has {steps}")
        return steps[-1] if step is None else step

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        model: ModelConfig,
        nonfinite: int = 0,
        data: str | None = None,
    ) -> None:
        """Starts writing in the background; returns once the arrays may change, and earlier saves are complete.

        `opt_state` None: there is none. `nonfinite`, `data`: for the metadata. Raises PrenormError if this save, or the
        one before it, cannot be written.
        """
        trees = {"params": params} | ({} if opt_state is None else {"optimizer": opt_state})
        metadata = {
            "step": step,
            "nonfinite": nonfinite,
            "model": dataclasses.asdict(model),
            "data": data,
            "digests": {name: digest(tree) for name, tree in trees.items()},
        }
        metadata["digest"] = json_digest(metadata)
        items = {
            name: ocp.args.StandardSave(tree, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree))
            for name, tree in trees.items()
        }
        try:
            self._manager.save(step, args=ocp.args.Composite(**items, metadata=ocp.args.JsonSave(metadata)))
        except Exception as error:  # of the file system, in whatever wrapping Orbax gives it
            raise self._not_written(error) from error

    @contextlib.contextmanager
    def save_leaves(
        self,
        step: int,
        leaves: Mapping[stream.Path, jax.ShapeDtypeStruct],
        model: ModelConfig,
        nonfinite: int = 0,
        data: str | None = None,
    ) -> Iterator[NewLeaves]:
        """While entered, the leaves of `params` are written, in parts; on leaving, the checkpoint is complete.

        Until then it is one that counts as damaged: for a workdir that is not in its place yet. Raises PrenormError.
        """
        small = {path: np.zeros(1, leaf.dtype) for path, leaf in leaves.items()}  # Orbax describes the tree by these
        self.save(step, unflatten_dict(small), None, model, nonfinite, data)
        self.wait()
        folder = self.directory / str(step)
        new = NewLeaves(folder / "params", leaves)
        try:
            yield new
        except NotWritten as error:
            raise PrenormError(
                f"{self.directory} could not be written: {error}; make room, or mend what is named, and give the same "
                "command again"
            ) from error
        metadata = self.metadata(step)
        metadata["digests"]["params"] = str(new.digest)
        metadata["digest"] = json_digest(metadata)
        write_whole(folder / "metadata" / "metadata", json.dumps(metadata).encode())

    def wait(self) -> None:
        """Returns when every save is complete on disk. Raises PrenormError if one cannot be written."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._not_written(error) from error

    def _not_written(self, error: Exception) -> Exception:
        if lost_process(error):
            return error
        complete = complete_steps(self.directory)
        last = f"the last complete one is at step {complete[-1]}" if complete else "there is no complete one yet"
        return PrenormError(
            f"a checkpoint in {self.directory} could not be written: {first_line(error)}; {last}: make room, or "
            "mend what is named, and give the same command again"
        )

    def metadata(self, step: int) -> dict[str, Any]:
        """What the module's docstring lists. Raises PrenormError if it cannot be read."""
        with _damaged_for_all():
            metadata = self._restore(step, "metadata", ocp.JsonCheckpointHandler, ocp.args.JsonRestore())
            if not isinstance(metadata, dict) or metadata.pop("digest", None) != json_digest(metadata):
                raise self._damaged(step, "metadata differ from what was saved")
            if metadata["step"] != step:
                raise self._damaged(step, f"it is that of step {metadata['step']} under another name")
        return metadata

    def model(self, step: int) -> ModelConfig:
        """The model config of the stored tree. Raises PrenormError if the tree is not what its metadata describe."""
        model = model_config(self.metadata(step)["model"])
        with _damaged_for_all():
            stored = self._shapes(step, "params")
            try:
                check_tree(stored, model)
            except PrenormError as error:
                raise self._damaged(step, error) from error
        return model

    def params(self, step: int, sharding: Any = None) -> tuple[ModelConfig, dict[str, Any]]:
        """The model config of the stored tree, and the tree, placed by the tree `sharding` (None: the first device).

        Raises PrenormError if the tree cannot be read, or is not exactly what its metadata describe.
        """
        model = self.model(step)
        abstract = unflatten_dict({path: leaf.value for path, leaf in abstract_params(model).items()})
        return model, self._restore_tree(step, "params", abstract, sharding)

    @contextlib.contextmanager
    def leaves(self, step: int, item: str = "params") -> Iterator[StoredLeaves]:
        """While entered, the leaves of a tree can be read, in parts.

        All of them must be: on leaving, raises PrenormError if what was read is not what was saved.
        """
        stored = StoredLeaves(self.directory / str(step) / item)
        try:
            yield stored
        except NotRead as error:
            raise self._damaged(step, str(error)) from error
        if str(stored.digest) != self.metadata(step)["digests"][item]:
            raise self._damaged(step, f"{item} differ from what was saved")

    def optimizer(self, step: int, abstract: Any, sharding: Any = None) -> Any:
        """The optimizer state, in the shapes of `abstract`; None if the checkpoint was converted and has none."""
        if "optimizer" not in self.metadata(step)["digests"]:
            return None
        return self._restore_tree(step, "optimizer", abstract, sharding)

    def copy(self, step: int, workdir: Path) -> None:
        """Copies a checkpoint as it is to a workdir that has none. Raises PrenormError if it is not what was saved."""
        for item in self.metadata(step)["digests"]:
            with self.leaves(step, item) as stored:
                for keys, leaf in jax.tree_util.tree_leaves_with_path(self._shapes(step, item)):
                    path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
                    axes = [(str(axis), size) for axis, size in enumerate(leaf.shape)]
                    for tile in tiles({path: axes}, 1, PART):
                        stored.read(path, part(tuple(name for name, _ in axes), tile))
        shutil.copytree(self.directory / str(step), workdir / self.directory.name / str(step))

    def set_aside(self, step: int) -> Path:
        """Moves a checkpoint that cannot be read out of the way, to `workdir/damaged/`, and returns where it is."""
        folder = self.directory.parent / "damaged"
        place = next(p for i in range(10**6) if not (p := folder / (f"{step}" if not i else f"{step}-{i}")).exists())
        wait_for_all("it is known where to")
        if is_first():
            folder.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(place)
        wait_for_all("it is moved")
        self._manager.reload()
        return place

    def _restore_tree(self, step: int, item: str, abstract: Any, sharding: Any) -> Any:
        if sharding is None:
            sharding = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), abstract)
        placed = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, sharding
        )
        with _damaged_for_all():
            tree = self._restore(step, item, ocp.StandardCheckpointHandler, ocp.args.StandardRestore(placed))
        if digest(tree) != self.metadata(step)["digests"][item]:
            raise self._damaged(step, f"{item} differ from what was saved")
        return tree

    def _shapes(self, step: int, item: str) -> Any:
        """The stored tree, with a shape and a dtype for each leaf; namedtuples are dicts in it."""
        try:
            with ocp.StandardCheckpointer() as reader:
                stored = reader.metadata(self.directory / str(step) / item).item_metadata
        except Exception as error:
            raise self._damaged(step, error) from error
        if stored is None:
            raise self._damaged(step, f"{item} are incomplete")
        return stored.tree

    def _restore(self, step: int, item: str, handler: type, args: ocp.args.CheckpointArgs) -> Any:
        """Reads what this process has of an item. (The manager's own would wait for the others at its end.)"""
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        reader = ocp.Checkpointer(handler(multiprocessing_options=alone), multiprocessing_options=alone)
        try:
            with reader:
                return reader.restore(self.directory / str(step) / item, args=args)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a file that is short, changed or gone
            raise self._damaged(step, error) from error

    def _damaged(self, step: int, why: Exception | str) -> Exception:
        if isinstance(why, Exception) and lost_process(why):
            return why  # which says nothing about the checkpoint
        why = first_line(why) if isinstance(why, Exception) else why
        others = [str(other) for other in self.steps() if other != step]
        remedy = f"; --step={' or '.join(others)} names another" if self._read_only and others else ""
        return Damaged(f"the checkpoint {self.directory / str(step)} is damaged: {why}{remedy}")
