"""The residual stream's coordinates under each norm.

Under layernorm a position of the stream is x in R^d. Under rmsnorm it is z = Cx, the same without its mean
(C = I - 11ᵀ/d). Under crmsnorm it is y in R^(d-1), since z has d-1 degrees of freedom. Of y there are two kinds:

    drop     y_i = z_i, without z_p                        z_p = -Σy, z_i = y_i
    reflect  y_i = z_i - z_p / (√d + 1) = (Bᵀz)_i          z_p = -Σy / √d, z_i = y_i + z_p / (√d + 1), or z = By

for an entry p, and i ≠ p. The first with the last entry is the paper's (arXiv 2305.14858, section 3.2). A dropped entry
that comes back carries the rounding of all others. Under a reflection, whose B has orthonormal columns, ‖y‖ = ‖z‖, and
rounding is spread evenly; `equivalence/choice.py` says which is the better for given weights. The last entry of z takes
the place of p, if that is another one: all else is as for p = d.

The maps work on NumPy and JAX arrays along any axis, so that the models (on activations) and the converter (on
parameters) use the same ones.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np

from prenorm_jax.base.trees import Array, at_least_float32
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.norms import CRMSNorm, LayerNorm, ReflectedRMSNorm, RMSNorm


def center(x: Array, axis: int = -1) -> Array:
    """C x: removes the mean along `axis`. In float32 at least; the result has the input's dtype.

    Twice: one subtraction leaves the rounding error of the mean in every entry, and where |mean| ≫ std that is far
    above the entries' own. It matters: LayerNorm would remove it, but RMSNorm keeps it and CRMSNorm multiplies it by d.
    (Once in the derivative: gradients have no mean that is far above their other entries. Once, too, of narrower dtypes
    than float32, whose own rounding is far above that of a mean in float32.)
    """
    return _in_two_steps(x, axis, _center)


def reflect(x: Array, axis: int = -1) -> Array:
    """Bᵀ x, for p = d: centred and in the reflection's d-1 coordinates along `axis`, by one sum. Dtypes as `center`.

    In two steps as there: x is centred, and what the mean's rounding has left goes with the reflection.
    """
    return _in_two_steps(x, axis, _reflect)


def _in_two_steps(x: Array, axis: int, step: Callable[[Array, int], Array]) -> Array:
    dtype, x = x.dtype, at_least_float32(x)
    if x.dtype != dtype:
        return step(x, axis).astype(dtype)
    return _centered_first(x, axis, step) if isinstance(x, jax.Array) else step(_center(x, axis), axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _centered_first(x: jax.Array, axis: int, step: Callable[[Array, int], Array]) -> jax.Array:
    return step(_center(x, axis), axis)


@_centered_first.defjvp
def _(
    axis: int, step: Callable[[Array, int], Array], primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    return _centered_first(*primals, axis, step), step(*tangents, axis)


def _center(x: Array, axis: int) -> Array:
    return x - x.mean(axis, keepdims=True)


def _reflect(x: Array, axis: int) -> Array:
    d, rest, last = x.shape[axis], drop_last(x, axis), entries(x, slice(-1, None), axis)
    return rest - (rest.sum(axis, keepdims=True) / (d + math.sqrt(d)) + last / math.sqrt(d))


def restore_reflected(y: Array, axis: int = -1) -> Array:
    """B y, for p = d: d-1 entries along `axis` -> d, of zero mean."""
    root = math.sqrt(y.shape[axis] + 1)
    last = -at_least_float32(y).sum(axis, keepdims=True) / root
    return _with_last(y, last, 1 / (root + 1), axis)


def _with_last(y: Array, last: Array, share: float, axis: int) -> Array:
    """[y + share last, last] along `axis`, in y's dtype.

    As a sum of y and a multiple of `last`: XLA makes zeros behind y part of what reads them, where it would write two
    arrays behind each other first.
    """
    xp, d = y.__array_namespace__(), y.shape[axis] + 1
    shape = [1] * y.ndim
    shape[axis] = d
    shares = xp.asarray(np.where(np.arange(d) < d - 1, share, 1.0).reshape(shape), dtype=last.dtype)
    padded = xp.concat([at_least_float32(y), xp.zeros_like(last)], axis=axis)
    return (padded + shares * last).astype(y.dtype)


def drop_last(z: Array, axis: int = -1) -> Array:
    """d entries along `axis` -> the first d-1."""
    return entries(z, slice(0, -1), axis)


def restore_last(y: Array, axis: int = -1) -> Array:
    """d-1 entries along `axis` -> d, the last being minus the sum of the others."""
    last = -at_least_float32(y).sum(axis, keepdims=True).astype(y.dtype)
    return y.__array_namespace__().concat([y, last], axis=axis)


def entries(x: Array, which: slice, axis: int) -> Array:
    """The entries `which` of x along `axis`."""
    index = [slice(None)] * x.ndim
    index[axis] = which
    return x[tuple(index)]


def exchange(x: Array, entry: int, axis: int = -1) -> Array:
    """x with its last entry and this one along `axis` in each other's place."""
    last = x.shape[axis] - 1
    if entry == last:
        return x
    slices = slice(0, entry), slice(last, None), slice(entry + 1, last), slice(entry, entry + 1)
    return x.__array_namespace__().concat([entries(x, which, axis) for which in slices], axis=axis)


def _same(x: Array, axis: int = -1) -> Array:
    return x


def _read_dropped(kernel: Array, axis: int = -1) -> Array:
    """The reader of y from the reader of z = E y: W z = W[:d-1] y - W[d-1] 1ᵀy."""
    return drop_last(kernel, axis) - entries(kernel, slice(-1, None), axis)


def _read_restored(kernel: Array, axis: int = -1) -> Array:
    """[W, 0] C: the reader of z = E y whose entries along the stream sum to zero, from the reader of y."""
    xp = kernel.__array_namespace__()
    zero = xp.zeros_like(kernel.sum(axis, keepdims=True))
    return center(xp.concat([kernel, zero], axis=axis), axis)


KINDS = ModelConfig.choices["coordinates"]
Map = Callable[..., Array]  # of (array, axis)


@dataclasses.dataclass(frozen=True)
class Coordinates:
    """What a model and the converter need to know about a stream.

    Attributes:
      of: the name of the norm: layernorm, rmsnorm or crmsnorm.
      norm: the module that normalises it.
      enter: a raw d-wide value -> stream coordinates.
      leave: stream coordinates -> d wide, z if they are not x.
      write: what is added to z -> what is added in these coordinates.
      read: a reader of z -> the reader of these coordinates.
      read_back: a reader of these coordinates -> a reader of z whose entries along the stream sum to zero, if they are
        compressed.
    """

    of: str
    norm: type[nn.Module]
    enter: Map = _same
    leave: Map = _same
    write: Map = _same
    read: Map = _same
    read_back: Map = _same


def _enter_dropped(x: Array, axis: int = -1) -> Array:
    return drop_last(center(x, axis), axis)


# By norm and, under crmsnorm, kind: what holds for p = d.
COORDINATES = {
    ("layernorm", ""): Coordinates("layernorm", LayerNorm),
    ("rmsnorm", ""): Coordinates("rmsnorm", RMSNorm, enter=center),
    ("crmsnorm", "drop"): Coordinates(
        "crmsnorm", CRMSNorm, _enter_dropped, restore_last, drop_last, _read_dropped, _read_restored
    ),
    ("crmsnorm", "reflect"): Coordinates(
        "crmsnorm", ReflectedRMSNorm, reflect, restore_reflected, reflect, reflect, restore_reflected
    ),
}


def coordinates(config: ModelConfig) -> Coordinates:
    """Those of the config's stream."""
    return coordinates_of(config.norm, config.coordinates, config.coordinates_entry)


def coordinates_of(norm: str, kind: str = "drop", entry: int | None = None) -> Coordinates:
    """Those of a stream under this norm; under crmsnorm of this kind, for this entry p, from 0 (None: the last)."""
    if norm != "crmsnorm" or entry is None:
        return COORDINATES[norm, kind if norm == "crmsnorm" else ""]
    own = COORDINATES[norm, kind]

    def after(function: Map) -> Map:
        return lambda x, axis=-1: function(exchange(x, entry, axis), axis)

    def before(function: Map) -> Map:
        return lambda y, axis=-1: exchange(function(y, axis), entry, axis)

    maps = after(own.enter), before(own.leave), after(own.write), after(own.read), before(own.read_back)
    return Coordinates(own.of, own.norm, *maps)
