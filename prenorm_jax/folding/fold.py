"""`fold`: what users call, and what it gives."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.base.trees import Array
from prenorm_jax.folding import internals
from prenorm_jax.folding.plan import Plan
from prenorm_jax.folding.program import trace
from prenorm_jax.folding.report import Report
from prenorm_jax.folding.run import Runner, centre


def fold(function: Callable[..., Any], params: Any, *inputs: Any, to: str = "rmsnorm") -> "Folded":
    """The same function with its LayerNorms as RMSNorms, where their mean's removal can move to what writes to them.

    Nothing of the function's code is asked for: it is traced, and each LayerNorm found in its equations.

    Args:
      function: of (params, *inputs), any that `jax.make_jaxpr` traces; what is static is bound beforehand.
      params: a pytree of arrays, or of `jax.ShapeDtypeStruct`s: then a plan is made, which `h` and `leaf` apply.
      inputs: examples of the inputs, or their shapes. Others of other shapes may be given to `apply`.
      to: "rmsnorm".

    Raises PrenormError for leaves that are no arrays, and for another `to`.
    """
    check_choice("to", to, ("rmsnorm",))
    return Folded(function, params, inputs)


class Folded:
    """A function and its folded parameters.

    Attributes:
      params: those of the source, some without their mean: the same tree, shapes and dtypes.
      names: the leaves' paths, as in "block_0/mlp/kernel".
      report: what became of each LayerNorm.
    """

    def __init__(self, function: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> None:
        self._function, self._source = function, params
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self.names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
        for name, (_, leaf) in zip(self.names, leaves, strict=True):
            if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
                raise PrenormError(f"the parameter {name} is no array but a {type(leaf).__name__}: bind it beforehand")
        self._runners: dict[Any, tuple[Runner, Any]] = {}
        self._pins: dict[int, Any] | None = None
        self._args = tuple(jax.tree.map(_abstract, one) for one in (params, *inputs))
        self._plan = self._runner(self._args)[0].plan
        self._pins = {i: self._plan.pin(i) for i in range(len(leaves))}

    def apply(self, params: Any, *inputs: Any) -> Any:
        """The function, of folded parameters; to be jitted, differentiated, mapped and scanned as any other.

        Raises PrenormError for another tree of parameters, and for inputs of shapes for which they do not serve.
        """
        if jax.tree.structure(params) != self._tree:
            raise PrenormError("the parameters are not a tree as the folded one; folded.h makes one of the source's")
        runner, tree = self._runner(tuple(jax.tree.map(_abstract, one) for one in (params, *inputs)))
        return jax.tree.unflatten(tree, runner(jax.tree.leaves((params, *inputs))))

    def h(self, params: Any) -> Any:
        """The folded parameters as a function of the source's: to be differentiated.

        A loss of `apply(h(θ), ...)` has the gradients by θ that the source's has, so any optimizer of θ follows the
        source's trajectory. Linear, but for what a LayerScale is multiplied into.
        """
        leaves = self._tree.flatten_up_to(params)
        return self._tree.unflatten([self._stored(i, leaves.__getitem__, centre) for i in range(len(leaves))])

    def leaf(self, name: str, read: Callable[[str], Array]) -> Array:
        """The folded parameter of this name; `read` gives the source's by their names, one, or two with a LayerScale.

        So a tree larger than memory is folded leaf by leaf. Arithmetic is in float64, on the host; an array on several
        devices stays on them, in float32 at least.
        """
        if name not in self.names:
            raise PrenormError(f"there is no parameter {name!r}; folded.names has those that there are")
        return self._stored(self.names.index(name), lambda index: read(self.names[index]), _centre_stored)

    @functools.cached_property
    def params(self) -> Any:
        leaves = self._tree.flatten_up_to(self._source)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise PrenormError("fold was given shapes, not parameters: folded.h(params) or folded.leaf(name, read)")
        return self._tree.unflatten([self._stored(i, leaves.__getitem__, _centre_stored) for i in range(len(leaves))])

    @functools.cached_property
    def report(self) -> Report:
        """What became of each LayerNorm, and why; `str`, `as_dict` and `html` have it in three forms."""
        after, _ = trace(self.apply, self._args, len(self.names))
        return Report.of(self._runner(self._args)[0], after, self.names)

    def _stored(self, index: int, read: Callable[[int], Array], centre: Callable[..., Array]) -> Array:
        label = self._plan.centred.get(self._plan.program.inputs[index])
        if label is None:
            return read(index)
        scale = label.scale and (read(label.scale.index) if label.scale.index >= 0 else label.scale.data)
        return centre(read(index), label.axes, scale, label.dims)

    def _runner(self, args: tuple[Any, ...]) -> tuple[Runner, Any]:
        """That of inputs of these shapes, and the tree of the outputs."""
        leaves, tree = jax.tree.flatten(args)
        key = tree, tuple((leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding) for leaf in leaves)
        if key not in self._runners:
            program, out = trace(self._function, args, len(self.names))
            self._runners[key] = Runner(Plan(program).solve(self._pins)), out
        return self._runners[key]


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    kind = leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)
    sharding = kind.sharding  # part of the type where a mesh has explicit axes
    explicit = jax.sharding.AxisType.Explicit in getattr(getattr(sharding, "mesh", None), "axis_types", ())
    return jax.ShapeDtypeStruct(
        kind.shape, kind.dtype, sharding=sharding if explicit else None, weak_type=kind.weak_type
    )


def _centre_stored(x: Array, axes: frozenset[int], scale: Array | None, dims: tuple[int, ...]) -> Array:
    """`centre`, once and for all: in float64 on the host; in place of an array on several devices, on them."""
    if internals.is_tracer(x) or internals.is_tracer(scale):
        return centre(x, axes, scale, dims)
    if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
        return jax.jit(centre, static_argnums=(1, 3), out_shardings=x.sharding)(x, axes, scale, dims)
    wide = np.asarray(x).astype(np.float64)
    wide = centre(wide, axes, None if scale is None else np.asarray(scale).astype(np.float64), dims)
    stored = centre(wide, axes).astype(x.dtype)  # twice: what rounding has left of the mean goes too
    # As bound to its device as x is: an array that is bound to one cannot be used beside others on several.
    return jax.device_put(stored, x.sharding if x.committed else None) if isinstance(x, jax.Array) else stored
