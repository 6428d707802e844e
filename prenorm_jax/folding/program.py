"""A traced function as a graph of values: calls are inlined, `scan` and `checkpoint` are regions with a body.

What enters and leaves a scan is an equation like others: `scan_carry` (initial value, value at the body's end -> value
at its start, value after the loop), `scan_xs` (array -> its slice), `scan_ys` (slice -> array). A checkpoint's body
shares its values with what is around it.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend.core as core
import jax.numpy as jnp

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.folding import internals

Loops = tuple[core.JaxprEqn, ...]


@dataclasses.dataclass(eq=False, repr=False)
class Value:
    """One array of the program.

    Attributes:
      loops: JAX's equations of the scans around it, the outermost first.
      kind: parameter, constant, input or computed.
      data: a constant's array.
      index: a parameter's or input's place among the function's flat arguments.
      fixed: whether it depends on constants alone.
      uniform: the axes along which its entries are known to be equal.
    """

    aval: Any
    loops: Loops = ()
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
        return math.prod(loop.params["length"] for loop in self.loops)

    @property
    def is_float(self) -> bool:
        return jnp.issubdtype(self.aval.dtype, jnp.floating)


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
    """A scan or a checkpoint with its body. `outputs`: what of the body is seen around a checkpoint."""

    name: str
    eqn: core.JaxprEqn
    body: list["Equation | Region"]
    outputs: list[Value]
    carries: list[Equation] = dataclasses.field(default_factory=list)
    xs: list[Equation] = dataclasses.field(default_factory=list)
    ys: list[Equation] = dataclasses.field(default_factory=list)


Block = list[Equation | Region]


@dataclasses.dataclass
class Program:
    """A whole function. `constants` in the order of their creation; `inputs` and `outputs` are flat."""

    block: Block
    inputs: list[Value]
    outputs: list[Value]

    def equations(self) -> list[Equation]:
        """All of them in the order of computation, those of the regions too."""
        return list(_flat(self.block))

    def checkpoints(self) -> list[Region]:
        """Those of all depths."""
        return [one for one in _regions(self.block) if one.name == "checkpoint"]


def _regions(block: Block) -> Iterator[Region]:
    for item in block:
        if isinstance(item, Region):
            yield item
            yield from _regions(item.body)


def _flat(block: Block) -> Iterator[Equation]:
    for item in block:
        if isinstance(item, Equation):
            yield item
        else:
            yield from item.carries
            yield from item.xs
            yield from _flat(item.body)
            yield from item.ys


def trace(function: Callable[..., Any], args: Any, parameters: int) -> tuple[Program, Any]:
    """The function of `args` as a program, and its outputs' tree. The first `parameters` flat inputs are parameters."""
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
    return read(internals.without_dead_code(internals.body_of(closed)), parameters), jax.tree.structure(shape)


def read(body: internals.Body, parameters: int = 0) -> Program:
    """A jaxpr as a program."""
    inputs = [
        Value(var.aval, kind="parameter" if i < parameters else "input", index=i, uniform=_units(var.aval))
        for i, var in enumerate(body.jaxpr.invars)
    ]
    block, outputs = _read(body, inputs, (), ())
    return Program(block, inputs, outputs)


def _constant(aval: Any, data: Any) -> Value:
    if internals.is_tracer(data):
        return Value(aval, kind="captured", data=data, uniform=_units(aval))
    return Value(aval, kind="constant", data=data, fixed=True, uniform=_units(aval))


def _read(body: internals.Body, args: list[Value], loops: Loops, calls: Loops) -> tuple[Block, list[Value]]:
    jaxpr, block = body.jaxpr, []
    env = dict(zip(jaxpr.invars, args, strict=True))
    env |= {var: _constant(var.aval, data) for var, data in zip(jaxpr.constvars, body.consts, strict=True)}

    def value(atom: Any) -> Value:
        return _constant(atom.aval, atom.val) if isinstance(atom, core.Literal) else env[atom]

    for eqn in jaxpr.eqns:
        # Of psum and its like it is no more than a name.
        if any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects):
            raise PrenormError(
                f"the function has an effect, {eqn.primitive.name} at {internals.where(eqn) or 'an unknown line'}, "
                "that the folded one would not have: fold it without (debug prints, callbacks, checks, references)"
            )
        name, inputs = eqn.primitive.name, [value(atom) for atom in eqn.invars]
        inner = (*calls, eqn)
        if name in internals.INLINED:
            items, outputs = _read(internals.bodies(eqn)[0], inputs, loops, inner)
        elif name in internals.REMAT:
            items, outputs = _read(internals.bodies(eqn)[0], inputs, loops, inner)
            items = [Region("checkpoint", eqn, items, outputs)]
        elif name == "scan":
            region = _read_scan(eqn, inputs, loops, inner)
            items, outputs = [region], region.outputs
        elif name == "optimization_barrier":  # one for each array: each may be moved on its own
            items = [
                _equation(eqn, name, [one], [var.aval], loops, calls)
                for one, var in zip(inputs, eqn.outvars, strict=True)
            ]
            outputs = [item.outputs[0] for item in items]
        else:
            items = [_equation(eqn, name, inputs, [var.aval for var in eqn.outvars], loops, calls)]
            outputs = items[0].outputs
        block += items
        env.update(zip(eqn.outvars, outputs, strict=True))
    return block, [value(atom) for atom in jaxpr.outvars]


def _equation(
    eqn: core.JaxprEqn, name: str, inputs: list[Value], avals: list[Any], loops: Loops, calls: Loops
) -> Equation:
    made = Equation(name, eqn, inputs, [], calls)
    fixed = all(one.fixed for one in inputs) and not eqn.effects and not name.startswith("scan_")
    made.outputs = [Value(aval, loops, equation=made, fixed=fixed) for aval in avals]
    for out in made.outputs:
        out.uniform = _units(out.aval) | _uniform(made, out)
    return made


def _read_scan(eqn: core.JaxprEqn, inputs: list[Value], loops: Loops, calls: Loops) -> Region:
    body = internals.bodies(eqn)[0]
    consts, carries = internals.scan_counts(eqn)
    inside, first = (*loops, eqn), consts + carries
    avals = [var.aval for var in body.jaxpr.invars]
    # The value at the body's end is not known yet: it is put in below.
    enter = [
        _equation(eqn, "scan_carry", [one], [avals[consts + i]] * 2, inside, calls)
        for i, one in enumerate(inputs[consts:first])
    ]
    xs = [
        _equation(eqn, "scan_xs", [one], [aval], inside, calls)
        for one, aval in zip(inputs[first:], avals[first:], strict=True)
    ]
    args = inputs[:consts] + [one.outputs[0] for one in enter + xs]
    block, ends = _read(body, args, inside, calls)
    for one, end in zip(enter, ends, strict=False):
        one.inputs.append(end)
        one.outputs[1].loops = loops
    ys = [
        _equation(eqn, "scan_ys", [end], [var.aval], loops, calls)
        for end, var in zip(ends[carries:], eqn.outvars[carries:], strict=True)
    ]
    outputs = [one.outputs[1] for one in enter] + [one.outputs[0] for one in ys]
    return Region("scan", eqn, block, outputs, enter, xs, ys)


def _units(aval: Any) -> frozenset[int]:
    return frozenset(i for i, size in enumerate(aval.shape) if size == 1)


_ENTRYWISE = {"abs", "add", "add_any", "and", "ceil", "convert_element_type", "copy", "cos", "div", "eq", "erf", "erfc"}
_ENTRYWISE |= {
    "exp",
    "exp2",
    "expm1",
    "floor",
    "ge",
    "gt",
    "integer_pow",
    "is_finite",
    "le",
    "log",
    "log1p",
    "logistic",
}
_ENTRYWISE |= {"lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "rem", "round", "rsqrt", "select_n", "sign"}
_ENTRYWISE |= {"sharding_constraint", "sin", "sqrt", "square", "stop_gradient", "sub", "tanh", "xor"}


def _uniform(made: Equation, out: Value) -> frozenset[int]:
    """The axes of `out` along which its entries are equal because those of the inputs are."""
    if made.name in _ENTRYWISE:
        wide = [one.uniform for one in made.inputs if one.shape]
        return frozenset.intersection(*wide) if wide else frozenset(range(len(out.shape)))
    back = back_map(made)
    if back is None:
        return frozenset()
    x = made.inputs[0]
    return frozenset(i for i, axis in enumerate(back) if axis is None or axis in x.uniform)


def back_map(made: Equation) -> list[int | None] | None:
    """For each axis of the output the axis of the first input that it is; None: it repeats or has one entry.

    None as a whole: the primitive does more than to move axes.
    """
    x, out = made.inputs[0] if made.inputs else None, made.outputs[0]
    match made.name:
        case "broadcast_in_dim":
            places = {place: axis for axis, place in enumerate(made.params["broadcast_dimensions"])}
            axes = [places.get(i) for i in range(len(out.shape))]
            return [None if a is None or x.shape[a] != out.shape[i] else a for i, a in enumerate(axes)]
        case "transpose":
            return list(made.params["permutation"])
        case "squeeze":
            return [i for i in range(len(x.shape)) if i not in made.params["dimensions"]]
        case "reshape":
            back: list[int | None] = [None] * len(out.shape)
            for ours, theirs in groups(x.shape, out.shape):
                if len(ours) == len(theirs) == 1:
                    back[theirs[0]] = ours[0]
                elif len(theirs) > 1 or len(ours) > 1:
                    return None
            return back
    return None


def groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """The least sets of axes, without those of one entry, that a reshape turns into each other."""
    ours, theirs = ([i for i, size in enumerate(shape) if size != 1] for shape in (old, new))
    found = []
    while ours or theirs:
        a, b = ours[:1], theirs[:1]
        ours, theirs = ours[1:], theirs[1:]
        while (left := math.prod(old[i] for i in a)) != (right := math.prod(new[i] for i in b)):
            if left < right and ours:
                a, ours = a + ours[:1], ours[1:]
            elif theirs:
                b, theirs = b + theirs[:1], theirs[1:]
            else:  # an array of no entries
                a, ours, b, theirs = a + ours, [], b + theirs, []
                break
        found.append((a, b))
    return found
