"""The steps of conversion, each a few lines on (tree, roles), whatever network the tree belongs to.

A tree is flat here, {path: array}, and may be part of one: whole modules, as `modules` says.
"""

from collections.abc import Callable

import numpy as np

from prenorm_jax.base.trees import Array, Flat, Path
from prenorm_jax.equivalence.roles import UNFELT, Roles
from prenorm_jax.models.coordinates import Coordinates, center
from prenorm_jax.models.parameters import NormSite


def fold_norms(flat: Flat, roles: Roles) -> Flat:
    """Moves each norm's γ and β into the readers it feeds: W(γ ⊙ n + β) + b = (W diag(γ)) n + (b + Wβ)."""
    affines = affine_leaves(roles)
    gone = set(affines.values())
    folded = {path: leaf for path, leaf in fold_shifts(flat, roles).items() if path not in gone}
    for path, role in roles.items():
        scale = affines.get((role.norm, "scale"))
        if role.reads is not None and path in flat and scale is not None:
            folded[path] = flat[path] * _along(flat[scale], flat[path], role.reads)
    return folded


def fold_shifts(flat: Flat, roles: Roles) -> Flat:
    """The tree with each reader's Wβ, of the norm that feeds it, added to its bias."""
    folded, affines = dict(flat), affine_leaves(roles)
    for path, role in roles.items():
        shift = affines.get((role.norm, "bias"))
        if role.reads is None or path not in flat or shift is None or role.bias == UNFELT:
            continue
        added = _weighted_sum(flat[path], _along(flat[shift], flat[path], role.reads), role.reads)
        folded[role.bias] = folded[role.bias] + added if role.bias in folded else added
    return folded


def _weighted_sum(x: Array, weights: Array, axis: int) -> Array:
    """Σ x · weights along `axis`. XLA makes one loop of it; NumPy would write the product out first."""
    if not isinstance(x, np.ndarray):
        return (x * weights).sum(axis)
    axes = list(range(x.ndim))
    return np.einsum(x, axes, weights, axes, [i for i in axes if i != axis % x.ndim])


def affine_leaves(roles: Roles) -> dict[tuple[NormSite | None, str], Path]:
    """(a norm, "scale" or "bias") -> its γ or β, of norms that have them."""
    return {(role.norm, role.affine): path for path, role in roles.items() if role.affine is not None}


def fold_layer_scales(flat: Flat, roles: Roles) -> Flat:
    """Moves each LayerScale λ into what it multiplies: λ ⊙ (W a + b) = (diag(λ) W) a + λ ⊙ b."""
    folded = dict(flat)
    for path, role in roles.items():
        if role.scales and path in flat:
            scale = folded.pop(path)
            for leaf, axis in role.scales:
                folded[leaf] = folded[leaf] * _along(scale, folded[leaf], axis)
    return folded


def center_heads(flat: Flat, roles: Roles) -> Flat:
    """Removes the mean over each head from what a norm over each head takes."""
    centered = dict(flat)
    for path, role in roles.items():
        if role.heads is not None and path in flat:
            centered[path] = map_heads(center, flat[path], role.heads, role.head_dim)
    return centered


def map_heads(function: Callable[[Array], Array], x: Array, axis: int, head_dim: int) -> Array:
    """x with the function, of (..., heads, head_dim), applied along its axis of heads · head_dim entries."""
    xp = x.__array_namespace__()
    moved = xp.moveaxis(x, axis, -1)
    return xp.moveaxis(function(split_heads(moved, head_dim)).reshape(moved.shape), -1, axis)


def split_heads(x: Array, head_dim: int) -> Array:
    """(..., heads · head_dim) -> (..., heads, head_dim)."""
    return x.reshape(*x.shape[:-1], -1, head_dim)


def _along(vector: Array, like: Array, axis: int) -> Array:
    """Shapes a (..., D) parameter to multiply `like` along `axis`; leading (stacked) axes stay aligned."""
    stacked = vector.shape[:-1]
    own_axes = range(len(stacked) - like.ndim, 0)
    return vector.reshape(stacked + tuple(vector.shape[-1] if i == axis else 1 for i in own_axes))


def change_coordinates(flat: Flat, roles: Roles, source: Coordinates, target: Coordinates) -> Flat:
    """Writers and readers in the coordinates `target` of the stream, from those in `source`; by way of rmsnorm's."""
    if (source.of, target.of) == ("rmsnorm", "layernorm"):
        return flat  # the same numbers
    # The mean of an rmsnorm tree's writers is what their dtype has rounded off: dropping an entry would multiply it.
    to_rms = (source.leave if source.of == "crmsnorm" else center), source.read_back
    changed = dict(flat)
    for maps in (to_rms, (target.write, target.read)):
        for path in flat:
            for axis, change in zip((roles[path].writes, roles[path].reads), maps, strict=True):
                if axis is not None:
                    changed[path] = change(changed[path], axis)
    return changed


def modules(roles: Roles) -> dict[Path, list[Path]]:
    """Module -> the leaves of a tree that conversion needs for the module's own: those, and what is folded into them.

    Each leaf of the converted tree is made of the leaves of one module.
    """
    result: dict[Path, list[Path]] = {}
    affines = affine_leaves(roles)
    for path, role in roles.items():
        if role.affine is None and not role.scales:
            result.setdefault(path[:-1] or path, []).append(path)
    for path, role in roles.items():
        if role.reads is not None:
            leaves = (affines.get((role.norm, affine)) for affine in ("scale", "bias"))
            result[path[:-1] or path] += [leaf for leaf in leaves if leaf is not None]
        for module in {leaf[:-1] or leaf: None for leaf, _ in role.scales}:
            result[module].append(path)
    return result
