"""`fold`: what users call, and what it gives."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.base.trees import Array, at_least_float32
from prenorm_jax.folding import internals
from prenorm_jax.folding.plan import Plan
from prenorm_jax.folding.program import trace
from prenorm_jax.folding.report import Report
from prenorm_jax.folding.rules import Label
from prenorm_jax.folding.run import Run, centre


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
      names: the leaves' paths, as in "block_0/mlp/kernel"; where two would be one name, as in "['block_0/mlp']".
      report: what became of each LayerNorm.
    """

    def __init__(self, function: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> None:
        self._function, self._source = function, params
        leaves, self._tree = jax.tree_util.tree_flatten_with_path(params)
        self.names = _names([path for path, _ in leaves])
        for name, (_, leaf) in zip(self.names, leaves, strict=True):
            if not (hasattr(leaf, "dtype") and hasattr(leaf, "shape")):
                raise PrenormError(f"the parameter {name} is no array but a {type(leaf).__name__}: bind it beforehand")
        self._plans: dict[Any, tuple[Plan, Any]] = {}
        self._pins: dict[int, Any] = {}
        self._args = _shapes(params, *inputs)
        plan, _ = self._plan(self._args)
        self._pins = {i: plan.pin(i) for i in range(len(leaves))}

    def apply(self, params: Any, *inputs: Any) -> Any:
        """The function, of folded parameters; to be jitted, differentiated, mapped and scanned as any other.

        Raises PrenormError for another tree of parameters, and for inputs of shapes for which they do not serve.
        """
        if jax.tree.structure(params) != self._tree:
            raise PrenormError("the parameters are not a tree as the folded one; folded.h makes one of the source's")
        plan, tree = self._plan(_shapes(params, *inputs))
        return jax.tree.unflatten(tree, Run(plan)(jax.tree.leaves((params, *inputs))))

    def h(self, params: Any) -> Any:
        """The folded parameters as a function of the source's: to be differentiated.

        A loss of `apply(h(θ), ...)` has the gradients by θ that the source's has, so any optimizer of θ follows the
        source's trajectory. Linear, but for what a LayerScale is multiplied into.
        """
        leaves = self._tree.flatten_up_to(params)
        return self._tree.unflatten([self._stored(i, leaves.__getitem__, _centre) for i in range(len(leaves))])

    def leaf(self, name: str, read: Callable[[str], Array]) -> Array:
        """The folded parameter of this name; `read` gives the source's by their names, one, or two with a LayerScale.

        So a tree larger than memory is folded leaf by leaf. Arithmetic is in float64, on the host; an array on several
        devices stays on them, in float32 at least.
        """
        if self.names.count(name) != 1:
            raise PrenormError(f"there is no parameter {name!r}; folded.names has those that there are")
        return self._stored(self.names.index(name), lambda index: read(self.names[index]), _centre_once)

    @functools.cached_property
    def params(self) -> Any:
        leaves = self._tree.flatten_up_to(self._source)
        if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
            raise PrenormError("fold was given shapes, not parameters: folded.h(params) or folded.leaf(name, read)")
        return self._tree.unflatten([self._stored(i, leaves.__getitem__, _centre_once) for i in range(len(leaves))])

    @functools.cached_property
    def report(self) -> Report:
        """What became of each LayerNorm, and why; `str`, `as_dict` and `html` have it in three forms."""
        after, _ = trace(self.apply, self._args, len(self.names))
        return Report.of(self._plan(self._args)[0], after, self.names)

    def _stored(self, index: int, read: Callable[[int], Array], centre: Callable[..., Array]) -> Array:
        plan, _ = self._plan(self._args)
        label = plan.centred.get(plan.program.inputs[index])
        if label is None:
            return read(index)
        return centre(read(index), label._replace(scale=None), label.scale and read(label.scale.index))

    def _plan(self, args: tuple[Any, ...]) -> tuple[Plan, Any]:
        """That of inputs of these shapes, and the tree of the outputs."""
        leaves, tree = jax.tree.flatten(args)
        key = tree, tuple((leaf.shape, leaf.dtype, leaf.weak_type, leaf.sharding) for leaf in leaves)
        if key not in self._plans:
            program, out = trace(self._function, args, len(self.names))
            self._plans[key] = Plan(program, self._pins), out
        return self._plans[key]


def _names(paths: list[Any]) -> list[str]:
    short = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    counts = Counter(short)
    return [name if counts[name] == 1 else jax.tree_util.keystr(path) for name, path in zip(short, paths, strict=True)]


def _shapes(*args: Any) -> tuple[Any, ...]:
    """Of the arrays in these trees, with what else JAX traces by: weak types, and shardings of explicit axes."""
    return jax.eval_shape(_given, *args)


def _given(*args: Any) -> tuple[Any, ...]:
    return args  # by name, for `eval_shape` keeps what it has traced by the function


def _centre(x: Array, label: Label, scale: Array | None) -> Array:
    """C(λ ⊙ x), of the dtype of x."""
    wide = at_least_float32(x)
    if scale is not None:
        sizes = [size if axis in label.dims else 1 for axis, size in enumerate(x.shape)]
        wide = wide * scale.squeeze().transpose(np.argsort(label.dims)).reshape(sizes)
    return centre(wide, label).astype(x.dtype)


def _centre_once(x: Array, label: Label, scale: Array | None) -> Array:
    """`_centre` once and for all: in float64 on the host; in place of an array on several devices, on them."""
    if internals.is_tracer(x) or internals.is_tracer(scale):
        return _centre(x, label, scale)
    if isinstance(x, jax.Array) and len(x.sharding.device_set) > 1:
        return jax.jit(_centre, static_argnums=1, out_shardings=x.sharding)(x, label, scale)
    wide = _centre(np.asarray(x, np.float64), label, None if scale is None else np.asarray(scale, np.float64))
    stored = centre(wide, label).astype(x.dtype)  # twice: what rounding has left of the mean goes too
    if not isinstance(x, jax.Array):
        return stored
    with jax.ensure_compile_time_eval():  # else it would be a tracer where a function is traced that asks for `params`
        # As bound to its device as x is: an array that is bound to one cannot be used beside others on several.
        return jax.device_put(stored, x.sharding if x.committed else None)
