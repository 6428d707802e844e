"""The families of models. A further one is a file beside `gpt.py`, and a line in FAMILIES."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ml_collections import ConfigDict, config_dict

from prenorm_jax.base.errors import check_choice
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.encoder import Encoder
from prenorm_jax.models.gpt import GPT
from prenorm_jax.models.transformer import StreamModel
from prenorm_jax.models.vit import ViT

# Each module names the dataclass of its config as `config_class`.
FAMILIES: dict[str, type[StreamModel]] = {"gpt": GPT, "encoder": Encoder, "vit": ViT}


def family(name: str) -> type[StreamModel]:
    """The family of this name. Raises PrenormError."""
    check_choice("model.family", name, tuple(FAMILIES))
    return FAMILIES[name]


def model_config(config: ModelConfig | Mapping[str, Any] | ConfigDict) -> ModelConfig:
    """The checked, resolved form of `config.model`. Raises PrenormError naming the first key that is wrong."""
    values = dict(vars(config) if isinstance(config, ModelConfig) else config.items())
    return family(values.get("family") or "gpt").config_class.resolve(values)


def model_defaults(name: str) -> ConfigDict:
    """`config.model` with the defaults of the family's dataclass. Raises PrenormError for an unknown family."""
    config_class = family(name).config_class
    types, defaults = config_class.value_types(), {field.name: field.default for field in fields(config_class)}
    return ConfigDict(
        {key: config_dict.placeholder(types[key]) if value is None else value for key, value in defaults.items()}
    )


def build_model(config: ConfigDict | Mapping[str, Any] | ModelConfig) -> StreamModel:
    """The Flax module that `config.model` describes. Raises PrenormError naming a key that is unknown or wrong.

    `model.init(key, inputs)["params"]` is a nested dict of arrays, and `model.apply({"params": params}, inputs)` are
    the logits: of a GPT's integer tokens (batch, length), in the shape (batch, length, vocab); of a ViT's images
    (batch, side, side, channels), in the shape (batch, classes). Of an encoder: `models/encoder.py`.
    """
    config = model_config(config)
    return FAMILIES[config.family](config)
