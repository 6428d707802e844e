"""How the removal of a mean moves from what a primitive gives to what it takes: one identity for each primitive.

C removes a mean: Cx = x - mean_S(x), jointly over all that S names. A rule answers: which operands must lose their
mean, over what of them, for the primitive to give Cy in the place of y? Each is an identity that holds for all numbers,
so whatever `plan.py` chooses, the function stays what it was. They hold as well of a mean over a part of an axis, such
as each head's, since all that they ask of C is that it is linear, acts along S alone and makes 0 of what is uniform.

A LayerScale λ between a linear map and the stream is part of a label: C(λ ⊙ (x W)) = x C(W diag λ). It moves across a
primitive along the axes that the primitive passes on entry by entry, as its rule says, and ends at parameters or
nowhere: so no λ is needed at run time.

A primitive without a rule is never moved across: a new one costs folds, and no correctness.
"""

import itertools
from collections.abc import Callable, Iterable, Set
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from prenorm_jax.folding.program import Equation, Value, moved, strides

Piece = tuple[int, int, int]  # (start, stop, group): of these entries of an axis each group that follow one another


class Label(NamedTuple):
    """x without the mean over some of its axes; given a parameter λ in `scale`, of λ ⊙ x without it.

    `pieces`: the mean is over each group of entries of one axis, such as over each head; (): over whole axes.
    `dims`: the axes of x that those of λ are that have more than one entry.
    """

    axes: frozenset[int]
    pieces: tuple[Piece, ...] = ()
    scale: Value | None = None
    dims: tuple[int, ...] = ()


def joined(label: Label, other: Label) -> Label | None:
    """One label for what is wanted by both, where they are over different entries of one axis, or one is in the other.

    (Queries and keys, made by one product with values, each lose the means of their heads.)"""
    pieces = tuple(sorted({*label.pieces, *other.pieces}))
    in_pieces = label.pieces and other.pieces and label.axes == other.axes and label.scale is other.scale is None
    apart = all(left[1] <= right[0] for left, right in itertools.pairwise(pieces))
    return Label(label.axes, pieces) if in_pieces and apart else None


RAW = "raw"  # the operand as it is
ZERO = "zero"  # zeros in the operand's place: it is uniform along S, and so its Cx is 0
ONE = "one"  # ones in the operand's place: the other operand's label has it


class Window(NamedTuple):
    """An axis of the operand, whose index is the output's and the offset; where both have the entry."""

    axis: int
    offset: int


Moves = dict[int, Any]  # axis of the output -> axis of the operand that it is, Window, or None where it is repeated
Rule = Callable[[Equation, Set[int], int], list[Any] | None]  # of (equation, S, which output)
# A rule gives, of each operand, RAW, ZERO, or Moves: it is to lose its mean over what S is of it. S must be within the
# Moves, which have all axes along which the primitive passes the operand on entry by entry. None: no identity holds.

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule of these primitives."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def _same(eqn: Equation, without: Iterable[int] = ()) -> Moves:
    """All axes but these stay in place."""
    return {axis: axis for axis in sorted({*range(len(eqn.outputs[0].shape))}.difference(without))}


def _uniform(value: Value, axes: Iterable[int]) -> bool:
    """Whether all entries along these axes are known to be equal; a scalar's are."""
    return not value.shape or value.uniform.issuperset(axes)


@rule("add", "sub", "add_any", "neg", "copy", "name", "sharding_constraint", "pvary", "exit")
@rule("convert_element_type", "stop_gradient", "scan_carry")
def entrywise(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C(x ± y) = Cx ± Cy; and casts, up to rounding. What a loop carries has no mean where what it starts with and what
    each turn gives has none."""
    return [_same(eqn)] * len(eqn.inputs)


@rule("mul", "div")
def multiply(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C(u x) = u Cx, C(x / u) = Cx / u of a u that is uniform along S."""
    x, y = eqn.inputs
    if _uniform(y, axes):
        return [_same(eqn), RAW]
    return [RAW, _same(eqn)] if eqn.name == "mul" and _uniform(x, axes) else None


@rule("select_n")
def select(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C where(p, x, y) = where(p, Cx, Cy) of a p that is uniform along S. (A mask of dropout is not.)"""
    return [RAW] + [_same(eqn)] * (len(eqn.inputs) - 1) if _uniform(eqn.inputs[0], axes) else None


@rule("transpose", "reshape", "broadcast_in_dim", "squeeze")
def move(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """Axes change places, and S with them. What repeats along all of S is uniform. (`_regrouped`: reshapes.)"""
    return [moved(eqn)] + [RAW] * (len(eqn.inputs) - 1)


@rule("reduce_sum", "unstack", "scan_xs")
def lose_axes(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C Σx = Σ Cx, C x[i] = (Cx)[i]: S is among the axes that stay."""
    gone = {"scan_xs": (0,), "unstack": (eqn.params.get("axis"),)}.get(eqn.name, eqn.params.get("axes"))
    return [dict(enumerate(axis for axis in range(len(eqn.inputs[0].shape)) if axis not in gone))]


@rule("stack", "scan_ys")
def gain_axis(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C stack(x, y) = stack(Cx, Cy), where S does not have the new axis."""
    new = 0 if eqn.name == "scan_ys" else eqn.params["axis"]
    others = (axis for axis in range(len(eqn.outputs[0].shape)) if axis != new)
    return [{axis: i for i, axis in enumerate(others)}] * len(eqn.inputs)


@rule("concatenate")
def concatenate(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C [x, y] = [Cx, Cy] along an axis that is not of S; along S, of what lies in one of them."""
    along, offset, found = eqn.params["dimension"], 0, []
    for one in eqn.inputs:
        found.append(_same(eqn) | {along: Window(along, -offset)})
        offset += one.shape[along]
    return found


@rule("slice", "split")
def cut_out(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C x[i] = (Cx)[i] where the slice is all of x along S, or has all of S."""
    if eqn.name == "split":
        starts = {eqn.params["axis"]: int(sum(eqn.params["sizes"][:out]))}
    else:
        steps = eqn.params["strides"] or [1] * len(eqn.params["start_indices"])
        starts = {axis: start for axis, start in enumerate(eqn.params["start_indices"]) if steps[axis] == 1}
    windows = {axis: Window(axis, start) for axis, start in starts.items()}
    return [windows | _whole(eqn.inputs[0], eqn.outputs[out])]


@rule("dynamic_slice", "dynamic_update_slice")
def cut_out_or_put_in(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C x[i] = (Cx)[i], and C of x with y written into it is Cx with Cy written into it, where the slice, or y, is all
    of x along S."""
    part, arrays = (eqn.outputs[0], 1) if eqn.name == "dynamic_slice" else (eqn.inputs[1], 2)
    return [_whole(eqn.inputs[0], part)] * arrays + [RAW] * (len(eqn.inputs) - arrays)


@rule("cumsum", "rev", "tile")
def along_others(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C Σx = Σ Cx, and so on, along axes that are not of S."""
    along = {"cumsum": [eqn.params.get("axis")], "rev": eqn.params.get("dimensions")}
    repeats = [axis for axis, times in enumerate(eqn.params.get("reps", ())) if times != 1]
    return [_same(eqn, without=along.get(eqn.name, repeats))]


@rule("pad")
def pad(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C pad(x, u) = pad(Cx, 0) where nothing is padded along S: what is put there is uniform."""
    padded = [axis for axis, widths in enumerate(eqn.params["padding_config"]) if any(widths)]
    return [_same(eqn, without=padded), ZERO]


def _whole(x: Value, y: Value) -> Moves:
    return {axis: axis for axis, size in enumerate(x.shape) if size == y.shape[axis]}


@rule("dot_general")
def dot(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C(x W) = x (C W), where S are axes of W that are neither contracted nor of the batch."""
    contracted, batch = eqn.params["dimension_numbers"]
    first = len(batch[0])
    for i, one in enumerate(eqn.inputs):
        free = [axis for axis in range(len(one.shape)) if axis not in (*contracted[i], *batch[i])]
        moves = {first + place: axis for place, axis in enumerate(free)}
        if axes <= moves.keys():
            return [RAW] * i + [moves] + [RAW] * (1 - i)
        first += len(free)
    return None


@rule("conv_general_dilated")
def convolve(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C(x * W) = x * (C W), where S is the output's features and there is one group of them."""
    numbers, grouped = eqn.params["dimension_numbers"], ("feature_group_count", "batch_group_count")
    one_group = all(eqn.params[count] == 1 for count in grouped)
    return [RAW, {numbers.out_spec[1]: numbers.rhs_spec[0]}] if one_group else None


@rule("gather")
def gather(eqn: Equation, axes: Set[int], out: int) -> list[Any] | None:
    """C table[i] = (C table)[i], where what is taken is all of the table along S."""
    numbers, x, fill = eqn.params["dimension_numbers"], eqn.inputs[0], eqn.params.get("fill_value")
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    taken = [axis for axis in range(len(x.shape)) if axis not in gone]
    pairs = zip(numbers.offset_dims, taken, strict=True)
    moves = {place: axis for place, axis in pairs if eqn.params["slice_sizes"][axis] == x.shape[axis]}
    return [moves, RAW] if fill is None or fill == 0 or np.isnan(fill) else None  # NaN stays; another would not be 0


# From rules to labels: what holds for all primitives.


def needs(eqn: Equation, label: Label, out: int) -> list[Any] | None:
    """What the operands must be for the output `out` to come by this label: RAW, ZERO, ONE or a Label each; or None."""
    found = RULES[eqn.name](eqn, label.axes, out) if eqn.name in RULES else None
    if found is None:
        return _taken_up(eqn, label)
    if ZERO in found and (label.scale is not None or label.pieces):
        return None  # C(λ ⊙ u) is not 0, nor is Cu where other entries keep their mean
    if label.scale is not None and eqn.name == "stop_gradient":
        return None  # λ has a derivative
    pairs = zip(eqn.inputs, found, strict=True)
    found = [_need(eqn, label, out, one, need) if isinstance(need, dict) else need for one, need in pairs]
    return None if None in found else found


def _need(eqn: Equation, label: Label, out: int, one: Value, moves: Moves) -> Any:
    """The operand's label, RAW, ZERO, or None."""
    scale, shape = label.scale, eqn.outputs[out].shape
    repeated = {axis: None for axis, to in moves.items() if to in range(len(one.shape)) and one.shape[to] < shape[axis]}
    moves = moves | repeated  # `add` and its like repeat an operand's axis of one entry
    if not one.shape:
        return ZERO if not label.pieces and scale is None else None
    if eqn.name == "reshape" and not label.pieces:
        need = _regrouped(label.axes, one.shape, shape)
    else:
        need = _passed_on(label, moves, one.shape, shape)
    if need is None or not one.is_float:
        return None
    if need == RAW:
        return RAW if scale is None else None
    if scale is None:
        return ZERO if not label.pieces and _uniform(one, need.axes) else need
    dims = tuple(moves.get(dim) for dim in label.dims)
    kept = all(isinstance(dim, int) for dim in dims)
    if eqn.name == "scan_xs" and scale.loops == eqn.outputs[0].loops:  # each turn has its λ: they are one array outside
        scale = scale.equation.inputs[0]
        dims = (0, *dims) if one.shape[0] > 1 else dims
    usable = kept and need.axes and _takes_up(one, scale)
    return Label(need.axes, need.pieces, scale, dims) if usable else None


def _passed_on(label: Label, moves: Moves, old: tuple[int, ...], new: tuple[int, ...]) -> Any:
    """Of an operand of shape `old` the label, without λ, for an output of shape `new`; or RAW, or None."""
    if not label.axes <= moves.keys():
        return None
    ends = [moves[axis] for axis in sorted(label.axes)]
    if not label.pieces and not any(isinstance(end, Window) for end in ends):
        return Label(frozenset(ends) - {None})  # what repeats along an axis has the same mean without it
    if len(ends) > 1 or ends[0] is None:
        return None
    (axis,), (end,) = label.axes, ends
    to, offset = end if isinstance(end, Window) else (end, 0)
    return _shifted(label.pieces or ((0, new[axis], new[axis]),), offset, to, old[to])


def _shifted(pieces: tuple[Piece, ...], offset: int, axis: int, size: int) -> Any:
    """The label of an axis of this size by the moved pieces; RAW where it has none of them, None where it cuts one."""
    moved = ((start + offset, stop + offset, group) for start, stop, group in pieces)
    pieces = tuple(piece for piece in moved if piece[1] > 0 and piece[0] < size)
    if any(start < 0 or stop > size for start, stop, _ in pieces):
        return None
    return Label(frozenset([axis]), () if pieces == ((0, size, size),) else pieces) if pieces else RAW


def seen(eqn: Equation, label: Label, out: int) -> Any:
    """What a slice of the operand by this label is by: a label, RAW where nothing in it lost its mean, or None."""
    if eqn.name not in ("slice", "split") or not label.pieces or label.scale is not None:
        return None
    (axis,) = label.axes
    end = RULES[eqn.name](eqn, label.axes, out)[0].get(axis)
    offset = end.offset if isinstance(end, Window) else 0
    return None if end is None else _shifted(label.pieces, -offset, axis, eqn.outputs[out].shape[axis])


def _regrouped(axes: Set[int], old: tuple[int, ...], new: tuple[int, ...]) -> Label | None:
    """Of an array of shape `old` the label that becomes the mean over these axes of shape `new`; or None.

    Both shapes number the same entries, row by row. Each axis is a range of the number's digits, which is cut anew:
    along `old` they must be whole axes, or all that is lost be of one, and at its end.
    """
    ranges: list[tuple[int, int]] = []
    for low, high in sorted((strides(new)[axis], strides(new)[axis] * new[axis]) for axis in axes):
        ranges.append((ranges.pop()[0] if ranges and ranges[-1][1] == low else low, high))
    groups: dict[int, int] = {}
    for low, high in ranges:
        for axis, (size, stride) in enumerate(zip(old, strides(old), strict=True)):
            bottom, top = max(low, stride), min(high, stride * size)
            if bottom < top:
                if bottom > stride or top % stride or stride * size % top:
                    return None
                groups[axis] = top // stride
    pieces = [(0, old[axis], group) for axis, group in groups.items() if group < old[axis]]
    return None if pieces and len(groups) > 1 else Label(frozenset(groups), tuple(pieces))


def _takes_up(value: Value, scale: Value) -> bool:
    """Whether λ is there where the value is, and its dtype has room for products with a small λ, as float16 has not."""
    there = scale.loops == value.loops[: len(scale.loops)]  # that of a loop's turn is not there outside of the loop
    return there and float(jnp.finfo(value.aval.dtype).tiny) <= float(jnp.finfo(jnp.float32).tiny)


def _taken_up(eqn: Equation, label: Label) -> list[Any] | None:
    """C(λ ⊙ x), of a parameter λ, or a loop's slice of one: x by the label that has λ, and 1 in λ's place."""
    if eqn.name != "mul" or label.scale is not None:
        return None
    for i, scale in enumerate(eqn.inputs):
        x, places = eqn.inputs[1 - i], {axis: axis for axis in range(len(scale.shape))}  # its axes -> the output's
        while (made := scale.equation) is not None and made.name != "scan_xs":
            moves = {axis: axis for axis in places} if made.name == "convert_element_type" else moved(made)
            if moves is None or not made.inputs[0].is_float:
                break
            places = {moves[axis]: place for axis, place in places.items() if moves.get(axis) is not None}
            scale = made.inputs[0]
        dims = tuple(places.get(axis) for axis, size in enumerate(scale.shape) if size > 1)
        if None not in dims and _is_parameter(scale) and x.shape == eqn.outputs[0].shape and _takes_up(x, scale):
            found: list[Any] = [ONE, ONE]
            found[1 - i] = label._replace(scale=scale, dims=dims)
            return found
    return None


def _is_parameter(value: Value) -> bool:
    """A loop's slice of one is one."""
    while value.equation is not None and value.equation.name == "scan_xs":
        value = value.equation.inputs[0]
    return value.kind == "parameter"
