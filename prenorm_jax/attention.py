"""Softmax attention that computes what the causal mask leaves, and stores no attention matrix for the backward pass.

The queries go in blocks, each against the keys that it may see: with 4 blocks, 5/8 of the full product. Each block is
under `jax.checkpoint`: the backward pass computes its probabilities anew, from queries and keys. Softmax is divided by
its sum after the product with the values, which is the smaller. On TPUs that sum is a column of the product.

Shape suffixes as in `transformer.py`. N is B·G as one axis on CPUs; else, or where `tensor` splits G, it is two axes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from prenorm_jax.sharding import computing_platform, is_split_by

CAUSAL_BLOCKS = 4
SMALLEST_BLOCK = 32  # queries
TPU_COLUMNS = 128  # that a TPU multiplies at once


class CacheUse(NamedTuple):
    """What a call does with the collection "cache", which holds the keys and values of a sequence's tokens.

    Attributes:
      size: S, for how many tokens to make it, where they begin a sequence; None: it is there, and they go on with it.
      position: of the first token given, a scalar that may be traced; 0 where a sequence begins.
    """

    size: int | None
    position: jax.Array | int = 0


def attend(
    q_BxTxHxK: jax.Array,
    k_BxSxGxK: jax.Array,
    v_BxSxGxK: jax.Array,
    causal: bool,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> jax.Array:
    """softmax(q kᵀ / √K) v over H query heads on G key/value heads: (B, T, H·K), in q's dtype.

    Scores and softmax are in float32 at least, but that its sum, on TPUs, is that of the numbers which are multiplied
    with the values, so in v's dtype. With a `dropout_key`, each probability is dropped with `dropout_rate`.
    """
    B, T, _, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    # CPUs are faster with three axes, TPUs with five. (And what two axes of a mesh split does not become one.)
    on = computing_platform()
    rows = (B * G,) if on == "cpu" and not is_split_by("tensor") else (B, G)
    q_NxRxTxK = _group(q_BxTxHxK, rows, G)
    k_NxSxK, v_NxSxK = (x.transpose(0, 2, 1, 3).reshape(*rows, S, K) for x in (k_BxSxGxK, v_BxSxGxK))
    if dropout_key is None and on == "tpu" and K % TPU_COLUMNS:
        # The sum then costs nothing, and a pass over the scores is saved. On CPUs 65 columns take longer than 64.
        v_NxSxK = jnp.concatenate([v_NxSxK, jnp.ones_like(v_NxSxK[..., :1])], axis=-1)
    size = max(-(-T // CAUSAL_BLOCKS), SMALLEST_BLOCK) if causal else T
    blocks = []
    for start in range(0, T, size):
        end = min(start + size, T)
        seen = S - T + end if causal else S
        key = None if dropout_key is None else jax.random.fold_in(dropout_key, start)
        position = seen - end + start if causal else None

        # Around the slices, so that all blocks keep the same arrays. (Merged with the forward pass it would be slower.)
        @jax.checkpoint
        def block(q, k, v, key, start=start, end=end, seen=seen, position=position):
            seen_kv = (x[..., :seen, :] for x in (k, v))
            return _attend_block(q[..., start:end, :], *seen_kv, key, position, dropout_rate)

        blocks.append(block(q_NxRxTxK, k_NxSxK, v_NxSxK, key))
    return _ungroup(jnp.concatenate(blocks, axis=-2), B)


def attend_cached(q_BxTxHxK: jax.Array, k_NxSxK: jax.Array, v_NxSxK: jax.Array, position: jax.Array | int) -> jax.Array:
    """The same of queries from `position` on, each of which sees the entries of a cache up to its own: (B, T, H·K)."""
    B, N = len(q_BxTxHxK), len(k_NxSxK)
    q_NxRxTxK = _group(q_BxTxHxK, (N,), N // B)
    return _ungroup(_attend_block(q_NxRxTxK, k_NxSxK, v_NxSxK, None, position, dropout_rate=0.0), B)


def _group(q_BxTxHxK: jax.Array, rows: tuple[int, ...], G: int) -> jax.Array:
    """Queries / √K, those of one key head together: (*rows, R, T, K)."""
    B, T, H, K = q_BxTxHxK.shape
    q_BxGxRxTxK = (q_BxTxHxK * K**-0.5).reshape(B, T, G, H // G, K).transpose(0, 2, 3, 1, 4)
    return q_BxGxRxTxK.reshape(*rows, H // G, T, K)


def _ungroup(x_NxRxTxK: jax.Array, B: int) -> jax.Array:
    R, T, K = x_NxRxTxK.shape[-3:]
    return x_NxRxTxK.reshape(B, -1, R, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, -1)


def _attend_block(
    q_NxRxTxK: jax.Array,
    k_NxSxK: jax.Array,
    v_NxSxK: jax.Array,
    key: jax.Array | None,
    position: jax.Array | int | None,
    dropout_rate: float,
) -> jax.Array:
    """The same of T queries, of which the first stands at key `position`; None: each sees all keys.

    Without dropout the values may have a further column, of ones, whose product with the weights is their sum.
    """
    *rows, R, T, K = q_NxRxTxK.shape
    S = k_NxSxK.shape[-2]
    queries = (R * T,) if len(rows) == 1 else (R, T)
    # Query heads of one key head are further rows of one product.
    scores = jnp.einsum("...mk,...sk->...ms", q_NxRxTxK.reshape(*rows, R * T, K), k_NxSxK)
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32)).reshape(*rows, *queries, S)
    if position is not None:
        position += jnp.broadcast_to(jnp.arange(T), (R, T)).reshape(*queries, 1)
        scores = jnp.where(jnp.arange(S) <= position, scores, -jnp.inf)
    # The largest score keeps exp from overflowing; the result does not depend on it, nor does the gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True) if v_NxSxK.shape[-1] == K else None
    if key is not None:
        kept = jax.random.bernoulli(key, 1 - dropout_rate, weights.shape)
        weights = jnp.where(kept, weights / (1 - dropout_rate), 0)
    weights = weights.astype(v_NxSxK.dtype).reshape(*rows, R * T, S)
    values = _weigh(weights, v_NxSxK).reshape(*rows, *queries, -1)
    if total is None:
        total = values[..., K:]
    return (values[..., :K] / total).astype(q_NxRxTxK.dtype).reshape(*rows, R, T, K)


@jax.custom_jvp
def _weigh(weights_NxMxS: jax.Array, v_NxSxK: jax.Array) -> jax.Array:
    """Their product, (N, M, K), in float32 at least: sums of many values that are not divided overflow float16."""
    dtype = jnp.promote_types(v_NxSxK.dtype, jnp.float32)
    return jnp.einsum("...ms,...sk->...mk", weights_NxMxS, v_NxSxK, preferred_element_type=dtype)


# Derived by JAX, the backward pass would multiply float32 by a narrower dtype, which GPUs do in float32.
@_weigh.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (weights, v), (dweights, dv) = primals, tangents
    product = _weigh(weights, v)
    tangent = jnp.einsum("...ms,...sk->...mk", dweights, v) + jnp.einsum("...ms,...sk->...mk", weights, dv)
    return product, tangent.astype(product.dtype)
