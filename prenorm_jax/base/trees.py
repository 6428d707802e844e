"""Trees of arrays: the words that all rooms share, and the dtype that sums are taken in."""

from typing import Any

import jax
import jax.numpy as jnp

Array = Any  # jax.Array or numpy.ndarray
Path = tuple[str, ...]  # the names that lead to a leaf
Flat = dict[Path, Array]  # a tree's leaves by their paths


def count(tree: Any) -> int:
    """Numbers in a tree of (abstract) arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def at_least_float32(x: Array) -> Array:
    """x in float32, or in its own dtype if that is as wide. (float8 has no implicit promotion.)"""
    return x.astype(jnp.float32) if x.dtype.itemsize < 4 else x
