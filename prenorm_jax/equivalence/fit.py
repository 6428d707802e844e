"""A tree as the one that another config of the same network describes: what `init_from` needs."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.equivalence.convert import check_tree, convert_config, convert_params
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import EXECUTION, OF_CRMSNORM, ModelConfig
from prenorm_jax.models.stacking import stack_blocks, unstack_blocks


def model_differences(config: ModelConfig, other: ModelConfig, ignored: Collection[str] = ()) -> list[str]:
    """ "model.key: value -> other value" for each key in which they differ, but for the `ignored`."""
    one, two = vars(config), vars(other)
    if not config.norm == other.norm == "crmsnorm":
        ignored = {*ignored, *OF_CRMSNORM}
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
    parameters = {"norm", "reader_bias", "qkv_bias", "head_bias", "use_bias", "layer_scale"}
    parameters |= {"norm_affine", "norm_bias", "final_norm_affine", "kept_norm_affine", *OF_CRMSNORM}
    training = {"stochastic_depth", "stochastic_depth_schedule", "init", "dtype", "param_dtype", *EXECUTION}
    if differences := model_differences(config, to_config, ignored={*parameters, *config.rates, *training}):
        raise PrenormError(
            f"the checkpoint is of another network ({'; '.join(differences)}): change the config to match"
        )

    if config.scan != to_config.scan:
        params = (stack_blocks if to_config.scan else unstack_blocks)(params)
        config = dataclasses.replace(config, scan=to_config.scan)

    def is_raw(config: ModelConfig) -> tuple[bool, bool]:
        return config.raw_embedding, config.raw_branches

    def stream(config: ModelConfig) -> tuple[Any, ...]:
        return (config.norm, *(getattr(config, key) for key in OF_CRMSNORM if config.norm == "crmsnorm"))

    if stream(config) != stream(to_config) or is_raw(config) != is_raw(to_config):
        # By way of the Pre-LN tree, which alone is the same whether there is dropout on what is written or not.
        if config.norm != "layernorm":
            params, config = convert_params(params, config, "layernorm"), convert_config(config, "layernorm")
        config = dataclasses.replace(config, **{key: getattr(to_config, key) for key in (*config.rates, *OF_CRMSNORM)})
        if to_config.norm != "layernorm":
            params, config = convert_params(params, config, to_config.norm), convert_config(config, to_config.norm)
    flat, fitted = flatten_dict(dict(params)), {}
    for path, leaf in param_shapes(to_config).items():
        if path in flat:
            fitted[path] = flat.pop(path).astype(leaf.dtype)
        elif path[-1].endswith(("scale", "bias")):
            fitted[path] = jnp.full(leaf.shape, path[-1].endswith("scale"), leaf.dtype)
    left = ["/".join(path) for path in flat]
    if left:
        raise PrenormError(
            f"the config has no place for {', '.join(left[:5])}: set model.use_bias, head_bias, ... to keep them"
        )
    return unflatten_dict(check_tree(unflatten_dict(fitted), to_config))
