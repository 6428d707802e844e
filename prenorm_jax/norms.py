"""LayerNorm, RMSNorm and CRMSNorm: three Flax modules with one signature.

    LN(x)   = γ ⊙ (x - mean(x)) · rsqrt(var(x) + ε) + β                     x in R^d
    RMS(z)  = γ ⊙ z · rsqrt(‖z‖²/d + ε) + β                                 z in R^d
    CRMS(y) = γ ⊙ y · rsqrt((‖y‖² + (1ᵀy)²)/d + ε) + β                      y in R^(d-1)

On a zero-mean z all three agree: LN(z) = RMS(z), and CRMS of z without its last entry is RMS(z) without its last entry,
because that entry is -1ᵀy. Note the divisor of CRMSNorm: d, not the d-1 numbers it is given.
Source: arXiv 2305.14858, sections 3.1 and 3.2.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Each norm's derivative is a formula in its own output n and in r, the reciprocal root: of what the forward pass made,
# those two are kept, and n is kept anyway by the matrix product that reads it. Derived line by line, the formulas keep
# more, and XLA fuses them worse.


def _sum(x: jax.Array) -> jax.Array:
    return x.sum(-1, keepdims=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def layer_norm(x: jax.Array, epsilon: float) -> jax.Array:
    """(..., d) -> (..., d). The variance by two passes: E[x²] - E[x]² cancels where |mean| ≫ std."""
    return _layer_norm(x, epsilon)[0]


def _layer_norm(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    d = x.shape[-1]
    centered = x - _sum(x) / d
    r = jax.lax.rsqrt(_sum(jnp.square(centered)) / d + epsilon)
    return centered * r, r


@layer_norm.defjvp
def _(epsilon: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (dx,), d = tangents, tangents[0].shape[-1]
    n, r = _layer_norm(*primals, epsilon)
    return n, r * (dx - _sum(dx) / d - n * (_sum(n * dx) / d))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def rms_norm(z: jax.Array, epsilon: float) -> jax.Array:
    """(..., d) -> (..., d)."""
    return _rms_norm(z, epsilon)[0]


def _rms_norm(z: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    r = jax.lax.rsqrt(_sum(jnp.square(z)) / z.shape[-1] + epsilon)
    return z * r, r


@rms_norm.defjvp
def _(epsilon: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (dz,), d = tangents, tangents[0].shape[-1]
    n, r = _rms_norm(*primals, epsilon)
    return n, r * (dz - n * (_sum(n * dz) / d))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def crms_norm(y: jax.Array, epsilon: float) -> jax.Array:
    """(..., d-1) -> (..., d-1)."""
    return _crms_norm(y, epsilon)[0]


def _crms_norm(y: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    r = jax.lax.rsqrt((_sum(jnp.square(y)) + jnp.square(_sum(y))) / (y.shape[-1] + 1) + epsilon)
    return y * r, r


@crms_norm.defjvp
def _(epsilon: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (dy,), d = tangents, tangents[0].shape[-1] + 1
    n, r = _crms_norm(*primals, epsilon)
    return n, r * (dy - n * ((_sum(n * dy) + _sum(n) * _sum(dy)) / d))


class Affine(nn.Module):
    """x -> scale ⊙ x + bias over the last axis. Parameters `scale` and `bias` of the input's width, as switched on.

    Attributes:
      axis: the logical axis name of both parameters (see `stream.py`).
    """

    use_scale: bool = True
    use_bias: bool = True
    param_dtype: Any = jnp.float32
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for name, used, init in (
            ("scale", self.use_scale, nn.initializers.ones_init()),
            ("bias", self.use_bias, nn.initializers.zeros_init()),
        ):
            if used:
                boxed_init = nn.with_logical_partitioning(init, (self.axis,))
                value = self.param(name, boxed_init, x.shape[-1:], self.param_dtype).astype(x.dtype)
                x = x * value if name == "scale" else x + value
        return x


class Norm(nn.Module):
    """What the three norms share: the signature, the affine map, the dtypes.

    Attributes:
      epsilon: added to the mean square.
      use_scale, use_bias: whether there are parameters γ (`scale`) and β (`bias`).
      dtype: of the result; None: the input's. Statistics and the affine map are in float32 at least.
      param_dtype: of γ and β.
      axis: the logical axis name of γ and β (see `stream.py`).
    """

    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str = "norm"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.normalize(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.epsilon)
        affine = Affine(self.use_scale, self.use_bias, self.param_dtype, self.axis)
        nn.share_scope(self, affine)
        return affine(y).astype(self.dtype or x.dtype)


class LayerNorm(Norm):
    """LN over the last axis, of width d."""

    normalize = staticmethod(layer_norm)


class RMSNorm(Norm):
    """RMSNorm over the last axis, of width d."""

    normalize = staticmethod(rms_norm)


class CRMSNorm(Norm):
    """CRMSNorm over the last axis, of width d-1: a zero-mean vector of width d without its last entry."""

    normalize = staticmethod(crms_norm)
