"""Trees of arrays: the words that all rooms share."""

from typing import Any

import jax

Array = Any  # jax.Array or numpy.ndarray
Path = tuple[str, ...]  # the names that lead to a leaf
Flat = dict[Path, Array]  # a tree's leaves by their paths


def count(tree: Any) -> int:
    """Numbers in a tree of (abstract) arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
