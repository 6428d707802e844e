"""A traced function as a graph of values: calls are inlined, `scan` and `checkpoint` are regions with a body.

What crosses a region's border is an equation like others, so that values of a body are read within it alone:

    scan_carry   initial value, value at the body's end -> value at its start, value after the loop
    scan_xs      array -> its slice
    scan_ys      slice -> array
    exit         array of a checkpoint's body -> the same around it
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
      loops: the lengths of the scans around it, the outermost first; each an object of its own.
      kind: parameter, input, constant or computed.
      data: a constant's array.
      index: a parameter's or input's place among the function's flat arguments.
      fixed: whether it depends on known constants alone.
      uniform: the axes along which its entries are known to be equal.
    """

    aval: Any
    loops: tuple["Loop", ...] = ()
    kind: str = "computed"
    data: Any = None
    index: int = -1
    equation: "Equation | None" = None
    fixed: bool = False
    uniform: frozenset[int] = frozenset()

    @property
    def shape(self) -> tuple[int, ...]:
        return self.aval.shape

    @property
    def times(self) -> int:
        """How often it is computed in one call."""
        return math.prod(loop.length for loop in self.loops)

    @property
    def is_float(self) -> bool:
        return jnp.issubdtype(self.aval.dtype, jnp.floating)


@dataclasses.dataclass(eq=False)
class Loop:
    """One scan of the program."""

    length: int


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
    carries: list[Equation]
    xs: list[Equation]
    body: list["Equation | Region"]
    ys: list[Equation]


Block = list[Equation | Region]


@dataclasses.dataclass
class Program:
    """A whole function. `inputs` and `outputs` are flat."""

    block: Block
    inputs: list[Value]
    outputs: list[Value]

    def equations(self) -> list[Equation]:
        """All of them in the order of computation, those of the regions too."""
        return list(_flat(self.block))


def _flat(block: Block) -> Iterator[Equation]:
    for item in block:
        if isinstance(item, Equation):
            yield item
        else:
            yield from (*item.carries, *item.xs, *_flat(item.body), *item.ys)


def trace(function: Callable[..., Any], args: Any, parameters: int) -> tuple[Program, Any]:
    """The function of `args` as a program, and its outputs' tree. The first `parameters` flat inputs are parameters.

    Raises PrenormError for a function with effects.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    _check_effects(internals.body_of(closed).jaxpr)
    return read(internals.without_dead_code(internals.body_of(closed)), parameters), jax.tree.structure(shape)


def read(body: internals.Body, parameters: int = 0) -> Program:
    """A jaxpr as a program."""
    inputs = [
        Value(var.aval, kind="parameter" if i < parameters else "input", index=i, uniform=_units(var.aval))
        for i, var in enumerate(body.jaxpr.invars)
    ]
    block, outputs = _read(body, inputs, _Place())
    return Program(block, inputs, outputs)


class _Place(NamedTuple):
    """Where an equation stands: in which scans, and in which calls."""

    loops: tuple[Loop, ...] = ()
    calls: tuple[core.JaxprEqn, ...] = ()


def _read(body: internals.Body, args: list[Value], place: _Place) -> tuple[Block, list[Value]]:
    jaxpr, block = body.jaxpr, []
    env = dict(zip(jaxpr.invars, args, strict=True))
    env |= {var: _constant(var.aval, data) for var, data in zip(jaxpr.constvars, body.consts, strict=True)}

    def value(atom: Any) -> Value:
        return _constant(atom.aval, atom.val) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [value(atom) for atom in eqn.invars]
        inner = place._replace(calls=(*place.calls, eqn))
        if name in internals.INLINED:
            items, outputs = _read(internals.bodies(eqn)[0], inputs, inner)
        elif name in internals.REMAT:
            inside, ends = _read(internals.bodies(eqn)[0], inputs, inner)
            exits = [_equation(eqn, "exit", [end], [end.aval], inner) for end in ends]
            items, outputs = [Region(eqn, [], [], inside, exits)], [made.outputs[0] for made in exits]
        elif name == "scan":
            region = _read_scan(eqn, inputs, inner)
            items, outputs = [region], [made.outputs[-1] for made in region.carries + region.ys]
        else:
            items = [_equation(eqn, name, inputs, [var.aval for var in eqn.outvars], place)]
            outputs = items[0].outputs
        block += items
        env.update(zip(eqn.outvars, outputs, strict=True))
    return block, [value(atom) for atom in jaxpr.outvars]


def _read_scan(eqn: core.JaxprEqn, inputs: list[Value], place: _Place) -> Region:
    body = internals.bodies(eqn)[0]
    consts, carries = internals.scan_counts(eqn)
    inside = place._replace(loops=(*place.loops, Loop(eqn.params["length"])))
    given = [(one, var.aval) for one, var in zip(inputs, body.jaxpr.invars, strict=True)][consts:]
    # The value at the body's end is not known yet: it is put in below.
    enter = [_equation(eqn, "scan_carry", [one], [aval, aval], inside) for one, aval in given[:carries]]
    xs = [_equation(eqn, "scan_xs", [one], [aval], inside) for one, aval in given[carries:]]
    block, ends = _read(body, inputs[:consts] + [one.outputs[0] for one in enter + xs], inside)
    for one, end in zip(enter, ends, strict=False):
        one.inputs.append(end)
        one.outputs[1].loops = place.loops
    stacked = zip(ends[carries:], eqn.outvars[carries:], strict=True)
    ys = [_equation(eqn, "scan_ys", [end], [var.aval], place) for end, var in stacked]
    return Region(eqn, enter, xs, block, ys)


def _check_effects(jaxpr: core.Jaxpr) -> None:
    for eqn in jaxpr.eqns:
        # Of psum and its like it is no more than a name.
        if any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects):
            for body in internals.bodies(eqn):
                _check_effects(body.jaxpr)
            raise PrenormError(
                f"the function has an effect, {eqn.primitive.name} at {internals.where(eqn) or 'an unknown line'}, "
                "that the folded one would not have: fold it without (debug prints, callbacks, checks, references)"
            )


def _constant(aval: Any, data: Any) -> Value:
    return Value(aval, kind="constant", data=data, fixed=not internals.is_tracer(data), uniform=_units(aval))


def _equation(eqn: core.JaxprEqn, name: str, inputs: list[Value], avals: list[Any], place: _Place) -> Equation:
    made = Equation(name, eqn, inputs, [], place.calls)
    fixed = all(one.fixed for one in inputs) and not name.startswith("scan_")
    made.outputs = [Value(aval, place.loops, equation=made, fixed=fixed) for aval in avals]
    for out in made.outputs:
        out.uniform = _units(out.aval) | _uniform(made, out)
    return made


def value_of(value: Value) -> float | None:
    """The number that a constant is, through casts and broadcasts."""
    while value.equation is not None and value.equation.name in ("convert_element_type", "broadcast_in_dim", "reshape"):
        value = value.equation.inputs[0]
    if value.kind != "constant" or not value.fixed or value.shape or not jnp.issubdtype(value.aval.dtype, jnp.number):
        return None
    return float(np.asarray(value.data, np.float64))


# What is known of axes.

_ENTRYWISE = "add sub mul div max min neg sqrt rsqrt exp log square integer_pow select_n convert_element_type copy"
_ENTRYWISE = frozenset((_ENTRYWISE + " and or not lt le gt ge eq ne stop_gradient sharding_constraint exit").split())


def _units(aval: Any) -> frozenset[int]:
    return frozenset(i for i, size in enumerate(getattr(aval, "shape", ())) if size == 1)  # tokens have none


def _uniform(made: Equation, out: Value) -> frozenset[int]:
    """The axes of `out` along which its entries are equal because those of the inputs are."""
    if made.name in _ENTRYWISE:
        wide = [one.uniform for one in made.inputs if one.shape]
        return frozenset(range(len(out.shape))).intersection(*wide)
    axes = (moved(made) or {}).items()
    return frozenset(i for i, axis in axes if axis is None or axis in made.inputs[0].uniform)


def moved(made: Equation) -> dict[int, int | None] | None:
    """The axis of the first input that each axis of the output is; None: it repeats the input, or has one entry.

    Axes of a reshape that are made of several, or of a part of one, are left out. None as a whole: the primitive does
    more than to move axes.
    """
    old, new, params = made.inputs[0].shape if made.inputs else (), made.outputs[0].shape, made.params
    ones = {i: None for i, size in enumerate(new) if size == 1}
    match made.name:
        case "broadcast_in_dim":
            kept = {i: axis for axis, i in enumerate(params["broadcast_dimensions"]) if old[axis] == new[i]}
            return dict.fromkeys(range(len(new))) | kept | ones
        case "transpose":
            return dict(enumerate(params["permutation"])) | ones
        case "squeeze":
            return dict(enumerate(axis for axis in range(len(old)) if axis not in params["dimensions"])) | ones
        case "reshape":
            axes = {key: axis for axis, key in enumerate(zip(old, strides(old), strict=True))}
            return {i: axes[key] for i, key in enumerate(zip(new, strides(new), strict=True)) if key in axes} | ones
    return None


def strides(shape: tuple[int, ...]) -> list[int]:
    """How many entries lie between two neighbours along each axis, row by row."""
    return [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
