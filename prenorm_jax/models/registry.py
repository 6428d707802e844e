"""What comes before and after the residual stream, one file per family of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.gpt import GPT
from prenorm_jax.models.transformer import StreamModel
from prenorm_jax.models.vit import ViT

MODELS: dict[str, type[StreamModel]] = {"gpt": GPT, "vit": ViT}


def build_model(config: ConfigDict | Mapping[str, Any] | ModelConfig) -> StreamModel:
    """The Flax module that `config.model` describes. Raises PrenormError naming a key that is unknown or wrong.

    `model.init(key, inputs)["params"]` is a nested dict of arrays, and `model.apply({"params": params}, inputs)` are
    the logits: of a GPT's integer tokens (batch, length), in the shape (batch, length, vocab); of a ViT's images
    (batch, side, side, channels), in the shape (batch, classes).
    """
    config = ModelConfig.create(config)
    return MODELS[config.family](config)
