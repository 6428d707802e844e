"""The leaves of a tree that Orbax stored, read and written in parts, for trees larger than memory.

Orbax keeps a tree as one key-value store (OCDBT) of arrays (zarr), each under its names joined by dots. A part is an
index: a slice for each axis. What passes is added to a digest.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorstore as ts

from prenorm_jax.base.trees import Flat, Path
from prenorm_jax.equivalence.stored import Part
from prenorm_jax.train.checksum import checksum, combined

Failed = Callable[[Exception], Exception]  # what is raised of TensorStore's errors, which are of many kinds


class _Leaves:
    """Leaves of one tree, and the digest of what passed of them."""

    def __init__(self, folder: pathlib.Path, failed: Failed):
        self._folder, self._failed = folder, failed
        self._stores: dict[Path, ts.TensorStore] = {}
        self._summed: dict[str, tuple[Any, tuple[int, ...], np.ndarray]] = {}
        self._seen: set[tuple[Path, tuple[int, ...]]] = set()

    def digest(self) -> str:
        """That of the tree, once all parts of all leaves have passed."""
        return combined(self._summed)

    def _take(self, path: Path, shape: tuple[int, ...], part: Part, array: np.ndarray) -> bool:
        """Takes a part of a leaf of this shape into the digest; False, and nothing, if it was before."""
        start = tuple(axis.start or 0 for axis in part) or (0,) * array.ndim
        if (path, start) in self._seen:
            return False
        self._seen.add((path, start))
        *_, sums = self._summed.get("/".join(path), (None, None, np.uint32(0)))
        self._summed["/".join(path)] = array.dtype, shape, sums + np.asarray(checksum(array, start))
        return True

    def _store(self, path: Path, spec: dict[str, Any], **how: bool) -> ts.TensorStore:
        if path not in self._stores:
            base = {"driver": "file", "path": f"{self._folder}/"}
            kvstore = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(path)}/"}
            self._stores[path] = ts.open({"driver": "zarr", "kvstore": kvstore} | spec, **how).result()
        return self._stores[path]


class StoredLeaves(_Leaves):
    """Leaves that are read."""

    def read(self, path: Path, part: Part = ()) -> np.ndarray:
        """Part of the leaf (default: all of it)."""
        try:
            store = self._store(path, {}, open=True, read=True)
            array = np.asarray(store[part].read().result())
        except Exception as error:
            raise self._failed(error) from error
        self._take(path, tuple(store.shape), part, array)
        return array


class NewLeaves(_Leaves):
    """Leaves of these shapes that are written, in place of those of the same names, whatever these are."""

    def __init__(self, folder: pathlib.Path, failed: Failed, leaves: Flat):
        super().__init__(folder, failed)
        self._leaves = leaves

    def write(self, path: Path, part: Part, array: np.ndarray) -> None:
        """Writes part of a leaf, once; the first part starts at zero, and no other is larger."""
        shape = self._leaves[path].shape
        if not self._take(path, shape, part, array):
            return
        spec = {
            "metadata": {"shape": shape, "chunks": array.shape, "compressor": None},
            "dtype": array.dtype.name,
            "store_data_equal_to_fill_value": True,  # to Orbax a chunk that is not there is damage
        }
        try:
            self._store(path, spec, create=True, delete_existing=True)[part].write(array).result()
        except Exception as error:
            raise self._failed(error) from error
