"""A traced function as a graph of values: calls are inlined, `scan` and `checkpoint` are regions with a body.

What crosses a region's border is an equation like others, so that values of a body are read within it alone:

    scan_carry   initial value, value at the body's end -> value at its start, value after the loop
    scan_xs      array -> its slice
    scan_ys      slice -> array
    exit         array of a checkpoint's body -> the same around it
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as core
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.folding import internals


@dataclasses.dataclass(eq=False, repr=False)
class Value:
    """One array of the program.

    Attributes:
      loops: the scans around it, the outermost first.
      kind: parameter, input, constant or computed.
      data: a constant's array.
      index: a parameter's or input's place among the function's flat arguments.
      fixed: whether it depends on known constants alone.
      uniform: the axes along which its entries are known to be equal.
    """

    aval: Any
    loops: tuple["Region", ...] = ()
    kind: str = "computed"
    data: Any = None
    index: int = -1
    equation: "Equation | None" = None
    fixed: bool = False
    uniform: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        self.shape: tuple[int, ...] = getattr(self.aval, "shape", ())  # tokens have none
        self.is_float = jnp.issubdtype(getattr(self.aval, "dtype", int), jnp.floating)
        self.uniform |= {axis for axis, size in enumerate(self.shape) if size == 1}

    @property
    def times(self) -> int:
        """How often it is computed in one call."""
        return math.prod(loop.eqn.params["length"] for loop in self.loops)


@dataclasses.dataclass(eq=False, repr=False)
class Equation:
    """A primitive's call. `eqn` is JAX's own; `name`, the primitive's or one of this module's; `calls`, JAX's equations
    that it was inlined from, the outermost first."""

    name: str
    eqn: core.JaxprEqn
    inputs: list[Value]
    outputs: list[Value]
    calls: tuple[core.JaxprEqn, ...] = ()

    @property
    def params(self) -> dict[str, Any]:
        return self.eqn.params

    @property
    def where(self) -> str:
        return next(filter(None, map(internals.where, (self.eqn, *self.calls[::-1]))), "?")

    @property
    def scope(self) -> str:
        return "/".join(filter(None, map(internals.scope, (*self.calls, self.eqn))))


@dataclasses.dataclass(eq=False, repr=False)
class Region:
    """A scan or a checkpoint: what enters its body, the body, and what leaves it."""

    eqn: core.JaxprEqn
    carries: list[Equation] = dataclasses.field(default_factory=list)
    xs: list[Equation] = dataclasses.field(default_factory=list)
    body: list["Equation | Region"] = dataclasses.field(default_factory=list)
    ys: list[Equation] = dataclasses.field(default_factory=list)


Block = list[Equation | Region]


@dataclasses.dataclass
class Program:
    """A whole function. `inputs` and `outputs` are flat; `equations` has those of the regions too, in their order."""

    block: Block
    inputs: list[Value]
    outputs: list[Value]
    equations: list[Equation]


def trace(function: Callable[..., Any], args: Any, parameters: int) -> tuple[Program, Any]:
    """The function of `args` as a program, and its outputs' tree. The first `parameters` flat inputs are parameters.

    Raises PrenormError for a function with effects.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    # Of psum and its like an effect is no more than a name.
    if effects := [one for one in closed.effects if type(one).__name__ != "NamedAxisEffect"]:
        eqn = next(eqn for eqn in internals.body_of(closed).jaxpr.eqns if effects[0] in eqn.effects)
        raise PrenormError(
            f"the function has an effect, {eqn.primitive.name} at {internals.where(eqn) or 'an unknown line'}, "
            "that the folded one would not have: fold it without (debug prints, callbacks, checks, references)"
        )
    return read(internals.without_dead_code(internals.body_of(closed)), parameters), jax.tree.structure(shape)


def read(body: internals.Body, parameters: int = 0) -> Program:
    """A jaxpr as a program."""
    variables = enumerate(body.jaxpr.invars)
    inputs = [Value(var.aval, kind="parameter" if i < parameters else "input", index=i) for i, var in variables]
    reader = _Reader()
    block, outputs = reader.read(body, inputs, (), ())
    return Program(block, inputs, outputs, reader.equations)


class _Reader:
    """Of all methods `loops` and `calls` are those that the equation stands in."""

    def __init__(self) -> None:
        self.equations: list[Equation] = []

    def read(self, body: internals.Body, args: list[Value], loops: Any, calls: Any) -> tuple[Block, list[Value]]:
        env, block = dict(zip(body.jaxpr.invars, args, strict=True)), []
        env |= {var: _constant(var.aval, data) for var, data in zip(body.jaxpr.constvars, body.consts, strict=True)}

        def value(atom: Any) -> Value:
            return _constant(atom.aval, atom.val) if isinstance(atom, core.Literal) else env[atom]

        for eqn in body.jaxpr.eqns:
            name, inputs, within = eqn.primitive.name, [value(atom) for atom in eqn.invars], (*calls, eqn)
            if name in internals.INLINED:
                items, outputs = self.read(internals.bodies(eqn)[0], inputs, loops, within)
            elif name in internals.REMAT:
                inside, ends = self.read(internals.bodies(eqn)[0], inputs, loops, within)
                exits = [self.equation(eqn, "exit", [end], [end.aval], loops, within) for end in ends]
                items, outputs = [Region(eqn, body=inside, ys=exits)], [made.outputs[0] for made in exits]
            elif name == "scan":
                items = [self.scan(eqn, inputs, loops, within)]
                outputs = [made.outputs[-1] for made in items[0].carries + items[0].ys]
            else:
                items = [self.equation(eqn, name, inputs, [var.aval for var in eqn.outvars], loops, calls)]
                outputs = items[0].outputs
            block += items
            env.update(zip(eqn.outvars, outputs, strict=True))
        return block, [value(atom) for atom in body.jaxpr.outvars]

    def scan(self, eqn: core.JaxprEqn, inputs: list[Value], loops: Any, calls: Any) -> Region:
        body, region = internals.bodies(eqn)[0], Region(eqn)
        consts, carries = internals.scan_counts(eqn)
        inside = (*loops, region)
        given = [(one, var.aval) for one, var in zip(inputs, body.jaxpr.invars, strict=True)][consts:]
        # The value at the body's end is not known yet: it is put in below.
        firsts, slices = given[:carries], given[carries:]
        region.carries = [self.equation(eqn, "scan_carry", [one], [aval] * 2, inside, calls) for one, aval in firsts]
        region.xs = [self.equation(eqn, "scan_xs", [one], [aval], inside, calls) for one, aval in slices]
        entering = [made.outputs[0] for made in region.carries + region.xs]
        region.body, ends = self.read(body, inputs[:consts] + entering, inside, calls)
        for made, end in zip(region.carries, ends, strict=False):
            made.inputs.append(end)
            made.outputs[1].loops = loops
        stacked = zip(ends[carries:], eqn.outvars[carries:], strict=True)
        region.ys = [self.equation(eqn, "scan_ys", [end], [var.aval], loops, calls) for end, var in stacked]
        return region

    def equation(
        self, eqn: core.JaxprEqn, name: str, inputs: list[Value], avals: list[Any], loops: Any, calls: Any
    ) -> Equation:
        made = Equation(name, eqn, inputs, [], calls)
        self.equations.append(made)
        fixed = all(one.fixed for one in inputs) and not name.startswith("scan_")
        made.outputs = [Value(aval, loops, equation=made, fixed=fixed) for aval in avals]
        for out in made.outputs:
            out.uniform |= _uniform(made, out)
        return made


def _constant(aval: Any, data: Any) -> Value:
    return Value(aval, kind="constant", data=data, fixed=not internals.is_tracer(data))


def value_of(value: Value) -> float | None:
    """The number that a constant is, through casts, which round it, and broadcasts."""
    dtypes = [np.float64]
    through = ("convert_element_type", "broadcast_in_dim", "reshape", "pvary")
    while (eqn := value.equation) is not None and eqn.name in through:
        dtypes.append(value.aval.dtype)
        value = eqn.inputs[0]
    if value.kind != "constant" or not value.fixed or value.shape or not jnp.issubdtype(value.aval.dtype, jnp.number):
        return None
    return float(functools.reduce(np.ndarray.astype, reversed(dtypes), np.asarray(value.data)))


# What is known of axes.

_ENTRYWISE = "add sub mul div max min neg sqrt rsqrt exp log square integer_pow select_n convert_element_type copy"
_ENTRYWISE = frozenset(
    (_ENTRYWISE + " and or not lt le gt ge eq ne stop_gradient sharding_constraint pvary exit").split()
)


def _uniform(made: Equation, out: Value) -> frozenset[int]:
    """The axes of `out` along which its entries are equal because those of the inputs are."""
    if made.name in _ENTRYWISE:
        return frozenset(range(len(out.shape))).intersection(*(one.uniform for one in made.inputs if one.shape))
    axes = (moved(made) or {}).items()
    return frozenset(i for i, axis in axes if axis is None or axis in made.inputs[0].uniform)


def moved(made: Equation) -> dict[int, int | None] | None:
    """The axis of the first input that each axis of the output is; None: it repeats the input, or has one entry.

    Axes of a reshape that are made of several, or of a part of one, are left out. None as a whole: the primitive does
    more than to move axes.
    """
    old, new, params = made.inputs[0].shape if made.inputs else (), made.outputs[0].shape, made.params
    match made.name:
        case "broadcast_in_dim":
            kept = {i: axis for axis, i in enumerate(params["broadcast_dimensions"]) if old[axis] == new[i]}
            axes = dict.fromkeys(range(len(new))) | kept
        case "transpose":
            axes = dict(enumerate(params["permutation"]))
        case "squeeze":
            axes = dict(enumerate(axis for axis in range(len(old)) if axis not in params["dimensions"]))
        case "reshape" if params["dimensions"] is None:  # else it transposes first
            places = {key: axis for axis, key in enumerate(zip(old, strides(old), strict=True))}
            axes = {i: places[key] for i, key in enumerate(zip(new, strides(new), strict=True)) if key in places}
        case _:
            return None
    return axes | {i: None for i, size in enumerate(new) if size == 1}


def strides(shape: tuple[int, ...]) -> list[int]:
    """How many entries lie between two neighbours along each axis, row by row."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
