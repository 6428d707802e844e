"""Linear maps: from the normalised stream, and back to it. Shape suffixes as in `transformer.py`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.coordinates import coordinates
from prenorm_jax.models.norms import Normed
from prenorm_jax.models.parameters import NormSite, annotated, spread
from prenorm_jax.models.placement import constrain, mesh_axis_size, platform


class Linear(nn.Module):
    """x W + b over the last axis. The kernel (in, features) has the logical axis names `axes`, the bias the second.

    Attributes:
      stddev: of the kernel under init "normal".
      head_dim: of outputs that a norm over each head takes: the width of a head.
    """

    config: ModelConfig
    features: int
    axes: tuple[str, str]
    use_bias: bool
    stddev: float = 0.02
    head_dim: int | None = None

    @nn.compact
    def weights(self, width: int, norm: NormSite | None = None) -> list[jax.Array]:
        """Kernel (width, features), in config.dtype, and, if there is one, bias (features,). `norm` feeds it."""
        config = self.config
        init = nn.initializers.xavier_uniform() if config.init == "xavier" else nn.initializers.normal(self.stddev)
        init = annotated(init, *self.axes, norm=norm, head_dim=self.head_dim)
        kernel = self.param("kernel", init, (width, self.features), config.param_dtype)
        weights = [constrain(kernel.astype(config.dtype), *self.axes)]
        if self.use_bias:
            init = annotated(nn.initializers.zeros_init(), self.axes[1], head_dim=self.head_dim)
            bias = self.param("bias", init, (self.features,), config.param_dtype)
            weights.append(constrain(bias, self.axes[1]))
        return weights

    def __call__(self, x: jax.Array | Normed) -> jax.Array:
        return apply_fused([self], x if isinstance(x, Normed) else Normed(x))[0]


def apply_fused(layers: Sequence[Linear], normed: Normed) -> list[jax.Array]:
    """What each of the linear layers, which all have a bias or all have none, makes of n; by one matrix product."""
    x = normed.x
    # Not fused: one token a sequence, for which concatenating the kernels would be most of the work; and kernels whose
    # features are sharded over `tensor`, which concatenation would reshuffle between devices.
    if len(layers) > 1 and (x.shape[-2] == 1 or mesh_axis_size("tensor") > 1):
        normed = Normed(normed.product, site=normed.site)  # one n, whose cotangents are summed before their all-reduce
        return [layer(normed) for layer in layers]
    weights = [layer.weights(x.shape[-1], normed.site) for layer in layers]
    kernel, *bias = (jnp.concatenate(leaves, axis=-1) for leaves in zip(*weights, strict=True))
    # Rematerialise n in the backward pass, so that only x is a residual. Where `remat` rematerialises the whole block
    # a second level would only compute n once more; in unrolled blocks the platform decides.
    config = layers[0].config
    remat = config.remat == "none" and (config.scan or platform().remat_normed)
    y = (rematerialised(config, read) if remat else read)(normed, kernel)
    y = y + spread(bias[0], y.shape, y.dtype) if bias else y
    if len(layers) == 1:
        return [constrain(y, "batch", *[None] * (y.ndim - 2), layers[0].axes[1])]
    return jnp.split(y, np.cumsum([layer.features for layer in layers])[:-1], axis=-1)


def rematerialised(config: ModelConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.checkpoint` of a function in a block: its residuals are its arguments alone."""
    # `prevent_cse=True` puts optimization barriers around what is recomputed, across which XLA does not fuse. Inside
    # `lax.scan` they are not needed (see the documentation of `jax.checkpoint`): forward and backward pass are loops of
    # their own, and no CSE reaches from one into the other. With `remat` both passes are in the backward loop's body.
    return jax.checkpoint(function, prevent_cse=not (config.scan and config.remat == "none"))


def read(normed: Normed, kernel: jax.Array) -> jax.Array:
    """n W: (..., in), (in, out) -> (..., out)."""
    return matmul(normed.product.astype(kernel.dtype), kernel)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., in) @ (in, out), as one product of two matrices.

    Its derivative by the kernel is then one too: of three axes XLA:CPU transposes an operand into a copy first, and
    fuses its producers into the copy. Widths are padded as the platform is told, but not for one token a sequence,
    where padding the kernel would take as long as the product.
    """
    *leading, width = x.shape
    features, one_token = kernel.shape[-1], x.ndim > 2 and x.shape[-2] == 1
    multiple = 1 if one_token else max(platform().pad_bytes // x.dtype.itemsize, 1)
    more_in, more_out = -width % multiple, -features % multiple
    if more_in:
        x = jnp.pad(x, [(0, 0)] * len(leading) + [(0, more_in)])
    if more_in or more_out:
        kernel = jnp.pad(kernel, [(0, more_in), (0, more_out)])
    y = x.reshape(math.prod(leading), width + more_in) @ kernel  # not -1, which no empty batch has
    return y[:, :features].reshape(*leading, features)


def reader(
    config: ModelConfig,
    name: str,
    features: int,
    axis: str,
    bias: bool,
    head_dim: int | None = None,
    reads: str = "read",
) -> Linear:
    """A linear map from the normalised stream, or what `reads` names: (B, T, D) -> (B, T, features)."""
    return Linear(config, features, (reads, axis), bias, head_dim=head_dim, name=name)


def write(module: nn.Module, config: ModelConfig, name: str, axis: str, x_BxTxN: jax.Array, train: bool) -> jax.Array:
    """What a branch (`module`) ends in: (B, T, N) -> (B, T, D), to be added to the stream.

    A linear map, dropout, and LayerScale (arXiv 2103.17239), whose parameter `<name>_scale` conversion folds into the
    map. Dropout drops some of all d coordinates, and what is left has no zero mean whatever the weights are: the value
    is centred (and compressed) after it. Without dropout the weights themselves are in stream coordinates.
    """
    raw = config.raw_branches
    features = config.d_model if raw else config.stream_width
    stddev = 0.02 / (2 * config.depth) ** 0.5  # 2·depth branches add up (GPT-2, section 2.3)
    write_map = Linear(config, features, (axis, "raw" if raw else "write"), config.use_bias, stddev, name=name)
    y_BxTxW = nn.Dropout(config.branch_dropout)(write_map(x_BxTxN), deterministic=not train)
    if config.layer_scale is not None:
        init = annotated(nn.initializers.constant(config.layer_scale), "layer_scale", scaled=write_map.path)
        scale_W = module.param(f"{name}_scale", init, (features,), config.param_dtype)
        y_BxTxW = y_BxTxW * spread(scale_W, y_BxTxW.shape, y_BxTxW.dtype)
    return coordinates(config).enter(y_BxTxW) if raw else y_BxTxW
