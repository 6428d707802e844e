"""The probes of roles that were written by hand, where of a network only its forward function is known.

    fold       γ and β go into the declared readers, and become 1 and 0; the network keeps its LayerNorms
    shift      u ⊗ 1 is added to every declared writer, each with its own u: what a LayerNorm removes; and, in the same
               network with γ = 1 and β = 0, to every declared reader along what it reads, which has no mean
    omission   in that network any other leaf, shifted along any axis, is felt; one that is not is a writer or a reader
               that was not declared, which a shift alone cannot find
    scale      of a norm without an affine the readers are still felt when all declared writers are large: an undeclared
               one vanishes beside them

The outputs stay the same under the first two, to rounding, if the roles are right. A shift under a LayerScale λ is u/λ:
λ is folded first, and becomes 1. Each costs a few calls of the function, the last one for every axis of every leaf.
What they cannot tell, where a norm has no affine, is its reader that is declared a writer: there to remove its mean is
nothing, and under rmsnorm nothing else is done to it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.trees import Flat, Path
from prenorm_jax.equivalence.roles import UNFELT, Role, Roles, check_roles
from prenorm_jax.equivalence.rules import affine_leaves, fold_layer_scales, fold_norms

Apply = Callable[[Any], Any]  # a tree of parameters -> outputs, of inputs that the caller has chosen

TOLERANCE = 1e-9  # of float64, relative: what is the same is 1e-15 to 1e-12, what is not .02 and more


def check_by_probes(
    apply: Apply, params: Mapping[str, Any], roles: Roles, tolerance: float = TOLERANCE, raw: Collection[Path] = ()
) -> None:
    """Raises PrenormError, naming what is wrong, unless the probes find the roles to be the network's.

    Args:
      apply: the network's outputs of a tree such as `params`, in float64; jitted, or it takes long.
      params: the tree of a Pre-LN network, with norms' γ and β of many values: of γ = 1 and β = 0 nothing can be told.
      roles: of each of its leaves.
      tolerance: relative to the largest output.
      raw: leaves that add to the stream, though conversion leaves them as they are.
    """
    flat = {path: np.asarray(leaf) for path, leaf in flatten_dict(dict(params)).items()}
    if missing := sorted("/".join(path) for path in flat.keys() ^ roles.keys()):
        raise PrenormError(f"leaves without a role, or roles without a leaf: {', '.join(missing[:8])}")
    check_roles(roles, {path: leaf.shape for path, leaf in flat.items()})
    _check_affines(flat, roles)
    differ = _difference_from(apply, flat)
    if (off := differ(fold(flat, roles))) > tolerance:
        raise PrenormError(f"fold: with γ and β in the declared readers the outputs change by {off:.1e}: {_FEEDS}")
    if (off := differ(shifted(flat, roles))) > tolerance:
        raise PrenormError(f"shift: the declared writers' mean changes the outputs by {off:.1e}: {_WRITERS}")
    differ = _difference_from(apply, plain := _without_affines(flat, roles))
    if names := ", ".join("/".join(path) for path in _unfelt(plain, differ, tolerance)[:8]):
        raise PrenormError(
            f"nothing of {names} is felt in the outputs, so that nothing can be said of it: give longer and more "
            "varied inputs, and all outputs; or leave it out of the tree"
        )
    if (off := differ(shifted(plain, roles, reads=True))) > tolerance:
        raise PrenormError(f"shift: what the declared readers read has a mean, felt by {off:.1e}: {_FEEDS}")
    if found := omitted(plain, roles, differ, tolerance):
        names = ", ".join(f"{'/'.join(path)} (axis {axis})" for path, axis in found[:8])
        raise PrenormError(f"omission: a mean along {names} is not felt: declare it as a writer or a reader")
    if found := vanishing(plain, roles, apply, raw):
        names = ", ".join("/".join(path) for path in found[:8])
        raise PrenormError(f"scale: {names} vanishes beside large writers: it is a writer, and no reader")


def _check_affines(flat: Flat, roles: Roles) -> None:
    """Raises PrenormError where a norm has two scales or biases, or another width than what reads it."""
    affines = affine_leaves(roles)
    if len(affines) < sum(role.affine is not None for role in roles.values()):
        raise PrenormError("fold: two leaves are declared the scale, or the bias, of one norm: name each one's own")
    for (norm, _), affine in affines.items():
        width = flat[affine].shape[-1]
        for path, role in roles.items():
            if role.reads is not None and role.norm == norm and flat[path].shape[role.reads] != width:
                other = flat[path].shape[role.reads]
                raise PrenormError(
                    f"fold: {'/'.join(path)} reads along an axis of {other}, but its norm is {width} wide"
                )


def _difference_from(apply: Apply, flat: Flat) -> Callable[[Flat], float]:
    """How far the outputs of another tree are from this one's, relative to the largest."""
    expected = np.asarray(apply(unflatten_dict(flat)))

    def differ(changed: Flat) -> float:
        delta = np.abs(np.asarray(apply(unflatten_dict(changed))) - expected).max() / np.abs(expected).max()
        return float(np.nan_to_num(delta, nan=np.inf))

    return differ


def _unfelt(flat: Flat, differ: Callable[[Flat], float], tolerance: float) -> list[Path]:
    """The kernels and tables that the outputs do not feel. (A bias may be a key's, which softmax removes.)"""
    rng, found = np.random.default_rng(3), []
    for path, leaf in flat.items():
        nudged = {**flat, path: leaf + rng.normal(size=leaf.shape).astype(leaf.dtype)}
        is_kernel = leaf.ndim > 1 and min(leaf.shape) > 1 and "bias" not in path[-1]
        if is_kernel and differ(nudged) <= tolerance:
            found.append(path)
    return found


def vanishing(flat: Flat, roles: Roles, apply: Apply, raw: Collection[Path]) -> list[Path]:
    """The declared readers, of norms without an affine, that are hardly felt where all that writes is large.

    A LayerNorm does not feel the size of what it takes. A writer that stays small beside large ones is lost in it, and
    where it is the only one its own size is.
    """
    with_affine = {norm for norm, _ in affine_leaves(roles)}
    writes = {path for path, role in roles.items() if role.writes is not None} | set(raw)
    large = {path: leaf * (2.0**27 if path in writes else 1.0) for path, leaf in flat.items()}
    found, rng = [], np.random.default_rng(2)
    for path, role in roles.items():
        if role.reads is None or role.norm in with_affine or path in writes:
            continue
        leaf = flat[path]
        nudged = leaf + rng.normal(size=leaf.shape).astype(leaf.dtype)
        felt = _difference_from(apply, flat)({**flat, path: nudged})
        differ = _difference_from(apply, large)
        if differ({**large, path: nudged}) < 1e-4 * felt or differ({**large, path: 2 * leaf}) < 0.02 * felt:
            found.append(path)
    return found


_FEEDS = "a reader is missing, reads along another axis, or is fed by another norm"
_WRITERS = "a declared writer is none or writes along another axis, or something reads the raw stream"


def shifted(flat: Flat, roles: Roles, reads: bool = False, seed: int = 0) -> Flat:
    """The tree with u ⊗ 1 added to every writer, and to what a norm over a head takes; u is of the size of its entries.

    With `reads`, instead to every reader along what it reads: of a network whose norms have no γ and β.
    """
    rng, changed = np.random.default_rng(seed), _without_layer_scales(flat, roles)
    for path, role in roles.items():
        for axis in (role.reads,) if reads else (role.writes, role.heads):
            if axis is not None and path in changed:
                changed[path] = _with_mean(changed[path], axis, rng)
    return changed


def _with_mean(leaf: np.ndarray, axis: int, rng: np.random.Generator) -> np.ndarray:
    shape = [1 if i == axis % leaf.ndim else size for i, size in enumerate(leaf.shape)]
    size = float(np.sqrt(np.square(leaf).mean())) or 1.0
    return leaf + (size * rng.normal(size=shape)).astype(leaf.dtype)


def _without_layer_scales(flat: Flat, roles: Roles) -> Flat:
    """The same function, λ in what it multiplies and 1 itself."""
    ones = {path: np.ones_like(flat[path]) for path, role in roles.items() if role.scales and path in flat}
    return fold_layer_scales(dict(flat), roles) | ones


def _without_affines(flat: Flat, roles: Roles) -> Flat:
    """Another function of the same network: its declared γ and λ are 1, its β 0."""
    kinds = {path: kind for (_, kind), path in affine_leaves(roles).items()}
    affines = {path: np.full_like(flat[path], float(kind == "scale")) for path, kind in kinds.items()}
    return _without_layer_scales(flat, roles) | affines


def fold(flat: Flat, roles: Roles) -> Flat:
    """The tree with each norm's γ and β in its readers, 1 and 0 in their place: the same network, leaf by leaf.

    Where a reader has no bias in the tree, the norm keeps β/γ; where an entry of γ is zero, γ stays.
    """
    affines = affine_leaves(roles)
    changed, narrowed, left = dict(flat), dict(roles), {}
    for (norm, kind), path in affines.items():
        scale = affines.get((norm, "scale"))
        stuck = scale is not None and not flat[scale].all()
        readers = [role for role in roles.values() if role.reads is not None and role.norm == norm]
        biased = all(role.bias == UNFELT or role.bias in flat for role in readers)
        if stuck or (kind == "bias" and not biased):
            narrowed[path] = Role()  # to the rules, nothing that they know
            changed[path] = flat[path] if stuck or scale is None else flat[path] / flat[scale]
        else:
            left[path] = np.full_like(flat[path], float(kind == "scale"))
    return fold_norms(changed, narrowed) | left


def omitted(
    flat: Flat, roles: Roles, differ: Callable[[Flat], float], tolerance: float = TOLERANCE
) -> list[tuple[Path, int]]:
    """The leaves, and axes of them, whose mean is not felt though the leaf is: writers and readers nobody declared.

    (What a norm of its own follows, as the embedding of BLOOM, is a writer of that norm's stream.)

    Args:
      flat: the tree, its norms without γ and β.
      differ: how far the outputs of a tree are from those of `flat`.
    """
    rng, found = np.random.default_rng(1), []
    for path, role in roles.items():
        leaf = flat[path]
        declared = {axis % leaf.ndim for axis in (role.writes, role.reads, role.heads) if axis is not None}
        if role.affine is not None or role.scales:
            continue
        for axis in sorted(set(range(leaf.ndim)) - declared):
            unfelt = differ({**flat, path: _with_mean(leaf, axis, rng)}) <= tolerance
            # What is not felt in any way, such as a key's bias that softmax removes, writes nothing.
            if unfelt and differ({**flat, path: leaf + rng.normal(size=leaf.shape).astype(leaf.dtype)}) > tolerance:
                found.append((path, axis - leaf.ndim))
    return found
