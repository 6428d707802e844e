"""Norms and attention beside those of Flax and JAX. References from other libraries stand in this folder.

They have a step of CI of their own, with its own budget of time (`pytest -m reference`); `make test` leaves them out.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from prenorm_jax.models.attention import attend
from prenorm_jax.models.norms import LayerNorm, RMSNorm

pytestmark = pytest.mark.reference


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (LayerNorm(epsilon=1e-3), nn.LayerNorm(epsilon=1e-3, use_fast_variance=False, dtype=jnp.float64)),
        (RMSNorm(epsilon=1e-3, use_bias=False), nn.RMSNorm(epsilon=1e-3, dtype=jnp.float64)),
    ],
    ids=["layernorm", "rmsnorm"],
)
def test_a_norm_and_its_derivatives_are_flaxs(ours, theirs):
    rng = np.random.default_rng(0)
    x, direction = rng.normal(size=(2, 5, 12)) + 3, rng.normal(size=(5, 12))
    params = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape), nn.unbox(ours.init(jax.random.key(0), x)))

    def value(norm):
        return jax.value_and_grad(lambda x, params: (norm.apply(params, x) * direction).sum(), (0, 1))(x, params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), value(ours), value(theirs))


@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_jaxs(causal):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 70, heads, 4))) for heads in (4, 2, 2))
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=causal)
    np.testing.assert_allclose(attend(q, k, v, causal), expected.reshape(2, 70, 16), rtol=1e-6, atol=1e-6)
