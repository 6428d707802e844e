"""Attention, MLP and the residual block, each written once for all three norms.

Shape suffixes, here and in `models/`:
    B batch   T sequence (queries)   S sequence (keys)   D stream width (d, or d-1 under crmsnorm)   W model width d
    H heads   G key/value heads   R query heads per key/value head (H = G·R)   K head width   F MLP width   V vocabulary
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from prenorm_jax.config import ModelConfig
from prenorm_jax.stream import COORDINATES

_ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
    "tanh": jnp.tanh,
}


def make_norm(config: ModelConfig, name: str, affine: bool) -> nn.Module:
    """The config's norm, for values in stream coordinates."""
    return COORDINATES[config.norm].norm(
        epsilon=config.epsilon,
        use_scale=affine,
        use_bias=affine and config.norm_bias,
        param_dtype=config.param_dtype,
        name=name,
    )


def _linear(
    config: ModelConfig, name: str, features: int, axes: tuple[str, str], bias: bool, stddev: float
) -> nn.Dense:
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        kernel_init=nn.with_logical_partitioning(nn.initializers.normal(stddev), axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        name=name,
    )


def reader(config: ModelConfig, name: str, features: int, axis: str, bias: bool) -> nn.Dense:
    """A linear map from the normalised stream: (B, T, D) -> (B, T, features)."""
    return _linear(config, name, features, ("read", axis), bias, stddev=0.02)


def write(config: ModelConfig, name: str, axis: str, x_BxTxN: jax.Array, train: bool) -> jax.Array:
    """A branch's last linear map and the dropout behind it: (B, T, N) -> (B, T, D), to be added to the stream.

    Dropout drops some of all d coordinates, and what is left has no zero mean whatever the weights are: the value is
    centred (and compressed) after it. Without dropout the weights themselves are in stream coordinates.
    """
    raw = config.raw_branches
    features = config.d_model if raw else config.stream_width
    stddev = 0.02 / (2 * config.depth) ** 0.5  # 2·depth branches add up (GPT-2, section 2.3)
    linear = _linear(config, name, features, (axis, "raw" if raw else "write"), config.use_bias, stddev)
    y_BxTxW = nn.Dropout(config.branch_dropout)(linear(x_BxTxN), deterministic=not train)
    return COORDINATES[config.norm].enter(y_BxTxW) if raw else y_BxTxW


def rotate(x_BxTxHxK: jax.Array, base: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): turns the pair (k, k + K/2) of position t by t · base^(-2k/K)."""
    T, K = x_BxTxHxK.shape[1], x_BxTxHxK.shape[3]
    dtype = jnp.promote_types(x_BxTxHxK.dtype, jnp.float32)
    angles_TxK = jnp.arange(T, dtype=dtype)[:, None] * base ** (-jnp.arange(0, K, 2, dtype=dtype) / K)
    cos, sin = jnp.cos(angles_TxK)[:, None, :], jnp.sin(angles_TxK)[:, None, :]
    first, second = jnp.split(x_BxTxHxK.astype(dtype), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)


class Attention(nn.Module):
    """Causal self-attention with H query heads on G key/value heads: normalised (B, T, D) -> update (B, T, D)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        B, T, _ = x_BxTxD.shape
        H, G, K = config.heads, config.kv_heads, config.head_dim

        def project(name: str, heads: int, axis: str) -> jax.Array:
            return reader(config, name, heads * K, axis, config.reader_bias)(x_BxTxD).reshape(B, T, heads, K)

        q_BxTxHxK = project("query", H, "heads")
        k_BxSxGxK = project("key", G, "kv_heads")
        v_BxSxGxK = project("value", G, "kv_heads")
        if config.positions == "rotary":
            q_BxTxHxK, k_BxSxGxK = (rotate(x, config.rotary_base) for x in (q_BxTxHxK, k_BxSxGxK))

        q_BxTxGxRxK = q_BxTxHxK.reshape(B, T, G, H // G, K) * K**-0.5
        scores_BxGxRxTxS = jnp.einsum("btgrk,bsgk->bgrts", q_BxTxGxRxK, k_BxSxGxK)
        scores_BxGxRxTxS = scores_BxGxRxTxS.astype(jnp.promote_types(scores_BxGxRxTxS.dtype, jnp.float32))
        causal_TxS = jnp.tril(jnp.ones((T, T), bool))
        weights_BxGxRxTxS = jax.nn.softmax(jnp.where(causal_TxS, scores_BxGxRxTxS, -jnp.inf)).astype(v_BxSxGxK.dtype)
        weights_BxGxRxTxS = nn.Dropout(config.attention_dropout)(weights_BxGxRxTxS, deterministic=not train)
        heads_BxTxN = jnp.einsum("bgrts,bsgk->btgrk", weights_BxGxRxTxS, v_BxSxGxK).reshape(B, T, H * K)
        return write(config, "out", "heads", heads_BxTxN, train)


class Mlp(nn.Module):
    """Two linear maps around a nonlinearity, gated or not: normalised (B, T, D) -> update (B, T, D)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        activation = _ACTIVATIONS[config.activation]

        def project(name: str) -> jax.Array:
            return reader(config, name, config.mlp_dim, "mlp", config.reader_bias)(x_BxTxD)

        h_BxTxF = activation(project("gate")) * project("up") if config.gated_mlp else activation(project("up"))
        return write(config, "down", "mlp", h_BxTxF, train)


class Block(nn.Module):
    """Attention and MLP on the residual stream: (B, T, D) -> (B, T, D).

    The norm beside branch `X` is called `X_norm`, one that feeds both `norm`: conversion finds it by that name.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        branches = {"attention": Attention(config, name="attention"), "mlp": Mlp(config, name="mlp")}

        def norm(name: str) -> nn.Module:
            return make_norm(config, name, config.norm_affine)

        if config.shared_norm:
            normed_BxTxD = norm("norm")(x_BxTxD)
            return x_BxTxD + sum(branch(normed_BxTxD, train) for branch in branches.values())
        if config.parallel:
            return x_BxTxD + sum(branch(norm(f"{name}_norm")(x_BxTxD), train) for name, branch in branches.items())
        for name, branch in branches.items():
            branch_norm = norm(f"{name}_norm")
            if config.post_norm:
                x_BxTxD = branch_norm(x_BxTxD + branch(x_BxTxD, train))
            else:
                x_BxTxD = x_BxTxD + branch(branch_norm(x_BxTxD), train)
        return x_BxTxD
