"""Vision Transformer (arXiv 2010.11929): patches before the stream, pooling and the classifier behind it."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.linear import Linear, apply_fused, matmul, reader
from prenorm_jax.models.norms import LayerNorm, Normed
from prenorm_jax.models.parameters import annotated, spread
from prenorm_jax.models.positions import sincos2d_table
from prenorm_jax.models.transformer import (
    StreamModel,
    activate,
    blocks,
    constant_table,
    embedding_axis,
    end_embedding,
    enter_stream,
    kept_norm,
    leave_stream,
    make_norm,
    table,
)


@dataclasses.dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """A Vision Transformer of square images, which classifies them or, without a head, gives their features."""

    family: str = "vit"
    activation: str = "gelu"
    head_bias: bool = True
    epsilon: float = 1e-6
    init: str = "xavier"

    image_size: int = 224  # pixels, both ways
    patch_size: int = 16  # divides image_size
    channels: int = 3  # of an image
    classes: int = 1000  # labels are below it; 0: no head, the output is what it would read
    patch_bias: bool = True  # of the patch embedding
    positions: str = "learned"  # learned | sincos2d | none
    class_token: bool = True  # a learned token before the patches
    class_position: bool = True  # a learned position table has a row for the class token too
    registers: int = 0  # further tokens without position or output (arXiv 2309.16588)
    pooling: str = "class"  # class token | mean of the patches | class_mean: both | attention | none: all, without head
    norm_after_pooling: bool = False  # the final norm takes what the pooling gives, not what it is given

    inputs: ClassVar[str] = "images"
    choices = ModelConfig.choices | {
        "positions": ("learned", "sincos2d", "none"),
        "pooling": ("class", "mean", "class_mean", "attention", "none"),
    }
    at_least = ModelConfig.at_least | {
        **dict.fromkeys(("image_size", "patch_size", "channels"), 1),
        **dict.fromkeys(("classes", "registers"), 0),
    }

    @property
    def patches(self) -> int:
        """Patches in an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return self.class_token + self.registers

    def check(self) -> None:
        """Raises PrenormError for keys that contradict each other."""
        super().check()
        if self.image_size % self.patch_size:
            raise PrenormError(
                f"model.patch_size={self.patch_size} does not divide model.image_size={self.image_size}: change one"
            )
        if self.positions == "sincos2d" and self.d_model % 4:
            raise PrenormError(f"model.positions='sincos2d' needs a model.d_model divisible by 4, not {self.d_model}")
        if self.pooling.startswith("class") and not self.class_token:
            raise PrenormError(f"model.pooling={self.pooling!r} needs model.class_token=True")
        if self.pooling == "none" and self.classes:
            raise PrenormError("model.pooling='none' gives all tokens, which no head reads: set model.classes=0")
        if self.pooling == "class_mean" and not self.classes:
            raise PrenormError("model.classes=0 gives one vector: set model.pooling to another than 'class_mean'")

    @property
    def final_norm_bias(self) -> str | None:
        """That of what reads the final norm's output: the head, or the pooling's key and value. None: nothing does."""
        if self.pooling == "attention":
            return "qkv_bias"
        return "head_bias" if self.classes else None

    @property
    def raw_reader(self) -> str | None:
        """As in ModelConfig; the norm behind an attention pooling is not on the stream."""
        if not (self.final_norm or self.classes or self.pooling == "attention"):
            return "model.final_norm=False with model.classes=0: the output is"
        if self.final_norm and self.pooling == "attention" and self.norm_after_pooling:
            keys = "model.pooling='attention' with model.norm_after_pooling=True"
            return f"{keys}: pool/key and pool/value read"
        return super().raw_reader

    @property
    def position_rows(self) -> int:
        """Rows of a learned position table."""
        return self.patches + (self.class_token and self.class_position)

    def tokens(self, length: int = 0) -> int:
        """Tokens in the stream."""
        return self.patches + self.prefix

    def flops_outside_blocks(self, length: int = 0, logits: int | None = None) -> int:
        """FLOPs of the patch embedding and the head, without attention pooling."""
        patch = self.patch_size**2 * self.channels
        return 2 * self.d_model * (self.patches * patch + self.classes)


class PatchEmbedding(nn.Module):
    """A linear map of each patch: (B, height, width, C) images -> (B, T, D or W). The kernel (P, P, C, D) is that of a
    convolution with stride P, which this is; as one matrix product it is the faster."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        P, C, side = config.patch_size, config.channels, config.image_size // config.patch_size
        B = len(images)
        width, stream_axis = embedding_axis(config)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        init = annotated(init, "patch", "patch", "channel", stream_axis)
        kernel = self.param("kernel", init, (P, P, C, width), config.param_dtype)
        patches_BxTxN = images.astype(config.dtype).reshape(B, side, P, side, P, C).swapaxes(2, 3)
        patches_BxTxN = patches_BxTxN.reshape(B, side * side, P * P * C)
        x_BxTxD = matmul(patches_BxTxN, kernel.astype(config.dtype).reshape(P * P * C, width))
        if config.patch_bias:
            init = annotated(nn.initializers.zeros_init(), stream_axis)
            x_BxTxD += spread(self.param("bias", init, (width,), config.param_dtype), x_BxTxD.shape, x_BxTxD.dtype)
        return x_BxTxD


class AttentionPool(nn.Module):
    """Attention of one learned query to the stream, normalised, then an MLP: (B, T, D) -> (B, W) (arXiv 2106.04560).

    Key and value read the stream. What they make has a residual stream of its own, which no norm ends: its mean is
    read, so that all of it stays as it is in the variants, the LayerNorm (of one token) included.
    """

    config: ViTConfig

    @nn.compact
    def __call__(self, normed: Normed) -> jax.Array:
        config = self.config
        B, T, _ = normed.x.shape
        W, H, K = config.d_model, config.heads, config.head_dim

        projections = [reader(config, name, H * K, "heads", config.qkv_bias) for name in ("key", "value")]
        k_BxTxHxK, v_BxTxHxK = (y.reshape(B, T, H, K) for y in apply_fused(projections, normed))
        init = annotated(nn.initializers.xavier_uniform(), "token", "raw")
        probe_1xW = self.param("probe", init, (1, W), config.param_dtype).astype(config.dtype)
        q_HxK = Linear(config, H * K, ("raw", "heads"), config.use_bias, name="query")(probe_1xW).reshape(H, K)
        scores_BxHxT = jnp.einsum("hk,bthk->bht", q_HxK * K**-0.5, k_BxTxHxK)
        weights_BxHxT = jax.nn.softmax(scores_BxHxT.astype(jnp.promote_types(config.dtype, jnp.float32)))
        heads_BxN = jnp.einsum("bht,bthk->bhk", weights_BxHxT.astype(config.dtype), v_BxTxHxK).reshape(B, H * K)
        x_BxW = Linear(config, W, ("heads", "raw"), config.use_bias, name="out")(heads_BxN)
        normed_BxW = kept_norm(config, "mlp_norm", LayerNorm, axis="raw")(x_BxW)
        h_BxF = activate(config, Linear(config, config.mlp_dim, ("raw", "mlp"), config.use_bias, name="up")(normed_BxW))
        return x_BxW + Linear(config, W, ("mlp", "raw"), config.use_bias, name="down")(h_BxF)


class PairHead(nn.Module):
    """A linear classifier of two normalised vectors side by side, (B, D) each: -> (B, V)."""

    config: ViTConfig

    @nn.compact
    def __call__(self, class_token: Normed, mean: Normed) -> jax.Array:
        config = self.config
        by_class, by_mean = (
            reader(config, name, config.classes, "class", config.head_bias) for name in ("class", "mean")
        )
        return by_class(class_token) + by_mean(mean)


def _mean(normed: Normed) -> Normed:
    """Over the tokens: (B, T, D) -> (B, D)."""
    return normed.replace(x=normed.x.mean(1))


class ViT(StreamModel):
    """An image classifier: (B, image_size, image_size, C) numbers -> (B, V) logits in `config.dtype`.

    Without a head (`classes=0`) it gives what that would read: (B, W), or with `pooling="none"` all tokens, (B, T, W).

    Dropout and stochastic depth are active with `train=True` and need `rngs={"dropout": key}`; one key gives the three
    norms the same masks.
    """

    config: ViTConfig
    config_class: ClassVar[type[ModelConfig]] = ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        expected = (config.image_size, config.image_size, config.channels)
        if images.shape[1:] != expected:
            raise PrenormError(f"images of shape {images.shape[1:]} do not fit the model's, {expected}")
        x_BxTxD = blocks(config, enter_stream(config, end_embedding(config, self._embed(images), train)), train)
        if config.pooling == "attention":
            return self._attention_head(x_BxTxD)
        return self._head(x_BxTxD) if config.classes else self._features(x_BxTxD)

    def _attention_head(self, x_BxTxD: jax.Array) -> jax.Array:
        """The classifier behind attention pooling. What the pooling gives is not on the stream."""
        config, normed = self.config, Normed(x_BxTxD)
        if config.final_norm and not config.norm_after_pooling:
            normed = self._final_norm("pool_norm")(x_BxTxD)
        x_BxW = AttentionPool(config, name="pool")(normed)
        if config.final_norm and config.norm_after_pooling:
            x_BxW = kept_norm(config, "pooled_norm", LayerNorm, axis="raw")(x_BxW)
        if not config.classes:
            return x_BxW
        return Linear(config, config.classes, ("raw", "class"), config.head_bias, name="head")(x_BxW)

    def _features(self, x_BxTxD: jax.Array) -> jax.Array:
        """What a head would read: the class token, the patches' mean or all tokens, normalised and W wide."""
        config = self.config
        if config.pooling == "class":
            return leave_stream(config, x_BxTxD[:, 0])
        if config.pooling == "none":
            return leave_stream(config, x_BxTxD)
        patches_BxTxD = x_BxTxD[:, config.prefix :]
        if config.norm_after_pooling:
            return leave_stream(config, patches_BxTxD.mean(1))
        return leave_stream(config, patches_BxTxD).mean(1)

    def _head(self, x_BxTxD: jax.Array) -> jax.Array:
        """The classifier of the class token, of the patches' mean, or of both."""
        config = self.config
        norm = self._final_norm("head_norm") if config.final_norm else Normed
        class_token = norm(x_BxTxD[:, 0]) if config.pooling.startswith("class") else None  # whatever stands first
        if config.pooling != "class":
            x_BxTxD = x_BxTxD[:, config.prefix :]
            mean = norm(x_BxTxD.mean(1)) if config.norm_after_pooling else _mean(norm(x_BxTxD))
        if config.pooling == "class_mean":
            return PairHead(config, name="head")(class_token, mean)
        head = reader(config, "head", config.classes, "class", config.head_bias)
        return head(class_token if config.pooling == "class" else mean)

    def _final_norm(self, name: str) -> Callable[[jax.Array], Normed]:
        """The final norm, multiplied out: what it gives is sliced, averaged or read by two."""
        norm = make_norm(self.config, name, self.config.final_norm_affine)
        return lambda x: Normed(norm(x), site=norm.site)

    def _embed(self, images: jax.Array) -> jax.Array:
        """(B, side, side, C) -> (B, T, D or W): class token, registers, patches."""
        config = self.config
        x_BxTxW = PatchEmbedding(config, name="patch_embedding")(images)
        before = []
        if config.class_token:
            before.append(table(self, config, "class_token", 1, "token"))
        if config.positions == "learned":
            on_class = config.class_token and config.class_position
            positions_TxW = table(self, config, "position_embedding", config.position_rows, "position")
            if on_class:
                before[0] += positions_TxW[:1]
            x_BxTxW += spread(positions_TxW[int(on_class) :], x_BxTxW.shape, x_BxTxW.dtype)
        elif config.positions == "sincos2d":
            side = config.image_size // config.patch_size
            x_BxTxW += constant_table(config, sincos2d_table(side, config.d_model))
        if config.registers:
            before.append(table(self, config, "registers", config.registers, "token"))
        before = [spread(rows, (len(images), *rows.shape), x_BxTxW.dtype) for rows in before]
        return jnp.concatenate([*before, x_BxTxW], axis=1)

    @nn.nowrap
    def example(self, batch: int = 1, seed: int | None = None) -> np.ndarray:
        """An input: (batch, side, side, C) zeros, or of a seed standard normal numbers; float32."""
        config = self.config
        shape = (batch, config.image_size, config.image_size, config.channels)
        values = np.zeros(shape) if seed is None else np.random.default_rng(seed).normal(size=shape)
        return values.astype(np.float32)
