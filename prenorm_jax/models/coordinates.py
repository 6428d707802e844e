"""The residual stream's coordinates under each norm.

Under layernorm a position of the stream is x in R^d. Under rmsnorm it is z = Cx, the same without its mean
(C = I - 11ᵀ/d). Under crmsnorm it is y = Pz: the last of z's entries is dropped, being minus the sum of the others.
`center`, `drop_last` and `restore_last` are these maps; they work on NumPy and JAX arrays along any axis, so the
models (on activations) and the converter (on parameters) use the same ones.
"""

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from prenorm_jax.base.trees import Array, at_least_float32
from prenorm_jax.models.norms import CRMSNorm, LayerNorm, RMSNorm


def center(x: Array, axis: int = -1) -> Array:
    """C x: removes the mean along `axis`. In float32 at least; the result has the input's dtype.

    Twice: one subtraction leaves the rounding error of the mean in every entry, and where |mean| ≫ std that is far
    above the entries' own. It matters: LayerNorm would remove it, but RMSNorm keeps it and CRMSNorm multiplies it by d.
    (Once in the derivative: gradients have no mean that is far above their other entries. Once, too, of narrower dtypes
    than float32, whose own rounding is far above that of a mean in float32.)
    """
    dtype, x = x.dtype, at_least_float32(x)
    if x.dtype != dtype:
        return _center(x, axis).astype(dtype)
    return _center_jax(x, axis) if isinstance(x, jax.Array) else _center(_center(x, axis), axis)


def _center(x: Array, axis: int) -> Array:
    return x - x.mean(axis, keepdims=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _center_jax(x: jax.Array, axis: int) -> jax.Array:
    return _center(_center(x, axis), axis)


@_center_jax.defjvp
def _(axis: int, primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return _center_jax(*primals, axis), _center(*tangents, axis)


def drop_last(z: Array, axis: int = -1) -> Array:
    """P z: d entries along `axis` -> the first d-1."""
    return entries(z, slice(0, -1), axis)


def restore_last(y: Array, axis: int = -1) -> Array:
    """E y: d-1 entries along `axis` -> d, the last being minus the sum of the others."""
    last = -at_least_float32(y).sum(axis, keepdims=True).astype(y.dtype)
    return y.__array_namespace__().concat([y, last], axis=axis)


def entries(x: Array, which: slice, axis: int) -> Array:
    """The entries `which` of x along `axis`."""
    index = [slice(None)] * x.ndim
    index[axis] = which
    return x[tuple(index)]


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """What a model needs to know about its stream.

    Attributes:
      norm: the module that normalises it.
      enter: a raw d-wide value -> stream coordinates.
      leave: stream coordinates -> d wide.
    """

    norm: type[nn.Module]
    enter: Callable[[Array], Array]
    leave: Callable[[Array], Array]


COORDINATES = {
    "layernorm": Coordinates(LayerNorm, enter=lambda x: x, leave=lambda x: x),
    "rmsnorm": Coordinates(RMSNorm, enter=center, leave=lambda z: z),
    "crmsnorm": Coordinates(CRMSNorm, enter=lambda x: drop_last(center(x)), leave=restore_last),
}
