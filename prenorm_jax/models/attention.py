"""Softmax attention that computes what the causal mask leaves, and stores no attention matrix for the backward pass.

The queries go in blocks, each against the keys that it may see: with 4 blocks, 5/8 of the full product, and less with a
window, the positions that a query sees. Each block is under `jax.checkpoint`: the backward pass computes its
probabilities anew, from queries and keys. Softmax is divided by its sum after the product with the values, which is the
smaller.

On NVIDIA GPUs cuDNN's kernel, which writes no attention matrix at all, does the same for numbers of two bytes. Of its
derivatives JAX has the first alone, and only in reverse mode.

Shape suffixes as in `transformer.py`, and
    L batch and key heads: one axis of B·G, or the two axes B and G (see `_leading`)   M query rows of a key head, R·T
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from prenorm_jax.base.trees import at_least_float32
from prenorm_jax.models.placement import computing_device, mesh_axis_size, platform

CAUSAL_BLOCKS = 4
SMALLEST_BLOCK = 32  # queries

# (positions of T queries, positions of S keys) -> what is added to their scores, (H, T, S), in float32 at least.
ScoreBias = Callable[[jax.Array, jax.Array], jax.Array]


class CacheUse(NamedTuple):
    """What a call does with the collection "cache", which holds the keys and values of a sequence's tokens.

    Attributes:
      size: S, for how many tokens to make it, where they begin a sequence; None: it is there, and they go on with it.
      position: of the first token given, a scalar that may be traced; 0 where a sequence begins.
    """

    size: int | None
    position: jax.Array | int = 0


class Sight(NamedTuple):
    """Which keys a query sees, and what is added to their scores; the arguments of `attend` that say so."""

    causal: bool
    window: int | None = None
    bias: ScoreBias | None = None

    def keys(self, start: int, end: int, S: int) -> slice:
        """Those of S that queries at positions from `start` to `end` see."""
        first = 0 if self.window is None else max(start - self.window + 1, 0)
        behind = 0 if self.causal else S if self.window is None else self.window - 1
        return slice(first, min(end + behind, S))

    def mask(self, own: jax.Array, keys_S: jax.Array) -> jax.Array:
        """Whether queries whose own keys are `own`, (..., 1), see these keys."""
        if self.window is None:
            return keys_S <= own
        within = keys_S > own - self.window
        return within & (keys_S <= own if self.causal else keys_S < own + self.window)


def attend(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    causal: bool,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    kernel: str = "auto",
    window: int | None = None,
    scale: float | None = None,
    bias: ScoreBias | None = None,
    mask_BxS: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale · q kᵀ + bias) v over H query heads on G key/value heads: (B, T, H·K), in q's dtype.

    Scores and softmax are in float32 at least; its sum, where it is a column of the product (`Platform.sum_as_column`),
    adds the probabilities as they are multiplied with the values, rounded to v's dtype. With a `dropout_key`, each
    probability is dropped with `dropout_rate`.
    `kernel` is `ModelConfig.attention_kernel`. With a `window` a query sees its own position and so many less one
    before it, and behind it if attention is not causal. `scale` is 1/√K where it is None. The last query stands at the
    last key. `mask_BxS`: the keys that may be seen, those of no padding; what a query gets that sees none is finite,
    and no more.
    """
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    plain = kernel == "auto" and dropout_key is None and bias is None and mask_BxS is None
    # Of windows the kernel knows those that end at the query's own position.
    if plain and (T == S if causal else window is None) and _cudnn_serves(q_BxTxHxK, S, G):
        qkv = q_BxTxHxK, k_BxSxGxK, v_BxSxGxK
        sides = None if window is None else (window - 1, 0)  # before and after it
        options = {"scale": scale, "is_causal": causal, "local_window_size": sides, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(*qkv, **options).reshape(B, T, H * K)
    q_LxRxTxK = _group(q_BxTxHxK, G, scale)
    k_LxSxK, v_LxSxK = (x.transpose(0, 2, 1, 3).reshape(*_leading(B, G), S, K) for x in (k_BxSxGxK, v_BxSxGxK))
    columns = platform().sum_as_column
    if dropout_key is None and columns and K % columns:
        v_LxSxK = jnp.concatenate([v_LxSxK, jnp.ones_like(v_LxSxK[..., :1])], axis=-1)
    size = max(-(-T // CAUSAL_BLOCKS), SMALLEST_BLOCK) if causal or window else T
    sight, blocks = Sight(causal, window, bias), []
    for start in range(0, T, size):
        end = min(start + size, T)
        seen, position = sight.keys(S - T + start, S - T + end, S), S - T + start  # the T queries are the last of S
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)

        # The slices are inside, so that the residuals of all blocks are the same three arrays. With `prevent_cse`:
        # without its barriers XLA merges what is recomputed with the forward pass, and is slower.
        @jax.checkpoint
        def block(q, k, v, key, start=start, end=end, seen=seen, position=position):  # defaults bind this iteration's
            seen_kv = (x[..., seen, :] for x in (k, v))
            mask = None if mask_BxS is None else mask_BxS[:, seen]
            return _attend_block(q[..., start:end, :], *seen_kv, key, dropout_rate, sight, position, seen.start, mask)

        blocks.append(block(q_LxRxTxK, k_LxSxK, v_LxSxK, key))
    return _ungroup(jnp.concatenate(blocks, axis=-2), B, G)


def attend_cached(
    q_BxTxHxK: jax.Array,
    k_NxSxK: jax.Array,
    v_NxSxK: jax.Array,
    position: jax.Array | int,
    window: int | None = None,
    scale: float | None = None,
    bias: ScoreBias | None = None,
) -> jax.Array:
    """`attend` of queries from `position` on, each of which sees the entries of a cache up to its own: (B, T, H·K).

    The cache's first axis, N, is B·G. With a `window` a query sees only the last entries, so many.
    """
    B, T = q_BxTxHxK.shape[:2]
    first: jax.Array | int = 0
    if window is not None and (size := T + window - 1) < k_NxSxK.shape[1]:  # what no query sees is not read
        first = jnp.clip(position - window + 1, 0, k_NxSxK.shape[1] - size)
        k_NxSxK, v_NxSxK = (jax.lax.dynamic_slice_in_dim(x, first, size, axis=1) for x in (k_NxSxK, v_NxSxK))
    N, S, K = k_NxSxK.shape
    q_LxRxTxK = _group(q_BxTxHxK, N // B, scale)
    k_LxSxK, v_LxSxK = (x.reshape(*_leading(B, N // B), S, K) for x in (k_NxSxK, v_NxSxK))
    sight = Sight(True, window, bias)
    return _ungroup(_attend_block(q_LxRxTxK, k_LxSxK, v_LxSxK, None, 0.0, sight, position, first), B, N // B)


def _cudnn_serves(q_BxTxHxK: jax.Array, S: int, G: int) -> bool:
    """Whether cuDNN's kernel takes these queries with S keys of G heads: NVIDIA's GPUs from the A100's time on have it.

    It takes numbers of two bytes and heads of up to 128 (Hopper's up to 256). JAX gives it no odd number of tokens in
    training, and splits it over devices by whole heads, alike in queries and keys.
    (To be asked because JAX's own choice of an implementation, None, never is cuDNN's.)
    """
    device, (_, T, _, K) = computing_device(), q_BxTxHxK.shape
    if device.platform != "gpu" or not device.device_kind.startswith("NVIDIA"):
        return False
    fits = q_BxTxHxK.dtype.itemsize == 2 and K <= 128 and K % 8 == 0 and T % 2 == S % 2 == 0
    return fits and G % mesh_axis_size("tensor") == 0 and float(device.compute_capability) >= 8


def _leading(B: int, G: int) -> tuple[int, ...]:
    """L, the axes of batch and key heads: one or two, as the platform is told.

    Two where `tensor` splits G: merged with B, which other mesh axes split, XLA would gather them.
    """
    return (B * G,) if platform().merge_batch_and_heads and mesh_axis_size("tensor") == 1 else (B, G)


def _group(q_BxTxHxK: jax.Array, G: int, scale: float | None) -> jax.Array:
    """Queries · scale, those of one key head together: (L, R, T, K)."""
    B, T, H, K = q_BxTxHxK.shape
    q_BxGxRxTxK = (
        (q_BxTxHxK * (K**-0.5 if scale is None else scale)).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    )
    return q_BxGxRxTxK.reshape(*_leading(B, G), H // G, T, K)


def _ungroup(x_LxRxTxK: jax.Array, B: int, G: int) -> jax.Array:
    R, T, K = x_LxRxTxK.shape[-3:]  # no size is left to be inferred: of an empty batch none can be
    return x_LxRxTxK.reshape(B, G, R, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, G * R * K)


def _attend_block(
    q_LxRxTxK: jax.Array,
    k_LxSxK: jax.Array,
    v_LxSxK: jax.Array,
    key: jax.Array | None,
    dropout_rate: float,
    sight: Sight,
    position: jax.Array | int,
    first: jax.Array | int,
    mask_BxS: jax.Array | None = None,
) -> jax.Array:
    """`attend` of T queries from `position` on, to S keys from `first` on: (L, R, T, K).

    Without dropout the values may have a further column, of ones, whose product with the weights is their sum.
    """
    *leading, R, T, K = q_LxRxTxK.shape
    S = k_LxSxK.shape[-2]
    # Query heads of one key head are further rows of one product. Softmax keeps them merged where L is one axis, for
    # platforms that are the faster with three axes throughout.
    queries = (R * T,) if len(leading) == 1 else (R, T)
    scores = jnp.einsum("...mk,...sk->...ms", q_LxRxTxK.reshape(*leading, R * T, K), k_LxSxK)
    scores = at_least_float32(scores).reshape(*leading, *queries, S)
    if sight.bias is not None:
        bias_HxTxS = sight.bias(position + jnp.arange(T), first + jnp.arange(S))
        G, shape = len(bias_HxTxS) // R, scores.shape
        scores = scores.reshape(math.prod(leading) // G, G, *queries, S) + bias_HxTxS.reshape(G, *queries, S)
        scores = scores.reshape(shape)
    if sight.causal or sight.window is not None:
        own = position - first + jnp.broadcast_to(jnp.arange(T), (R, T)).reshape(*queries, 1)
        scores = jnp.where(sight.mask(own, jnp.arange(S)), scores, -jnp.inf)
    if mask_BxS is not None:  # finite, for a query that sees no key: NaN would spread from its value to all
        mask_LxS = jnp.repeat(mask_BxS != 0, leading[0] // len(mask_BxS), axis=0)
        mask_LxS = mask_LxS.reshape(-1, *[1] * (scores.ndim - 2), S)
        scores = jnp.where(mask_LxS, scores, jnp.finfo(scores.dtype).min)
    # The largest score keeps exp from overflowing; the result does not depend on it, nor does the gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True) if v_LxSxK.shape[-1] == K else None
    if key is not None:
        kept = jax.random.bernoulli(key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0)
    weights = weights.astype(v_LxSxK.dtype).reshape(*leading, R * T, S)
    values = _weigh(weights, v_LxSxK)
    values = values.reshape(*leading, *queries, values.shape[-1])
    if total is None:
        total = values[..., K:]
    return (values[..., :K] / total).astype(q_LxRxTxK.dtype).reshape(*leading, R, T, K)


@jax.custom_jvp
def _weigh(weights_LxMxS: jax.Array, v_LxSxK: jax.Array) -> jax.Array:
    """Their product, (L, M, K), in float32 at least: sums of many values that are not divided overflow float16."""
    dtype = jnp.promote_types(v_LxSxK.dtype, jnp.float32)
    return jnp.einsum("...ms,...sk->...mk", weights_LxMxS, v_LxSxK, preferred_element_type=dtype)


# Derived by JAX, the backward pass would multiply float32 by a narrower dtype, which GPUs do in float32.
@_weigh.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (weights, v), (dweights, dv) = primals, tangents
    product = _weigh(weights, v)
    tangent = jnp.einsum("...ms,...sk->...mk", dweights, v) + jnp.einsum("...ms,...sk->...mk", weights, dv)
    return product, tangent.astype(product.dtype)
