"""Vision Transformer (arXiv 2010.11929): patches before the stream, pooling and the classifier behind it."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.config import ViTConfig
from prenorm_jax.models.linear import Linear, apply_together, matmul, reader
from prenorm_jax.models.norms import LayerNorm, Scaled
from prenorm_jax.models.positions import sincos2d_table
from prenorm_jax.models.transformer import (
    StreamModel,
    activate,
    blocks,
    constant_table,
    embedding_axis,
    enter_stream,
    kept_norm,
    make_norm,
    table,
)


class PatchEmbedding(nn.Module):
    """A linear map of each patch: (B, height, width, C) images -> (B, T, D or W). The kernel (P, P, C, D) is that of a
    convolution with stride P, which this is; as one matrix product it is the faster."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        P, C, side = config.patch_size, config.channels, config.image_size // config.patch_size
        width, stream_axis = embedding_axis(config)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        axes = ("patch", "patch", "channel", stream_axis)
        kernel = self.param("kernel", nn.with_logical_partitioning(init, axes), (P, P, C, width), config.param_dtype)
        patches_BxTxN = images.astype(config.dtype).reshape(-1, side, P, side, P, C).swapaxes(2, 3)
        patches_BxTxN = patches_BxTxN.reshape(-1, side * side, P * P * C)
        x_BxTxD = matmul(patches_BxTxN, kernel.astype(config.dtype).reshape(P * P * C, width))
        if config.patch_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), (stream_axis,))
            x_BxTxD += self.param("bias", bias_init, (width,), config.param_dtype).astype(config.dtype)
        return x_BxTxD


class AttentionPool(nn.Module):
    """Attention of one learned query to the normalised stream, then an MLP: (B, T, D) -> (B, W) (arXiv 2106.04560).

    Key and value read the stream. What they make has a residual stream of its own, which no norm ends: its mean is
    read, so that all of it stays as it is in the variants, the LayerNorm (of one token) included.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        config = self.config
        B, T, _ = x_BxTxD.shape
        W, H, K = config.d_model, config.heads, config.head_dim

        projections = [reader(config, name, H * K, "heads", config.qkv_bias) for name in ("key", "value")]
        k_BxTxHxK, v_BxTxHxK = (y.reshape(B, T, H, K) for y in apply_together(projections, Scaled(x_BxTxD)))
        probe_init = nn.with_logical_partitioning(nn.initializers.xavier_uniform(), ("token", "raw"))
        probe_1xW = self.param("probe", probe_init, (1, W), config.param_dtype).astype(config.dtype)
        q_HxK = Linear(config, H * K, ("raw", "heads"), config.use_bias, name="query")(probe_1xW).reshape(H, K)
        scores_BxHxT = jnp.einsum("hk,bthk->bht", q_HxK * K**-0.5, k_BxTxHxK)
        weights_BxHxT = jax.nn.softmax(scores_BxHxT.astype(jnp.promote_types(config.dtype, jnp.float32)))
        heads_BxN = jnp.einsum("bht,bthk->bhk", weights_BxHxT.astype(config.dtype), v_BxTxHxK).reshape(B, H * K)
        x_BxW = Linear(config, W, ("heads", "raw"), config.use_bias, name="out")(heads_BxN)
        normed_BxW = kept_norm(config, "mlp_norm", LayerNorm, axis="raw")(x_BxW)
        h_BxF = activate(config, Linear(config, config.mlp_dim, ("raw", "mlp"), config.use_bias, name="up")(normed_BxW))
        return x_BxW + Linear(config, W, ("mlp", "raw"), config.use_bias, name="down")(h_BxF)


class PairHead(nn.Module):
    """A linear classifier of two normalised vectors side by side: (B, D), (B, D) -> (B, V)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, class_BxD: jax.Array, mean_BxD: jax.Array) -> jax.Array:
        config = self.config
        by_class, by_mean = (
            reader(config, name, config.classes, "class", config.head_bias) for name in ("class", "mean")
        )
        return by_class(class_BxD) + by_mean(mean_BxD)


class ViT(StreamModel):
    """An image classifier: (B, image_size, image_size, C) numbers -> (B, V) logits in `config.dtype`.

    Dropout and stochastic depth are active with `train=True` and need `rngs={"dropout": key}`; one key gives the three
    norms the same masks.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        expected = (config.image_size, config.image_size, config.channels)
        if images.shape[1:] != expected:
            raise PrenormError(f"images of shape {images.shape[1:]} do not fit the model's, {expected}")

        x_BxTxD = enter_stream(config, self._embed(images), train)
        x_BxTxD = blocks(config, x_BxTxD, train)

        def final_norm(name: str) -> Callable[[jax.Array], jax.Array]:
            return make_norm(config, name, config.final_norm_affine) if config.final_norm else lambda x: x

        if config.pooling == "attention":
            if not config.norm_after_pooling:
                x_BxTxD = final_norm("pool_norm")(x_BxTxD)
            x_BxW = AttentionPool(config, name="pool")(x_BxTxD)
            if config.norm_after_pooling and config.final_norm:
                x_BxW = kept_norm(config, "pooled_norm", LayerNorm, axis="raw")(x_BxW)
            return Linear(config, config.classes, ("raw", "class"), config.head_bias, name="head")(x_BxW)

        norm = final_norm("head_norm")
        class_BxD = norm(x_BxTxD[:, 0]) if config.pooling.startswith("class") else None  # whatever stands first
        if config.pooling == "class":
            return self._head(class_BxD)
        x_BxTxD = x_BxTxD[:, config.prefix :]
        mean_BxD = norm(x_BxTxD.mean(1)) if config.norm_after_pooling else norm(x_BxTxD).mean(1)
        if config.pooling == "mean":
            return self._head(mean_BxD)
        return PairHead(config, name="head")(class_BxD, mean_BxD)

    def _embed(self, images: jax.Array) -> jax.Array:
        """(B, side, side, C) -> (B, T, D or W): class token, registers, patches."""
        config = self.config
        x_BxTxW = PatchEmbedding(config, name="patch_embedding")(images)
        before = []
        if config.class_token:
            before.append(table(self, config, "class_token", 1, "token"))
        if config.positions == "learned":
            on_class = config.class_token and config.class_position
            positions_TxW = table(self, config, "position_embedding", on_class + config.patches, "position")
            if on_class:
                before[0] += positions_TxW[:1]
            x_BxTxW += positions_TxW[int(on_class) :]
        elif config.positions == "sincos2d":
            side = config.image_size // config.patch_size
            x_BxTxW += constant_table(config, sincos2d_table(side, config.d_model))
        if config.registers:
            before.append(table(self, config, "registers", config.registers, "token"))
        before = [jnp.broadcast_to(rows, (len(images), *rows.shape)) for rows in before]
        return jnp.concatenate([*before, x_BxTxW], axis=1)

    def _head(self, x_BxD: jax.Array) -> jax.Array:
        return reader(self.config, "head", self.config.classes, "class", self.config.head_bias)(x_BxD)

    @nn.nowrap
    def example(self, batch: int = 1, seed: int | None = None) -> np.ndarray:
        """An input: (batch, side, side, C) zeros, or of a seed standard normal numbers; float32."""
        config = self.config
        shape = (batch, config.image_size, config.image_size, config.channels)
        values = np.zeros(shape) if seed is None else np.random.default_rng(seed).normal(size=shape)
        return values.astype(np.float32)
