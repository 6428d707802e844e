"""The residual stream: its coordinates under each norm, and which parameter does what to it.

Under layernorm a position of the stream is x in R^d. Under rmsnorm it is z = Cx, the same without its mean
(C = I - 11ᵀ/d). Under crmsnorm it is y = Pz: the last of z's entries is dropped, being minus the sum of the others.
`center`, `drop_last` and `restore_last` are these maps; they work on NumPy and JAX arrays along any axis, so the
models (on activations) and the converter (on parameters) use the same ones.

Every parameter of a model names its axes where it is created, and at most one of them lies on the stream:

    write        adds to the stream: embeddings, attention output, MLP down
    read         consumes a normalised stream: query, key, value, up, gate, head
    norm         the affine map of the norm that feeds readers
    layer_scale  multiplies what a branch writes
    raw          d wide, but not in stream coordinates: what follows at run time centres it (ModelConfig.raw_embedding,
                 ...), or it belongs to what comes after the stream

Off the stream, `normed_heads` and `normed_kv_heads` are the outputs of query and key that a LayerNorm over each head
follows: a linear map into another small stream, whose mean can be removed from the map's weights by the same argument.

`parameter_roles` turns these names into what the converter needs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from prenorm_jax.model_config import ModelConfig
from prenorm_jax.norms import CRMSNorm, LayerNorm, RMSNorm

Array = Any  # jax.Array or numpy.ndarray
Path = tuple[str, ...]
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


def center(x: Array, axis: int = -1) -> Array:
    """C x: removes the mean along `axis`. In float32 at least; the result has the input's dtype.

    Twice: one subtraction leaves the rounding error of the mean in every entry, and where |mean| ≫ std that is far
    above the entries' own. It matters: LayerNorm would remove it, but RMSNorm keeps it and CRMSNorm multiplies it by d.
    (Once in the derivative, for no gradient is all mean; and of narrower dtypes than float32, whose own rounding is far
    above that of a mean in float32.)
    """
    dtype, x = x.dtype, _at_least_float32(x)
    if x.dtype != dtype:
        return _center(x, axis).astype(dtype)
    return _center_jax(x, axis) if isinstance(x, jax.Array) else _center(_center(x, axis), axis)


def _center(x: Array, axis: int) -> Array:
    return x - x.mean(axis, keepdims=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _center_jax(x: jax.Array, axis: int) -> jax.Array:
    return _center(_center(x, axis), axis)


@_center_jax.defjvp
def _(axis: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _center_jax(*primals, axis), _center(*tangents, axis)


def drop_last(z: Array, axis: int = -1) -> Array:
    """P z: d entries along `axis` -> the first d-1."""
    return entries(z, slice(0, -1), axis)


def restore_last(y: Array, axis: int = -1) -> Array:
    """E y: d-1 entries along `axis` -> d, the last being minus the sum of the others."""
    last = -_at_least_float32(y).sum(axis, keepdims=True).astype(y.dtype)
    return y.__array_namespace__().concat([y, last], axis=axis)


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def entries(x: Array, which: slice, axis: int) -> Array:
    """The entries `which` of x along `axis`."""
    index = [slice(None)] * x.ndim
    index[axis] = which
    return x[tuple(index)]


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """What a model needs to know about its stream.

    Attributes:
      norm: the module that normalises it.
      enter: a raw d-wide value -> stream coordinates.
      leave: stream coordinates -> d wide.
    """

    norm: type[nn.Module]
    enter: Callable[[Array], Array]
    leave: Callable[[Array], Array]


COORDINATES = {
    "layernorm": Coordinates(LayerNorm, enter=lambda x: x, leave=lambda x: x),
    "rmsnorm": Coordinates(RMSNorm, enter=center, leave=lambda z: z),
    "crmsnorm": Coordinates(CRMSNorm, enter=lambda x: drop_last(center(x)), leave=restore_last),
}


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
def abstract_params(config: ModelConfig) -> dict[Path, nn.LogicallyPartitioned]:
    """Path -> the leaf's logical axis names (`.names`) and its shape and dtype (`.value`); no array is made."""
    from prenorm_jax.models import build_model  # the models are built on this module

    model = build_model(config)
    variables = jax.eval_shape(model.annotated_init, jax.random.key(0), model.example())
    return flatten_dict(variables["params"])


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
