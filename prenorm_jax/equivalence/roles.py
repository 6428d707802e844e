"""What each parameter does to the residual stream, from the axis names it is created with."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from prenorm_jax.base.trees import Path
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import ModelConfig

STREAM_AXES = ("write", "read", "norm", "layer_scale")


NORMED_AXES = ("normed_heads", "normed_kv_heads")


OTHER_AXES = (
    "raw",
    "vocab",
    "position",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "patch",
    "channel",
    "token",
    "class",
    "layer",
)


@dataclasses.dataclass(frozen=True)
class Role:
    """What one leaf of a parameter tree does to the stream.

    Attributes:
      kind: writer, reader, norm, layer_scale, or internal (nothing).
      axis: the stream axis, counted from the end (negative), so that stacking layers in front changes nothing.
      normed_axis: the axis, counted likewise, whose every head_dim entries are what a norm over a head takes.
      scale, shift: of a reader: the leaves γ and β of the norm that feeds it; None where there is no such norm.
      bias: of a reader: the leaf that takes up Wβ; it need not exist yet.
    """

    kind: str
    axis: int | None = None
    normed_axis: int | None = None
    scale: Path | None = None
    shift: Path | None = None
    bias: Path | None = None


Roles = dict[Path, Role]


_KINDS = {"write": "writer", "read": "reader", "norm": "norm", "layer_scale": "layer_scale"}


@functools.lru_cache
def parameter_roles(config: ModelConfig) -> Roles:
    """The role of every leaf of the model's parameter tree, from the axis names given where it is created.

    Raises ValueError for a leaf whose names are unknown or put it on the stream twice: no leaf is internal by default.
    """
    leaves = abstract_params(config)
    roles = {}
    for path, leaf in leaves.items():
        names = getattr(leaf, "names", ())
        on_stream = [name for name in names if name in STREAM_AXES]
        known = STREAM_AXES + NORMED_AXES + OTHER_AXES
        if not names or len(on_stream) > 1 or any(name not in known for name in names):
            raise ValueError(f"parameter {'/'.join(path)}: axis names {names} do not give it a role")
        normed_axis = next((i - len(names) for i, name in enumerate(names) if name in NORMED_AXES), None)
        if not on_stream:
            roles[path] = Role("internal", normed_axis=normed_axis)
            continue
        axis = names.index(on_stream[0]) - len(names)
        if on_stream == ["read"]:
            norm = _feeding_norm(path, leaves)
            scale, shift = ((*norm, leaf_name) for leaf_name in ("scale", "bias"))
            roles[path] = Role(
                "reader",
                axis,
                normed_axis,
                scale=scale if scale in leaves else None,
                shift=shift if shift in leaves else None,
                bias=(*path[:-1], "bias"),
            )
        else:
            roles[path] = Role(_KINDS[on_stream[0]], axis)
    return roles


def _feeding_norm(path: Path, leaves: dict[Path, Any]) -> Path:
    """The norm that feeds the reader at `path`: beside some module X around it, `X_norm`, or else `norm`.

    So `block_0/attention/query/kernel` is fed by `block_0/attention_norm`, or by `block_0/norm` if both branches share
    it. Where neither has parameters, the path returned holds none.
    """
    norms = {leaf_path[:-1] for leaf_path, leaf in leaves.items() if leaf.names[-1:] == ("norm",)}
    for depth in range(len(path) - 2, -1, -1):
        for name in (f"{path[depth]}_norm", "norm"):
            candidate = (*path[:depth], name)
            if candidate in norms:
                return candidate
    return ("norm",)
