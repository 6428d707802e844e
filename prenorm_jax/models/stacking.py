"""Blocks unrolled or stacked: a subtree for each, or one with a leading axis (`model.scan`).

    {"block_0": {...}, "block_1": {...}, ...}  <->  {"blocks": {...}}, every leaf (depth, ...)

Both are of the same numbers. What holds trees like the parameters, as an optimizer's state does, changes likewise.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

STACKED = "blocks"
LAYER = "layer"  # the logical name of the leading axis


def stack_blocks(tree: Any) -> Any:
    """`tree` with the blocks of every dict in it stacked."""

    def change(node: dict[str, Any]) -> dict[str, Any]:
        names = sorted((name for name in node if _is_block(name)), key=lambda name: int(name.split("_")[1]))
        rest = {name: value for name, value in node.items() if name not in names}
        return {STACKED: jax.tree.map(lambda *x: jnp.stack(x), *(node[name] for name in names)), **rest}

    return _map_dicts(tree, lambda node: any(map(_is_block, node)), change)


def unstack_blocks(tree: Any) -> Any:
    """The inverse of `stack_blocks`."""

    def change(node: dict[str, Any]) -> dict[str, Any]:
        stacked = node[STACKED]
        depth = len(jax.tree.leaves(stacked)[0]) if jax.tree.leaves(stacked) else 0
        rest = {name: value for name, value in node.items() if name != STACKED}
        return {f"block_{i}": jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(depth)} | rest

    return _map_dicts(tree, lambda node: STACKED in node, change)


def _is_block(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("block_") and name[6:].isdecimal()


def _map_dicts(tree: Any, found: Callable[[dict[str, Any]], bool], change: Callable[[dict[str, Any]], Any]) -> Any:
    """Changes the outermost dicts that are `found`, in dicts and (named) tuples."""
    if isinstance(tree, dict):
        return change(tree) if found(tree) else {key: _map_dicts(value, found, change) for key, value in tree.items()}
    if isinstance(tree, tuple):
        values = [_map_dicts(value, found, change) for value in tree]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return tree
