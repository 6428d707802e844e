"""Vision Transformer (arXiv 2010.11929): patches before the stream, pooling and the classifier behind it."""

import dataclasses
import math
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
    RelativeBias,
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

    image_size: int = 224  # pixels from top to bottom
    image_width: int | None = None  # image_size; of other rectangles, such as spectrograms
    patch_size: int = 16  # divides image_size
    patch_stride: int | None = None  # patch_size; smaller, patches overlap (AST, arXiv 2104.01778)
    channels: int = 3  # of an image
    classes: int = 1000  # labels are below it; 0: no head, the output is what it would read
    patch_bias: bool = True  # of the patch embedding
    positions: str = "learned"  # learned | sincos2d | rotary2d: queries and keys of patches are turned | none
    rotary_base: float = 100.0  # of rotary2d
    relative_bias: str = "none"  # none | layer | shared by all: scores gain a learned number for each distance (BEiT)
    class_token: bool = True  # a learned token before the patches
    distillation_token: bool = False  # a second class token, behind it (DeiT, arXiv 2012.12877)
    class_position: bool = True  # a learned position table has a row for each class token too
    registers: int = 0  # further tokens without position or output (arXiv 2309.16588)
    # distilled: each class token has a head, logits are the mean of theirs; class_pair: the mean of the two tokens
    pooling: str = "class"  # token | mean of the patches | class_mean: both | distilled | class_pair | attention | none
    norm_after_pooling: bool = False  # the final norm takes what the pooling gives, not what it is given
    pooled_norm: bool = False  # a LayerNorm more, of what the pooling gives, outside the stream (AST)

    inputs: ClassVar[str] = "images"
    choices = ModelConfig.choices | {
        "positions": ("learned", "sincos2d", "rotary2d", "none"),
        "relative_bias": ("none", "layer", "shared"),
        "pooling": ("class", "mean", "class_mean", "distilled", "class_pair", "attention", "none"),
    }
    at_least = ModelConfig.at_least | {
        **dict.fromkeys(("image_size", "image_width", "patch_size", "patch_stride", "channels", "rotary_base"), 1),
        **dict.fromkeys(("classes", "registers"), 0),
    }

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image."""
        return self.image_size, self.image_width or self.image_size, self.channels

    @property
    def grid(self) -> tuple[int, int]:
        """Patches from top to bottom, and from left to right."""
        height, width, _ = self.image_shape
        stride = self.patch_stride or self.patch_size
        return (height - self.patch_size) // stride + 1, (width - self.patch_size) // stride + 1

    @property
    def patches(self) -> int:
        """Patches in an image."""
        return math.prod(self.grid)

    @property
    def distances(self) -> int:
        """Distances that tokens may be apart: rows of a relative bias."""
        rows, columns = self.grid
        return (2 * rows - 1) * (2 * columns - 1) + 3

    @property
    def class_tokens(self) -> int:
        """The class token and the distillation token, as far as there are."""
        return self.class_token + self.distillation_token

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class tokens and the registers."""
        return self.class_tokens + self.registers

    @property
    def rotary2d(self) -> bool:
        """As in ModelConfig."""
        return self.positions == "rotary2d"

    def check(self) -> None:
        """Raises PrenormError for keys that contradict each other."""
        super().check()
        self._check_patches()
        if self.positions == "sincos2d" and self.d_model % 4:
            raise PrenormError(f"model.positions='sincos2d' needs a model.d_model divisible by 4, not {self.d_model}")
        if self.rotary2d and self.head_dim % 4:
            raise PrenormError(f"model.positions='rotary2d' needs a model.head_dim divisible by 4, not {self.head_dim}")
        if self.distillation_token and not self.class_token:
            raise PrenormError("model.distillation_token=True needs model.class_token=True, behind which it stands")
        if self.pooling.startswith("class") and not self.class_token:
            raise PrenormError(f"model.pooling={self.pooling!r} needs model.class_token=True")
        if self.pooling in ("distilled", "class_pair") and not self.distillation_token:
            raise PrenormError(f"model.pooling={self.pooling!r} needs model.distillation_token=True")
        if self.pooling == "none" and self.classes:
            raise PrenormError("model.pooling='none' gives all tokens, which no head reads: set model.classes=0")
        if self.pooling in ("class_mean", "distilled") and not self.classes:
            raise PrenormError(f"model.classes=0 gives one vector: set model.pooling to another than {self.pooling!r}")
        if self.pooled_norm and self.pooling not in ("class", "mean", "class_pair"):
            raise PrenormError(
                f"model.pooled_norm=True needs model.pooling='class', 'mean' or 'class_pair', not {self.pooling!r}"
            )

    def _check_patches(self) -> None:
        height, width, _ = self.image_shape
        if self.patch_stride is None:
            for key, size in (("image_size", height), ("image_width", width)):
                if size % self.patch_size:
                    raise PrenormError(
                        f"model.patch_size={self.patch_size} does not divide model.{key}={size}: change one"
                    )
        elif self.patch_size > min(height, width):
            raise PrenormError(f"model.patch_size={self.patch_size} is larger than the images: lower it")
        if self.positions == "sincos2d" and self.grid[0] != self.grid[1]:
            raise PrenormError("model.positions='sincos2d' needs as many patches both ways: unset model.image_width")

    @property
    def final_norm_bias(self) -> str | None:
        """That of what reads the final norm's output: the head, or the pooling's key and value. None: nothing does, or
        a norm."""
        if self.pooling == "attention":
            return "qkv_bias"
        return "head_bias" if self.classes and not self.pooled_norm else None

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
        return self.patches + self.class_tokens * self.class_position

    def tokens(self, length: int = 0) -> int:
        """Tokens in the stream."""
        return self.patches + self.prefix

    def flops_outside_blocks(self, length: int = 0, logits: int | None = None) -> int:
        """FLOPs of the patch embedding and the head, without attention pooling."""
        patch = self.patch_size**2 * self.channels
        return 2 * self.d_model * (self.patches * patch + self.classes)


class PatchEmbedding(nn.Module):
    """A linear map of each patch: (B, height, width, C) images -> (B, T, D or W). The kernel (P, P, C, D) is that of a
    convolution, which this is; where patches do not overlap, it is faster as one matrix product."""

    config: ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        config = self.config
        P, C, (rows, columns) = config.patch_size, config.channels, config.grid
        B, images = len(images), images.astype(config.dtype)
        width, stream_axis = embedding_axis(config)
        init = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")
        init = annotated(init, "patch", "patch", "channel", stream_axis)
        kernel = self.param("kernel", init, (P, P, C, width), config.param_dtype)
        kernel = kernel.astype(config.dtype)
        if config.patch_stride is None:
            patches_BxTxN = images.reshape(B, rows, P, columns, P, C).swapaxes(2, 3)
            patches_BxTxN = patches_BxTxN.reshape(B, rows * columns, P * P * C)
            x_BxTxD = matmul(patches_BxTxN, kernel.reshape(P * P * C, width))
        else:
            layout = ("NHWC", "HWIO", "NHWC")
            strides = (config.patch_stride, config.patch_stride)
            maps = jax.lax.conv_general_dilated(images, kernel, strides, "VALID", dimension_numbers=layout)
            x_BxTxD = maps.reshape(B, rows * columns, width)
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
    """A linear classifier for each of two normalised vectors, (B, D) each: (B, V), the sum of what they give.

    Attributes:
      second: the name of the second one; the first is that of the class token.
    """

    config: ViTConfig
    second: str

    @nn.compact
    def __call__(self, class_token: Normed, other: Normed) -> jax.Array:
        config = self.config
        by_class, by_other = (
            reader(config, name, config.classes, "class", config.head_bias) for name in ("class", self.second)
        )
        return by_class(class_token) + by_other(other)


def _mean(normed: Normed) -> Normed:
    """Over the tokens: (B, T, D) -> (B, D)."""
    return normed.replace(x=normed.x.mean(1))


class ViT(StreamModel):
    """An image classifier: (B, height, width, C) numbers -> (B, V) logits in `config.dtype`.

    Without a head (`classes=0`) it gives what that would read: (B, W), or with `pooling="none"` all tokens, (B, T, W).

    Dropout and stochastic depth are active with `train=True` and need `rngs={"dropout": key}`; one key gives the three
    norms the same masks.
    """

    config: ViTConfig
    config_class: ClassVar[type[ModelConfig]] = ViTConfig

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        config = self.config
        if images.shape[1:] != config.image_shape:
            raise PrenormError(f"images of shape {images.shape[1:]} do not fit the model's, {config.image_shape}")
        bias = RelativeBias(config, name="relative_bias")() if config.relative_bias == "shared" else None
        x_BxTxW = end_embedding(config, self._embed(images), train)
        x_BxTxD = blocks(config, enter_stream(config, x_BxTxW), train, bias=bias)
        if config.pooling == "attention":
            return self._attention_head(x_BxTxD)
        if config.pooled_norm:
            return self._raw_head(kept_norm(config, "pooled_norm", LayerNorm, axis="raw")(self._features(x_BxTxD)))
        return self._head(x_BxTxD) if config.classes else self._features(x_BxTxD)

    def _raw_head(self, x_BxW: jax.Array) -> jax.Array:
        """The classifier, if there is one, of what is no longer on the stream."""
        config = self.config
        if not config.classes:
            return x_BxW
        return Linear(config, config.classes, ("raw", "class"), config.head_bias, name="head")(x_BxW)

    def _attention_head(self, x_BxTxD: jax.Array) -> jax.Array:
        """The classifier behind attention pooling. What the pooling gives is not on the stream."""
        config, normed = self.config, Normed(x_BxTxD)
        if config.final_norm and not config.norm_after_pooling:
            normed = self._final_norm("pool_norm")(x_BxTxD)
        x_BxW = AttentionPool(config, name="pool")(normed)
        if config.final_norm and config.norm_after_pooling:
            x_BxW = kept_norm(config, "pooled_norm", LayerNorm, axis="raw")(x_BxW)
        return self._raw_head(x_BxW)

    def _features(self, x_BxTxD: jax.Array) -> jax.Array:
        """What a head would read: class tokens, the patches' mean or all tokens, normalised and W wide."""
        config = self.config
        if config.pooling == "class":
            return leave_stream(config, x_BxTxD[:, 0])
        if config.pooling == "none":
            return leave_stream(config, x_BxTxD)
        if config.pooling == "class_pair":
            return leave_stream(config, x_BxTxD[:, :2]).mean(1)
        patches_BxTxD = x_BxTxD[:, config.prefix :]
        if config.norm_after_pooling:
            return leave_stream(config, patches_BxTxD.mean(1))
        return leave_stream(config, patches_BxTxD).mean(1)

    def _head(self, x_BxTxD: jax.Array) -> jax.Array:
        """The classifier of the class token, of the patches' mean, or of two vectors."""
        config = self.config
        norm = self._final_norm("head_norm") if config.final_norm else Normed
        if config.pooling == "mean":
            pooled = self._patch_mean(norm, x_BxTxD)
        elif config.pooling == "class_pair":
            pooled = _mean(norm(x_BxTxD[:, :2]))
        else:
            pooled = norm(x_BxTxD[:, 0])  # whatever stands first
        if config.pooling == "class_mean":
            return PairHead(config, "mean", name="head")(pooled, self._patch_mean(norm, x_BxTxD))
        if config.pooling == "distilled":
            return PairHead(config, "distillation", name="head")(pooled, norm(x_BxTxD[:, 1])) / 2
        return reader(config, "head", config.classes, "class", config.head_bias)(pooled)

    def _patch_mean(self, norm: Callable[[jax.Array], Normed], x_BxTxD: jax.Array) -> Normed:
        """The mean of the patches, normalised before or after."""
        patches_BxTxD = x_BxTxD[:, self.config.prefix :]
        return norm(patches_BxTxD.mean(1)) if self.config.norm_after_pooling else _mean(norm(patches_BxTxD))

    def _final_norm(self, name: str) -> Callable[[jax.Array], Normed]:
        """The final norm, multiplied out: what it gives is sliced, averaged or read by two."""
        norm = make_norm(self.config, name, self.config.final_norm_affine)
        return lambda x: Normed(norm(x), site=norm.site)

    def _embed(self, images: jax.Array) -> jax.Array:
        """(B, height, width, C) -> (B, T, D or W): class tokens, registers, patches."""
        config = self.config
        x_BxTxW = PatchEmbedding(config, name="patch_embedding")(images)
        before = []
        if config.class_token:
            before.append(table(self, config, "class_token", 1, "token"))
        if config.distillation_token:
            before.append(table(self, config, "distillation_token", 1, "token"))
        if config.positions == "learned":
            on_class = len(before) * config.class_position
            positions_TxW = table(self, config, "position_embedding", config.position_rows, "position")
            before[:on_class] = [token + positions_TxW[i : i + 1] for i, token in enumerate(before[:on_class])]
            x_BxTxW += spread(positions_TxW[on_class:], x_BxTxW.shape, x_BxTxW.dtype)
        elif config.positions == "sincos2d":
            x_BxTxW += constant_table(config, sincos2d_table(config.grid[0], config.d_model))
        if config.registers:
            before.append(table(self, config, "registers", config.registers, "token"))
        before = [spread(rows, (len(images), *rows.shape), x_BxTxW.dtype) for rows in before]
        return jnp.concatenate([*before, x_BxTxW], axis=1)

    @nn.nowrap
    def example(self, batch: int = 1, seed: int | None = None) -> np.ndarray:
        """An input: (batch, height, width, C) zeros, or of a seed standard normal numbers; float32."""
        shape = (batch, *self.config.image_shape)
        values = np.zeros(shape) if seed is None else np.random.default_rng(seed).normal(size=shape)
        return values.astype(np.float32)
