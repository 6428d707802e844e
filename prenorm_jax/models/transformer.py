"""The residual stream: how a model enters it, attention, MLP and block. Each is written once for all three norms.

Shape suffixes, here and in `models/`:
    B batch   T sequence (queries)   S sequence (keys)   D stream width (d, or d-1 under crmsnorm)   W model width d
    H heads   G key/value heads   R query heads per key/value head (H = G·R)   K head width   F MLP width
    V vocabulary or classes   P patch size   C channels   N any width or, first, B·G of a cache
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.trees import at_least_float32
from prenorm_jax.models.attention import CacheUse, ScoreBias, attend, attend_cached
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.coordinates import coordinates
from prenorm_jax.models.linear import apply_fused, reader, rematerialised, write
from prenorm_jax.models.norms import Affine, LayerNorm, Norm, Normed, RMSNorm, Statistics
from prenorm_jax.models.parameters import NormSite, annotated
from prenorm_jax.models.placement import constrain, fusion_barrier
from prenorm_jax.models.positions import alibi, patch_distances, rotate, rotate_patches
from prenorm_jax.models.stacking import LAYER, STACKED


def _gelu(x: jax.Array) -> jax.Array:
    """x Φ(x), arXiv 1606.08415. By erf, in float32 at least: the erfc of `nn.gelu` takes CPUs twice as long.

    Where x < -5.5, that is 0 in float32, and off by 2e-7.
    """
    wide = at_least_float32(x)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


_ACTIVATIONS = {
    "gelu": _gelu,
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # arXiv 1606.08415, section 2
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),  # arXiv 2109.08668
    "silu": nn.silu,
    "tanh": jnp.tanh,
}
_REMAT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


def activate(config: ModelConfig, x: jax.Array) -> jax.Array:
    """The nonlinearity of the config's MLPs, rematerialised: cheaper than storing its residuals."""
    return rematerialised(config, _ACTIVATIONS[config.activation])(x)


class StreamModel(nn.Module):
    """What the models share: `init` gives plain arrays, `annotated_init` the axis names that conversion reads."""

    @nn.nowrap
    def annotated_init(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """`init` whose leaves carry their logical axis names (`nn.LogicallyPartitioned`)."""
        return super().init(*args, **kwargs)

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Variables as `nn.Module.init` makes them, with plain arrays as leaves."""
        return nn.unbox(self.annotated_init(*args, **kwargs))


def make_norm(config: ModelConfig, name: str, affine: bool) -> Norm:
    """The config's norm, for values in stream coordinates."""
    return coordinates(config).norm(
        epsilon=config.epsilon,
        use_scale=affine,
        use_bias=affine and config.norm_bias,
        param_dtype=config.param_dtype,
        name=name,
    )


class Stream(NamedTuple):
    """The residual stream between two branches.

    Attributes:
      x: (B, T, D).
      statistics: what the norm that reads x next takes of it, where that is known without the norm's parameters. They
        are computed with x, so that XLA fuses their sums with what adds to it: in a scan over blocks the next iteration
        would have to read x again. None: that norm is still to come. (It is for a LayerNorm, whose x is centred first:
        that would be a second array of x's size in the carry.)
    """

    x: jax.Array
    statistics: Statistics | None = None


def as_stream(config: ModelConfig, x_BxTxD: jax.Array, train: bool) -> Stream:
    """The stream x, sharded by batch, with the statistics of its next norm where they may be known."""
    # Row-major in training: else XLA:TPU picks the layout that attention's product reads, and copies x for the rest.
    x_BxTxD = constrain(x_BxTxD, "batch", None, None, row_major=train)
    if config.norm == "layernorm" or config.norm_affine or config.post_norm:
        return Stream(x_BxTxD)
    with jax.named_scope("norm"):
        return Stream(x_BxTxD, coordinates(config).norm.normalise(x_BxTxD, config.epsilon).statistics)


def kept_norm(
    config: ModelConfig, name: str, norm: type[nn.Module], axis: str, of_each: str | None = None
) -> nn.Module:
    """A norm outside the stream: its affine stays where it is in all variants. `axis`, `of_each` as of `Affine`."""
    affine = config.kept_norm_affine
    options = {"param_dtype": config.param_dtype, "axis": axis, "of_each": of_each, "name": name}
    return norm(config.epsilon, affine, affine and config.norm_bias, **options)


def embedding_axis(config: ModelConfig) -> tuple[int, str]:
    """Width and logical name of the last axis of a table or kernel whose rows are the first to enter the stream."""
    return (config.d_model, "raw") if config.raw_embedding else (config.stream_width, "write")


def table(module: nn.Module, config: ModelConfig, name: str, rows: int, axis: str) -> jax.Array:
    """A learned parameter (rows, D or W) of `module`, added to the stream before the first block."""
    width, stream_axis = embedding_axis(config)
    init = annotated(nn.initializers.normal(0.02), axis, stream_axis)
    return constrain(module.param(name, init, (rows, width), config.param_dtype), axis, stream_axis)


def constant_table(config: ModelConfig, values_TxW: np.ndarray) -> jax.Array:
    """The same of a table that is computed: (T, W) -> (T, D or W)."""
    table_TxW = jnp.asarray(values_TxW, jnp.promote_types(config.dtype, jnp.float32))
    return (table_TxW if config.raw_embedding else coordinates(config).enter(table_TxW)).astype(config.dtype)


def end_embedding(config: ModelConfig, x_BxTxW: jax.Array, train: bool) -> jax.Array:
    """The embedding's norm and dropout, if it has them: (B, T, D or W) -> (B, T, D or W)."""
    if config.embed_norm:
        x_BxTxW = kept_norm(config, "embedding_norm", LayerNorm, axis="raw")(x_BxTxW)
    return nn.Dropout(config.embed_dropout)(x_BxTxW, deterministic=not train)


def enter_stream(config: ModelConfig, x_BxTxW: jax.Array) -> jax.Array:
    """What the embedding ends in, in the stream's coordinates: (B, T, D or W) -> (B, T, D)."""
    return coordinates(config).enter(x_BxTxW) if config.raw_embedding else x_BxTxW


def leave_stream(config: ModelConfig, x: jax.Array) -> jax.Array:
    """What the final norm gives, where a tied head or nothing reads it: (..., D) -> (..., W).

    The stream goes back to d numbers, and γ, β, which no reader takes up, are applied to them.
    """
    if config.final_norm:
        x = make_norm(config, "head_norm", affine=False)(x)
    x = coordinates(config).leave(x)
    if config.final_norm and config.final_norm_affine:
        affine = Affine(True, config.norm_bias, config.param_dtype, axis="raw", name="head_affine")
        x = affine(x.astype(jnp.promote_types(config.dtype, jnp.float32))).astype(config.dtype)
    return x


def blocks(
    config: ModelConfig,
    x_BxTxD: jax.Array,
    train: bool,
    cache: CacheUse | None = None,
    bias: ScoreBias | None = None,
    mask_BxT: jax.Array | None = None,
    embedding_BxTxW: jax.Array | None = None,
) -> jax.Array:
    """All of the model's blocks: (B, T, D) -> (B, T, D).

    `bias`: what all of them add to their scores. `mask_BxT`: the tokens that are seen, those of no padding.
    `embedding_BxTxW`: what block 0's attention reads in place of the stream, where that has no norm (`first_norm`).
    """

    def apply(block: Block, stream: Stream, embedding_BxTxW: jax.Array | None = None) -> Stream:
        return block(stream, train, cache, bias, mask_BxT, embedding_BxTxW)

    if train and config.remat != "none":
        apply = nn.remat(apply, policy=_REMAT[config.remat], prevent_cse=not config.scan)
    stream = as_stream(config, x_BxTxD, train)
    if config.scan:
        scanned = nn.scan(
            lambda block, stream, _: (apply(block, stream), None),
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True, "dropout": True},
            length=config.depth,
            metadata_params={nn.PARTITION_NAME: LAYER},
        )
        return scanned(Block(config.of_block(0), config.stochastic_depth, name=STACKED), stream, None)[0].x
    for i in range(config.depth):
        rate = config.stochastic_depth
        if config.stochastic_depth_schedule == "linear":
            rate *= i / max(config.depth - 1, 1)
        stream = apply(Block(config.of_block(i), rate, name=f"block_{i}"), stream, embedding_BxTxW)
        embedding_BxTxW = None
    return stream.x


class RelativeBias(nn.Module):
    """A learned number for each head and each distance between patches, to be added to scores: -> a `ScoreBias`."""

    config: ModelConfig

    @nn.compact
    def __call__(self) -> ScoreBias:
        config = self.config
        distances_TxT = patch_distances(config.tokens(0), config.grid)
        init = annotated(nn.initializers.zeros_init(), "position", "heads")
        table_NxH = self.param("table", init, (config.distances, config.heads), config.param_dtype)

        def bias(t_T: jax.Array, s_S: jax.Array) -> jax.Array:
            return jnp.moveaxis(at_least_float32(table_NxH)[jnp.asarray(distances_TxT)[t_T[:, None], s_S]], -1, 0)

        return bias


class Attention(nn.Module):
    """Self-attention with H query heads on G key/value heads: normalised (B, T, D) -> update (B, T, D).

    Attributes:
      reads: the logical name of the axis that query, key and value read along: read, of the stream, or raw.
    """

    config: ModelConfig
    reads: str = "read"

    @nn.compact
    def __call__(
        self,
        normed: Normed,
        train: bool = False,
        cache: CacheUse | None = None,
        bias: ScoreBias | None = None,
        mask_BxT: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config
        B, T, _ = normed.x.shape
        H, G, K = config.heads, config.kv_heads, config.head_dim

        prefix, width = ("normed_", K) if config.qk_norm else ("", None)
        projections = [
            reader(config, "query", H * K, f"{prefix}heads", config.qkv_bias, width, self.reads),
            reader(config, "key", G * K, f"{prefix}kv_heads", config.qkv_bias, width, self.reads),
            reader(config, "value", G * K, "kv_heads", config.qkv_bias, None, self.reads),
        ]
        q_BxTxHxK, k_BxSxGxK, v_BxSxGxK = (
            y.reshape(B, T, y.shape[-1] // K, K) for y in apply_fused(projections, normed)
        )
        if config.qk_norm:  # of a linear map's output, whose mean can be removed from the map: RMSNorm does
            norm = LayerNorm if config.norm == "layernorm" else RMSNorm
            of_each = ("heads", "kv_heads") if config.qk_norm_by_head else (None, None)
            q_BxTxHxK = kept_norm(config, "query_norm", norm, "head_dim", of_each[0])(q_BxTxHxK)
            k_BxSxGxK = kept_norm(config, "key_norm", norm, "head_dim", of_each[1])(k_BxSxGxK)
        if (bound := config.clip_qkv) is not None:
            q_BxTxHxK, k_BxSxGxK, v_BxSxGxK = (jnp.clip(x, -bound, bound) for x in (q_BxTxHxK, k_BxSxGxK, v_BxSxGxK))
        if config.rotary:
            position = 0 if cache is None else cache.position
            options = config.rotary_base, position, config.rotary_dim, config.rotary_interleaved
            q_BxTxHxK, k_BxSxGxK = (rotate(x, *options) for x in (q_BxTxHxK, k_BxSxGxK))
        if config.rotary2d:
            q_BxTxHxK, k_BxSxGxK = (rotate_patches(x, config.rotary_base, config.grid) for x in (q_BxTxHxK, k_BxSxGxK))

        if cache is not None:
            k_NxSxK = self._remember("keys", k_BxSxGxK, cache)
            v_NxSxK = self._remember("values", v_BxSxGxK, cache)
        if cache is not None and cache.size is None:
            options = cache.position, config.window, config.score_scale, bias or self._score_bias()
            heads_BxTxN = attend_cached(q_BxTxHxK, k_NxSxK, v_NxSxK, *options)
        else:
            key = self.make_rng("dropout") if train and config.attention_dropout else None
            options = config.causal, config.attention_dropout, key, config.attention_kernel, config.window
            options += config.score_scale, bias or self._score_bias(), mask_BxT
            heads_BxTxN = attend(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, *options)
        return write(self, config, "out", "heads", heads_BxTxN, train)

    def _score_bias(self) -> ScoreBias | None:
        """What is added to the scores, if anything is."""
        config = self.config
        if config.relative_bias == "layer":
            return RelativeBias(config, name="relative_bias")()
        if not config.alibi:
            return None
        scale = config.head_dim**-0.5 if config.alibi_rounded else 1.0
        dtype = jnp.promote_types(config.dtype, jnp.float32)
        return functools.partial(alibi, config.heads, config.alibi_rounded, scale, dtype)

    def _remember(self, name: str, x_BxTxGxK: jax.Array, cache: CacheUse) -> jax.Array:
        """Writes the tokens' keys or values into the cache, and returns all of it: (B·G, S, K).

        Of three axes, as XLA:CPU multiplies it: of four it would be copied at each step.
        """
        B, T, G, K = x_BxTxGxK.shape
        stored = self.variable("cache", name, jnp.zeros, (B * G, cache.size, K), x_BxTxGxK.dtype)
        x_NxTxK = x_BxTxGxK.swapaxes(1, 2).reshape(B * G, T, K)
        stored.value = jax.lax.dynamic_update_slice_in_dim(stored.value, x_NxTxK, cache.position, axis=1)
        return stored.value


class Mlp(nn.Module):
    """Two linear maps around a nonlinearity, gated or not: normalised (B, T, D) -> update (B, T, D)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, normed: Normed, train: bool = False) -> jax.Array:
        config = self.config
        names = ["gate", "up"] if config.gated_mlp else ["up"]
        readers = [reader(config, name, config.mlp_dim, "mlp", config.reader_bias) for name in names]
        h_BxTxF, *gated_BxTxF = apply_fused(readers, normed)
        h_BxTxF = activate(config, h_BxTxF)
        if config.gated_mlp:
            h_BxTxF *= gated_BxTxF[0]
        if not train:  # as one fused operation the two products take longer
            h_BxTxF = fusion_barrier(h_BxTxF)
        return write(self, config, "down", "mlp", h_BxTxF, train)


class Block(nn.Module):
    """Attention and MLP on the residual stream: Stream -> Stream.

    The norm that feeds branch `X` is called `X_norm`, one that feeds both `norm`.

    Attributes:
      drop_rate: of stochastic depth (arXiv 1603.09382): in training each branch is left out for this share of the
        examples, and is the larger for the others. One factor for all coordinates keeps a zero mean.
    """

    config: ModelConfig
    drop_rate: float = 0.0

    @nn.compact
    def __call__(
        self,
        stream: Stream,
        train: bool = False,
        cache: CacheUse | None = None,
        bias: ScoreBias | None = None,
        mask_BxT: jax.Array | None = None,
        embedding_BxTxW: jax.Array | None = None,
    ) -> Stream:
        config = self.config
        attention = Attention(config, "read" if embedding_BxTxW is None else "raw", name="attention")
        attention = functools.partial(attention, cache=cache, bias=bias, mask_BxT=mask_BxT)
        branches = {"attention": attention, "mlp": Mlp(config, name="mlp")}

        def update(name: str, normed: Normed) -> jax.Array:
            drop = nn.Dropout(self.drop_rate, broadcast_dims=(1, 2), name=f"{name}_drop")
            return drop(branches[name](normed, train), deterministic=not train)

        if config.parallel:
            names = {branch: "norm" if config.shared_norm else f"{branch}_norm" for branch in branches}
            normed = {name: self._normalise(name, stream) for name in dict.fromkeys(names.values())}
            x_BxTxD = stream.x + sum(update(branch, normed[name]) for branch, name in names.items())
            return as_stream(config, x_BxTxD, train)
        for name in branches:
            if config.post_norm:
                x_BxTxD = stream.x + update(name, Normed(stream.x))
                x_BxTxD = make_norm(config, f"{name}_norm", config.norm_affine)(x_BxTxD)
            elif name == "attention" and embedding_BxTxW is not None:
                x_BxTxD = stream.x + update(name, Normed(embedding_BxTxW))
            else:
                x_BxTxD = stream.x + update(name, self._normalise(f"{name}_norm", stream))
            stream = as_stream(config, x_BxTxD, train)
        return stream

    def _normalise(self, name: str, stream: Stream) -> Normed:
        """The stream as the norm of this name gives it to its readers."""
        if stream.statistics is None:
            return make_norm(self.config, name, self.config.norm_affine).for_readers(stream.x)
        return Normed(stream.x, stream.statistics, NormSite((*self.path, name), self.config.epsilon))
