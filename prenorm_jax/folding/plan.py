"""Which values of a program lose their mean: each is raw, or is stored without its mean over some axes.

Every choice computes the same function, by the identities of `rules.py`; only the cost differs. A value that is raw and
wanted without its mean has it removed at run time: of a site that is kept, too. One minimum cut finds the choice that
costs least: the source's side is raw, the sink's without mean. Edges, with what they cost if they are cut:

    a -> a'         a's mean is removed at run time: a's size times how often it is computed; half as much again where
                    that is a pass of its own, and not the one that a norm of a makes in any case. With a λ: no cut
    a' -> sink      a site wants a without its mean: no cut
    a' -> c         c without its mean is made of a without its mean: no cut
    c -> a          c raw is made of a raw: no cut
    source -> a     a must be raw: an input, a constant, something read raw, what no rule moves across: no cut
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import networkx

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.folding import rules
from prenorm_jax.folding.program import Equation, Program, Value, value_of
from prenorm_jax.folding.rules import RAW, Label
from prenorm_jax.folding.sites import Site, find_sites

_UNSERVED = "the folded parameters do not serve inputs of these shapes: fold with examples of them"


class Why(NamedTuple):
    """Why a value has to be raw: blocked, read, returned, ... (`report.py` has words), and the equation to blame."""

    kind: str
    equation: Equation | None = None


class Plan:
    """The labels of a program's values.

    Attributes:
      sites: those that the outputs need, by their equations; refused: what looks like one.
      live: the equations that the outputs need, in no order; read: the values that they read, and those given.
      wanted: for each value the labels that something wants it by; the first is the one it can be stored by, and has
        what all others ask for.
      centred: the values that are stored without their mean, by their label.
      made: for each value that is raw the labels that it is brought to at run time.
      moved: those of them that something else than a site wants.
      forced: why a value has to be raw.
    """

    def __init__(self, program: Program, pins: Mapping[int, Any] | None = None) -> None:
        """`pins`: the labels of some parameters, by their index: `pin` of an earlier plan.

        Raises PrenormError where a pinned parameter cannot be so in this program.
        """
        self.program = program
        given = {program.inputs[index]: pin for index, pin in (pins or {}).items()}
        self.sites, self.refused = find_sites(program)
        self.wanted: dict[Value, list[Label]] = {}
        self.forced: dict[Value, Why] = {}
        self._edges: dict[tuple[Any, Any], float] = {}
        self._needs: dict[tuple[Value, Label], list[Any] | None] = {}
        self._known: dict[tuple[Value, Label], bool] = {}
        self.live, self.read = self._reached()
        for site in self.sites.values():
            if not self.known(site.base, site.label):
                self._want(site.base, site.label)
        self._connect()
        for value, pin in given.items():
            if pin is None:
                self._force(value, "pinned")
            elif value in self.wanted:
                self._edge(value, "sink")
        sink_side = _cut(self._edges)
        self.centred = {value: labels[0] for value, labels in self.wanted.items() if value in sink_side}
        self.made = {
            value: [label for label in labels if (value, label) in sink_side]
            for value, labels in self.wanted.items()
            if value not in sink_side
        }
        moved = {tail for tail, head in self._edges if isinstance(tail, tuple) and head in self.centred}
        self.moved = {tail for tail in moved if tail[0] in self.made}
        if any(self.pin(value.index) != pin for value, pin in given.items() if value in self.read):
            raise PrenormError(_UNSERVED)

    def folded(self, site: Site) -> bool:
        """Whether a site is given its base without mean: so stored, or so made for another reader, or so by itself."""
        stored = site.base in self.centred or (site.base, site.label) in self.moved
        return stored or self.known(site.base, site.label)

    def pin(self, index: int) -> Any:
        """A parameter's label in the words of any program of the same parameters; None: it is raw."""
        label = self.centred.get(self.program.inputs[index])
        return label and label._replace(scale=label.scale and label.scale.index)

    # What reads what.

    def _reached(self) -> tuple[set[Equation], dict[Value, None]]:
        """From the outputs backwards, where a site needs its base alone; what needs its mean too is no site."""
        live, read, todo = set(), {}, list(self.program.outputs)
        while todo:
            value = todo.pop()
            read[value] = None
            if (eqn := value.equation) is not None and eqn not in live:
                live.add(eqn)
                todo += [self.sites[eqn].base] if eqn in self.sites else eqn.inputs
                todo += eqn.outputs if eqn.name == "scan_carry" else []
        shared = [eqn for eqn, site in self.sites.items() if eqn in live and site.mean.equation in live]
        for eqn in shared:
            self.refused.append(self.sites.pop(eqn)._replace(refused="shared"))
        if shared:
            return self._reached()
        self.sites = {eqn: site for eqn, site in self.sites.items() if eqn in live}
        return live, read

    def needs(self, value: Value, label: Label) -> list[Any] | None:
        """What the operands of the value's equation must be for it to come by this label; see `rules.needs`."""
        key = value, label
        if key not in self._needs:
            found = self._rule(value, label)
            if found is not None:
                pairs = zip(value.equation.inputs, found, strict=True)
                found = [RAW if isinstance(need, Label) and self.known(one, need) else need for one, need in pairs]
            self._needs[key] = found
        return self._needs[key]

    def _rule(self, value: Value, label: Label) -> list[Any] | None:
        eqn = value.equation
        return None if eqn is None or eqn in self.sites else rules.needs(eqn, label, eqn.outputs.index(value))

    def known(self, value: Value, label: Label, depth: int = 0) -> bool:
        """Whether the value has no mean over the label's axes, whatever it is stored by: what a site gives has none."""
        key = value, label
        if label.scale is None and key not in self._known and depth < 20:
            self._known[key] = False  # while a loop asks for itself
            site = self.sites.get(value.equation)
            if site is not None:
                self._known[key] = site.form == "difference" and site.label == label
            elif (found := self._rule(value, label)) and any(isinstance(need, Label) for need in found):
                self._known[key] = all(
                    self.known(one, need, depth + 1) if isinstance(need, Label) else need == RAW or value_of(one) == 0
                    for one, need in zip(value.equation.inputs, found, strict=True)
                )
        return self._known.get(key, False)

    def indifferent(self, eqn: Equation, i: int, out: Value) -> bool:
        """Whether operand i may be raw or without mean: it is contracted with what has no mean there, so xᵀCy = xᵀy; or
        a part of it is taken that has its mean in any case."""
        one = eqn.inputs[i]
        if one not in self.wanted or (label := self.wanted[one][0]).scale is not None:
            return False
        if eqn.name != "dot_general" or eqn.inputs.count(one) > 1:
            return rules.seen(eqn, label, eqn.outputs.index(out)) == RAW
        contracted = eqn.params["dimension_numbers"][0]
        theirs = dict(zip(contracted[i], contracted[1 - i], strict=True))
        axes, other = frozenset(theirs.get(axis, -1) for axis in label.axes), eqn.inputs[1 - i]
        return -1 not in axes and other not in self.wanted and self.known(other, Label(axes, label.pieces))

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
                both = rules.joined(labels[0], label)
                if both is None:
                    self._force(value, "twice", value.equation)
                if both in (None, labels[0]):
                    continue
                labels.insert(0, label := both)
            if (needs := self.needs(value, label)) is not None:
                pairs = zip(value.equation.inputs, needs, strict=True)
                todo += [(one, need) for one, need in pairs if isinstance(need, Label)]
                if value.equation.name == "scan_carry":
                    todo += [(out, label) for out in value.equation.outputs if out is not value]

    def _force(self, value: Value, kind: str, eqn: Equation | None = None) -> None:
        if value in self.wanted:
            self.forced.setdefault(value, Why(kind, eqn))
            self._edge("source", value)

    # The graph of the cut.

    def _connect(self) -> None:
        for value in self.program.outputs:
            self._force(value, "returned")
        for eqn in self.program.equations:
            if eqn in self.live:
                self._connect_equation(eqn)
        bases = {site.base for site in self.sites.values()}
        for value, labels in self.wanted.items():
            if value.equation is None and value.kind != "parameter":
                self._force(value, "given")
            for label in labels:
                size = 1.0 if value.fixed else math.prod(value.shape) * (1.0 if value in bases else 1.5)
                self._edge(value, (value, label), math.inf if label.scale else size * value.times)

    def _connect_equation(self, eqn: Equation) -> None:
        if eqn in self.sites:
            site = self.sites[eqn]
            if self.known(site.base, site.label):
                self._force(site.base, "read", eqn)
            else:
                self._edge((site.base, site.label), "sink")
        for out in eqn.outputs:
            labels = self.wanted.get(out)
            found = self.needs(out, labels[0]) if labels else None
            if labels and found is None:
                self._force(out, "norm" if eqn in self.sites else "blocked", eqn)
            if eqn not in self.sites:
                self._connect_operands(eqn, out, found or [RAW] * len(eqn.inputs), found is not None)
            for other in eqn.outputs if labels and eqn.name == "scan_carry" else ():
                self._edge(out, other)

    def _connect_operands(self, eqn: Equation, out: Value, found: list[Any], is_choice: bool) -> None:
        """`is_choice`: `out` may be stored by a label, for which its operands must be as found."""
        for i, (one, need) in enumerate(zip(eqn.inputs, found, strict=True)):
            if isinstance(need, Label):
                self._edge((one, need), out)
                stored = self.wanted[one][0]
                if stored != need and rules.seen(eqn, stored, eqn.outputs.index(out)) != self.wanted[out][0]:
                    self._force(one, "twice", one.equation)  # what else it loses shows here
            if one in self.wanted and not self.indifferent(eqn, i, out):
                if need == RAW and out in self.read:
                    self._force(one, "read", eqn)
                elif is_choice:
                    self._edge(out, one)

    def _edge(self, tail: Any, head: Any, cost: float = math.inf) -> None:
        if tail is not head:
            self._edges[tail, head] = max(cost, self._edges.get((tail, head), 0.0))


def _cut(edges: Mapping[tuple[Any, Any], float]) -> set[Any]:
    """What is on the sink's side of the minimum cut that has the least on it: of equal costs, that of fewer changes."""
    graph = networkx.DiGraph()
    graph.add_nodes_from(("source", "sink"))
    graph.add_weighted_edges_from(((*edge, cost) for edge, cost in edges.items()), weight="capacity")
    try:
        return networkx.minimum_cut(graph, "source", "sink")[1][1]
    except networkx.NetworkXUnbounded:
        raise PrenormError(_UNSERVED) from None
