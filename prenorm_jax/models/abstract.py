"""A model's parameters without their numbers: axis names, what belongs to each, shapes, dtypes."""

import dataclasses
import functools

import jax
from flax.traverse_util import flatten_dict

from prenorm_jax.base.trees import Path
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.parameters import Parameter
from prenorm_jax.models.registry import build_model


def abstract_params(config: ModelConfig) -> dict[Path, Parameter]:
    """Path -> the leaf's annotations and, as `.value`, its shape and dtype; no array is made."""
    # What they are computed in, and which entry of the stream is left out, changes none: one trace serves all.
    return _traced(dataclasses.replace(config, dtype=config.param_dtype, coordinates="drop", coordinates_entry=None))


@functools.lru_cache
def _traced(config: ModelConfig) -> dict[Path, Parameter]:
    model = build_model(config)
    variables = jax.eval_shape(model.annotated_init, jax.random.key(0), model.example())
    return flatten_dict(variables["params"])


@functools.lru_cache
def param_shapes(config: ModelConfig) -> dict[Path, jax.ShapeDtypeStruct]:
    """Path -> the leaf's shape and dtype."""
    return {path: leaf.value for path, leaf in abstract_params(config).items()}
