"""What comes before and after the residual stream, one file per family of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from prenorm_jax.config import ModelConfig
from prenorm_jax.models.gpt import GPT


def build_model(config: ConfigDict | Mapping[str, Any] | ModelConfig) -> GPT:
    """The Flax module that `config.model` describes. Raises PrenormError naming a key that is unknown or wrong.

    `model.init(key, tokens)["params"]` is a nested dict of arrays; `model.apply({"params": params}, tokens)` are the
    logits, of shape (batch, length, vocab), of integer tokens of shape (batch, length).
    """
    return GPT(ModelConfig.create(config))
