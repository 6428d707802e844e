"""A model's parameters without their numbers: axis names, shapes, dtypes."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from prenorm_jax.base.trees import Path
from prenorm_jax.models.config import ModelConfig


@functools.lru_cache
def abstract_params(config: ModelConfig) -> dict[Path, nn.LogicallyPartitioned]:
    """Path -> the leaf's logical axis names (`.names`) and its shape and dtype (`.value`); no array is made."""
    from prenorm_jax.models.registry import build_model  # the models are built on this module

    model = build_model(config)
    variables = jax.eval_shape(model.annotated_init, jax.random.key(0), model.example())
    return flatten_dict(variables["params"])
