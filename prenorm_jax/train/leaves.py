"""The leaves of a tree that Orbax stored, read and written in parts, for trees larger than memory.

Orbax keeps a tree as one key-value store (OCDBT) of arrays (zarr), each under its names joined by dots. A part is an
index: a slice for each axis. What passes is added to a digest.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorstore as ts

from prenorm_jax.base.errors import first_line
from prenorm_jax.base.trees import Path
from prenorm_jax.equivalence.stored import Part
from prenorm_jax.train.checksum import PartialDigest


class NotRead(Exception):
    """A leaf cannot be read; the message is one line."""


class NotWritten(Exception):
    """A leaf cannot be written; the message is one line."""


class StoredLeaves:
    """Leaves that are read. Once all parts of all leaves were, `str(digest)` is that of the tree."""

    def __init__(self, folder: pathlib.Path):
        self.digest = PartialDigest()
        self._folder = folder
        self._stores: dict[Path, ts.TensorStore] = {}

    def read(self, path: Path, part: Part = ()) -> np.ndarray:
        """Part of the leaf (default: all of it). Raises NotRead."""
        try:
            if path not in self._stores:
                self._stores[path] = ts.open(_spec(self._folder, path), open=True, read=True).result()
            store = self._stores[path]
            part = part or (slice(None),) * store.rank
            array = np.asarray(store[part].read().result()) if part else np.asarray(store.read().result())
        except Exception as error:  # TensorStore raises many kinds for a file that is short, changed or gone
            raise NotRead(first_line(error)) from error
        self.digest.add(path, tuple(store.shape), _start(part), array)
        return array


class NewLeaves:
    """Leaves that are written, in place of those of the same names, whatever these are."""

    def __init__(self, folder: pathlib.Path, leaves: Mapping[Path, jax.ShapeDtypeStruct]):
        self.digest = PartialDigest()
        self._folder = folder
        self._leaves = leaves
        self._stores: dict[Path, ts.TensorStore] = {}

    def write(self, path: Path, part: Part, array: np.ndarray) -> None:
        """Writes part of a leaf, once; the first part starts at zero, and no other is larger. Raises NotWritten."""
        shape = self._leaves[path].shape
        if not self.digest.add(path, shape, _start(part), array):
            return
        try:
            if path not in self._stores:
                metadata = {"shape": shape, "chunks": array.shape, "compressor": {"id": "zstd", "level": 1}}
                spec = _spec(self._folder, path) | {"metadata": metadata, "dtype": array.dtype.name}
                self._stores[path] = ts.open(spec, create=True, delete_existing=True).result()
            store = self._stores[path]
            (store[part] if part else store).write(array).result()
        except Exception as error:
            raise NotWritten(first_line(error)) from error


def _spec(folder: pathlib.Path, path: Path) -> dict[str, Any]:
    files = {"driver": "file", "path": f"{folder}/"}
    return {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": files, "path": f"{'.'.join(path)}/"},
        "store_data_equal_to_fill_value": True,  # to Orbax a chunk that is not there is damage
    }


def _start(part: Part) -> tuple[int, ...]:
    return tuple(axis.start or 0 for axis in part)
