"""Digests of trees of arrays, wherever they lie: the same sharded over any mesh, on one device and in NumPy.

Each 32-bit word of an array is mixed with its place, and the results are added up modulo 2^32, under four keys for 128
bits. Integers add up to the same in any order, so each device sums what it holds and nothing is gathered; and the parts
of an array may come one by one, where all of it would not fit.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from jax.experimental import multihost_utils

from prenorm_jax.base.trees import Array

_KEYS = 4
_SMALL = 2**15  # entries of arrays on the host for which a program would take longer to compile than NumPy takes


def digest(tree: Any) -> str:
    """A 128-bit hash of a tree of arrays: of names, dtypes, shapes and every bit.

    Of arrays that several processes share, each process gets it, and all have to call this.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): x if isinstance(x, jax.Array) else np.asarray(x)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    parts = jax.device_get({name: [checksum(*part) for part in _parts_here(x)] for name, x in leaves.items()})
    sums = {name: sum(values, start=np.zeros(_KEYS, np.uint32)) for name, values in parts.items()}
    shared = [name for name, x in leaves.items() if isinstance(x, jax.Array) and not x.is_fully_addressable]
    if shared:
        of_each = multihost_utils.process_allgather(np.stack([sums[name] for name in shared]))
        sums |= zip(shared, of_each.sum(0, dtype=np.uint32), strict=True)
    return combined({name: (leaf.dtype, leaf.shape, sums[name]) for name, leaf in leaves.items()})


def _parts_here(array: Array) -> list[tuple[Array, list[int]]]:
    """What of an array is for this process to add up, each part with its place: together, each entry once."""
    if isinstance(array, np.ndarray):
        return [(array, [0] * array.ndim)]
    shards = [shard for shard in array.addressable_shards if shard.replica_id == 0]
    on_host = array.size <= _SMALL and all(shard.device.platform == "cpu" for shard in shards)
    parts = [np.asarray(shard.data) if on_host else shard.data for shard in shards]
    return [(x, [axis.start or 0 for axis in shard.index]) for x, shard in zip(parts, shards, strict=True)]


def combined(leaves: Mapping[str, tuple[Any, tuple[int, ...], np.ndarray]]) -> str:
    """The digest of a tree, from each leaf's dtype, shape and checksum by its names, joined by slashes."""
    lines = [f"{name} {dtype} {shape} {sums.tolist()}" for name, (dtype, shape, sums) in sorted(leaves.items())]
    return xxhash.xxh3_128("\n".join(lines).encode()).hexdigest()


def checksum(array: Array, start: Sequence[int]) -> Array:
    """(4,) uint32. Those of an array's parts add up, modulo 2^32, to that of the array.

    Args:
      array: part of an array of booleans, or of integers or floats of at most 64 bits; on one device, or in NumPy.
      start: the place of its first entry in the whole.
    """
    wide = array.dtype.itemsize == 8
    if isinstance(array, np.ndarray) and wide:  # which JAX may have no dtype for
        array = np.ascontiguousarray(array).view(np.uint32).reshape(*array.shape, 2)
    places = [_factor(key, -1) + sum(i * _factor(key, axis) for axis, i in enumerate(start)) for key in range(_KEYS)]
    places = np.array([place % 2**32 for place in places], np.uint32)
    if isinstance(array, np.ndarray) and array.size <= _SMALL:
        array = array.astype(np.uint8) if array.dtype == bool else np.ascontiguousarray(array)
        words = array if wide else array.view(f"uint{8 * min(array.dtype.itemsize, 4)}").astype(np.uint32)
        return _sums_in_numpy(words, places)
    return _checksum(array, places, wide)


@functools.partial(jax.jit, static_argnums=2)
def _checksum(x: jax.Array, start: jax.Array, wide: bool) -> jax.Array:
    """`start`: the place of the first entry under each key. `wide`: of two words, which are one more, last axis."""
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, f"uint{8 * min(x.dtype.itemsize, 4)}").astype(jnp.uint32)
    if not wide:
        return _sums(words, start)
    next_word = np.array([_factor(key, words.ndim - 1) for key in range(_KEYS)], np.uint32)
    return _sums(words[..., 0], start) + _sums(words[..., 1], start + next_word)


def _sums(words: jax.Array, start: jax.Array) -> jax.Array:
    mixed = []
    for key in range(_KEYS):
        place = start[key]
        for axis in range(words.ndim):
            place += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(_factor(key, axis))
        mixed.append(_mix(words ^ place))
    if words.ndim:  # One reduction, of the last axis first: XLA fuses all of the above with it.
        zeros = (jnp.uint32(0),) * _KEYS
        mixed = jax.lax.reduce(tuple(mixed), zeros, lambda a, b: jax.tree.map(jnp.add, a, b), (words.ndim - 1,))
    return jnp.stack([x.sum(dtype=jnp.uint32) for x in mixed])


def _sums_in_numpy(words: np.ndarray, start: np.ndarray) -> np.ndarray:
    """The same of an array on the host; the two words of a wide entry are its last axis."""
    words = words.reshape(words.shape or (1,))
    axes = [np.arange(size, dtype=np.uint32) for size in words.shape]
    places = [
        start[key] + sum(np.ix_(*(i * np.uint32(_factor(key, n)) for n, i in enumerate(axes)))) for key in range(_KEYS)
    ]
    return np.array([_mix(words ^ place).sum(dtype=np.uint32) for place in places])


def _mix(x: Array) -> Array:
    """MurmurHash3's finaliser: one to one, and each bit of x changes each bit of the result in half of all cases."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@functools.cache
def _factor(key: int, axis: int) -> int:
    """An odd number of 32 bits, so that no two entries of an axis have the same place; random, that few others do."""
    return xxhash.xxh32(f"{key} {axis}".encode()).intdigest() | 1
