"""Norms alone, on streams that are made up: a mean of so many times the spread, a few channels far above the others.

What is measured is the arithmetic of `models/norms.py` and Flax's LayerNorm, in a dtype that the stream is given in,
against float64. LayerNorm is given the stream x, mean and all. The others are given what they are given in a network:
x centred, and compressed, in float64, as conversion does it to the weights that write it; then rounded.
"""

import itertools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.console import say
from prenorm_jax.bench.contenders import FlaxLayerNorm
from prenorm_jax.equivalence.choice import leaks, reader_sums
from prenorm_jax.models.coordinates import KINDS, Coordinates, coordinates_of

MEANS = (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
WIDTH, ROWS = 768, 256
OUTLIERS, TIMES, SCALE = 4, 60.0, 0.03  # channels, their size over the others', and γ there
OUTLIER_WIDTH, OUTPUTS = 192, 256
EPSILON = 1e-5

Report = dict[str, Any]


def measure(dtypes: tuple[str, ...], seed: int = 0) -> Report:
    """{means, outliers}: rows of errors. See docs/numerics.md."""
    with jax.enable_x64(True):
        say("streams with a mean")
        means = [row for dtype in dtypes for row in with_mean(dtype, seed)]
        say("streams with outliers")
        outliers = [row for dtype in dtypes for row in with_outliers(dtype, seed)]
    setting = {"width": WIDTH, "rows": ROWS, "seed": seed, "epsilon": EPSILON}
    made = {"width": OUTLIER_WIDTH, "rows": ROWS, "channels": OUTLIERS, "times": TIMES, "scale": SCALE}
    return {"setting": setting, "means": means, "outlier_setting": made, "outliers": outliers}


def exact(x: np.ndarray) -> np.ndarray:
    """LayerNorm without affine, in float64: (..., d) -> (..., d)."""
    z = x - x.mean(-1, keepdims=True)
    return z / np.sqrt((z**2).mean(-1, keepdims=True) + EPSILON)


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """‖actual - expected‖ / ‖expected‖."""
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def _contenders() -> dict[str, tuple[Coordinates, Callable[..., nn.Module]]]:
    """Name -> the coordinates of the stream, and the norm."""
    found = {"layernorm": coordinates_of("layernorm"), "rmsnorm": coordinates_of("rmsnorm")}
    found |= {f"crmsnorm {kind}": coordinates_of("crmsnorm", kind) for kind in KINDS}
    one_pass = {"layernorm one-pass": (found["layernorm"], FlaxLayerNorm)}
    return one_pass | {name: (own, own.norm) for name, own in found.items()}


def with_mean(dtype: str, seed: int) -> list[Report]:
    """{dtype, variant, mean, error} of each norm's output, left to d numbers in float64, for each of MEANS."""
    noise, rows = np.random.default_rng(seed).normal(size=(ROWS, WIDTH)), []
    for name, (own, norm) in _contenders().items():
        function = _jitted(norm)
        for mean in MEANS:
            x = noise + mean
            found = own.leave(np.asarray(function(own.enter(x).astype(jnp.dtype(dtype))), np.float64))
            rows.append({"dtype": dtype, "variant": name, "mean": mean, "error": relative(found, exact(x))})
    return rows


def _jitted(norm: Callable[..., nn.Module]) -> Callable[[np.ndarray], jax.Array]:
    module = norm(epsilon=EPSILON, use_scale=False, use_bias=False)
    return jax.jit(lambda x: module.apply({}, x))


def outlier_stream(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A zero-mean stream (rows, d), some of whose channels are large, and readers times γ, (outputs, d), small there.

    The last channel is none of those.
    """
    rng = np.random.default_rng(seed)
    large = rng.choice(OUTLIER_WIDTH - 1, OUTLIERS, replace=False)
    z, readers = rng.normal(size=(ROWS, OUTLIER_WIDTH)), rng.normal(size=(OUTPUTS, OUTLIER_WIDTH))
    z[:, large] *= TIMES
    readers[:, large] *= SCALE
    return z - z.mean(-1, keepdims=True), readers


def with_outliers(dtype: str, seed: int) -> list[Report]:
    """{dtype, kind, entry, large, predicted, measured}: what the readers give, each relative to rmsnorm's error.

    Of every other entry, the large ones and the best, the least predicted first. `large`: whether it is large.
    """
    z, readers = outlier_stream(seed)
    normed, functions = exact(z), {kind: _read(coordinates_of("crmsnorm", kind)) for kind in KINDS}
    # Of the normalised vectors: it is they that are multiplied with the readers.
    expected, sizes = normed @ readers.T, np.sqrt((normed**2).mean(0))

    def error(own: Coordinates, function: Callable[..., jax.Array]) -> float:
        given = (array.astype(jnp.dtype(dtype)) for array in (own.enter(z), own.read(readers)))
        return relative(np.asarray(function(*given), np.float64), expected)

    of_rms = error(coordinates_of("rmsnorm"), _read(coordinates_of("rmsnorm")))
    # Here nothing is rounded elsewhere: the factor is the root of the law's L.
    factors, large = np.sqrt(leaks(reader_sums(readers, sizes**2), sizes**2)), sizes > 10 * np.median(sizes)
    entries = {*range(0, len(sizes), 2), *np.flatnonzero(large).tolist(), len(sizes) - 1, *factors.argmin(1).tolist()}
    rows = []
    for (kind, predicted), entry in itertools.product(zip(KINDS, factors, strict=True), sorted(entries)):
        measured = error(coordinates_of("crmsnorm", kind, entry), functions[kind]) / of_rms
        row = {"dtype": dtype, "kind": kind, "entry": entry, "predicted": float(predicted[entry])}
        rows.append(row | {"measured": measured, "large": bool(large[entry])})
    return sorted(rows, key=lambda row: row["predicted"])


def _read(own: Coordinates) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    """The norm, and the product with readers in its dtype, which is summed in float32 at least."""
    module = own.norm(epsilon=EPSILON, use_scale=False, use_bias=False)

    @jax.jit
    def read(stream: jax.Array, readers: jax.Array) -> jax.Array:
        normed = module.apply({}, stream)
        return jnp.matmul(normed, readers.T, preferred_element_type=jnp.promote_types(stream.dtype, jnp.float32))

    return read
