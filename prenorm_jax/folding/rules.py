"""How the removal of a mean moves from what a primitive gives to what it takes: one identity for each primitive.

C removes the mean over the axes S of a value: Cx = x - mean_S(x), jointly over all of S. A rule answers: which operands
must lose their mean, over which of their axes, for the primitive to give Cy in the place of y? Each is an identity
that holds for all numbers, so whatever `plan.py` chooses, the function stays what it was.

A primitive without a rule is never moved across: a new one costs folds, and no correctness.
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.folding import internals
from prenorm_jax.folding.program import Equation, Value, groups, read

RAW = "raw"  # the operand as it is
ZERO = "zero"  # zeros in the operand's place: it is uniform along S, and so its Cx is 0
UNREAD = "unread"  # it makes no difference
Axes = dict[int, int]  # axes of the operand that it is to lose its mean over -> the axis of the output that each is
Needs = list[Any] | None  # of each operand RAW, ZERO or Axes; None: no identity holds
Rule = Callable[[Equation, frozenset[int], int], Needs]  # of (equation, S, which output)

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of these primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def needs(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """What the operands must be for the output `out` to lose its mean over `axes`."""
    found = RULES.get(eqn.name)
    return found(eqn, axes, out) if found is not None else None


def uniform(value: Value, axes: Iterable[int]) -> bool:
    """Whether all entries along these axes are known to be equal; a scalar's are."""
    return not value.shape or value.uniform.issuperset(axes)


def same(axes: Iterable[int]) -> Axes:
    return {axis: axis for axis in axes}


def _or_zero(value: Value, axes: frozenset[int]) -> Any:
    return ZERO if uniform(value, axes) else same(axes)


@rule("neg", "copy", "name", "sharding_constraint", "optimization_barrier", "stop_gradient", "rev")
def unary(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C(-x) = -Cx; and a mean does not ask for an order: C rev(x) = rev(Cx)."""
    return [same(axes)]


@rule("tile")
def tile(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C tile(x) = tile(Cx): what is repeated has the mean of what it repeats."""
    return [same(axes)]


@rule("convert_element_type")
def cast(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C cast(x) = cast(Cx), up to rounding, between floating dtypes."""
    return [same(axes)] if eqn.inputs[0].is_float and eqn.outputs[0].is_float else None


@rule("add", "sub", "add_any")
def add(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C(x ± y) = Cx ± Cy, and Cu = 0 of a u that is uniform along S."""
    return [_or_zero(one, axes) for one in eqn.inputs]


@rule("mul")
def multiply(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C(u x) = u Cx of a u that is uniform along S."""
    x, y = eqn.inputs
    if uniform(y, axes):
        return [same(axes), RAW]
    return [RAW, same(axes)] if uniform(x, axes) else None


@rule("div")
def divide(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C(x / u) = Cx / u of a u that is uniform along S."""
    return [same(axes), RAW] if uniform(eqn.inputs[1], axes) else None


@rule("select_n")
def select(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C where(p, x, y) = where(p, Cx, Cy) of a p that is uniform along S. (A mask of dropout is not.)"""
    if not uniform(eqn.inputs[0], axes):
        return None
    return [RAW, *(_or_zero(case, axes) for case in eqn.inputs[1:])]


@rule("transpose")
def transpose(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """Axes change places, and S with them."""
    return [{eqn.params["permutation"][axis]: axis for axis in axes}]


@rule("squeeze")
def squeeze(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """Axes of one entry go; those of S are the others."""
    kept = [i for i in range(len(eqn.inputs[0].shape)) if i not in eqn.params["dimensions"]]
    return [{kept[axis]: axis for axis in axes}]


@rule("reshape")
def reshape(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """S is the same entries before and after where it is made of whole groups of axes."""
    found: Axes = {}
    for ours, theirs in groups(eqn.inputs[0].shape, eqn.outputs[0].shape):
        if axes.issuperset(theirs):
            found |= dict.fromkeys(ours, theirs[0])
        elif not axes.isdisjoint(theirs):
            return None
    return [found or ZERO]


@rule("broadcast_in_dim")
def broadcast(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C_S bc(x) = bc(C_S' x), S' the axes of S that x has; where it has none, bc(x) is uniform along S."""
    x, y = eqn.inputs[0], eqn.outputs[0]
    places = {place: axis for axis, place in enumerate(eqn.params["broadcast_dimensions"])}
    found = {places[i]: i for i in axes if i in places and x.shape[places[i]] == y.shape[i]}
    return [found or ZERO, *[RAW] * (len(eqn.inputs) - 1)]


@rule("slice")
def slices(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C x[i] = (Cx)[i] where the slice is all of x along S."""
    return _if_whole(eqn, axes, [same(axes)])


@rule("dynamic_slice")
def dynamic_slice(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """As `slice`."""
    return _if_whole(eqn, axes, [same(axes), *[RAW] * (len(eqn.inputs) - 1)])


@rule("dynamic_update_slice")
def update_slice(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C of x with y written into it is Cx with Cy written into it, where y is all of x along S."""
    whole = all(eqn.inputs[1].shape[axis] == eqn.outputs[0].shape[axis] for axis in axes)
    return [same(axes), same(axes), *[RAW] * (len(eqn.inputs) - 2)] if whole else None


def _if_whole(eqn: Equation, axes: frozenset[int], found: Needs) -> Needs:
    """`found`, where the output has as many entries along S as the first operand."""
    return found if all(eqn.inputs[0].shape[axis] == eqn.outputs[0].shape[axis] for axis in axes) else None


@rule("concatenate")
def concatenate(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C [x, y] = [Cx, Cy] along an axis that is not of S."""
    return None if eqn.params["dimension"] in axes else [_or_zero(one, axes) for one in eqn.inputs]


@rule("split")
def split(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """The parts of Cx are C of the parts, along an axis that is not of S."""
    return None if eqn.params["axis"] in axes else [same(axes)]


@rule("stack")
def stack(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C stack(x, y) = stack(Cx, Cy), where S does not have the new axis."""
    new = eqn.params["axis"]
    return None if new in axes else [{axis - (axis > new): axis for axis in axes}] * len(eqn.inputs)


@rule("unstack")
def unstack(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """The parts of Cx are C of the parts: the axis that goes is not of S."""
    gone = eqn.params["axis"]
    return [{axis + (axis >= gone): axis for axis in axes}]


@rule("pad")
def pad(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C pad(x, u) = pad(Cx, 0) where nothing is padded along S: what is put there is uniform."""
    padded = any(any(eqn.params["padding_config"][axis]) for axis in axes)
    return None if padded else [same(axes), ZERO]


@rule("cumsum")
def cumulate(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C Σx = Σ Cx along an axis that is not of S."""
    return None if eqn.params["axis"] in axes else [same(axes)]


@rule("reduce_sum")
def reduce_sum(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C Σx = Σ Cx over axes that are gone from the output, and so not of S."""
    kept = [i for i in range(len(eqn.inputs[0].shape)) if i not in eqn.params["axes"]]
    return [{kept[axis]: axis for axis in axes}]


@rule("dot_general")
def dot(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C(x W) = x (C W), where S are axes of W that are neither contracted nor of the batch."""
    found, first = [RAW, RAW], len(eqn.params["dimension_numbers"][1][0])
    for i, one in enumerate(eqn.inputs):
        taken = {*eqn.params["dimension_numbers"][0][i], *eqn.params["dimension_numbers"][1][i]}
        free = {first + place: axis for place, axis in enumerate(j for j in range(len(one.shape)) if j not in taken)}
        if axes <= free.keys() and one.is_float:
            found[i] = {free[axis]: axis for axis in axes}
            return found
        first += len(free)
    return None


@rule("conv_general_dilated")
def convolve(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C(x * W) = x * (C W), where S is the output's features and there is one group of them."""
    numbers, grouped = eqn.params["dimension_numbers"], ("feature_group_count", "batch_group_count")
    if axes != {numbers.out_spec[1]} or any(eqn.params[count] != 1 for count in grouped):
        return None
    if not eqn.inputs[1].is_float:
        return None
    return [RAW, {numbers.rhs_spec[0]: numbers.out_spec[1]}]


@rule("gather")
def gather(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C table[i] = (C table)[i], where what is taken is all of the table along S."""
    numbers, x = eqn.params["dimension_numbers"], eqn.inputs[0]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    places = dict(zip(numbers.offset_dims, (i for i in range(len(x.shape)) if i not in gone), strict=True))
    whole = axes <= places.keys() and all(eqn.params["slice_sizes"][places[i]] == x.shape[places[i]] for i in axes)
    fill = eqn.params.get("fill_value")
    if not whole or not (fill is None or fill == 0 or np.isnan(fill)):  # NaN stays NaN; another number would not be 0
        return None
    return [{places[axis]: axis for axis in axes}, RAW]


@rule("scan_carry")
def carry(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """What a loop carries has no mean where what it starts with and what each turn gives has none."""
    return [same(axes), same(axes)]


@rule("scan_xs")
def scan_slices(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """x[i], for the turn i: S is one axis further in x."""
    return [{axis + 1: axis for axis in axes}]


@rule("scan_ys")
def scan_stack(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """The turns' outputs, stacked: S must not have the new axis, and is one axis earlier in each."""
    return None if 0 in axes else [{axis - 1: axis for axis in axes}]


@rule("cond")
def cond(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C of each branch's output, where the same of the operands does in all branches."""
    branches = [_through(body, axes, out) for body in internals.bodies(eqn.eqn)]
    return None if None in branches else _merged([RAW], branches)


@rule("custom_jvp_call")
def custom_jvp(eqn: Equation, axes: frozenset[int], out: int) -> Needs:
    """C f(x) = f(Cx) by the rules inside f; and inside its derivative, which is the user's own, likewise."""
    found = _through(internals.bodies(eqn.eqn)[0], axes, out)
    if found is None:
        return None
    floats = [i for i, one in enumerate(eqn.inputs) if one.is_float]

    def tangent(primals: list[jax.Array], tangents: list[jax.Array]) -> jax.Array:
        whole = [np.zeros(one.shape, jax.dtypes.float0) for one in primals]
        for i, one in zip(floats, tangents, strict=True):
            whole[i] = one
        return jax.jvp(lambda *x: internals.bind(eqn.eqn, list(x))[out], tuple(primals), tuple(whole))[1]

    abstract = [jax.ShapeDtypeStruct(one.shape, one.aval.dtype) for one in eqn.inputs]
    jaxpr = jax.make_jaxpr(tangent)(abstract, [abstract[i] for i in floats])
    derivative = _through(internals.body_of(jaxpr), axes, 0)
    if derivative is None:
        return None
    of_tangents: list[Any] = [None] * len(abstract)
    for i, one in zip(floats, derivative[len(abstract) :], strict=True):
        of_tangents[i] = one
    return _merged([], [found, derivative[: len(abstract)], of_tangents])


def _through(body: internals.Body, axes: frozenset[int], out: int) -> Needs:
    """What the inputs of a program must be for its output to lose its mean; None as an entry: anything."""
    program = read(body)
    wanted: dict[Value, Any] = {program.outputs[out]: same(axes)}
    for eqn in reversed(program.equations()):
        for i, value in enumerate(eqn.outputs):
            if (want := wanted.get(value)) is None:
                continue
            if want == ZERO or not all(isinstance(item, Equation) for item in program.block):
                return None
            found = [RAW] * len(eqn.inputs) if want == RAW else needs(eqn, frozenset(want), i)
            for one, need in zip(eqn.inputs, found or [None] * len(eqn.inputs), strict=True):
                if isinstance(need, dict):
                    need = {axis: want[place] for axis, place in need.items()}
                if need is None or wanted.setdefault(one, need) != need:
                    return None
    constants = [value for value, want in wanted.items() if value.kind == "constant" and want != RAW]
    if any(np.any(np.asarray(value.data)) for value in constants):
        return None
    return [wanted.get(value) for value in program.inputs]


def _merged(first: list[Any], found: list[list[Any]]) -> Needs:
    """One need for each operand, where all that say something say the same."""
    merged = list(first)
    for column in zip(*found, strict=True):
        said = [one for one in column if one is not None]
        if any(one != said[0] for one in said):
            return None
        merged.append(said[0] if said else RAW)
    return merged


def value_of(value: Value) -> float | None:
    """The number that a constant is, through casts and broadcasts."""
    while value.equation is not None and value.equation.name in ("convert_element_type", "broadcast_in_dim", "reshape"):
        value = value.equation.inputs[0]
    if value.kind != "constant" or value.shape or not jnp.issubdtype(value.aval.dtype, jnp.number):
        return None
    return float(np.asarray(value.data, np.float64))
