"""Where a program removes a mean: the sites of its LayerNorms, in whatever way they are spelled.

Two forms are recognised, of a value b and a set S of its axes, through casts, broadcasts, reshapes and transposes:

    b - mean_S(b)                       the difference
    mean_S(b²) - mean_S(b)²             the variance by one pass, which is mean_S((b - mean_S(b))²)
"""

import math
from typing import NamedTuple

import jax.numpy as jnp

from prenorm_jax.folding.program import Equation, Program, Value, moved, value_of
from prenorm_jax.folding.rules import Label


class Mean(NamedTuple):
    """factor · mean over `axes` of `base`. `dims`: for each axis of the value the axis of base that it is, or None.

    `equation`: the sum. `through`: what on the way makes it another function or derivative: stop_gradient,
    digits (a cast to fewer), or a number that is not known.
    """

    base: Value
    axes: frozenset[int]
    dims: tuple[int | None, ...]
    factor: float
    equation: Equation
    through: str

    def is_of(self, base: Value) -> bool:
        """Whether it is of this value, each axis in its place (those that it is over have one entry or repeat)."""
        return self.base is base and all(
            dim == axis or (dim is None and (axis in self.axes or base.shape[axis] == 1))
            for axis, dim in enumerate(self.dims)
        )


class Site(NamedTuple):
    """An equation whose output is one of the forms, difference or variance. `refused`: why it is no site: what its mean
    is `through`, or weighted, or shared. (`report.py` has words.)"""

    equation: Equation
    mean: Mean
    form: str
    refused: str = ""

    @property
    def base(self) -> Value:
        return self.mean.base

    @property
    def label(self) -> Label:
        return Label(self.mean.axes)


def find_sites(program: Program) -> tuple[dict[Equation, Site], list[Site]]:
    """The sites by their equations; and what looks like one, with why it is not."""
    eqns = [eqn for eqn in program.equations if eqn.name in ("sub", "add", "add_any") and eqn.outputs[0].is_float]
    sites = [site for eqn in eqns if (site := _difference(eqn) or _variance(eqn)) is not None]
    return {site.equation: site for site in sites if not site.refused}, [site for site in sites if site.refused]


def _difference(eqn: Equation) -> Site | None:
    """x - mean(x), or x + -mean(x)."""
    for x, other in [eqn.inputs] if eqn.name == "sub" else [eqn.inputs, eqn.inputs[::-1]]:
        mean, base = mean_of(other), widened(x)
        if mean is None:
            continue
        refused = mean.through
        is_mean = mean.through != "number" and _close(mean.factor, 1.0 if eqn.name == "sub" else -1.0, eqn)
        weighted = mean.base is not base and mean.base.equation  # where(mask, x, 0), or x · mask
        if weighted and weighted.name in ("select_n", "mul") and base in map(widened, weighted.inputs):
            mean, refused = mean._replace(base=base), "weighted"
            count = math.prod(base.shape[axis] for axis in mean.axes)
            is_mean = mean.through == "number" or 1 <= abs(mean.factor) < count
        if is_mean and mean.is_of(base) and x.shape == eqn.outputs[0].shape:
            return Site(eqn, mean, "difference", refused)
    return None


def _variance(eqn: Equation) -> Site | None:
    """mean(b²) - mean(b)²."""
    of_squares, root = mean_of(eqn.inputs[0]), squared(eqn.inputs[1])
    mean, base = root and mean_of(root), of_squares and squared(of_squares.base)
    if eqn.name != "sub" or mean is None or base is None or of_squares.through or mean.through:
        return None
    same = widened(base) is mean.base and (of_squares.axes, of_squares.dims) == (mean.axes, mean.dims)
    ones = _close(of_squares.factor, 1.0, eqn) and _close(abs(mean.factor), 1.0, eqn)
    placed = [dim for dim in mean.dims if dim is not None]
    return Site(eqn, mean, "variance") if same and ones and placed == sorted(placed) else None


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
    name = "" if eqn is None else eqn.name
    product = name == "mul" and eqn.inputs[0] is eqn.inputs[1]
    return eqn.inputs[0] if product or name == "square" or (name == "integer_pow" and eqn.params["y"] == 2) else None


def mean_of(value: Value) -> Mean | None:
    """The mean that a value is a multiple of, if it is one."""
    dims: list[int | None] = list(range(len(value.shape)))
    factor, through, digits = 1.0, "", math.inf
    while (eqn := value.equation) is not None and eqn.inputs and value.is_float:
        x, digits = eqn.inputs[0], min(digits, jnp.finfo(value.aval.dtype).nmant)
        match eqn.name:
            case "reduce_sum" if axes := frozenset(eqn.params["axes"]):
                kept, base = [axis for axis in range(len(x.shape)) if axis not in axes], widened(x)
                if digits < jnp.finfo(base.aval.dtype).nmant:
                    through = through or "digits"
                places = tuple(None if dim is None else kept[dim] for dim in dims)
                return Mean(base, axes, places, factor * math.prod(x.shape[axis] for axis in axes), eqn, through)
            case "mul" | "div":
                number = value_of(eqn.inputs[1])
                if number is None and eqn.name == "mul":
                    number, x = value_of(x), eqn.inputs[1]
                elif number is None:
                    number, through = 1.0, through or "number"
                if not number:
                    return None
                factor *= number if eqn.name == "mul" else 1 / number
            case "neg":
                factor = -factor
            case "stop_gradient":
                through = "stop_gradient"
            case "copy" | "convert_element_type" | "pvary":
                pass
            case _:
                moves = moved(eqn)
                if moves is None or any(dim is not None and dim not in moves for dim in dims):
                    return None
                dims = [None if dim is None else moves[dim] for dim in dims]
        value = x
    return None
