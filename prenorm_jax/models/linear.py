"""Linear maps: from the normalised stream, and back to it. Shape suffixes as in `transformer.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.coordinates import COORDINATES
from prenorm_jax.models.norms import Scaled
from prenorm_jax.models.placement import computing_platform, constrain, is_split_by


class Linear(nn.Module):
    """x W + b over the last axis. The kernel (in, features) has the logical axis names `axes`, the bias the second.

    Attributes:
      stddev: of the kernel under init "normal".
    """

    config: ModelConfig
    features: int
    axes: tuple[str, str]
    use_bias: bool
    stddev: float = 0.02

    @nn.compact
    def weights(self, width: int) -> list[jax.Array]:
        """Kernel (width, features) and, if there is one, bias (features,), in config.dtype."""
        config = self.config
        init = nn.initializers.xavier_uniform() if config.init == "xavier" else nn.initializers.normal(self.stddev)
        boxed_init = nn.with_logical_partitioning(init, self.axes)
        kernel = self.param("kernel", boxed_init, (width, self.features), config.param_dtype)
        weights = [kernel]
        if self.use_bias:
            bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), self.axes[1:])
            weights.append(self.param("bias", bias_init, (self.features,), config.param_dtype))
        axes = (self.axes, self.axes[1:])
        return [
            constrain(leaf.astype(config.dtype), *names)
            for leaf, names in zip(weights, axes[: len(weights)], strict=True)
        ]

    def __call__(self, x: jax.Array | Scaled) -> jax.Array:
        return apply_together([self], x if isinstance(x, Scaled) else Scaled(x))[0]


def apply_together(layers: Sequence[Linear], normed: Scaled) -> list[jax.Array]:
    """What each of the linear layers, which all have a bias or all have none, makes of n; by one matrix product."""
    x = normed.x
    # Of one token a sequence, to copy the kernels would be most of the work; and kernels that are split along their
    # features would be shuffled between devices.
    if len(layers) > 1 and (x.shape[-2] == 1 or is_split_by("tensor")):
        normed = Scaled(normed.product)  # once: else devices would add up the derivative by each n for itself
        return [layer(normed) for layer in layers]
    weights = [layer.weights(x.shape[-1]) for layer in layers]
    kernel, *bias = (jnp.concatenate(leaves, axis=-1) for leaves in zip(*weights, strict=True))
    # The backward pass multiplies n out anew, so that only x is kept; as does all that is computed anew by `remat`. Not
    # so in unrolled blocks on CPUs: XLA:CPU then writes more, n included, and needs no less memory.
    config = layers[0].config
    anew = config.remat == "none" and (config.scan or computing_platform() != "cpu")
    y = (computed_anew(config, read) if anew else read)(normed, kernel)
    y = y + bias[0] if bias else y
    if len(layers) == 1:
        return [constrain(y, "batch", *[None] * (y.ndim - 2), layers[0].axes[1])]
    return jnp.split(y, np.cumsum([layer.features for layer in layers])[:-1], axis=-1)


def computed_anew(config: ModelConfig, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose intermediate results the backward pass computes anew from its arguments."""
    # Between the forward and the backward scan over blocks XLA can merge nothing, unless `remat` puts both passes into
    # the second; and what would keep it from merging (prevent_cse) also keeps it from fusing.
    return jax.checkpoint(function, prevent_cse=not (config.scan and config.remat == "none"))


def read(normed: Scaled, kernel: jax.Array) -> jax.Array:
    """n W: (..., in), (in, out) -> (..., out)."""
    return matmul(normed.product.astype(kernel.dtype), kernel)


def matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """(..., in) @ (in, out), as one product of two matrices.

    Its derivative by the kernel is then one too. Of three axes XLA:CPU would first copy an operand, transposed, and
    fuse all that made it into the copy.

    For GPUs widths are padded with zeros to whole multiples of 16 bytes, without which cuBLAS cannot use their matrix
    units well: those of a crmsnorm's stream, of d-1 numbers, or of its tied table of d. Not where there is one token
    a sequence, which takes little longer than to copy the kernel. (Of features that `tensor` splits each device's share
    should be such a multiple by itself.)
    """
    *leading, width = x.shape
    features, one_token = kernel.shape[-1], x.ndim > 2 and x.shape[-2] == 1
    multiple = 16 // x.dtype.itemsize if computing_platform() == "gpu" and not one_token else 1
    more_in, more_out = -width % multiple, -features % multiple
    if more_in:
        x = jnp.pad(x, [(0, 0)] * len(leading) + [(0, more_in)])
    if more_in or more_out:
        kernel = jnp.pad(kernel, [(0, more_in), (0, more_out)])
    y = x.reshape(-1, width + more_in) @ kernel
    return y[:, :features].reshape(*leading, features)


def reader(config: ModelConfig, name: str, features: int, axis: str, bias: bool) -> Linear:
    """A linear map from the normalised stream: (B, T, D) -> (B, T, features)."""
    return Linear(config, features, ("read", axis), bias, name=name)


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
        init = nn.with_logical_partitioning(nn.initializers.constant(config.layer_scale), ("layer_scale",))
        scale_W = module.param(f"{name}_scale", init, (features,), config.param_dtype)
        y_BxTxW = y_BxTxW * scale_W.astype(config.dtype)
    return COORDINATES[config.norm].enter(y_BxTxW) if raw else y_BxTxW
