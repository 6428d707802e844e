"""What a fold did: each LayerNorm, folded or kept and why, what is centred and when; as text, dict and page."""

import dataclasses
from typing import Any

from prenorm_jax.folding import internals
from prenorm_jax.folding.plan import Plan, Why
from prenorm_jax.folding.program import Equation, Program, Value, read
from prenorm_jax.folding.rules import RULES, Label
from prenorm_jax.folding.sites import Site, find_sites, squared
from prenorm_jax.report import page, table

# Why a value has its mean: by the kind of reason, or the primitive that no mean's removal moves across; and what would
# have to change.
_WORDS = {
    "returned": ("the function returns it", "return what comes after a norm"),
    "read": ("{} reads it with its mean", "read the normed value there"),
    "given": ("it is an input of the function, or a constant", "make it a parameter"),
    "twice": ("norms take its mean over different axes", "norm over the same axes"),
    "norm": ("another norm gives it", "leave out one of the two"),
    "blocked": ("no mean's removal moves across {}", "norm what comes before it"),
    "select_n": ("a mask that differs along the stream, as active dropout's does", "fold without dropout"),
    "mul": ("a factor that differs along the stream", "make a LayerScale a leaf of its own, or leave the factor out"),
    "conv_general_dilated": ("a convolution in groups (depthwise), or over what is normed", "use one group"),
    "reshape": ("a reshape that cuts the normed axes in another way", "norm whole axes, or heads"),
    "dot_general": ("a product of which no operand alone has the normed axes", "norm over axes of its weights alone"),
    # What only looks like a norm.
    "weighted": ("its mean is weighted, or of the entries of a mask alone", "take the mean of all entries"),
    "stop_gradient": ("its mean is behind stop_gradient", "let the gradient through the mean"),
    "digits": ("its mean is behind a cast to fewer digits", "compute the mean in the dtype of what it is of"),
    "shared": ("its mean is read by something else too", "read the normed value there"),
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

    @classmethod
    def at(cls, eqn: Equation, site: Site, status: str = "folded", reason: str = "") -> "Norm":
        """That of a site, as the equation's: its own, or a call's around it."""
        return cls(eqn.where, eqn.scope, site.base.shape, tuple(sorted(site.mean.axes)), status, reason)


@dataclasses.dataclass
class Report:
    """Of a fold.

    Attributes:
      norms: in the order of the program, those inside calls that are not looked into last.
      offline: the parameters that lost their mean once and for all, and over which axes.
      runtime: what loses its mean in each call beside the norms: line or parameter, and shape.
      reductions: how many the program has, loops counted by their turns: before and after.
      unknown: primitives that have no rule, and that a mean's removal came to.
    """

    norms: list[Norm]
    offline: dict[str, tuple[int, ...]]
    runtime: list[tuple[str, tuple[int, ...]]]
    reductions: tuple[int, int]
    unknown: list[str]

    @classmethod
    def of(cls, plan: Plan, after: Program, names: list[str]) -> "Report":
        """That of a plan, and of the program that it became."""
        pairs = zip(names, plan.program.inputs, strict=False)
        offline = {name: tuple(sorted(plan.centred[value].axes)) for name, value in pairs if value in plan.centred}
        runtime = [value for value, labels in plan.made.items() for label in labels if (value, label) in plan.moved]
        places = [(_place(value, names), value.shape) for value in runtime if not value.fixed]
        unknown = {why.equation.name for why in plan.forced.values() if why.kind == "blocked"} - RULES.keys()
        reductions = _reductions(plan.program), _reductions(after)
        return cls([*_norms(plan), *_hidden(plan)], offline, places, reductions, sorted(unknown))

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
        return page.page("LayerNorms folded", parts)

    def _sentence(self) -> str:
        before, after = self.reductions
        return (
            f"{self.count()} of {len(self.norms)} norms folded; {len(self.offline)} parameters centred once and for "
            f"all, {len(self.runtime)} values at run time; reductions {before} before, {after} after"
        )

    def _rows(self) -> table.Rows:
        """One for all norms of a line that share their fate."""
        grouped: dict[tuple[str, ...], list[Norm]] = {}
        for norm in self.norms:
            about = f"{norm.reason} ({norm.blame})" if norm.blame else norm.reason
            grouped.setdefault((norm.where, norm.status, about, norm.remedy), []).append(norm)
        rows = [["norm", "where", "", "why", "what would have to change"]]
        for key, norms in grouped.items():
            name = norms[0].scope or "norm"
            rows.append([f"{name} and {len(norms) - 1} more" if len(norms) > 1 else name, *key])
        return rows

    def _notes(self) -> list[str]:
        notes = [f"centred once and for all: {name}, over axes {axes}" for name, axes in self.offline.items()]
        notes += [f"centred at run time: {where}, {shape}" for where, shape in self.runtime]
        return notes + [f"no rule is known for {name}" for name in self.unknown]


def _place(value: Value, names: list[str]) -> str:
    if value.equation is not None:
        return value.equation.where
    return names[value.index] if value.kind == "parameter" else "an input"


def _norms(plan: Plan) -> list[Norm]:
    """Those of the program itself: of the sites of one value those whose difference is used, else one."""
    read_by = [(one, eqn) for eqn in plan.live for one in eqn.inputs]
    used = {one for one, eqn in read_by if squared(eqn.outputs[0]) is not one}  # but for a variance
    refused = {(site.base, site.label): site for site in plan.refused[::-1] if site.equation in plan.live}
    chosen = {site.equation: site for site in refused.values()}
    of_base: dict[Any, list[Site]] = {}
    for site in plan.sites.values():
        of_base.setdefault((site.base, site.label), []).append(site)
    for sites in of_base.values():
        shown = [site for site in sites if site.form == "difference" and site.equation.outputs[0] in used]
        chosen |= {site.equation: site for site in shown or sites[:1]}
    return [_norm(plan, chosen[eqn]) for eqn in plan.program.equations if eqn in chosen]


def _norm(plan: Plan, site: Site) -> Norm:
    norm = Norm.at(site.equation, site)
    if site.refused:
        norm.status, (norm.reason, norm.remedy) = "refused", _WORDS[site.refused]
    elif not plan.folded(site):
        norm.status, (norm.reason, norm.blame, norm.remedy) = "kept", _explained(plan, site.base)
    return norm


def _explained(plan: Plan, base: Value) -> tuple[str, str, str]:
    """Why a value is raw: it has to be, or what writes to it has. In words, the line to blame, what would help."""
    found, seen, todo = [], set(), [base]
    while todo:
        value = todo.pop()
        if value in plan.forced:
            found.append(plan.forced[value])
        elif value not in seen and value.equation is not None:
            pairs = zip(value.equation.inputs, plan.needs(value, plan.wanted[value][0]), strict=True)
            todo += [one for one, need in pairs if isinstance(need, Label)]
        seen.add(value)
    if not found:
        return "it alone would save nothing", "", ""
    reason, blame, remedy = _words(min(found, key=lambda why: why.kind != "blocked"))
    if base not in plan.forced:
        more = f" and {len(found) - 1} more like it" if len(found) > 1 else ""
        reason = f"to remove the mean at run time of what is written{more} costs as much: {reason}"
    return reason, blame, remedy


def _words(why: Why) -> tuple[str, str, str]:
    text, remedy = _WORDS[why.kind]
    if why.equation is None:
        return text, "", remedy
    name = "a loop" if why.equation.name.startswith("scan_") else why.equation.name
    if why.kind == "blocked":
        name, remedy = _WORDS.get(name, (name, remedy))
    return text.format(name), why.equation.where, remedy


def _hidden(plan: Plan) -> list[Norm]:
    """Those inside calls that are not looked into."""
    norms = {}
    for eqn in plan.program.equations:
        inside = internals.bodies(eqn.eqn) if eqn in plan.live and eqn.eqn.primitive.name == eqn.name else []
        for site in (site for body in inside for site in find_sites(read(body))[0].values()):
            norms[site.base, site.label] = Norm.at(eqn, site, "kept", f"it is inside {eqn.name}")
    return list(norms.values())


def _reductions(program: Program) -> int:
    names = ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or")
    return sum(eqn.outputs[0].times for eqn in program.equations if eqn.name in names)
