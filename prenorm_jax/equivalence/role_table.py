"""The roles of a tree that others defined, by a table: what the axes of each leaf are, and which norm feeds it.

    leaf                                      its axes              its norm         its bias
    tokens/embedding                          vocab write
    block_{i}/ln_{j}/{scale,bias}             {scale,bias}
    block_{i}/attn/{query,key,value}/kernel   read heads head_dim   block_{i}/ln_0
    block_{i}/attn/{query,key,value}/bias     heads head_dim
    block_{i}/attn/out/kernel                 heads head_dim write
    block_{i}/attn/out/bias                   write
    block_{i}/layer_scale                     layer_scale           block_{i}/attn/out/kernel block_{i}/attn/out/bias

Columns stand two spaces apart, and what follows # is a comment. A leaf is named by the keys that lead to it; {i} is a
number, the same one in all of a line's columns. {a,b} makes a line two; one further right goes along with the same one
in the name, or else with the last there of as many. Axes are in the array's order; - is none at all:

    write         adds to a stream                              read        consumes what a norm gives
    scale, bias   a norm's γ or β, which goes into its readers  layer_scale multiplies what a branch writes
    normed        what a norm takes as a whole, as QK-norms do; of heads that lie in one axis: normed:64, their width
    layer         stacked layers; always the first
    raw           d wide, but stays as it is: a tied table, a norm before it, what a nonlinearity keeps from being
                  centred; what such leaves add to the stream has to be centred at run time
    vocab position heads kv_heads head_dim mlp qkv patch channel token class other: off the stream, all the same here

The third column names, for a reader, the norm that feeds it, or - for one that has neither γ nor β; for γ and β the
norm they are of, by default their module; for a layer_scale the leaves that it multiplies, a space apart. The fourth
says which leaf takes up a reader's Wβ, by default the `bias` beside its `kernel` or `weight`; there - is for none,
since nobody would feel it: softmax removes what is the same for all keys, where these are not turned.
"""

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.equivalence.roles import UNFELT, Role, Roles, check_roles
from prenorm_jax.models.parameters import OTHER_AXES, NormSite

NOTHING = "-"  # in place of axes, a norm with an affine, or a bias
RAW, LAYER = "raw", "layer"
_AFFINES = ("scale", "bias")
_WORDS = {"write", "read", *_AFFINES, "layer_scale", *OTHER_AXES, "qkv", "other"}
_SHOWN = 8  # of each kind of problem

Shapes = Mapping[str, tuple[int, ...]]


class Row(NamedTuple):
    """A line of a table, for one of the leaves that it names, or before {i} is a number; columns as there."""

    leaf: str
    axes: tuple[str, ...]
    of: str = ""
    bias: str = ""

    def axis(self, word: str) -> int | None:
        """Where it has an axis of this name, from the end."""
        return self.axes.index(word) - len(self.axes) if word in self.axes else None

    @property
    def head_dim(self) -> int | None:
        """How wide what a norm takes is, where its axis is several times as wide."""
        return next((int(word.partition(":")[2]) for word in self.axes if word.startswith("normed:")), None)

    @property
    def heads(self) -> int | None:
        """The axis that a norm over each head takes, from the end."""
        return next((i - len(self.axes) for i, word in enumerate(self.axes) if word.startswith("normed")), None)

    @property
    def takes_up(self) -> str | None:
        """The name of the leaf that takes up Wβ of a reader, NOTHING for none; None: the table does not say."""
        beside = re.sub(r"(kernel|weight)$", "bias", self.leaf)
        return self.bias or (beside if beside != self.leaf else None)


def read_rows(table: str) -> Iterator[Row]:
    """The lines of a table, each for one name. Raises PrenormError for a line that cannot be read."""
    for line in filter(None, (line.partition("#")[0].strip() for line in table.splitlines())):
        columns = re.split(r"\s{2,}", line)
        if not 2 <= len(columns) <= 4:
            raise PrenormError(f"role table: {line!r} has {len(columns)} columns, two spaces apart, and not 2 to 4")
        for name, *others in _expanded(line, columns):
            axes = () if others[0] == NOTHING else tuple(others[0].split())
            yield Row(name, axes, *others[1:])


def _expanded(line: str, columns: list[str]) -> Iterator[list[str]]:
    """The columns for each option of {a,b} in the first."""
    group = re.compile(r"\{([^{}]*,[^{}]*)\}")
    own = [found.split(",") for found in group.findall(columns[0])]
    for chosen in itertools.product(*map(range, map(len, own))):
        names = iter(options[which] for options, which in zip(own, chosen, strict=True))
        done = [group.sub(lambda _, names=names: next(names), columns[0])]
        for column in columns[1:]:
            groups = [found.split(",") for found in group.findall(column)]
            if any(len(options) not in map(len, own) for options in groups):
                raise PrenormError(f"role table: {line!r} has a group that goes along with none in the leaf's name")
            words = iter(options[chosen[_partner(options, own)]] for options in groups)
            done.append(group.sub(lambda _, words=words: next(words), column))
        yield done


def _partner(options: list[str], own: list[list[str]]) -> int:
    """Which group of the name this one goes along with."""
    of_as_many = [i for i, others in enumerate(own) if len(others) == len(options)]
    return own.index(options) if options in own else of_as_many[-1]


def match(table: str, shapes: Shapes) -> dict[str, Row]:
    """Each leaf's row, its numbers filled in.

    Raises PrenormError listing all at once: leaves without a line, or with several, lines without a leaf, unknown axes,
    leaves with another number of them.
    """
    rows, found = list(read_rows(table)), {name: [] for name in shapes}
    unused = []
    for row in rows:
        pattern = re.compile(_regex(row.leaf))
        matches = {name: matched for name in shapes if (matched := pattern.fullmatch(name))}
        unused += [] if matches else [row.leaf]
        for name, matched in matches.items():
            of, bias = (_filled(column, matched.groupdict()) for column in (row.of, row.bias))
            found[name].append(Row(name, row.axes, of, bias))
    once = {name: own[0] for name, own in found.items() if len(own) == 1}
    words = dict.fromkeys(word for row in rows for word in row.axes)
    _refuse(
        {
            "no line for": [name for name, own in found.items() if not own],
            "several lines for": [name for name, own in found.items() if len(own) > 1],
            "no leaf for": unused,
            "unknown axes": [word for word in words if word not in _WORDS and not re.fullmatch(r"normed(:\d+)?", word)],
            "another number of axes:": [
                f"{name} {list(shapes[name])}, not {' '.join(row.axes) or NOTHING}"
                for name, row in once.items()
                if len(shapes[name]) != len(row.axes)
            ],
        }
    )
    return once


def _regex(pattern: str) -> str:
    """Of names in which every {i} is a number, the same where it stands twice."""
    seen: set[str] = set()

    def number(found: re.Match) -> str:
        name = found[1]
        again = name in seen
        seen.add(name)
        return f"(?P={name})" if again else rf"(?P<{name}>\d+)"

    return re.sub(r"\\\{(\w+)\\\}", number, re.escape(pattern))


def _filled(column: str, numbers: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda found: numbers.get(found[1], found[0]), column)


def table_roles(rows: Mapping[str, Row], shapes: Shapes) -> Roles:
    """The role of each leaf, by the path (name,), of a table's rows for the leaves (`match`).

    Raises PrenormError, listing all at once: readers, norms, biases, widths that do not fit each other.
    """
    roles = {(name,): _role(row, rows, shapes[name]) for name, row in rows.items()}
    _refuse(_contradictions(rows, roles, shapes))
    check_roles(roles, {(name,): shape for name, shape in shapes.items()})
    return roles


def norm_of(row: Row) -> str:
    """The name of the norm of a reader, of γ or of β."""
    return row.of or re.sub(r"[/.]?[^/.]*$", "", row.leaf)


def _role(row: Row, rows: Mapping[str, Row], shape: tuple[int, ...]) -> Role:
    heads = row.heads
    role = Role(
        writes=row.axis("write"),
        reads=row.axis("read"),
        heads=heads,
        head_dim=None if heads is None else row.head_dim or shape[heads],
    )
    site = NormSite((norm_of(row),), 0.0)  # ε is no matter of the weights
    if role.reads is not None:
        bias = UNFELT if row.takes_up == NOTHING else row.takes_up and (row.takes_up,)
        return Role(**vars(role) | {"norm": None if row.of == NOTHING else site, "bias": bias})
    if affine := next((word for word in _AFFINES if word in row.axes), None):
        return Role(norm=site, affine=affine)
    if "layer_scale" in row.axes:
        axes = {name: rows[name].axis("write") for name in row.of.split() if name in rows}
        return Role(scales=tuple(((name,), axis) for name, axis in axes.items() if axis is not None))
    return role


def _contradictions(rows: Mapping[str, Row], roles: Roles, shapes: Shapes) -> dict[str, list[str]]:
    """What does not fit, by kind."""
    found: dict[str, list[str]] = {}

    def note(kind: str, what: str) -> None:
        found.setdefault(kind, []).append(what)

    affines: dict[tuple[str, str], str] = {}
    for name, row in rows.items():
        if (affine := roles[name,].affine) and (other := affines.setdefault((norm_of(row), affine), name)) != name:
            note(f"two leaves are the {affine} of one norm:", f"{other} and {name}")
    widths = {shapes[name][-1] for name in affines.values()}
    for name, row in rows.items():
        role, shape = roles[name,], shapes[name]
        if LAYER in row.axes[1:] or any(word in row.axes[:-1] for word in (*_AFFINES, "layer_scale")):
            note("layer comes first, and scale, bias and layer_scale last:", f"{name} {' '.join(row.axes)}")
        if role.writes is not None and widths and shape[role.writes] not in widths:
            note("as wide as no norm:", f"{name} writes {shape[role.writes]}")
        if "layer_scale" in row.axes:
            fits = {leaf[0] for leaf, axis in role.scales if shapes[leaf[0]][axis] == shape[-1]}
            if wrong := [leaf for leaf in row.of.split() or ["nothing"] if leaf not in fits]:
                note("a layer_scale of what is no writer of its width:", f"{name} of {', '.join(wrong)}")
        if role.reads is None:
            continue
        own = {word: leaf for word in _AFFINES if (leaf := affines.get((row.of, word)))}
        if not own and row.of != NOTHING:
            note("readers of no norm that has a scale or bias (- is one without):", name)
        for leaf in own.values():
            stacked = shapes[leaf][:-1]
            if shapes[leaf][-1] != shape[role.reads] or stacked not in ((), shape[: len(stacked)]):
                note(
                    "readers of another shape than their norm:", f"{name} {list(shape)} of {leaf} {list(shapes[leaf])}"
                )
        rest = tuple(size for axis, size in enumerate(shape) if axis != role.reads % len(shape))
        if "bias" in own and row.takes_up is None:
            note("readers whose bias has to be named in the fourth column:", name)
        elif "bias" in own and shapes.get(row.takes_up, rest) != rest:
            note("biases of another shape than what they take up:", f"{row.takes_up} of {name}")
    return found


def _refuse(problems: Mapping[str, list[str]]) -> None:
    """Raises PrenormError for problems, by kind, if there are any."""
    said = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            said.append(f"{kind} {', '.join(names[:_SHOWN])}{more}")
    if said:
        raise PrenormError(f"the role table does not fit the tree: {'; '.join(said)}")
