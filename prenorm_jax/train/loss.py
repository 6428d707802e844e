"""The losses, and the rank of a label."""

import jax
import jax.numpy as jnp
import optax

from prenorm_jax.base.trees import at_least_float32
from prenorm_jax.models.placement import platform


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Of (..., V) logits, in nats and in float32 at least: (...). Targets are classes or distributions over them.

    That of a class which is not from 0 to V-1 is NaN.
    """
    logits = at_least_float32(logits)
    if targets.ndim == logits.ndim:
        return optax.softmax_cross_entropy(logits, targets)
    largest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    total = jnp.exp(logits - largest).sum(-1)
    exists = (targets >= 0) & (targets < logits.shape[-1])
    return jnp.where(exists, jnp.log(total) - (_entry(logits, targets) - largest[..., 0]), jnp.nan)


@jax.custom_jvp
def _entry(x: jax.Array, index: jax.Array) -> jax.Array:
    """Of (..., N), one of each N: (...)."""
    if platform().gather_label:
        return jnp.take_along_axis(x, index[..., None], axis=-1)[..., 0]
    return _entry_by_sum(x, index)


def _entry_by_sum(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.where(jnp.arange(x.shape[-1]) == index[..., None], x, 0).sum(-1)


# The transpose of a gather is a scatter-add, into which XLA does not fuse: it would write a loss's softmax in float32
# and read it again. That of the sum is elementwise.
@_entry.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, index), (dx, _) = primals, tangents
    return _entry(x, index), _entry_by_sum(dx, index)


def binary_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """(..., V), (..., V) -> (...): in nats, the mean over classes, each for itself.

    All classes that are mixed in count in full (arXiv 2110.00476, section 3): those whose target is above 0.
    """
    logits = at_least_float32(logits)
    return optax.sigmoid_binary_cross_entropy(logits, targets > 0).mean(-1)


def rank_of_label(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """How many classes come before the label, by logit and then by number: (..., V), (...) -> (...).

    Where a logit is NaN, more than there are.
    """
    own = _entry(logits, labels)[..., None]
    earlier = jnp.arange(logits.shape[-1]) < labels[..., None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(-1)
    return jnp.where(jnp.isnan(logits).any(-1), jnp.iinfo(rank.dtype).max, rank)
