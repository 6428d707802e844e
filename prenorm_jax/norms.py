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
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Scaled(NamedTuple):
    """A normalised vector n = x ⊙ scale that is not multiplied out yet: what reads it does, and may do so twice.

    Attributes:
      x: (..., N). Only its derivative is other than that of the norm's input (or, of a LayerNorm, of that centred).
      scale: (..., 1), to be taken as a constant: what depends on it is in the derivative of x. None: 1.
    """

    x: jax.Array
    scale: jax.Array | None

    @property
    def product(self) -> jax.Array:
        """n, in x's dtype."""
        return self.x if self.scale is None else (self.x * self.scale).astype(self.x.dtype)


# n = x r, with r = (‖x‖²/d + ε)^(-1/2), has the derivative dn = r (dx - x r² (x·dx)/d). Its bracket is given to x, and
# r is a constant. Derived line by line, the same keeps more for the backward pass, and XLA fuses it worse.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scaled_rms(z: jax.Array, epsilon: float) -> Scaled:
    """RMSNorm of (..., d)."""
    return Scaled(z, jax.lax.rsqrt(_dot(z, z) / z.shape[-1] + epsilon))


@scaled_rms.defjvp
def _(epsilon: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Scaled, Scaled]:
    (z,), (dz,) = primals, tangents
    _, r = scaled_rms(z, epsilon)
    bracket = dz - z * (jnp.square(r) * _dot(z, dz) / z.shape[-1])
    return Scaled(z, r), Scaled(bracket.astype(z.dtype), jnp.zeros_like(r))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scaled_crms(y: jax.Array, epsilon: float) -> Scaled:
    """CRMSNorm of (..., d-1)."""
    return Scaled(y, jax.lax.rsqrt((_dot(y, y) + jnp.square(_sum(y))) / (y.shape[-1] + 1) + epsilon))


@scaled_crms.defjvp
def _(epsilon: float, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[Scaled, Scaled]:
    (y,), (dy,) = primals, tangents
    _, r = scaled_crms(y, epsilon)
    dot = _dot(y, dy) + _sum(y) * _sum(dy)  # that of the restored vectors
    bracket = dy - y * (jnp.square(r) * dot / (y.shape[-1] + 1))
    return Scaled(y, r), Scaled(bracket.astype(y.dtype), jnp.zeros_like(r))


def scaled_layer_norm(x: jax.Array, epsilon: float) -> Scaled:
    """LayerNorm of (..., d). The variance by two passes: E[x²] - E[x]² cancels where |mean| ≫ std."""
    return scaled_rms((x - _sum(x) / x.shape[-1]).astype(x.dtype), epsilon)


def _sum(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)).sum(-1, keepdims=True)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(dtype) * y.astype(dtype)).sum(-1, keepdims=True)


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
        y = self.scaled(x.astype(jnp.promote_types(x.dtype, jnp.float32)), self.epsilon).product
        affine = Affine(self.use_scale, self.use_bias, self.param_dtype, self.axis)
        nn.share_scope(self, affine)
        return affine(y).astype(self.dtype or x.dtype)

    def for_readers(self, x: jax.Array) -> Scaled:
        """The same for what reads it by a matrix; not multiplied out where no affine map is in between."""
        return Scaled(self(x), None) if self.use_scale or self.use_bias else self.scaled(x, self.epsilon)


class LayerNorm(Norm):
    """LN over the last axis, of width d."""

    scaled = staticmethod(scaled_layer_norm)


class RMSNorm(Norm):
    """RMSNorm over the last axis, of width d."""

    scaled = staticmethod(scaled_rms)


class CRMSNorm(Norm):
    """CRMSNorm over the last axis, of width d-1: a zero-mean vector of width d without its last entry."""

    scaled = staticmethod(scaled_crms)
