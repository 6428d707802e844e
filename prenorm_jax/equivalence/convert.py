"""Conversion between Pre-LN, Pre-RMSNorm and Pre-CRMSNorm parameters, in every direction.

The parameters change in these steps (`rules.py`):

    fold      a branch's LayerScale goes into its writer:    b ← λ ⊙ b,   W ← diag(λ) W
              a norm's affine into its readers:              b ← b + Wβ,  W ← W diag(γ)
    to rms    from layernorm: writers W ← C W
              from crmsnorm, the last entry dropped: writers W ← E W, readers W ← [W, 0] C
                             reflected: writers W ← B W, readers W ← W Bᵀ
    from rms  to layernorm: nothing
              to crmsnorm, the last entry dropped: writers without it, readers W ← W[:d-1] - W[d-1]
                           reflected: writers W ← Bᵀ W, readers W ← W B
    heads     under a QK-norm, from layernorm:               W_q, b_q, W_k, b_k ← without the mean of each head

Source: arXiv 2305.14858, section 3; docs/conversion.md for what goes beyond it.
"""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AxisType
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.base.trees import Array, Flat, Path, at_least_float32
from prenorm_jax.equivalence.roles import Roles, check_roles, parameter_roles, with_biases
from prenorm_jax.equivalence.rules import center_heads, change_coordinates, fold_layer_scales, fold_norms, split_heads
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import NORMS, ModelConfig
from prenorm_jax.models.coordinates import KINDS, Coordinates, coordinates, coordinates_of
from prenorm_jax.models.registry import model_config, model_defaults


def convert_config(config: ConfigDict | Mapping[str, Any] | ModelConfig, to: str, keep_affine: bool = False) -> Any:
    """The model config that describes `convert_params(params, config, to, keep_affine)`; same type as `config`.

    Raises PrenormError if `to` is no norm or is the config's own, or if the network has no equivalent of that norm.
    """
    source = model_config(config)
    _check_norm(source.norm, to)
    _check_convertible(source)
    if keep_affine and to == "crmsnorm":
        raise PrenormError("crmsnorm has no affine to keep: it is folded; only rmsnorm and layernorm can keep theirs")
    shift = source.norm_affine and source.norm_bias  # a norm's bias becomes one of its readers
    changes: dict[str, Any] = {
        "norm": to,
        "norm_affine": False,
        "final_norm_affine": source.final_norm_affine and source.final_norm_bias is None,
        "kept_norm_affine": source.kept_norm_affine,
        "reader_bias": source.reader_bias or shift,
        "qkv_bias": source.qkv_bias or shift,
        "head_bias": source.head_bias,
        "layer_scale": None,
    }
    if keep_affine:
        changes = {"norm": to, "layer_scale": None}
    elif source.final_norm and source.final_norm_affine and source.norm_bias and source.final_norm_bias is not None:
        changes[source.final_norm_bias] = True
    if isinstance(config, ModelConfig):
        return dataclasses.replace(source, **changes)
    if not isinstance(config, ConfigDict):
        return dict(config) | changes
    # From fresh defaults: a copy would share the references behind keys that are None, and change `config` with them.
    converted = model_defaults(source.family)
    converted.update({key: value for key, value in config.items() if value is not None})
    converted.update(changes)
    return type(config)(converted)


def _check_norm(norm: str, to: str) -> None:
    if to not in NORMS:
        raise PrenormError(f"unknown norm {to!r}; one of {', '.join(NORMS)}")
    if to == norm:
        raise PrenormError(f"the model is {to} already: there is nothing to convert")


def _check_convertible(config: ModelConfig) -> None:
    """Raises unless everything that reads the stream reads it through a norm, and the mean can be kept out of it."""
    if not config.post_norm:
        if config.raw_reader is not None:
            raise PrenormError(f"{config.raw_reader} the raw stream, whose mean conversion removes; not convertible")
        return
    if config.norm_affine:
        raise PrenormError(
            "model.post_norm=True with model.norm_affine=True: each norm's affine puts a mean back into the stream, "
            "every block would need a centring at run time and nothing would be gained: set model.norm_affine=False"
        )
    if not config.embed_norm or config.kept_norm_affine or config.embed_dropout > 0:
        raise PrenormError(
            "model.post_norm=True: block_0/attention reads the raw embedding, whose mean conversion removes; it "
            "converts only with model.embed_norm=True, model.kept_norm_affine=False and model.embed_dropout=0"
        )


def convert_params(
    params: Mapping[str, Any], config: ConfigDict | Mapping[str, Any] | ModelConfig, to: str, keep_affine: bool = False
) -> dict[str, Any]:
    """The parameter tree of the equivalent network with norm `to`.

    Args:
      params: nested dict of arrays, as `build_model(config).init(...)["params"]`; not changed.
      config: the model config that describes it; its keys `coordinates` and `coordinates_entry` are those of crmsnorm,
        whether the tree is of that norm or is to be.
      to: layernorm, rmsnorm or crmsnorm.
      keep_affine: not to crmsnorm: whether the norms keep their scales and biases, instead of their being folded.

    Returns:
      The tree of `build_model(convert_config(config, to, keep_affine))`, each leaf with the dtype it had (a new bias:
      its kernel's); leaves that stay the same are the same objects. Concrete arrays are converted in float64 on the
      host and rounded once. Under `jax.jit` or `jax.grad` the same formulas run in the leaves' own dtype, float32 at
      least; the values are then unknown, so that the zero mean of an rmsnorm tree cannot be checked.

    Raises:
      PrenormError: what `convert_config` raises; leaves that are unknown, missing or of another shape; and, from
        rmsnorm, a writer that is not zero-mean: such a network has no Pre-LN or Pre-CRMSNorm equivalent.
    """
    source = model_config(config)
    expected = param_shapes(convert_config(source, to, keep_affine))  # which raises before the tree is looked at
    params = nn.unbox(flax.core.unfreeze(params) if isinstance(params, flax.core.FrozenDict) else params)
    flat = check_tree(params, source)
    target = dataclasses.replace(source, norm=to)
    both = coordinates(source), coordinates(target)
    return _nested(flat, convert_leaves(flat, parameter_roles(source), *both, expected, keep_affine))


def convert_tree(
    params: Mapping[str, Any],
    roles: Roles,
    norm: str,
    to: str,
    kind: str = "drop",
    entry: int | None = None,
    keep_affine: bool = False,
) -> dict[str, Any]:
    """`convert_params` of any tree whose leaves' roles are given, of a network of which `norm` are the norms.

    Under crmsnorm, be it `norm` or `to`, the stream is in the coordinates of this kind and entry (`coordinates_of`).

    Norms lose their affine, and readers gain the biases that take it up: the network's code has to go along. With
    `keep_affine`, not to crmsnorm, norms stay as they are. (`interop.foreign` does all of it by a table.) Raises
    PrenormError for a tree whose leaves are not those of the roles, for roles that do not fit each other, and for
    writers that are not zero-mean.
    """
    check_choice("norm", norm, NORMS)
    _check_norm(norm, to)
    flat = flatten_dict(dict(params))
    if missing := sorted("/".join(map(str, path)) for path in flat.keys() ^ roles.keys()):
        raise PrenormError(f"leaves without a role, or roles without a leaf: {', '.join(missing[:8])}")
    if wrong := [f"{'/'.join(path)} {why}" for path, leaf in flat.items() if (why := _wrong_leaf(leaf))]:
        raise PrenormError(f"the tree cannot be converted: {'; '.join(wrong[:8])}")
    check_roles(roles, {path: getattr(leaf, "shape", None) for path, leaf in flat.items()})
    check_choice("kind", kind, KINDS)
    source, target = (coordinates_of(name, kind, entry) for name in (norm, to))
    return _nested(flat, convert_leaves(flat, roles, source, target, keep_affine=keep_affine))


def _nested(flat: Flat, converted: Flat) -> dict[str, Any]:
    """The converted tree: of JAX arrays, if any of the source's leaves is one."""
    if any(isinstance(leaf, jax.Array) for leaf in flat.values()):
        converted = {path: x if x is flat.get(path) else jnp.asarray(x) for path, x in converted.items()}
    return unflatten_dict(converted)


def convert_leaves(
    flat: Flat,
    roles: Roles,
    source: Coordinates,
    target: Coordinates,
    biases: Collection[Path] = (),
    keep_affine: bool = False,
) -> Flat:
    """The conversion of those leaves of the converted tree that `flat` determines, by path.

    `flat` holds whole modules with the norms that feed them and the LayerScales on them (see `rules.modules`), or the
    same part of each along axes that are not the stream's, in whole heads under a QK-norm. Leading axes of stacked
    layers may come on top of those that the roles count from. Readers' biases among `biases` are there in any case,
    zero where nothing is folded into them.
    """
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in flat.values())
    if not traced:
        check_zero_mean(flat, roles, source.of, target.of)
    changed = fold_layer_scales(_widened(flat, roles, traced), roles)
    changed = changed if keep_affine else fold_norms(changed, roles)
    changed = change_coordinates(changed, with_biases(roles), source, target)
    if source.of == "layernorm":
        changed = center_heads(changed, with_biases(roles))
    kernels = {role.bias: path for path, role in roles.items() if role.bias is not None and path in flat}
    for bias in [bias for bias in kernels if bias in biases and bias not in changed]:
        shape = list(flat[kernels[bias]].shape)
        shape.pop(-2 if roles[kernels[bias]].reads is None else roles[kernels[bias]].reads)
        changed[bias] = np.zeros(shape)
    # Each with the dtype that it had; a new bias with its kernel's.
    return {
        path: leaf if leaf is flat.get(path) else leaf.astype(flat[path if path in flat else kernels[path]].dtype)
        for path, leaf in changed.items()
    }


def _widened(flat: Flat, roles: Roles, traced: bool) -> Flat:
    """Leaves that conversion may change, in the dtype it works in; the others as they are."""
    involved = {path for path, role in roles.items() if not role.is_internal}
    involved |= {role.bias for role in roles.values()} | {leaf for role in roles.values() for leaf, _ in role.scales}

    def widen(leaf: Array) -> Array:
        if not traced:
            return np.asarray(leaf).astype(np.float64)
        return at_least_float32(leaf)

    return {path: widen(leaf) if path in involved else leaf for path, leaf in flat.items()}


def check_tree(params: Mapping[str, Any], config: ModelConfig) -> Flat:
    """The leaves (anything with a shape) by path, if they are exactly those of the config's model.

    Raises PrenormError listing what is unknown, missing or of another shape.
    """
    expected, flat = param_shapes(config), flatten_dict(dict(params))
    problems = [f"unknown leaf {'/'.join(map(str, path))}" for path in flat if path not in expected]
    problems += [f"missing leaf {'/'.join(path)}" for path in expected if path not in flat]
    problems += [
        f"{'/'.join(path)} {wrong}"
        for path, leaf in expected.items()
        if path in flat and (wrong := _wrong_leaf(flat[path], leaf.shape))
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        hint = " (this looks like a whole train state: pass its 'params' entry)" if "params" in params else ""
        raise PrenormError(f"the tree is not that of the {config.norm} model in the config: {shown}{hint}")
    return flat


def _wrong_leaf(leaf: Any, shape: tuple[int, ...] | None = None) -> str:
    """What is wrong with it as an array of floating-point numbers of this shape; "" if nothing is."""
    try:
        dtype = np.dtype(leaf.dtype)  # a TypeError for a torch.Tensor's
    except (AttributeError, TypeError):
        return f"is no NumPy or JAX array but of type {type(leaf).__module__}.{type(leaf).__qualname__}"
    if not jnp.issubdtype(dtype, jnp.floating):
        return f"has dtype {dtype}, which is none of real floating-point numbers"
    if isinstance(leaf, jax.core.Tracer) and AxisType.Explicit in jax.typeof(leaf).sharding.mesh.axis_types:
        return "is traced over a mesh of Explicit axes: convert outside of jit, or make the mesh with AxisType.Auto"
    return "" if shape is None or tuple(leaf.shape) == shape else f"has shape {leaf.shape}, not {shape}"


def check_zero_mean(flat: Flat, roles: Roles, norm: str, to: str) -> None:
    """Raises PrenormError where a mean is not zero, to the rounding of its dtype, that layernorm would remove.

    Of an rmsnorm tree that is the mean along the stream of each writer, LayerScale folded; of a tree that becomes
    layernorm, under a QK-norm, that of each head's query and key.
    """
    if norm == "layernorm" or (norm == "crmsnorm" and to != "layernorm"):
        return
    wide = {path: np.asarray(leaf).astype(np.float64) for path, leaf in flat.items()}
    gaps = {path: _spacing(wide[path], leaf.dtype) for path, leaf in flat.items()}
    scales = {path for path, role in roles.items() if role.scales}
    sizes = {path: np.abs(leaf) for path, leaf in wide.items()}
    # Rounding moves an entry by half of its spacing at most; a product of two entries by each one's times the other.
    of_scales = fold_layer_scales(sizes | {path: gap for path, gap in gaps.items() if path in scales}, roles)
    of_leaves = fold_layer_scales(gaps | {path: size for path, size in sizes.items() if path in scales}, roles)
    scaled = {leaf for path in scales for leaf, _ in roles[path].scales}
    for path, leaf in fold_layer_scales(wide, roles).items():
        role, gap = roles[path], of_leaves[path] + (of_scales[path] if path in scaled else 0)
        if norm == "rmsnorm" and role.writes is not None:
            rows, gaps_of_rows = (np.moveaxis(x, role.writes, -1) for x in (leaf, gap))
            _check_mean(path, rows, gaps_of_rows, flat[path], "along the stream")
        if to == "layernorm" and role.heads is not None:
            heads, gaps_of_heads = (split_heads(np.moveaxis(x, role.heads, -1), role.head_dim) for x in (leaf, gap))
            # Under crmsnorm a row is the difference of two, with the rounding of both: the largest is the measure.
            largest = np.broadcast_to(gaps_of_heads.mean(-1, keepdims=True).max(), heads.shape)
            _check_mean(path, heads, largest, flat[path], "over each head, as its norm takes it")


def _spacing(wide: np.ndarray, dtype: Any) -> np.ndarray:
    """The distance, in the leaf's dtype, from each entry to the next; between subnormal numbers it is absolute."""
    info = jnp.finfo(dtype)
    exponent = np.where(wide == 0, info.minexp, np.frexp(wide)[1] - 1)  # of the power of two below it
    return np.ldexp(1.0, np.maximum(exponent, info.minexp) - info.nmant)


def _check_mean(path: Path, rows: np.ndarray, gaps: np.ndarray, stored: Array, where: str) -> None:
    """Raises unless the mean over the last axis is zero, to the mean spacing of the entries.

    And to the rounding of the sum itself, which is pairwise, and so small, only of contiguous entries.
    """
    rows = np.ascontiguousarray(rows)
    if not np.isfinite(rows).all():
        raise PrenormError(f"{'/'.join(path)} has entries that are not finite")
    mean, allowed = np.abs(rows.mean(-1)), gaps.mean(-1)
    rounding = np.finfo(np.float64).eps * np.abs(rows).mean(-1)
    excess = mean - (allowed + rounding)
    if (excess <= 0).all():
        return
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    row = f"in row {', '.join(map(str, worst))}, " if worst else ""
    reason = "parameters made from Pre-LN's have none, and training with parameterization=pre_ln keeps them so"
    for narrow in ("float32", "float16", "bfloat16"):  # most of what one holds those before it do, too
        is_rounded = jnp.finfo(narrow).bits < jnp.finfo(stored.dtype).bits and (rows == rows.astype(narrow)).all()
        if is_rounded and (mean <= _spacing(rows, narrow).mean(-1)).all():
            reason = f"it is off by the rounding of {narrow}, to which its entries are rounded: convert them in it"
    raise PrenormError(
        f"{'/'.join(path)} is not zero-mean {where} ({row}mean {rows.mean(-1)[worst]:.2g}, size "
        f"{np.abs(rows).mean(-1)[worst]:.2g}): what an RMSNorm network does with a mean has no equivalent; {reason}"
    )
