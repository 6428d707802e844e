"""From logits to a token: the likeliest one, or a sample under a temperature, top-k and top-p."""

import dataclasses

import jax
import jax.numpy as jnp

from prenorm_jax.base.errors import PrenormError, check_integer, check_range
from prenorm_jax.base.trees import at_least_float32


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits. Raises PrenormError for values that make no sense.

    Attributes:
      temperature: what logits are divided by; 0 takes the likeliest token.
      top_k: samples among the k likeliest tokens; None: among all.
      top_p: samples among the likeliest tokens whose probabilities first add up to p (arXiv 1904.09751); after top_k.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        check_range("temperature", self.temperature, at_least=0)
        check_integer("top_k", self.top_k)
        check_range("top_k", self.top_k, at_least=1)
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise PrenormError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.temperature == 0 and (self.top_k or self.top_p):
            raise PrenormError("top_k and top_p choose what is sampled from: set a temperature above 0, such as 1")


def choice_logits(logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """(B, V) log-probabilities, up to a constant, that a temperature above 0, top_k and top_p leave; -inf: none."""
    logits_BxV -= logits_BxV.max(-1, keepdims=True)  # so that no temperature, however low, makes two of them inf
    logits_BxV /= max(sampling.temperature, float(jnp.finfo(logits_BxV.dtype).tiny))
    if sampling.top_k is None and sampling.top_p is None:
        return logits_BxV
    V = logits_BxV.shape[-1]
    order_BxV = jnp.argsort(logits_BxV, descending=True)  # stable: of equal tokens the first stay
    kept_BxV = jnp.arange(V)[None] < min(sampling.top_k or V, V)
    if sampling.top_p is not None:
        sorted_BxV = jnp.where(kept_BxV, jnp.take_along_axis(logits_BxV, order_BxV, axis=-1), -jnp.inf)
        probabilities_BxV = jax.nn.softmax(sorted_BxV)
        kept_BxV &= jnp.cumsum(probabilities_BxV, axis=-1) - probabilities_BxV < sampling.top_p
    kept_BxV = jnp.broadcast_to(kept_BxV, logits_BxV.shape)
    allowed_BxV = jnp.put_along_axis(jnp.zeros_like(kept_BxV), order_BxV, kept_BxV, axis=-1, inplace=False)
    return jnp.where(allowed_BxV, logits_BxV, -jnp.inf)


def choose(logits_BxV: jax.Array, sampling: Sampling, keys_B: jax.Array, position: jax.Array | int) -> jax.Array:
    """(B,) int32 tokens for `position`: a pure function of the logits, each example's key and the position."""
    logits_BxV = at_least_float32(logits_BxV)
    if sampling.temperature == 0:
        return logits_BxV.argmax(-1).astype(jnp.int32)
    keys_B = jax.vmap(jax.random.fold_in, (0, None))(keys_B, position)
    return jax.vmap(jax.random.categorical)(keys_B, choice_logits(logits_BxV, sampling)).astype(jnp.int32)
