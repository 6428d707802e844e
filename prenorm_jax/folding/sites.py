"""Where a program removes a mean: the sites of its LayerNorms, in whatever way they are spelled.

Two forms are recognised, of a value b and a set S of its axes, through casts, broadcasts, reshapes and transposes:

    b - mean_S(b)                       the difference
    mean_S(b²) - mean_S(b)²             the variance by one pass, which is mean_S((b - mean_S(b))²)
"""

import dataclasses
import math

import jax.numpy as jnp

from prenorm_jax.folding import internals
from prenorm_jax.folding.program import Equation, Program, Value, back_map
from prenorm_jax.folding.rules import value_of


@dataclasses.dataclass(frozen=True)
class Mean:
    """factor · mean over `axes` of `base`. `dims`: for each axis of the value the axis of base that it is, or None.

    `through`: a primitive on the way that makes it another function or derivative: such as `stop_gradient`."""

    base: Value
    axes: frozenset[int]
    dims: tuple[int | None, ...]
    factor: float
    through: str = ""


@dataclasses.dataclass(frozen=True)
class Site:
    """An equation whose output is one of the forms. `dims` as in Mean, of a variance. `refused`: why it is no site."""

    equation: Equation
    base: Value
    axes: frozenset[int]
    form: str  # difference | variance
    dims: tuple[int | None, ...] = ()
    refused: str = ""


def find_sites(program: Program) -> tuple[dict[Equation, Site], list[Site]]:
    """The sites by their equations; and what looks like one, with why it is not."""
    sites, refused = {}, []
    for eqn in program.equations():
        if eqn.name not in ("sub", "add", "add_any") or not eqn.outputs[0].is_float:
            continue
        site = _difference(eqn) or _variance(eqn)
        if site is not None and site.refused:
            refused.append(site)
        elif site is not None and not _is_seen(site.base, eqn, program):
            refused.append(
                dataclasses.replace(site, refused="its base lies within a checkpoint, and the norm around it")
            )
        elif site is not None:
            sites[eqn] = site
    return sites, refused


def _is_seen(base: Value, reader: Equation, program: Program) -> bool:
    """Whether the base is outside of every checkpoint that the reader is outside of, or given by it."""
    if base.equation is None:
        return True
    hidden = [call for call in base.equation.calls if call.primitive.name in internals.REMAT]
    hidden = [call for call in hidden if call not in reader.calls]
    given = {id(region.eqn) for region in program.checkpoints() if base in region.outputs}
    return all(id(call) in given for call in hidden)


def _difference(eqn: Equation) -> Site | None:
    """x - mean(x), or x + -mean(x)."""
    pairs = [eqn.inputs] if eqn.name == "sub" else [eqn.inputs, eqn.inputs[::-1]]
    for x, other in pairs:
        mean, base = mean_of(other), widened(x)
        if mean is None:
            continue
        if not _aligned(mean, base):
            if _aligned(dataclasses.replace(mean, base=_unmasked(mean.base)), base):
                return Site(eqn, base, mean.axes, "difference", refused="its mean is of the entries of a mask alone")
            continue
        if mean.through:
            return Site(eqn, base, mean.axes, "difference", refused=f"its mean is behind {mean.through}")
        if _close(mean.factor, 1.0 if eqn.name == "sub" else -1.0, eqn):
            return Site(eqn, base, mean.axes, "difference")
    return None


def _aligned(mean: Mean, base: Value) -> bool:
    """Whether the mean is of this value, each axis in its place (those that it is over have one entry or repeat)."""
    return mean.base is base and all(
        dim == axis or (dim is None and (axis in mean.axes or base.shape[axis] == 1))
        for axis, dim in enumerate(mean.dims)
    )


def _variance(eqn: Equation) -> Site | None:
    """mean(b²) - mean(b)²."""
    if eqn.name != "sub":
        return None
    of_squares, mean = mean_of(eqn.inputs[0]), squared(eqn.inputs[1])
    mean = None if mean is None else mean_of(mean)
    if of_squares is None or mean is None or (base := squared(of_squares.base)) is None:
        return None
    agree = widened(base) is mean.base and (of_squares.axes, of_squares.dims) == (mean.axes, mean.dims)
    ones = _close(of_squares.factor, 1.0, eqn) and _close(abs(mean.factor), 1.0, eqn)
    placed = [dim for dim in mean.dims if dim is not None]
    if not (agree and ones and placed == sorted(placed)) or of_squares.through or mean.through:
        return None
    return Site(eqn, mean.base, mean.axes, "variance", mean.dims)


def _close(a: float, b: float, eqn: Equation) -> bool:
    """To the rounding of 1/n in the dtype of what the equation gives."""
    return math.isclose(a, b, rel_tol=min(4 * float(jnp.finfo(eqn.outputs[0].aval.dtype).eps), 1e-6))


def widened(value: Value) -> Value:
    """The value that this one is a cast of to a dtype that holds all of its numbers; else itself."""
    while (eqn := value.equation) is not None and eqn.name == "convert_element_type" and eqn.inputs[0].is_float:
        narrow, wide = jnp.finfo(eqn.inputs[0].aval.dtype), jnp.finfo(value.aval.dtype)
        if wide.nmant < narrow.nmant or wide.maxexp < narrow.maxexp:
            break
        value = eqn.inputs[0]
    return value


def squared(value: Value) -> Value | None:
    """x of a value x²."""
    eqn = value.equation
    if eqn is None:
        return None
    if eqn.name == "square" or (eqn.name == "integer_pow" and eqn.params["y"] == 2):
        return eqn.inputs[0]
    return eqn.inputs[0] if eqn.name == "mul" and eqn.inputs[0] is eqn.inputs[1] else None


def mean_of(value: Value) -> Mean | None:
    """The mean that a value is a multiple of, if it is one."""
    dims: list[int | None] = list(range(len(value.shape)))
    factor, through, digits = 1.0, "", math.inf
    while (eqn := value.equation) is not None:
        x = eqn.inputs[0] if eqn.inputs else value
        if eqn.name == "reduce_sum":
            kept = [axis for axis in range(len(x.shape)) if axis not in eqn.params["axes"]]
            factor *= math.prod(x.shape[axis] for axis in eqn.params["axes"])
            places = tuple(None if dim is None else kept[dim] for dim in dims)
            base = widened(x)
            if digits < jnp.finfo(base.aval.dtype).nmant:
                through = through or "a cast to a dtype of fewer digits"
            return Mean(base, frozenset(eqn.params["axes"]), places, factor, through)
        if eqn.name in ("mul", "div"):
            number = value_of(eqn.inputs[1])
            if number is None and eqn.name == "mul" and (number := value_of(x)) is not None:
                x = eqn.inputs[1]
            if number is None and eqn.name == "div":
                number, through = 1.0, through or "a division by what is not known to be the count of its entries"
            if not number:
                return None
            factor *= number if eqn.name == "mul" else 1 / number
        elif eqn.name == "neg":
            factor = -factor
        elif eqn.name == "stop_gradient":
            through = "stop_gradient"
        elif (back := back_map(eqn)) is not None:
            dims = [None if dim is None else back[dim] for dim in dims]
        elif not (eqn.name == "copy" or (eqn.name == "convert_element_type" and x.is_float)):
            return None
        if value.is_float:
            digits = min(digits, jnp.finfo(value.aval.dtype).nmant)
        value = x
    return None


def _unmasked(value: Value) -> Value | None:
    """x of where(mask, x, 0) or x · mask."""
    eqn = widened(value).equation
    if eqn is None or eqn.name not in ("select_n", "mul") or squared(widened(value)) is not None:
        return None
    cases = [one for one in eqn.inputs if value_of(one) is None and one.is_float and one.kind == "computed"]
    masks = [
        one for one in cases if one.equation.name == "convert_element_type" and not one.equation.inputs[0].is_float
    ]
    cases = [widened(one) for one in cases if one not in masks]
    return cases[0] if len(cases) == 1 and (masks or eqn.name == "select_n") else None
