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
from collections.abc import Mapping
from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.trees import Array, Path
from prenorm_jax.equivalence.roles import Roles, parameter_roles
from prenorm_jax.equivalence.rules import (
    _FROM_RMS,
    _TO_RMS,
    Flat,
    _map_stream,
    _scaled_writer,
    _split_heads,
    center_heads,
    fold_layer_scales,
    fold_norms,
)
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import NORMS, ModelConfig, model_defaults


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
