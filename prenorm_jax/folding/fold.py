"""`fold`: the public face of the room, and what it gives."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.base.trees import Array
from prenorm_jax.folding.plan import Plan
from prenorm_jax.folding.program import trace
from prenorm_jax.folding.run import Runner, centre


def fold(function: Callable[..., Any], params: Any, *inputs: Any, to: str = "rmsnorm") -> "Folded":
    """Moves the removal of means from a function's LayerNorms to what writes what they read: they become RMSNorms."""
    check_choice("to", to, ("rmsnorm",))
    return Folded(function, params, inputs)


class Folded:
    def __init__(self, function: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> None:
        self.function = function
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self.names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        self._runners: dict[Any, tuple[Runner, Any]] = {}
        self._pins: dict[int, Any] | None = None
        runner, _ = self._runner(params, inputs)
        self.plan = runner.plan
        self._pins = {i: self.plan.pin(i) for i in range(len(leaves))}
        if not any(isinstance(leaf, jax.ShapeDtypeStruct) for _, leaf in leaves):
            self.params = self.h(params)

    def h(self, params: Any) -> Any:
        leaves = self._tree.flatten_up_to(params)
        return self._tree.unflatten([self._stored(i, leaf, leaves) for i, leaf in enumerate(leaves)])

    def _stored(self, index: int, leaf: Array, leaves: list[Array]) -> Array:
        label = self.plan.centred.get(self.plan.program.inputs[index])
        if label is None:
            return leaf
        scale = label.scale
        scale = None if scale is None else leaves[scale.index] if scale.index >= 0 else scale.data
        return centre(leaf, label.axes, scale, label.dims)

    def apply(self, params: Any, *inputs: Any) -> Any:
        runner, tree = self._runner(params, inputs)
        return tree.unflatten(runner(jax.tree.leaves((params, *inputs))))

    def _runner(self, params: Any, inputs: tuple[Any, ...]) -> tuple[Runner, Any]:
        args = jax.tree.map(_abstract, (params, *inputs))
        leaves, tree = jax.tree.flatten(args)
        key = tree, tuple((leaf.shape, leaf.dtype, leaf.weak_type) for leaf in leaves)
        if key not in self._runners:
            program, out = trace(self.function, args, len(self.names))
            self._runners[key] = Runner(Plan(program).solve(self._pins)), out
        return self._runners[key]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    kind = jax.typeof(leaf) if not isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    return jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type)
