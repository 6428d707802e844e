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
    return _turn(x_BxTxHxK, t_T[:, None] * base ** (-jnp.arange(0, K, 2, dtype=dtype) / K), interleaved)


def _turn(x_BxTxHxK: jax.Array, angles_TxN: jax.Array, interleaved: bool = False) -> jax.Array:
    """The K/2 pairs of each head turned by so many angles."""
    cos, sin = jnp.cos(angles_TxN)[:, None, :], jnp.sin(angles_TxN)[:, None, :]
    wide = x_BxTxHxK.astype(angles_TxN.dtype)
    first, second = (wide[..., ::2], wide[..., 1::2]) if interleaved else jnp.split(wide, 2, axis=-1)
    pair = [first * cos - second * sin, second * cos + first * sin]
    rotated = jnp.stack(pair, axis=-1).reshape(wide.shape) if interleaved else jnp.concatenate(pair, axis=-1)
    return rotated.astype(x_BxTxHxK.dtype)


def alibi_slopes(heads: int) -> np.ndarray:
    """The slope of each head, (H,) float64 (arXiv 2108.12409, and its code for heads that are no power of two).

    Of n = 2^k heads they are 2^(-8 i/n), i = 1 to n. Of others, those of the next smaller n, and then of 2n the
    first, the third and so on.
    """
    n = 2 ** (heads.bit_length() - 1)
    exponents = [*(i / n for i in range(1, n + 1)), *(i / (2 * n) for i in range(1, 2 * (heads - n), 2))]
    return 2.0 ** (-8 * np.array(exponents))


def alibi(
    heads: int, rounded: bool, scale: float, dtype: jax.typing.DTypeLike, t_T: jax.Array, s_S: jax.Array
) -> jax.Array:
    """What is added to the scores of queries at t and keys at s: scale · slope · (s - t), in this dtype: (H, T, S).

    `rounded`: slope, positions and each product of the two are those of bfloat16, so that distances at high positions
    are not those at low ones.
    """
    slopes_Hx1 = jnp.asarray(alibi_slopes(heads), dtype)[:, None]

    def near(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)  # which no compiler leaves out

    def falls(positions: jax.Array) -> jax.Array:
        return near(near(slopes_Hx1) * near(positions.astype(dtype)))

    if rounded:
        bias_HxTxS = falls(s_S)[:, None] - falls(t_T)[:, :, None]
    else:
        bias_HxTxS = slopes_Hx1[:, None] * (s_S - t_T[:, None]).astype(dtype)
    return bias_HxTxS if scale == 1 else scale * bias_HxTxS


def rotate_patches(x_BxTxHxK: jax.Array, base: float, grid: tuple[int, int]) -> jax.Array:
    """Rotary embedding of an image's patches by their place, as in DINOv3 (arXiv 2508.10104).

    The tokens' last are the patches of a grid of so many rows and columns; those before them are not turned. With y and
    x from -1 to 1, at the middle of a patch, the first half of a head's pairs (k, k + K/2) is turned by
    2π y base^(-4k/K), the second by the same of x.
    """
    dtype = jnp.promote_types(x_BxTxHxK.dtype, jnp.float32)
    return _turn(x_BxTxHxK, jnp.asarray(patch_angles(x_BxTxHxK.shape[1], x_BxTxHxK.shape[3], base, grid), dtype))


def patch_angles(tokens: int, width: int, base: float, grid: tuple[int, int]) -> np.ndarray:
    """(tokens, width/2) float64 angles of `rotate_patches`."""
    frequencies = 2 * np.pi * base ** (-np.arange(0, width, 4) / width)
    y, x = ((2 * place + 1) / size - 1 for place, size in zip(np.indices(grid), grid, strict=True))
    angles = np.concatenate([place.reshape(-1, 1) * frequencies for place in (y, x)], axis=1)
    return np.pad(angles, [(tokens - len(angles), 0), (0, 0)])


def patch_distances(tokens: int, grid: tuple[int, int]) -> np.ndarray:
    """(tokens, tokens) the number of each distance between two tokens, as BEiT counts them (arXiv 2106.08254).

    Of patches y and x apart, in a grid of so many rows and columns, (y + rows - 1) (2 columns - 1) + x + columns - 1.
    Three more are of tokens that stand before the patches: from one of these to a patch, from a patch to one of these,
    and between these.
    """
    (rows, columns), before = grid, tokens - grid[0] * grid[1]
    y, x = (place.reshape(-1, 1) - place.reshape(1, -1) for place in np.indices(grid))
    last = (2 * rows - 1) * (2 * columns - 1)
    found = np.empty((tokens, tokens), int)
    found[before:, before:] = (y + rows - 1) * (2 * columns - 1) + x + columns - 1
    found[:before, before:], found[before:, :before], found[:before, :before] = last, last + 1, last + 2
    return found


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


def fairseq_table(length: int, width: int) -> np.ndarray:
    """(length, width) float64 position table of fairseq, after tensor2tensor's: sines first, then cosines.

    The frequencies run from 1 to 1/10000, both ends included, and the first position is 2: those before it are kept
    for padding.
    """
    half = width // 2
    frequencies = 10000.0 ** (-np.arange(half) / max(half - 1, 1))
    angles = (np.arange(length)[:, None] + 2) * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros((length, width % 2))], axis=1)


POSITION_TABLES = {"sinusoidal": sinusoidal_table, "fairseq": fairseq_table}  # of sequences: by `GPTConfig.positions`
