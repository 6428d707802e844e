"""What a fold did: each LayerNorm, folded or kept and why, what is centred and when; as text, dict and page."""

import dataclasses
from collections import Counter
from typing import Any

from prenorm_jax.folding import internals
from prenorm_jax.folding.plan import Plan, Why
from prenorm_jax.folding.program import Equation, Program, Value, read
from prenorm_jax.folding.rules import RULES
from prenorm_jax.folding.run import Runner
from prenorm_jax.folding.sites import Site, find_sites, squared
from prenorm_jax.report import page, table

_REMEDIES = {
    "dropout": "fold the function with dropout off, or drop out before the branch's last linear map",
    "select_n": "use a mask that is the same for all entries of the stream",
    "mul": "put the norm before the branch, or leave out the factor (an affine Post-LN has one)",
    "conv_general_dilated": "use one group of features",
    "reshape": "keep the normed axes whole",
    "stop_gradient": "let the gradient through the mean",
    "returned": "return what comes after a norm",
    "read": "read the normed value there",
}


@dataclasses.dataclass
class Norm:
    """One LayerNorm, or another place where a mean is removed.

    Attributes:
      where: the user's file and line; scope: the modules around it.
      shape, axes: of what is normed, and those that the mean is over.
      status: folded, kept (it was recognised), or refused (it only looks like one).
      reason: why it is so; remedy: what would have to change; blame: the line that it is about.
    """

    where: str
    scope: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    status: str
    reason: str = ""
    blame: str = ""
    remedy: str = ""


@dataclasses.dataclass
class Report:
    """Of a fold.

    Attributes:
      norms: in the order of the program.
      offline: the parameters that lost their mean once and for all, and over which axes.
      runtime: what loses its mean in each call: line or parameter, and shape.
      reductions: how many the program has, loops counted by their turns: before and after.
      unknown: primitives that have no rule, and that a mean's removal came to.
    """

    norms: list[Norm]
    offline: dict[str, tuple[int, ...]]
    runtime: list[tuple[str, tuple[int, ...]]]
    reductions: tuple[int, int]
    unknown: list[str]

    @classmethod
    def of(cls, runner: Runner, after: Program, names: list[str]) -> "Report":
        """That of a plan that is run, and of the program that it became."""
        plan = runner.plan
        inputs = plan.program.inputs
        offline = {
            name: tuple(sorted(plan.centred[value].axes))
            for name, value in zip(names, inputs, strict=False)
            if value in plan.centred
        }
        runtime = [
            (names[value.index] if value.kind == "parameter" else _where(value), value.shape)
            for value, forms in runner.forms.items()
            for form in forms
            if form is not None and form != plan.centred.get(value) and not value.fixed
        ]
        unknown = {why.equation.name for why in plan.forced.values() if why.kind == "blocked"} - RULES.keys()
        reductions = _reductions(plan.program), _reductions(after)
        return cls([*_norms(plan), *_hidden(plan)], offline, runtime, reductions, sorted(unknown))

    def count(self, status: str = "folded") -> int:
        """How many norms became of this status."""
        return sum(norm.status == status for norm in self.norms)

    def as_dict(self) -> dict[str, Any]:
        """What JSON holds."""
        return dataclasses.asdict(self) | {"folded": self.count(), "found": len(self.norms)}

    def __str__(self) -> str:
        return "\n".join([self._sentence(), "", table.to_text(self._rows()), "", *self._notes()])

    def html(self) -> bytes:
        """The page."""
        parts = [page.paragraphs([self._sentence()]), table.to_html(self._rows()), page.paragraphs(self._notes())]
        if self.offline:
            rows = [["parameter", "without its mean over axes"]]
            rows += [[name, ", ".join(map(str, axes))] for name, axes in self.offline.items()]
            parts += [page.heading("Centred once and for all"), table.to_html(rows)]
        return page.page("LayerNorms folded", parts)

    def _sentence(self) -> str:
        before, after = self.reductions
        return (
            f"{self.count()} of {len(self.norms)} norms folded; {len(self.offline)} parameters centred once and for "
            f"all, {len(self.runtime)} values at run time; reductions {before} before, {after} after"
        )

    def _rows(self) -> table.Rows:
        grouped: dict[tuple[str, ...], list[Norm]] = {}
        for norm in self.norms:
            about = f"{norm.reason} ({norm.blame})" if norm.blame else norm.reason
            key = norm.where, norm.status, about, norm.remedy
            grouped.setdefault(key, []).append(norm)
        rows = [["norm", "where", "", "why", "what would have to change"]]
        for (where, *rest), norms in grouped.items():
            scopes = list(dict.fromkeys(norm.scope for norm in norms if norm.scope))
            name = scopes[0] if scopes else "norm"
            rows.append([f"{name} and {len(norms) - 1} more" if len(norms) > 1 else name, where, *rest])
        return rows

    def _notes(self) -> list[str]:
        notes = [f"centred at run time: {where}, {shape}" for where, shape in self.runtime]
        return notes + [f"no rule is known for {name}" for name in self.unknown]


def _where(value: Value) -> str:
    return value.equation.where if value.equation is not None else f"input {value.index}"


def _norms(plan: Plan) -> list[Norm]:
    """Those of the program itself: of the sites of one value those whose difference is used, else one."""
    readers: dict[Value, list[Equation]] = {}
    for eqn in plan.live:
        for one in eqn.inputs:
            readers.setdefault(one, []).append(eqn)
    of_base: dict[Any, list[Site]] = {}
    for site in plan.live_sites():
        of_base.setdefault((site.base, site.axes), []).append(site)
    chosen = set()
    for sites in of_base.values():
        used = [site for site in sites if site.form == "difference" and _is_used(site, readers)]
        chosen |= {site.equation for site in used or sites[:1]}
    refused = {(site.base, site.axes): site for site in plan.refused[::-1] if site.equation in plan.live}
    refused = {site.equation: site for site in refused.values()}
    norms = []
    for eqn in plan.program.equations():
        if eqn in chosen:
            site = plan.sites[eqn]
            norm = _norm(site, "folded" if plan.folded(site) else "kept")
            norms.append(norm if norm.status == "folded" else _explained(norm, plan, site.base))
        elif eqn in refused:
            norm = _norm(refused[eqn], "refused")
            remedy = next((text for word, text in _REMEDIES.items() if word in refused[eqn].refused), "")
            norms.append(dataclasses.replace(norm, reason=refused[eqn].refused, remedy=remedy))
    return norms


def _is_used(site: Site, readers: dict[Value, list[Equation]]) -> bool:
    """Whether anything but a square, for the variance, reads what the site gives."""
    out = site.equation.outputs[0]
    return any(all(squared(y) is not out for y in eqn.outputs) for eqn in readers.get(out, ()))


def _norm(site: Site, status: str) -> Norm:
    eqn = site.equation
    return Norm(eqn.where, eqn.scope, site.base.shape, tuple(sorted(site.axes)), status)


def _explained(norm: Norm, plan: Plan, base: Value) -> Norm:
    """With the reason why the value is raw: it has to be, or what writes to it has."""
    if base in plan.forced:
        return _with(norm, "", plan.forced[base])
    found, seen, todo = [], set(), [base]
    while todo:
        value = todo.pop()
        if value in seen or value not in plan.wanted:
            continue
        seen.add(value)
        if value in plan.forced:
            found.append(plan.forced[value])
        elif value.equation is not None:
            needs = plan.needs(value, plan.wanted[value][0]) or ()
            todo += [one for one, need in zip(value.equation.inputs, needs, strict=False) if isinstance(need, tuple)]
    if not found:
        return dataclasses.replace(norm, reason="it alone would save nothing")
    found.sort(key=lambda why: why.kind != "blocked")
    more = f" and {len(found) - 1} more like it" if len(found) > 1 else ""
    return _with(norm, f"to remove the mean at run time of what is written{more} costs as much: ", found[0])


def _with(norm: Norm, first: str, why: Why) -> Norm:
    eqn, kind = why.equation, why.kind
    if kind == "blocked":
        kind = "dropout" if eqn.name in ("select_n", "mul") and _is_random(eqn) else eqn.name
    words = "active dropout: " if kind == "dropout" else ""
    blame = "" if eqn is None else eqn.where
    return dataclasses.replace(norm, reason=first + words + why.text, blame=blame, remedy=_REMEDIES.get(kind, ""))


def _is_random(eqn: Equation) -> bool:
    """Whether one of its operands comes of random bits, a few steps back."""
    todo, seen = list(eqn.inputs), set()
    while todo and len(seen) < 200:
        value = todo.pop(0)
        if value.equation is None or value in seen:
            continue
        seen.add(value)
        if value.equation.name.startswith(("random_bits", "threefry", "random_wrap")):
            return not value.is_float
        if value.equation.name not in ("dot_general", "scan_carry"):
            todo += value.equation.inputs
    return False


def _hidden(plan: Plan) -> list[Norm]:
    """Those inside calls that are not looked into."""
    norms = []
    for eqn in plan.program.equations():
        if eqn not in plan.live or eqn.name.startswith("scan_"):
            continue
        for body in internals.bodies(eqn.eqn):
            bases = {(site.base, site.axes): site for site in find_sites(read(body))[0].values()}
            for site in bases.values():
                inside = f"it is inside {eqn.name}"
                norms.append(dataclasses.replace(_norm(site, "kept"), where=eqn.where, reason=inside))
    return norms


def _reductions(program: Program) -> int:
    counts: Counter[str] = Counter()
    for eqn in program.equations():
        if eqn.name.startswith("reduce_") and eqn.name != "reduce_precision":
            counts[eqn.name] += eqn.outputs[0].times
    return counts.total()
