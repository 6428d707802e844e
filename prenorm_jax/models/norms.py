"""LayerNorm, RMSNorm and CRMSNorm: Flax modules with one signature.

    LN(x)   = γ ⊙ (x - mean(x)) · rsqrt(var(x) + ε) + β                     x in R^d
    RMS(z)  = γ ⊙ z · rsqrt(‖z‖²/d + ε) + β                                 z in R^d
    CRMS(y) = γ ⊙ y · rsqrt((‖y‖² + (1ᵀy)²)/d + ε) + β                      y in R^(d-1): z without an entry
    CRMS(y) = γ ⊙ y · rsqrt(‖y‖²/d + ε) + β                                 y in R^(d-1): z reflected

On a zero-mean z all agree: LN(z) = RMS(z), and CRMS of z without an entry is RMS(z) without that entry, because it is
-1ᵀy; a reflection leaves the length as it is. Note the divisor of both: d, not the d-1 numbers they are given. The
coordinates are those of `coordinates.py`.
Source: arXiv 2305.14858, sections 3.1 and 3.2.
"""

import functools
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from prenorm_jax.base.trees import at_least_float32
from prenorm_jax.models.parameters import NormSite, annotated


class Statistics(flax.struct.PyTreeNode):
    """What a norm takes of a vector x of N numbers, in float32 at least: (..., 1) each.

    Attributes:
      rsqrt: r = (⟨x, x⟩ + ε)^(-1/2), where ⟨·, ·⟩ is `_mean_dot`.
      total: of a CRMSNorm, the sum of x, which its ⟨x, ·⟩ takes. Of others None.
      d: what sums are divided by.
    """

    rsqrt: jax.Array
    total: jax.Array | None = None
    d: int = flax.struct.field(pytree_node=False, kw_only=True)


class Normed(flax.struct.PyTreeNode):
    """A normalised vector n = x r that is not multiplied out yet. Its readers do, forward and again in their
    backward pass.

    Attributes:
      x: (..., N). The norm's input; of a LayerNorm, that centred.
      statistics: None: x is n itself.
      site: the norm. Linear maps that read n name it in their kernels' annotations.
    """

    x: jax.Array
    statistics: Statistics | None = None
    site: NormSite | None = flax.struct.field(default=None, pytree_node=False)

    @property
    def product(self) -> jax.Array:
        """n, in x's dtype."""
        given = self.statistics
        return self.x if given is None else _multiply(given.d, self.x, given.rsqrt, given.total)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _multiply(d: int, x: jax.Array, r: jax.Array, total: jax.Array | None) -> jax.Array:
    """x r. (d and the total are for the derivative.)"""
    return (x * r).astype(x.dtype)


# dn = r dx - x r³ ⟨x, dx⟩. The tangents of r and total are not used, because this contains them; derivatives of the
# rule itself go through r and total. JAX's own derivative saves more residuals, and XLA fuses it worse.
@_multiply.defjvp
def _(d: int, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, r, total), (dx, *_) = primals, tangents
    dn = r * dx - x * (r * (r * (r * _mean_dot(d, x, total, dx))))
    return _multiply(d, x, r, total), dn.astype(x.dtype)


def rms_norm(z: jax.Array, epsilon: float) -> Normed:
    """RMSNorm of (..., d)."""
    return _normalise(z, None, z.shape[-1], epsilon)


def crms_norm(y: jax.Array, epsilon: float) -> Normed:
    """CRMSNorm of (..., d-1), where an entry of a zero-mean vector was dropped."""
    return _normalise(y, _sum(y), y.shape[-1] + 1, epsilon)


def reflected_rms_norm(y: jax.Array, epsilon: float) -> Normed:
    """CRMSNorm of (..., d-1), where a zero-mean vector was reflected."""
    return _normalise(y, None, y.shape[-1] + 1, epsilon)


def _normalise(x: jax.Array, total: jax.Array | None, d: int, epsilon: float) -> Normed:
    return Normed(x, Statistics(jax.lax.rsqrt(_mean_dot(d, x, total, x) + epsilon), total, d=d))


def layer_norm(x: jax.Array, epsilon: float) -> Normed:
    """LayerNorm of (..., d). The variance by two passes: E[x²] - E[x]² cancels where |mean| ≫ std."""
    return rms_norm((x - _sum(x) / x.shape[-1]).astype(x.dtype), epsilon)


def _mean_dot(d: int, x: jax.Array, total: jax.Array | None, y: jax.Array) -> jax.Array:
    """⟨x, y⟩ = x·y / d: (..., N), (..., N) -> (..., 1).

    Given the total of x, that of the vectors of d numbers whose first d-1 are x and y, and whose last is minus their
    sum.
    """
    return (_dot(x, y) if total is None else _dot(x, y) + total * _sum(y)) / d


def _sum(x: jax.Array) -> jax.Array:
    return at_least_float32(x).sum(-1, keepdims=True)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return (x.astype(dtype) * y.astype(dtype)).sum(-1, keepdims=True)


class Affine(nn.Module):
    """x -> scale ⊙ x + bias over the last axis. Parameters `scale` and `bias` of the input's width, as switched on.

    Attributes:
      axis: the logical axis name of both parameters (see `parameters.py`).
      of_each: the name of the axis before the last, if each of its entries has parameters of its own.
      site: the norm that it is of, if it is one's on the stream.
    """

    use_scale: bool = True
    use_bias: bool = True
    param_dtype: Any = jnp.float32
    axis: str = "norm"
    site: NormSite | None = None
    of_each: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        axes = (self.axis,) if self.of_each is None else (self.of_each, self.axis)
        for name, used, init in (
            ("scale", self.use_scale, nn.initializers.ones_init()),
            ("bias", self.use_bias, nn.initializers.zeros_init()),
        ):
            if used:
                init = annotated(init, *axes, norm=self.site)
                value = self.param(name, init, x.shape[-len(axes) :], self.param_dtype).astype(x.dtype)
                x = x * value if name == "scale" else x + value
        return x


class Norm(nn.Module):
    """What the three norms share: the signature, the affine map, the dtypes.

    Attributes:
      epsilon: added to the mean square.
      use_scale, use_bias: whether there are parameters γ (`scale`) and β (`bias`).
      dtype: of the result; None: the input's. Statistics and the affine map are in float32 at least.
      param_dtype: of γ and β.
      axis, of_each: of γ and β, as of `Affine`.
    """

    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    axis: str = "norm"
    of_each: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.normalise(at_least_float32(x), self.epsilon).product
        affine = Affine(self.use_scale, self.use_bias, self.param_dtype, self.axis, self.site, self.of_each)
        nn.share_scope(self, affine)
        return affine(y).astype(self.dtype or x.dtype)

    def for_readers(self, x: jax.Array) -> Normed:
        """The same for linear maps to read; not multiplied out where no affine map is in between."""
        affine = self.use_scale or self.use_bias
        return (Normed(self(x)) if affine else self.normalise(x, self.epsilon)).replace(site=self.site)

    @property
    def site(self) -> NormSite:
        """What readers name it by."""
        return NormSite(self.path, self.epsilon)


class LayerNorm(Norm):
    """LN over the last axis, of width d."""

    normalise = staticmethod(layer_norm)


class RMSNorm(Norm):
    """RMSNorm over the last axis, of width d."""

    normalise = staticmethod(rms_norm)


class CRMSNorm(Norm):
    """CRMSNorm over the last axis, of width d-1: a zero-mean vector of width d without one of its entries."""

    normalise = staticmethod(crms_norm)


class ReflectedRMSNorm(Norm):
    """CRMSNorm over the last axis, of width d-1: a zero-mean vector of width d in the coordinates of a reflection."""

    normalise = staticmethod(reflected_rms_norm)
