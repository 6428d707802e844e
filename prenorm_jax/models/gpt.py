"""GPT: token and position embeddings before the stream, the final norm and the language-model head behind it."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.config import ModelConfig
from prenorm_jax.errors import PrenormError
from prenorm_jax.norms import Affine, LayerNorm
from prenorm_jax.stream import COORDINATES
from prenorm_jax.transformer import Block, make_norm, reader


def sinusoidal_table(length: int, width: int) -> np.ndarray:
    """(length, width) float64 position table (arXiv 1706.03762, section 3.5): sines first, then cosines."""
    frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]


class GPT(nn.Module):
    """A causal language model: (B, T) int tokens -> (B, T, V) logits in `config.dtype`.

    Dropout is active with `train=True` and needs `rngs={"dropout": key}`; one key gives the three norms the same masks.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        T = tokens_BxT.shape[1]
        if config.max_len < T:
            raise PrenormError(f"a sequence of {T} tokens is longer than model.max_len={config.max_len}")

        table_VxW = self._table("token_embedding", config.vocab_size, "vocab")
        x_BxTxW = jnp.take(table_VxW, tokens_BxT, axis=0).astype(config.dtype)
        if config.positions == "learned":
            x_BxTxW += self._table("position_embedding", config.max_len, "position")[:T].astype(config.dtype)
        elif config.positions == "sinusoidal":
            positions_TxW = jnp.asarray(
                sinusoidal_table(T, config.d_model), jnp.promote_types(config.dtype, jnp.float32)
            )
            in_stream = positions_TxW if config.raw_embedding else COORDINATES[config.norm].enter(positions_TxW)
            x_BxTxW += in_stream.astype(config.dtype)
        if config.embed_norm:
            affine = config.embed_norm_affine
            norm = LayerNorm(
                config.epsilon,
                use_scale=affine,
                use_bias=affine and config.norm_bias,
                param_dtype=config.param_dtype,
                axis="raw",
                name="embedding_norm",
            )
            x_BxTxW = norm(x_BxTxW)
        x_BxTxW = nn.Dropout(config.embed_dropout)(x_BxTxW, deterministic=not train)
        x_BxTxD = COORDINATES[config.norm].enter(x_BxTxW) if config.raw_embedding else x_BxTxW

        for i in range(config.depth):
            x_BxTxD = Block(config, name=f"block_{i}")(x_BxTxD, train)

        if not config.tie_embeddings:
            if config.final_norm:
                x_BxTxD = make_norm(config, "head_norm", config.final_norm_affine)(x_BxTxD)
            return reader(config, "head", config.vocab_size, "vocab", config.head_bias)(x_BxTxD)

        # A tied table is read in its raw form, so the stream goes back to d numbers, and γ, β cannot be folded into it.
        if config.final_norm:
            x_BxTxD = make_norm(config, "head_norm", affine=False)(x_BxTxD)
        x_BxTxW = COORDINATES[config.norm].leave(x_BxTxD)
        if config.final_norm and config.final_norm_affine:
            affine = Affine(True, config.norm_bias, config.param_dtype, axis="raw", name="head_affine")
            x_BxTxW = affine(x_BxTxW.astype(jnp.promote_types(config.dtype, jnp.float32))).astype(config.dtype)
        logits_BxTxV = x_BxTxW @ table_VxW.T.astype(config.dtype)
        if config.head_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",))
            logits_BxTxV += self.param("head_bias", bias_init, (config.vocab_size,), config.param_dtype)
        return logits_BxTxV.astype(config.dtype)

    def _table(self, name: str, rows: int, axis: str) -> jax.Array:
        raw = self.config.raw_embedding
        width = self.config.d_model if raw else self.config.stream_width
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (axis, "raw" if raw else "write"))
        return self.param(name, init, (rows, width), self.config.param_dtype)

    @nn.nowrap
    def annotated_init(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`init` whose leaves carry their logical axis names (`nn.LogicallyPartitioned`)."""
        return super().init(*args, **kwargs)

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Variables as `nn.Module.init` makes them, with plain arrays as leaves."""
        return nn.unbox(self.annotated_init(*args, **kwargs))
