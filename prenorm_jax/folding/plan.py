"""Which values of a program lose their mean: each is raw, or is stored without its mean over some axes.

Every choice computes the same function, by the identities of `rules.py`; only the cost differs. A value that is raw and
wanted without its mean has it removed at run time. One minimum cut finds the choice that costs least: the source's side
is raw, the sink's without mean. Edges, with what they cost if they are cut:

    a -> a'         a's mean is removed at run time: a's size times how often it is computed; half as much again where
                    that is a pass of its own, and not the one that a norm of a makes in any case
    a' -> sink      a site wants a without its mean: no cut
    a' -> c         c without its mean is made of a without its mean: no cut
    c -> a          c raw is made of a raw: no cut
    source -> a     a must be raw: an input, something read raw, what no rule moves across: no cut
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.folding import rules
from prenorm_jax.folding.program import Block, Equation, Program, Region, Value, back_map
from prenorm_jax.folding.rules import RAW, UNREAD, ZERO
from prenorm_jax.folding.sites import Site, find_sites


class Label(NamedTuple):
    """x without the mean over `axes`; given a `scale`, of scale ⊙ x, with `dims` the axes of x that the scale has.

    (A LayerScale λ between a linear map and the stream: C(λ ⊙ (x W)) = x C(W diag λ).)
    """

    axes: frozenset[int]
    scale: Value | None = None
    dims: tuple[int, ...] = ()


@dataclasses.dataclass
class Why:
    """Why a value has to be raw: in words, as a kind (blocked, read, returned or other), the equation to blame."""

    text: str
    kind: str = "other"
    equation: Equation | None = None


class Plan:
    """The labels of a program's values.

    Attributes:
      sites: its sites by their equations; refused: what looks like one.
      wanted: for each value the labels that something wants it by; the first is the one it can be stored by.
      centred: the values that are stored without their mean, by their label.
      made: the values whose mean is removed for a reader that is not a site, and that reader's label.
      forced: why a value has to be raw.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.sites, self.refused = find_sites(program)
        self.differences = {eqn.outputs[0]: site for eqn, site in self.sites.items() if site.form == "difference"}
        self.wanted: dict[Value, list[Label]] = {}
        self.centred: dict[Value, Label] = {}
        self.made: set[tuple[Value, Label]] = set()
        self.forced: dict[Value, Why] = {}
        self._needs: dict[tuple[Value, Label], list[Any] | None] = {}
        self._known: dict[tuple[Value, Label], bool] = {}
        self.live, self._read = self._liveness()
        for site in self.live_sites():
            if not self.known(site.base, Label(site.axes)):
                self._want(site.base, Label(site.axes))
        self.edges: dict[tuple[Any, Any], float] = {}
        self._connect()

    def live_sites(self) -> list[Site]:
        return [site for eqn, site in self.sites.items() if eqn in self.live]

    # What reads what.

    def _liveness(self) -> tuple[set[Equation], set[Value]]:
        """The equations that an output needs, where a site needs its base alone; and the values that are read."""
        live, needed = set(), set(self.program.outputs)

        def walk(block: Block) -> None:
            for item in reversed(block):
                if isinstance(item, Region):
                    needed.update(out for eqn in item.carries for out in eqn.outputs)
                    visit(item.ys + item.carries)
                    walk(item.body)
                    visit(item.xs)
                else:
                    visit([item])

        def visit(equations: list[Equation]) -> None:
            for eqn in equations:
                if not needed.isdisjoint(eqn.outputs):
                    live.add(eqn)
                    needed.update([self.sites[eqn].base] if eqn in self.sites else eqn.inputs)

        walk(self.program.block)
        return live, needed

    def needs(self, value: Value, label: Label) -> list[Any] | None:
        """What the operands of the value's equation must be for it to come by this label: RAW, ZERO or a Label each."""
        if (value, label) not in self._needs:
            found = self._push(value, label)
            if found is not None:
                pairs = zip(value.equation.inputs, found, strict=True)
                found = [RAW if isinstance(need, Label) and self.known(one, need) else need for one, need in pairs]
            self._needs[value, label] = found
        return self._needs[value, label]

    def _push(self, value: Value, label: Label) -> list[Any] | None:
        eqn = value.equation
        if eqn is None or eqn in self.sites:
            return None
        found = rules.needs(eqn, label.axes, eqn.outputs.index(value))
        if found is None:
            return _push_scale(eqn, label)
        if label.scale is not None and ZERO in found:  # C(λ ⊙ u) is not 0
            return None
        found = [_mapped(eqn, label, need) if isinstance(need, dict) else need for need in found]
        pairs = zip(eqn.inputs, found, strict=True)
        return found if all(need is not None and _is_seen(need, one) for one, need in pairs) else None

    def known(self, value: Value, label: Label, depth: int = 0) -> bool:
        """Whether the value has no mean over the label's axes, whatever it is stored by: what a site gives has none."""
        key = value, label
        if label.scale is None and key not in self._known and depth < 20:
            self._known[key] = False  # while a loop asks for itself
            site = self.differences.get(value)
            self._known[key] = site is not None and site.axes == label.axes
            if site is None and value.equation is not None and (found := self._push(value, label)):
                self._known[key] = any(isinstance(need, Label) for need in found) and all(
                    rules.value_of(one) == 0
                    if need == ZERO
                    else need in (RAW, UNREAD) or self.known(one, need, depth + 1)
                    for one, need in zip(value.equation.inputs, found, strict=True)
                )
        return self._known.get(key, False)

    def indifferent(self, eqn: Equation, i: int) -> bool:
        """Whether operand i may be raw or without mean: it is contracted with what has no mean there, so xᵀCy = xᵀy."""
        labels = self.wanted.get(eqn.inputs[i], ())
        if eqn.name != "dot_general" or len(labels) != 1 or labels[0].scale is not None or len(set(eqn.inputs)) < 2:
            return False
        ours, theirs = eqn.params["dimension_numbers"][0][i], eqn.params["dimension_numbers"][0][1 - i]
        axes = frozenset(b for a, b in zip(ours, theirs, strict=True) if a in labels[0].axes)
        return len(axes) == len(labels[0].axes) and self.known(eqn.inputs[1 - i], Label(axes))

    # Who wants what.

    def _want(self, value: Value, label: Label) -> None:
        todo = [(value, label)]
        while todo:
            value, label = todo.pop()
            labels = self.wanted.setdefault(value, [])
            if label in labels:
                continue
            labels.append(label)
            if len(labels) > 1:
                self._force(value, Why("norms take its mean over different axes", "other", value.equation))
            elif (found := self.needs(value, label)) is not None:
                pairs = zip(value.equation.inputs, found, strict=True)
                todo += [(one, need) for one, need in pairs if isinstance(need, Label)]
                if value.equation.name == "scan_carry":
                    todo += [(out, label) for out in value.equation.outputs if out is not value]

    def _force(self, value: Value, why: Why) -> None:
        self.forced.setdefault(value, why)

    # The graph of the cut.

    def _connect(self) -> None:
        for value in self.program.outputs:
            self._force(value, Why("the function returns it", "returned"))
        for eqn in self.program.equations():
            if eqn not in self.live:
                continue
            if eqn in self.sites:
                site = self.sites[eqn]
                if self.known(site.base, Label(site.axes)):
                    self._force(site.base, Why("a norm of a norm reads it", "read", eqn))
                else:
                    self._edge((site.base, Label(site.axes)), "sink")
                self._tie(eqn, site)
                self._force(eqn.outputs[0], Why("a norm of a norm, over other axes", "other", eqn))
            else:
                for out in (one for one in eqn.outputs if one in self._read):
                    self._connect_output(eqn, out)
        bases = {site.base for site in self.live_sites()}
        for value, labels in self.wanted.items():
            if value.equation is None and value.kind not in ("parameter", "constant"):
                self._force(value, Why("it is an input of the function"))
            for label in labels:
                size = math.prod(value.shape) * value.times * (1.0 if value in bases else 1.5)
                self._edge(value, (value, label), 1.0 if value.fixed else size)
        for value in self.forced:
            if value in self.wanted:
                self._edge("source", value)

    def _connect_output(self, eqn: Equation, out: Value) -> None:
        labels = self.wanted.get(out)
        found = self.needs(out, labels[0]) if labels else None
        if labels and found is None:
            self._force(out, Why(_blocked(eqn), "blocked", eqn))
        self._read_raw(eqn, out if found is not None else None, found or [RAW] * len(eqn.inputs))
        for one, need in zip(eqn.inputs, found or (), strict=False):
            if isinstance(need, Label):
                self._edge((one, need), out)
        if labels and eqn.name == "scan_carry":
            for other in eqn.outputs:
                self._edge(out, other)

    def _read_raw(self, eqn: Equation, out: Value | None, found: list[Any]) -> None:
        """`eqn` reads its operands raw: always, or if `out` is raw."""
        for i, (one, need) in enumerate(zip(eqn.inputs, found, strict=True)):
            if one not in self.wanted or self.indifferent(eqn, i):
                continue
            if need == RAW:
                self._force(one, Why(f"{_reader(eqn)} reads it with its mean", "read", eqn))
            else:
                self._edge(out, one)

    def _tie(self, eqn: Equation, site: Site) -> None:
        """A site that stays as it is reads what lies between its base and it: that is raw if the base is."""
        todo = list(eqn.inputs)
        while todo:
            if (one := todo.pop()) is not site.base:
                if one in self.wanted:
                    self._edge(site.base, one)
                todo += one.equation.inputs if one.equation is not None else []

    def _edge(self, tail: Any, head: Any, cost: float = math.inf) -> None:
        if tail is not head:
            self.edges[tail, head] = max(cost, self.edges.get((tail, head), 0.0))

    def solve(self, pins: Mapping[int, Any] | None = None) -> "Plan":
        """Finds the labels. `pins`: those of some parameters, by their index: an earlier plan's.

        Raises PrenormError where a pinned parameter cannot be so in this program.
        """
        for value in self.program.inputs:
            if value.index not in (pins or ()) or value not in self.wanted:
                continue
            if pins[value.index] is None:
                self._force(value, Why("it is so for the first inputs"))
                self._edge("source", value)
            else:
                self._edge(value, "sink")
        sink_side = _cut(self.edges)
        self.centred = {value: labels[0] for value, labels in self.wanted.items() if value in sink_side}
        self.made = {node for node, reader in self.edges if isinstance(node, tuple) and reader in self.centred}
        broken = [value for value in self.centred if value in self.forced]  # no cut: a pin and what forces disagree
        kept = all(pin is None or self.pin(i) == pin or not self._is_read(i) for i, pin in (pins or {}).items())
        if broken or not kept:
            raise PrenormError("the folded parameters do not serve inputs of these shapes: fold with examples of them")
        return self

    def folded(self, site: Site) -> bool:
        """Whether a site is given its base without mean: so stored, or so made for another reader, or so by itself."""
        label = Label(site.axes)
        return site.base in self.centred or (site.base, label) in self.made or self.known(site.base, label)

    def _is_read(self, index: int) -> bool:
        value = self.program.inputs[index]
        return any(value in eqn.inputs for eqn in self.live) or value in self.program.outputs

    def pin(self, index: int) -> Any:
        """A parameter's label in the words of any program of the same parameters; None: it is raw."""
        label = self.centred.get(self.program.inputs[index])
        return None if label is None else (label.axes, -1 if label.scale is None else label.scale.index, label.dims)


# What a λ crosses too: f(λ ⊙ x) = λ' ⊙ f(x) with λ' along the same axes as they lie in x, in values and derivatives.
_LINEAR_ENTRYWISE = {"neg", "copy", "name", "sharding_constraint", "optimization_barrier", "convert_element_type"}
_LINEAR_ENTRYWISE |= {"add", "sub", "add_any", "mul", "div", "select_n", "transpose", "squeeze", "reshape"}
_LINEAR_ENTRYWISE |= {"broadcast_in_dim", "reduce_sum", "dot_general", "conv_general_dilated", "gather", "scan_xs"}
_LINEAR_ENTRYWISE |= {"concatenate", "slice", "dynamic_slice", "pad", "expand_dims"}


def _mapped(eqn: Equation, label: Label, need: dict[int, int]) -> Label | None:
    """The label of an operand whose axes are the label's in another order."""
    if label.scale is None:
        return Label(frozenset(need))
    back, scale = {theirs: ours for ours, theirs in need.items()}, label.scale
    if len(back) != len(need) or not back.keys() >= set(label.dims) or eqn.name not in _LINEAR_ENTRYWISE:
        return None
    if eqn.name == "reshape" and any(eqn.inputs[0].shape[back[dim]] != eqn.outputs[0].shape[dim] for dim in back):
        return None
    axes, dims = frozenset(need), tuple(back[dim] for dim in label.dims)
    if eqn.name == "scan_xs" and scale.equation is not None:  # each turn has its λ: they are one array outside
        if scale.equation.eqn is not eqn.eqn or not _is_given(scale.equation.inputs[0]):
            return None
        scale, dims = scale.equation.inputs[0], (0, *dims)
    return Label(axes, scale, dims)


def _push_scale(eqn: Equation, label: Label) -> list[Any] | None:
    """C(λ ⊙ x), of a parameter or constant λ along S: x by the label that has λ."""
    if eqn.name != "mul" or label.scale is not None:
        return None
    for i, scale in enumerate(eqn.inputs):
        dims: list[int | None] = list(range(len(scale.shape)))
        while (made := scale.equation) is not None and made.name != "scan_xs":
            back = back_map(made)
            if back is None and not (made.name == "convert_element_type" and made.inputs[0].is_float):
                break
            dims = dims if back is None else [None if dim is None else back[dim] for dim in dims]
            scale = made.inputs[0]
        places = {dim: axis for axis, dim in enumerate(dims) if dim is not None}
        whole = places.keys() == set(range(len(scale.shape))) and label.axes.issuperset(places.values())
        if whole and _is_given(scale):
            found: list[Any] = [UNREAD, UNREAD]
            found[1 - i] = Label(label.axes, scale, tuple(places[dim] for dim in range(len(scale.shape))))
            return found
    return None


def _is_seen(need: Any, value: Value) -> bool:
    """Whether the scale of a label is there where the value is: not that of a loop's turn outside of the loop."""
    scale = need.scale if isinstance(need, Label) else None
    return scale is None or scale.loops == value.loops[: len(scale.loops)]


def _is_given(value: Value) -> bool:
    """Whether it is a parameter, a constant, or a loop's slice of one: there from the start of its body."""
    if value.equation is not None:
        return value.equation.name == "scan_xs" and _is_given(value.equation.inputs[0])
    return value.kind in ("parameter", "constant")


def _reader(eqn: Equation) -> str:
    return {"scan_carry": "a loop", "scan_xs": "a loop", "scan_ys": "a loop"}.get(eqn.name, eqn.name)


_BLOCKED = {
    "select_n": "a mask that differs along the stream",
    "mul": "a factor that differs along the stream",
    "conv_general_dilated": "a convolution in several groups (depthwise), or over what is normed",
    "reshape": "a reshape that splits or merges the normed axes",
    "dot_general": "a product that sums over the normed axes",
}


def _blocked(eqn: Equation) -> str:
    return f"no mean's removal moves across {_BLOCKED.get(eqn.name, _reader(eqn))}"


def _cut(edges: Mapping[tuple[Any, Any], float]) -> set[Any]:
    """What is on the sink's side of the minimum cut that has the least on it: of equal costs, that of fewer changes.

    Capacities are 32-bit integers (SciPy's maximum_flow takes no larger ones, and gives 0 for what wraps), so costs are
    scaled: all finite ones together stay below 2^29, and 2^30 stands for no cut.
    """
    nodes: dict[Any, int] = {"source": 0, "sink": 1}
    for edge in edges:
        for node in edge:
            nodes.setdefault(node, len(nodes))
    unit = max(1.0, sum(cost for cost in edges.values() if cost < math.inf) / 2**28)
    ends = np.array([[nodes[tail], nodes[head]] for tail, head in edges], np.int32).reshape(-1, 2)
    limits = np.array([2**30 if c == math.inf else max(1, round(c / unit)) for c in edges.values()], np.int32)
    graph = scipy.sparse.csr_array((limits, (ends[:, 0], ends[:, 1])), (len(nodes), len(nodes)))
    residual = graph - scipy.sparse.csgraph.maximum_flow(graph, 0, 1).flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    reached = set(scipy.sparse.csgraph.breadth_first_order(residual.T, 1, return_predecessors=False).tolist())
    return {node for node, number in nodes.items() if number in reached}
