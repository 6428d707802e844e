"""Checkpoints of a run, through Orbax: `workdir/checkpoints/<step>/{params, optimizer, metadata}`.

`metadata` (JSON) says what the tree is, so that a checkpoint can be read without the run's configuration:
    step                the batches used
    nonfinite           those of them whose update was skipped
    model               config.model that describes `params` literally; its `norm` is the variant the tree belongs to
    data                a digest of what the run is trained and evaluated on; None: unknown
    vocabulary          a digest of the tokenizer's tokens and ids; None, or not there: unknown
    digests             of `params` and, unless it was converted, of `optimizer` (`checksum.py`): what was saved is what
                        is loaded
    digest              of all this
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import xxhash
from absl import logging
from flax.traverse_util import unflatten_dict

from prenorm_jax.base.errors import PrenormError, SharedError, Unwritable, first_line
from prenorm_jax.base.files import write_whole
from prenorm_jax.base.processes import (
    check_same,
    count_processes,
    first_said,
    is_first,
    lost_process,
    of_first,
    refused_alike,
    wait_for_all,
)
from prenorm_jax.base.trees import Flat
from prenorm_jax.equivalence.convert import check_tree
from prenorm_jax.equivalence.stored import PART, part, tiles
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.checksum import digest
from prenorm_jax.train.leaves import NewLeaves, StoredLeaves

T = TypeVar("T")

# Larger arrays are stored in chunks of at most this, each of which can be read without the others.
CHUNK_BYTES = 2**24
_STEP = re.compile("0|[1-9][0-9]*")  # what `int` takes is more: ٣, 007
MEND = "make room, or mend what is named, and give the same command again"


def json_digest(value: Any) -> str:
    return xxhash.xxh3_128(json.dumps(value, sort_keys=True).encode()).hexdigest()


def complete_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in `directory` that were written to their end, ascending; they may be damaged."""
    return sorted(int(path.name) for path in directory.glob("*") if _STEP.fullmatch(path.name) and path.is_dir())


def _whole(workdir: str | Path) -> Path:
    """Its absolute path, without the `..` that TensorStore refuses."""
    path = Path(workdir).absolute()
    return path.resolve() if ".." in path.parts else path


def check_place(workdir: str | Path) -> None:
    """Raises PrenormError if checkpoints in a folder of this name could not be read again."""
    path = str(_whole(workdir))
    if found := re.search(r"[\[*?\\]", path):
        raise PrenormError(f"{path} has a {found[0]} in its name, special to Orbax: name another folder")


def _ignore_late_callbacks(unraisable: Any) -> None:
    """After a write that failed, TensorStore's others report to an event loop that Orbax has closed: no news."""
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


_KINDS = {"step": int, "nonfinite": int, "model": dict, "digests": dict}  # of metadata


def _reason(error: BaseException) -> str:
    """What is wrong, of what Orbax and TensorStore say around it."""
    while "See full TensorStore details" in str(error) and error.__cause__:
        error = error.__cause__
    if isinstance(error, LookupError):
        return f"{error} is not in it"
    around = r'Error opening "\w+" driver: | in OCDBT database at local file "[^"]*"| \[(source loc|tensorstore_).*'
    return first_line(Exception(re.sub(around, "", str(error), flags=re.DOTALL)))


class Damaged(SharedError):
    """A checkpoint that cannot be read, or does not hold what was saved."""


class Checkpoints:
    """The checkpoints of one workdir. A context manager: leaving it waits for a save that is still being written.

    Many processes make and use it together, outside `refused_alike`: most of what is here waits for all of them.
    """

    def __init__(self, workdir: str | Path, keep: int | None = None, read_only: bool = False):
        """Opens (and, unless `read_only`, creates) the folder; at most `keep` checkpoints stay, the latest."""
        self.directory = _whole(workdir) / "checkpoints"
        self._read_only = read_only
        # Orbax logs every save, every item it was not asked for, and errors with their traces: here they are raised.
        logging.set_verbosity(logging.FATAL)
        sys.unraisablehook = _ignore_late_callbacks
        with refused_alike():
            if read_only and not self.directory.parent.is_dir():
                raise PrenormError(f"no such workdir: {workdir}")
            if read_only and not self.directory.is_dir():
                raise PrenormError(f"{workdir} holds no checkpoints (no folder {self.directory.name} in it)")
        cleanup = not read_only  # of a save that was killed
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, read_only=read_only, cleanup_tmp_directories=cleanup)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        if error is not None and count_processes() > 1 and not getattr(error, "shared", False):
            return  # closing waits for the other processes, and they for this one: it is about to end
        with self._writing() if kind is None else contextlib.suppress(Exception):  # the one under way says more
            self._manager.close()

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

    def of(self, step: int | None, use: Callable[[int], T]) -> T:
        """`use(step)`; of the latest for None: where its run removed it meanwhile, of the one that then is.

        Raises PrenormError if there is none, or not the same one for all processes, and what `use` raises.
        """
        with refused_alike():
            tried = self.resolve(step)
        try:
            check_same("the checkpoint that they find", self.metadata(tried))
            return use(tried)
        except Damaged:
            if step is not None or of_first(self.steps()[-1:] == [tried]):
                raise
        return self.of(None, use)

    def save(
        self,
        step: int,
        params: Any,
        opt_state: Any,
        model: ModelConfig,
        nonfinite: int = 0,
        data: str | None = None,
        vocabulary: str | None = None,
    ) -> None:
        """Starts writing in the background; returns once the arrays may change, and earlier saves are complete.

        `opt_state` None: there is none. `nonfinite`, `data`, `vocabulary`: for the metadata. Raises PrenormError if
        this save, or the one before it, cannot be written.
        """
        pieces = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        trees = {"params": params} | ({} if opt_state is None else {"optimizer": opt_state})
        metadata = {
            "step": step,
            "nonfinite": nonfinite,
            "model": dataclasses.asdict(model),
            "data": data,
            "vocabulary": vocabulary,
            "digests": {name: digest(tree) for name, tree in trees.items()},
        }
        metadata["digest"] = json_digest(metadata)
        items = {
            name: ocp.args.StandardSave(tree, jax.tree.map(lambda _: pieces, tree)) for name, tree in trees.items()
        }
        with self._writing():
            self._manager.save(step, args=ocp.args.Composite(**items, metadata=ocp.args.JsonSave(metadata)))

    @contextlib.contextmanager
    def save_leaves(self, step: int, leaves: Flat, model: ModelConfig, *known: Any) -> Iterator[NewLeaves]:
        """While entered, the leaves of `params` are written, in parts; on leaving, the checkpoint is complete.

        `known`: as `save` takes it after the model.
        Until then it is one that counts as damaged: for a workdir that is not in its place yet. Raises PrenormError.
        """
        small = {path: np.zeros(1, leaf.dtype) for path, leaf in leaves.items()}  # Orbax describes the tree by these
        self.save(step, unflatten_dict(small), None, model, *known)
        self.wait()
        folder = self.directory / str(step)

        def failed(error: Exception) -> PrenormError:
            return PrenormError(f"{self.directory} could not be written: {_reason(error)}; {MEND}")

        yield (new := NewLeaves(folder / "params", failed, leaves))
        metadata = self.metadata(step)
        metadata["digests"]["params"] = new.digest()
        metadata["digest"] = json_digest(metadata)
        write_whole(folder / "metadata" / "metadata", json.dumps(metadata).encode())

    def wait(self) -> None:
        """Returns when every save is complete on disk. Raises PrenormError if one cannot be written."""
        with self._writing():
            self._manager.wait_until_finished()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of the file system, in whatever wrapping Orbax gives it
            if lost_process(error):
                raise
            complete = self.steps()
            last = f"the last complete one is at step {complete[-1]}" if complete else "there is no complete one yet"
            raise Unwritable(
                f"a checkpoint in {self.directory} could not be written: {first_line(error)}; {last}: {MEND}"
            ) from error

    def metadata(self, step: int) -> dict[str, Any]:
        """What the module's docstring lists. Raises PrenormError if it cannot be read."""
        with self._reading(step):
            metadata = json.loads((self.directory / str(step) / "metadata" / "metadata").read_bytes())
            if not isinstance(metadata, dict) or metadata.pop("digest", None) != json_digest(metadata):
                raise ValueError("metadata differ from what was saved")
            if metadata["step"] != step:
                raise ValueError(f"it is that of step {metadata['step']} under another name")
            if any(type(metadata[key]) is not kind for key, kind in _KINDS.items()) or not metadata["digests"]:
                raise ValueError("metadata are not what was saved")
        return metadata

    def model(self, step: int) -> ModelConfig:
        """The model config of the stored tree. Raises PrenormError if the tree is not what its metadata describe."""
        model = model_config(self.metadata(step)["model"])
        with self._reading(step):
            check_tree(self._shapes(step, "params"), model)
        return model

    def params(self, step: int, sharding: Any = None) -> tuple[ModelConfig, dict[str, Any]]:
        """The model config of the stored tree, and the tree, placed by the tree `sharding` (None: the first device).

        Raises PrenormError if the tree cannot be read, or is not exactly what its metadata describe.
        """
        model = self.model(step)
        return model, self._restore(step, "params", unflatten_dict(param_shapes(model)), sharding)

    @contextlib.contextmanager
    def leaves(self, step: int, item: str = "params") -> Iterator[StoredLeaves]:
        """While entered, the leaves of a tree can be read, in parts.

        All of them must be: on leaving, raises PrenormError if what was read is not what was saved.
        """
        yield (stored := StoredLeaves(self.directory / str(step) / item, functools.partial(self._damaged, step)))
        if stored.digest() != self.metadata(step)["digests"][item]:
            raise self._damaged(step, f"{item} differ from what was saved")

    def optimizer(self, step: int, abstract: Any, sharding: Any = None) -> Any:
        """The optimizer state, in the shapes of `abstract`; None if the checkpoint was converted and has none."""
        if "optimizer" not in self.metadata(step)["digests"]:
            return None
        return self._restore(step, "optimizer", abstract, sharding)

    def copy(self, step: int, workdir: Path) -> None:
        """Copies a checkpoint as it is to a workdir that has none.

        Raises PrenormError if it is not what was saved, or has links to what is not of it.
        """
        folder = (self.directory / str(step)).resolve()
        if others := [path for path in folder.rglob("*") if not path.resolve().is_relative_to(folder)]:
            raise PrenormError(
                f"{others[0]} is a link to what is not of the checkpoint: put what it means in its place"
            )
        for item in self.metadata(step)["digests"]:
            with self._reading(step):
                shapes = self._shapes(step, item)
            with self.leaves(step, item) as stored:
                for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes):
                    path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
                    names = tuple(map(str, range(len(leaf.shape))))
                    for tile in tiles({path: list(zip(names, leaf.shape, strict=True))}, 1, PART):
                        stored.read(path, part(names, tile))
        try:
            shutil.copytree(folder, workdir / self.directory.name / str(step))
        except OSError as error:
            if folder.is_dir():
                raise
            raise self._damaged(step, error) from error

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

    def _restore(self, step: int, item: str, abstract: Any, sharding: Any) -> Any:
        """Reads what this process has of a tree. (The manager's own would wait for the others at its end.)"""
        if sharding is None:
            sharding = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), abstract)
        placed = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), abstract, sharding
        )
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=alone)
        with self._reading(step), ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            tree = reader.restore(self.directory / str(step) / item, args=ocp.args.StandardRestore(placed))
        if digest(tree) != self.metadata(step)["digests"][item]:
            raise self._damaged(step, f"{item} differ from what was saved")
        return tree

    def _shapes(self, step: int, item: str) -> Any:
        """The stored tree, with a shape and a dtype for each leaf; namedtuples are dicts in it."""
        with ocp.StandardCheckpointer() as reader:
            stored = reader.metadata(self.directory / str(step) / item).item_metadata
        if stored is None:
            raise ValueError(f"{item} are incomplete")
        return stored.tree

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """What fails in it in one process, which alone reads its part, is damage for all, in the same words.

        So no process waits for one that has turned to another checkpoint. Nothing in it may wait for the others.
        """
        why = ""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise many kinds for a file that is short, changed or gone
            if lost_process(error):  # which says nothing about the checkpoint
                raise
            damaged = self._damaged(step, error)
            if count_processes() == 1:
                raise damaged from error
            why = str(damaged)
        if why := first_said(why):
            raise Damaged(why)

    def _damaged(self, step: int, why: Exception | str) -> Damaged:
        why = _reason(why) if isinstance(why, Exception) else why
        state = f"is damaged: {why}" if (self.directory / str(step)).is_dir() else "is gone: its run keeps its latest"
        others = [str(other) for other in self.steps() if other != step]
        remedy = f"; --step={' or '.join(others)} names another" if self._read_only and others else ""
        return Damaged(f"the checkpoint {self.directory / str(step)} {state}{remedy}")
