"""Position tables and rotary embedding."""

import jax
import jax.numpy as jnp
import numpy as np


def rotate(
    x_BxTxHxK: jax.Array,
    base: float,
    position: jax.Array | int = 0,
    width: int | None = None,
    interleaved: bool = False,
) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864): turns the pair (k, k + K/2) of position t by t · base^(-2k/K).

    `position` is t of the first token. With a `width`, only so many numbers of each head are turned, the first, and
    stand for K. `interleaved`: the pairs are (2k, 2k + 1).
    """
    T, K = x_BxTxHxK.shape[1], x_BxTxHxK.shape[3]
    if width is not None and width < K:
        turned = rotate(x_BxTxHxK[..., :width], base, position, interleaved=interleaved)
        return jnp.concatenate([turned, x_BxTxHxK[..., width:]], axis=-1)
    dtype = jnp.promote_types(x_BxTxHxK.dtype, jnp.float32)
    t_T = jnp.arange(T, dtype=dtype) + position
    angles_TxK = t_T[:, None] * base ** (-jnp.arange(0, K, 2, dtype=dtype) / K)
    cos, sin = jnp.cos(angles_TxK)[:, None, :], jnp.sin(angles_TxK)[:, None, :]
    wide = x_BxTxHxK.astype(dtype)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    pair = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.stack(pair, axis=-1).reshape(wide.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)


def sincos2d_table(side: int, width: int) -> np.ndarray:
    """(side², width) float64 position table: sine and cosine of x, then of y (arXiv 2205.01580).

    The frequencies run from 1 to 1/10000 in width/4 steps, both ends included.
    """
    frequencies = 10000.0 ** -np.linspace(0, 1, width // 4)
    y, x = (place.reshape(-1, 1) * frequencies for place in np.mgrid[:side, :side])
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def sinusoidal_table(length: int, width: int) -> np.ndarray:
    """(length, width) float64 position table (arXiv 1706.03762, section 3.5): sines first, then cosines."""
    frequencies = 10000.0 ** (-np.arange(0, width, 2) / width)
    angles = np.arange(length)[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)[:, :width]
