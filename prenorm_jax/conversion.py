"""Conversion between Pre-LN, Pre-RMSNorm and Pre-CRMSNorm parameters, in every direction.

The parameters change in these steps, each a few lines on (tree, roles), whatever model the tree belongs to:

    fold      a norm's affine goes into its readers:         b ← b + Wβ,  W ← W diag(γ)
              a branch's LayerScale into its writer:         b ← λ ⊙ b,   W ← diag(λ) W
    to rms    from layernorm: writers W ← C W                 from crmsnorm: writers W ← E W, readers W ← [W, 0] C
    from rms  to layernorm: nothing                           to crmsnorm: writers drop the last entry,
                                                              readers W ← W[:d-1] - W[d-1]   (along the stream axis)
    heads     under a QK-norm, from layernorm:               W_q, b_q, W_k, b_k ← without the mean of each head

Source: arXiv 2305.14858, section 3; README, "The idea", for what goes beyond it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from prenorm_jax.errors import PrenormError
from prenorm_jax.model_config import EXECUTION, NORMS, ModelConfig, model_defaults
from prenorm_jax.stacking import stack_blocks, unstack_blocks
from prenorm_jax.stream import (
    Array,
    Path,
    Roles,
    abstract_params,
    center,
    drop_last,
    entries,
    parameter_roles,
    restore_last,
)

Flat = dict[Path, Array]


def convert_config(config: ConfigDict | Mapping[str, Any] | ModelConfig, to: str) -> Any:
    """The model config that describes `convert_params(params, config, to)`; same type as `config`.

    Raises PrenormError if `to` is no norm or is the config's own, or if the network has no equivalent of that norm.
    """
    source = ModelConfig.create(config)
    if to not in NORMS:
        raise PrenormError(f"unknown norm {to!r}; one of {', '.join(NORMS)}")
    if to == source.norm:
        raise PrenormError(f"the model is {to} already: there is nothing to convert")
    _check_convertible(source)
    shift = source.norm_affine and source.norm_bias  # a norm's bias becomes one of its readers
    final_shift = source.final_norm and source.final_norm_affine and source.norm_bias
    pool_reads = getattr(source, "pooling", None) == "attention"
    changes: dict[str, Any] = {
        "norm": to,
        "norm_affine": False,
        "final_norm_affine": source.final_norm_affine and source.tie_embeddings,
        "kept_norm_affine": source.kept_norm_affine,
        "reader_bias": source.reader_bias or shift,
        "qkv_bias": source.qkv_bias or shift or (final_shift and pool_reads),
        "head_bias": source.head_bias or (final_shift and not source.tie_embeddings and not pool_reads),
        "layer_scale": None,
    }
    if isinstance(config, ModelConfig):
        return dataclasses.replace(source, **changes)
    if not isinstance(config, ConfigDict):
        return dict(config) | changes
    # From fresh defaults: a copy would share the references behind keys that are None, and change `config` with them.
    converted = model_defaults(source.family)
    converted.update({key: value for key, value in config.items() if value is not None})
    converted.update(changes)
    return type(config)(converted)


def _check_convertible(config: ModelConfig) -> None:
    """Raises unless everything that reads the stream reads it through a norm, and the mean can be kept out of it."""
    if not config.post_norm:
        if not config.final_norm:
            raise PrenormError(
                "model.final_norm=False: the head reads the raw stream, whose mean conversion removes; not convertible"
            )
        if getattr(config, "pooling", None) == "attention" and config.norm_after_pooling:
            raise PrenormError(
                "model.pooling='attention' with model.norm_after_pooling=True: pool/key and pool/value read the raw "
                "stream, whose mean conversion removes; not convertible"
            )
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
    params: Mapping[str, Any], config: ConfigDict | Mapping[str, Any] | ModelConfig, to: str
) -> dict[str, Any]:
    """The parameter tree of the equivalent network with norm `to`.

    Args:
      params: nested dict of arrays, as `build_model(config).init(...)["params"]`; not changed.
      config: the model config that describes it.
      to: layernorm, rmsnorm or crmsnorm.

    Returns:
      The tree of `build_model(convert_config(config, to))`, each leaf with the dtype it had (a new bias: its
      kernel's); leaves that stay the same are the same objects. Concrete arrays are converted in float64 on the host
      and rounded once. Under `jax.jit` or `jax.grad` the same formulas run in the leaves' own dtype, float32 at least;
      the values are then unknown, so that the zero mean of an rmsnorm tree cannot be checked.

    Raises:
      PrenormError: what `convert_config` raises; leaves that are unknown, missing or of another shape; and, from
        rmsnorm, a writer that is not zero-mean: such a network has no Pre-LN or Pre-CRMSNorm equivalent.
    """
    source = ModelConfig.create(config)
    convert_config(source, to)  # raises before the tree is looked at
    params = nn.unbox(flax.core.unfreeze(params) if isinstance(params, flax.core.FrozenDict) else params)
    flat = check_tree(params, source)
    converted = convert_leaves(flat, source, to)
    if any(isinstance(leaf, jax.Array) for leaf in flat.values()):
        converted = {path: x if x is flat.get(path) else jnp.asarray(x) for path, x in converted.items()}
    return unflatten_dict(converted)


def convert_leaves(flat: Flat, source: ModelConfig, to: str) -> Flat:
    """`convert_params` of those leaves of the converted tree that `flat` determines, by path.

    `flat` holds whole modules with the norms that feed them and the LayerScale on them (see `modules`), or the same
    part of each along axes that are not the stream's, in whole heads under a QK-norm. Leading axes of stacked layers
    may come on top of those that `source` describes.
    """
    roles = parameter_roles(source)
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in flat.values())
    if not traced:
        check_zero_mean(fold_layer_scales(flat, roles), source, roles, to)

    dtypes = {path: leaf.dtype for path, leaf in flat.items()}
    kernels = {role.bias: path for path, role in roles.items() if role.bias is not None and path in flat}
    for bias, kernel in kernels.items():
        dtypes.setdefault(bias, dtypes[kernel])
    changed = _with_work_dtype(flat, roles, traced)
    changed = fold_layer_scales(fold_norms(changed, roles), roles)
    if (source.norm, to) != ("rmsnorm", "layernorm"):  # those are the same numbers
        changed = _map_stream(changed, roles, *_TO_RMS[source.norm])
        changed = _map_stream(changed, roles, *_FROM_RMS[to])
    if source.norm == "layernorm":
        changed = center_heads(changed, roles, source.head_dim)
    result = {}
    for path in abstract_params(convert_config(source, to)):
        if path in kernels and path not in changed:  # a bias that nothing is folded to
            shape = list(flat[kernels[path]].shape)
            shape.pop(roles[kernels[path]].axis)
            result[path] = np.zeros(shape, dtypes[path])
        elif path in changed:
            leaf = changed[path]
            result[path] = leaf if leaf is flat.get(path) else leaf.astype(dtypes[path])
    return result


def modules(source: ModelConfig) -> dict[Path, list[Path]]:
    """Module -> the leaves of a tree that conversion needs for the module's own: those, and what is folded into them.

    Each leaf of the converted tree is made of the leaves of one module.
    """
    result: dict[Path, list[Path]] = {}
    roles = parameter_roles(source)
    for path, role in roles.items():
        if role.kind not in ("norm", "layer_scale"):
            result.setdefault(path[:-1] or path, []).append(path)
    for path, role in roles.items():
        if role.kind == "layer_scale":
            result[_scaled_writer(path)].append(path)
        elif role.kind == "reader":
            result[path[:-1]] += [leaf for leaf in (role.scale, role.shift) if leaf is not None]
    return result


def _with_work_dtype(flat: Flat, roles: Roles, traced: bool) -> Flat:
    """Leaves that conversion may change, in the dtype it works in; the others as they are."""
    involved = {role.bias for role in roles.values()}
    for path, role in roles.items():
        if role.kind == "layer_scale":
            involved |= {(*_scaled_writer(path), leaf) for leaf in ("kernel", "bias")}

    def widen(leaf: Array) -> Array:
        return (
            leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32)) if traced else np.asarray(leaf).astype(np.float64)
        )

    return {path: widen(x) if roles[path].kind != "internal" or path in involved else x for path, x in flat.items()}


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


def check_tree(params: Mapping[str, Any], config: ModelConfig) -> Flat:
    """The leaves (anything with a shape) by path, if they are exactly those of the config's model.

    Raises PrenormError listing what is unknown, missing or of another shape.
    """
    expected = {path: leaf.value.shape for path, leaf in abstract_params(config).items()}
    flat = flatten_dict(dict(params))
    problems = [f"unknown leaf {'/'.join(map(str, path))}" for path in flat if path not in expected]
    problems += [f"missing leaf {'/'.join(path)}" for path in expected if path not in flat]
    problems += [
        f"{'/'.join(path)} has shape {flat[path].shape}, not {shape}"
        for path, shape in expected.items()
        if path in flat and flat[path].shape != shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        hint = " (this looks like a whole train state: pass its 'params' entry)" if "params" in params else ""
        raise PrenormError(f"the tree is not that of the {config.norm} model in the config: {shown}{hint}")
    return flat


def check_zero_mean(flat: Flat, source: ModelConfig, roles: Roles, to: str) -> None:
    """Raises PrenormError where a mean is not zero, to the rounding of its dtype, that layernorm would remove.

    Of an rmsnorm tree that is the mean along the stream of each writer; of a tree that becomes layernorm, under a
    QK-norm, that of each head's query and key. LayerScale is folded already.
    """
    for path in flat:
        role, leaf = roles[path], np.asarray(flat[path]).astype(np.float64)
        if source.norm == "rmsnorm" and role.kind == "writer":
            # Rounding each entry to the leaf's dtype leaves a mean of at most half of this.
            # Of a product with a LayerScale it is three roundings.
            size = np.abs(leaf).mean(role.axis) * (1 if source.layer_scale is None else 2)
            _check_mean(path, leaf.mean(role.axis), size, flat[path].dtype, "along the stream")
        if source.norm != "layernorm" and to == "layernorm" and role.normed_axis is not None:
            heads = _split_heads(leaf, source.head_dim)
            # Under crmsnorm a row is the difference of two, with the rounding of both: the largest is the measure.
            size = np.abs(heads).mean(-1).max()
            _check_mean(path, heads.mean(-1), size, flat[path].dtype, "over each head, as its norm takes it")


def _check_mean(path: Path, mean: np.ndarray, size: Any, dtype: Any, where: str) -> None:
    if not (np.abs(mean) <= float(jnp.finfo(dtype).eps) * size).all():
        raise PrenormError(
            f"{'/'.join(path)} is not zero-mean {where} (mean {np.abs(mean).max():.2g}, size {np.max(size):.2g}): "
            "what an RMSNorm network does with a mean has no equivalent; parameters made from Pre-LN's have none, and "
            "training with parameterization=pre_ln keeps them so"
        )


def model_differences(config: ModelConfig, other: ModelConfig, ignored: Collection[str] = ()) -> list[str]:
    """ "model.key: value -> other value" for each key in which they differ, but for the `ignored`."""
    one, two = vars(config), vars(other)
    return [
        f"model.{key}: {one.get(key)!r} -> {two.get(key)!r}"
        for key in dict.fromkeys([*one, *two])
        if key not in ignored and one.get(key) != two.get(key)
    ]


def fit_params(params: Mapping[str, Any], config: ModelConfig, to_config: ModelConfig) -> dict[str, Any]:
    """`params`, which `config` describes, as the tree that `to_config` describes: the same function.

    A norm's affine or a LayerScale that only `to_config` has becomes the identity, a bias that only it has zero. Raises
    PrenormError if the tree has a leaf, or a shape, that `to_config` has no place for, or if what its fields say of the
    function (heads, activation, ε, ...) differs.
    """
    layout = {"norm", "reader_bias", "qkv_bias", "head_bias", "use_bias", "layer_scale"}
    layout |= {"norm_affine", "norm_bias", "final_norm_affine", "kept_norm_affine"}
    rates = {"dropout", "attention_dropout", "branch_dropout", "embed_dropout"}
    training = {"stochastic_depth", "stochastic_depth_schedule", "init", "dtype", "param_dtype", *EXECUTION}
    if differences := model_differences(config, to_config, ignored=layout | rates | training):
        raise PrenormError(
            f"the checkpoint is of another network ({'; '.join(differences)}): change the config to match"
        )

    if config.scan != to_config.scan:
        params = (stack_blocks if to_config.scan else unstack_blocks)(params)
        config = dataclasses.replace(config, scan=to_config.scan)

    def is_raw(config: ModelConfig) -> tuple[bool, bool]:
        return config.raw_embedding, config.raw_branches

    if config.norm != to_config.norm or is_raw(config) != is_raw(to_config):
        # By way of the Pre-LN tree, which alone is the same whether there is dropout on what is written or not.
        if config.norm != "layernorm":
            params, config = convert_params(params, config, "layernorm"), convert_config(config, "layernorm")
        config = dataclasses.replace(config, **{rate: getattr(to_config, rate) for rate in rates})
        if to_config.norm != "layernorm":
            params, config = convert_params(params, config, to_config.norm), convert_config(config, to_config.norm)
    flat, fitted = flatten_dict(dict(params)), {}
    for path, leaf in abstract_params(to_config).items():
        if path in flat:
            fitted[path] = flat.pop(path).astype(leaf.value.dtype)
        elif path[-1].endswith(("scale", "bias")):
            fitted[path] = jnp.full(leaf.value.shape, path[-1].endswith("scale"), leaf.value.dtype)
    left = ["/".join(path) for path in flat]
    if left:
        raise PrenormError(
            f"the config has no place for {', '.join(left[:5])}: set model.use_bias, head_bias, ... to keep them"
        )
    return unflatten_dict(check_tree(unflatten_dict(fitted), to_config))
