"""A small byte-level GPT on the source code of the Python standard library: needs no download."""

from ml_collections import ConfigDict

from prenorm_jax.config import base_config


def get_config() -> ConfigDict:
    config = base_config()
    config.steps = 500
    config.batch_size = 16
    config.data.seq_len = 128
    config.model.vocab_size = 257
    config.model.max_len = 128
    config.model.depth = 4
    config.model.d_model = 128
    config.model.heads = 4
    return config
