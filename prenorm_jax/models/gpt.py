"""GPT: token and position embeddings before the stream, the final norm and the language-model head behind it."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.attention import CacheUse
from prenorm_jax.models.config import GPTConfig
from prenorm_jax.models.coordinates import COORDINATES
from prenorm_jax.models.linear import matmul, reader
from prenorm_jax.models.norms import Affine
from prenorm_jax.models.placement import apart
from prenorm_jax.models.positions import sinusoidal_table
from prenorm_jax.models.transformer import StreamModel, blocks, constant_table, enter_stream, make_norm, table


@jax.custom_jvp
def _embed(table_VxW: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """The rows of the tokens: (B, T, W)."""
    return jnp.take(table_VxW, tokens_BxT, axis=0)


# The same, in float32 at least, so that the derivative by a row is summed so: over the thousands of times that a
# frequent token comes, numbers of two bytes would stop growing, and GPUs add such numbers one after the other.
@_embed.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (table, tokens), (dtable, _) = primals, tangents
    wide = dtable.astype(jnp.promote_types(table.dtype, jnp.float32))
    return _embed(table, tokens), jnp.take(wide, tokens, axis=0).astype(table.dtype)


class GPT(StreamModel):
    """A causal language model: (B, T) int tokens -> (B, T, V) logits in `config.dtype`.

    With `at_B`, (B,) int, the logits are (B, 1, V): of each sequence those at that one of the tokens given, from 0.

    Dropout is active with `train=True` and needs `rngs={"dropout": key}`; one key gives the three norms the same masks.

    With `mutable=["cache"]`, `cache_size=S` also makes the collection "cache": keys and values of the tokens, and room
    for S positions. Given back with `position=t` (a scalar, maybe traced), it stands for the t tokens before those of
    that call, and takes them up. Nothing checks that t + T <= S. `generate.py` is built on this.
    """

    config: GPTConfig

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        train: bool = False,
        cache_size: int | None = None,
        position: jax.Array | int | None = None,
        at_B: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config
        T = tokens_BxT.shape[1]
        if config.max_len < T:
            raise PrenormError(f"a sequence of {T} tokens is longer than model.max_len={config.max_len}")
        if cache_size is not None and not (position is None and T <= cache_size <= config.max_len):
            raise PrenormError(
                f"cache_size={cache_size} must be from {T}, the tokens given, to model.max_len={config.max_len}, "
                "and excludes position"
            )
        cache = None
        if cache_size is not None or position is not None:
            cache = CacheUse(cache_size, 0 if position is None else position)

        def rows(table_NxW: jax.Array) -> jax.Array:
            """Those of the tokens' positions."""
            return table_NxW[:T] if position is None else jax.lax.dynamic_slice_in_dim(table_NxW, position, T)

        table_VxW = table(self, config, "token_embedding", config.vocab_size, "vocab")
        x_BxTxW = _embed(table_VxW, tokens_BxT)
        if config.positions == "learned":
            x_BxTxW += rows(table(self, config, "position_embedding", config.max_len, "position"))
        elif config.positions == "sinusoidal":
            length = T if position is None else config.max_len
            x_BxTxW += rows(constant_table(config, sinusoidal_table(length, config.d_model)))
        x_BxTxD = blocks(config, enter_stream(config, x_BxTxW, train), train, cache)
        if at_B is not None:
            x_BxTxD = jnp.take_along_axis(x_BxTxD, at_B[:, None, None], axis=1)

        if not config.tie_embeddings:
            head = reader(config, "head", config.vocab_size, "vocab", config.head_bias)
            if not config.final_norm:
                return head(x_BxTxD)
            return head(make_norm(config, "head_norm", config.final_norm_affine).for_readers(x_BxTxD))

        # A tied table is read in its raw form, so the stream goes back to d numbers, and γ, β cannot be folded into it.
        if config.final_norm:
            x_BxTxD = make_norm(config, "head_norm", affine=False)(x_BxTxD)
        x_BxTxW = COORDINATES[config.norm].leave(x_BxTxD)
        if config.final_norm and config.final_norm_affine:
            affine = Affine(True, config.norm_bias, config.param_dtype, axis="raw", name="head_affine")
            x_BxTxW = affine(x_BxTxW.astype(jnp.promote_types(config.dtype, jnp.float32))).astype(config.dtype)
        if train:  # else the logits' derivative would be kept through that of all blocks, for the table's alone
            x_BxTxW, table_VxW = apart((x_BxTxW, table_VxW))
        logits_BxTxV = matmul(x_BxTxW, table_VxW.T)
        if config.head_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("vocab",))
            logits_BxTxV += self.param("head_bias", bias_init, (config.vocab_size,), config.param_dtype)
        return logits_BxTxV.astype(config.dtype)

    @nn.nowrap
    def example(self, batch: int = 1, seed: int | None = None) -> np.ndarray:
        """An input: (batch, 1) zeros, or of a seed (batch, up to 128) random tokens."""
        if seed is None:
            return np.zeros((batch, 1), np.int32)
        shape = (batch, min(self.config.max_len, 128))
        return np.random.default_rng(seed).integers(self.config.vocab_size, size=shape, dtype=np.int32)
