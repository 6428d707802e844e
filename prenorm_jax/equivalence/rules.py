"""The steps of conversion, each a few lines on (tree, roles)."""

from __future__ import annotations

from collections.abc import Callable

from prenorm_jax.base.trees import Array, Path
from prenorm_jax.equivalence.roles import Roles
from prenorm_jax.models.coordinates import center, drop_last, entries, restore_last

Flat = dict[Path, Array]


def fold_norms(flat: Flat, roles: Roles) -> Flat:
    """Moves each norm's γ and β into the readers it feeds: W(γ ⊙ n + β) + b = (W diag(γ)) n + (b + Wβ)."""
    folded = {path: leaf for path, leaf in flat.items() if roles[path].kind != "norm"}
    for path, role in roles.items():
        if role.kind != "reader" or path not in flat:
            continue
        kernel = flat[path]
        if role.shift is not None:
            added = (kernel * _along(flat[role.shift], kernel, role.axis)).sum(role.axis)
            folded[role.bias] = folded[role.bias] + added if role.bias in folded else added
        if role.scale is not None:
            folded[path] = kernel * _along(flat[role.scale], kernel, role.axis)
    return folded


def fold_layer_scales(flat: Flat, roles: Roles) -> Flat:
    """Moves each LayerScale λ, called `X_scale`, into kernel and bias of the writer X beside it: λ ⊙ (W a + b)."""
    folded = dict(flat)
    for path, role in roles.items():
        if role.kind != "layer_scale" or path not in flat:
            continue
        scale, writer = folded.pop(path), _scaled_writer(path)
        for leaf in (*writer, "kernel"), (*writer, "bias"):
            if leaf in folded:
                folded[leaf] = folded[leaf] * _along(scale, folded[leaf], -1)
    return folded


def _scaled_writer(path: Path) -> Path:
    return (*path[:-1], path[-1].removesuffix("_scale"))


def center_heads(flat: Flat, roles: Roles, head_dim: int) -> Flat:
    """Removes the mean over each head from what a norm over each head takes."""
    centered = dict(flat)
    for path, role in roles.items():
        if role.normed_axis is not None:
            for leaf in {path, role.bias} & flat.keys():
                centered[leaf] = center(_split_heads(flat[leaf], head_dim)).reshape(flat[leaf].shape)
    return centered


def _split_heads(x: Array, head_dim: int) -> Array:
    """(..., heads · head_dim) -> (..., heads, head_dim)."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def _along(vector: Array, like: Array, axis: int) -> Array:
    """Shapes a norm's (..., D) parameter to multiply `like` along `axis`; leading (stacked) axes stay aligned."""
    stacked = vector.shape[:-1]
    own_axes = range(len(stacked) - like.ndim, 0)
    return vector.reshape(stacked + tuple(vector.shape[-1] if i == axis else 1 for i in own_axes))


def _keep(x: Array, axis: int) -> Array:
    return x


def _read_restored(kernel: Array, axis: int) -> Array:
    """[W, 0] C: the reader of z = E y whose entries along the stream sum to zero, from the reader of y."""
    xp = kernel.__array_namespace__()
    zero = xp.zeros_like(kernel.sum(axis, keepdims=True))
    return center(xp.concat([kernel, zero], axis=axis), axis)


def _read_compressed(kernel: Array, axis: int) -> Array:
    """The reader of y from the reader of z = E y: W z = W[:d-1] y - W[d-1] 1ᵀy."""
    return drop_last(kernel, axis) - entries(kernel, slice(-1, None), axis)


# norm -> (map of writers, map of readers)
_StreamMap = Callable[[Array, int], Array]


_TO_RMS: dict[str, tuple[_StreamMap, _StreamMap]] = {
    "layernorm": (center, _keep),
    "rmsnorm": (center, _keep),  # of what its dtype had rounded off: dropping an entry would multiply it by d
    "crmsnorm": (restore_last, _read_restored),
}


_FROM_RMS: dict[str, tuple[_StreamMap, _StreamMap]] = {
    "layernorm": (_keep, _keep),
    "rmsnorm": (_keep, _keep),
    "crmsnorm": (drop_last, _read_compressed),
}


def _map_stream(flat: Flat, roles: Roles, map_writer: _StreamMap, map_reader: _StreamMap) -> Flat:
    maps = {"writer": map_writer, "reader": map_reader}
    return {
        path: maps[roles[path].kind](leaf, roles[path].axis) if path in roles and roles[path].kind in maps else leaf
        for path, leaf in flat.items()
    }
