"""What each leaf of a parameter tree does to the residual stream: all that conversion needs to know of a network.

Our own models' roles follow from what their parameters are created with (`models/parameters.py`). Another tree's may be
written by hand: conversion works on (tree, roles).
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.trees import Path
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.parameters import HEAD_AXES, OTHER_AXES, STREAM_AXES, NormSite, Parameter

UNFELT: Path = ()  # in place of a reader's bias


@dataclasses.dataclass(frozen=True)
class Role:
    """What one leaf does to residual streams; nothing, if all is None. A leaf may read one stream and write another.

    A tied table has no axes here: it stays raw, and what it writes is centred at run time.

    Axes are counted from the end (negative), so that stacking layers in front changes nothing.

    Attributes:
      writes: the axis along which it adds to a stream.
      stream: the name of that stream, in networks that have several. (The one that a leaf reads is its norm's.)
      reads: the axis along which it consumes a normalised stream.
      norm: of a reader, the norm that feeds it (None: nothing is known of it); of γ and β, the norm they are of.
      affine: of γ "scale", of β "bias".
      bias: of a reader, the leaf that takes up Wβ; it need not exist yet. UNFELT: none, since nobody would feel it, as
        of keys that are not turned, where softmax removes it. Of what reads beside the stream, its bias.
      scales: of a LayerScale λ, the leaves that it multiplies, each with the axis along which it does.
      heads: the axis whose every `head_dim` entries a norm over a head takes.
      head_dim: see heads.
    """

    writes: int | None = None
    stream: str = ""
    reads: int | None = None
    norm: NormSite | None = None
    affine: str | None = None
    bias: Path | None = None
    scales: tuple[tuple[Path, int], ...] = ()
    heads: int | None = None
    head_dim: int | None = None

    @property
    def is_internal(self) -> bool:
        """Whether conversion leaves it as it is (unless it is some reader's bias, or scaled)."""
        return self.writes is self.reads is self.affine is self.heads is None and not self.scales


Roles = Mapping[Path, Role]


@functools.lru_cache
def parameter_roles(config: ModelConfig) -> Roles:
    """The role of every leaf of the model's parameter tree, from what it is created with.

    Raises ValueError for a leaf whose axis names are unknown or put it on the stream twice: no leaf is internal by
    default.
    """
    leaves = abstract_params(config)
    roles = {path: _role(path, leaf, leaves) for path, leaf in leaves.items()}
    check_roles(roles)
    return roles


def _role(path: Path, leaf: Parameter, leaves: Mapping[Path, Any]) -> Role:
    names = getattr(leaf, "names", ())
    on_stream = [name for name in names if name in STREAM_AXES]
    known = STREAM_AXES + HEAD_AXES + OTHER_AXES
    if not names or len(on_stream) > 1 or any(name not in known for name in names):
        raise ValueError(f"parameter {'/'.join(path)}: axis names {names} do not give it a role")
    heads = next((i - len(names) for i, name in enumerate(names) if name in HEAD_AXES), None)
    role = Role(heads=heads, head_dim=leaf.head_dim)
    if not on_stream:
        is_kernel = path[-1] == "kernel" and names[0] == "raw"
        return dataclasses.replace(role, bias=(*path[:-1], "bias")) if is_kernel else role
    axis = names.index(on_stream[0]) - len(names)
    if on_stream == ["write"]:
        return dataclasses.replace(role, writes=axis)
    if on_stream == ["read"]:
        return dataclasses.replace(role, reads=axis, norm=leaf.norm, bias=(*path[:-1], "bias"))
    if on_stream == ["norm"]:
        return dataclasses.replace(role, norm=leaf.norm, affine=path[-1])
    scaled = [(*leaf.scaled, name) for name in ("kernel", "bias")]
    return dataclasses.replace(role, scales=tuple((leaf, -1) for leaf in scaled if leaf in leaves))


def with_biases(roles: Roles) -> dict[Path, Role]:
    """The roles, and those of the biases that folding may give to readers which have none."""
    new = {
        role.bias: Role(
            writes=None if role.writes is None else -1,
            stream=role.stream,
            heads=None if role.heads is None else -1,
            head_dim=role.head_dim,
        )
        for role in roles.values()
        if role.bias and role.bias not in roles
    }
    return {**roles, **new}


def check_roles(roles: Roles, shapes: Mapping[Path, tuple[int, ...] | None] | None = None) -> None:
    """Raises PrenormError, naming the leaf, for roles that contradict themselves, each other or the leaves' shapes."""
    feeding = {role.norm for role in roles.values() if role.reads is not None}
    shifts = {role.norm for role in roles.values() if role.affine == "bias"}
    sites: dict[Path, NormSite] = {}
    for path, role in roles.items():
        missing = ["/".join(leaf) for leaf, _ in role.scales if leaf not in roles]
        problems = {
            "is of a norm that feeds no reader: name it as the norm of one": role.affine and role.norm not in feeding,
            'has an affine that is neither "scale" nor "bias"': role.affine not in (None, "scale", "bias"),
            f"scales {', '.join(missing)}, which is not in the tree": missing,
            "reads the stream along the axis on which it writes it (a tied table): such a leaf stays raw, so give it a "
            "role without axes, and centre what it writes at run time": role.reads is not None
            and role.reads == role.writes,
            "takes up a norm's β: name the leaf of its bias": role.reads is not None
            and role.norm in shifts
            and role.bias is None,
            "names a norm that another leaf names with another epsilon or stream": role.norm is not None
            and sites.setdefault(role.norm.path, role.norm) != role.norm,
        }
        if shapes is not None and (problem := _shape_problem(role, shapes[path])):
            problems[problem] = True
        for problem, found in problems.items():
            if found:
                raise PrenormError(f"{'/'.join(map(str, path))} {problem}")


def _shape_problem(role: Role, shape: tuple[int, ...] | None) -> str:
    """What keeps a leaf of this shape (None: no array) from its role; "" if nothing does."""
    axes = [axis for axis in (role.writes, role.reads, role.heads) if axis is not None]
    if shape is None:
        return "is no array"
    if not all(-len(shape) <= axis < 0 for axis in axes):
        return "has no such axis; axes are counted from the end, from -1"
    if role.heads is not None and (not role.head_dim or shape[role.heads] % role.head_dim):
        return "has heads of no width, or of one that does not divide them"
    return ""
