"""What linear maps do otherwise on GPUs: the same numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import random_inputs, random_params, relative, tiny
from jax.flatten_util import ravel_pytree

from prenorm_jax import build_model
from prenorm_jax.models.linear import matmul


def multiplied_widths(x, kernel):
    """(in, out) of each product in `matmul`."""
    equations = jax.make_jaxpr(lambda x, kernel: matmul(x, kernel))(x, kernel).eqns  # of a new function: not remembered
    return [equation.invars[1].aval.shape for equation in equations if equation.primitive.name == "dot_general"]


@pytest.mark.parametrize(
    "dtype, tokens, widths, padded",
    [
        ("bfloat16", 3, (7, 24), (8, 24)),
        ("bfloat16", 3, (24, 7), (24, 8)),
        ("float32", 3, (5, 6), (8, 8)),
        ("float64", 3, (5, 3), (6, 4)),
        ("float64", 3, (4, 2), (4, 2)),
        ("bfloat16", 1, (7, 9), (7, 9)),
    ],
)
def test_products_for_gpus_are_of_whole_16_bytes(dtype, tokens, widths, padded, monkeypatch):
    rng = np.random.default_rng(0)
    x, kernel = jnp.asarray(rng.normal(size=(2, tokens, widths[0])), dtype), jnp.asarray(rng.normal(size=widths), dtype)
    assert multiplied_widths(x, kernel) == [widths]
    dy = jnp.asarray(rng.normal(size=(2, tokens, widths[1])), dtype)

    def results():
        def value_and_derivatives(x, kernel, dy):  # a new function: what is traced for one platform is not taken again
            y, pull_back = jax.vjp(matmul, x, kernel)
            return y, *pull_back(dy)

        return jax.jit(value_and_derivatives)(x, kernel, dy)

    expected = results()
    monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda: "gpu")
    assert multiplied_widths(x, kernel) == [padded]
    actual = results()
    # Zeros add nothing, but another width may be summed in another order.
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert relative(ours, np.asarray(theirs, np.float64)) < tolerance


@pytest.mark.parametrize(
    ("norm", "tied"),
    [
        pytest.param(
            *case, marks=pytest.mark.slow if case in (("layernorm", True), ("crmsnorm", False)) else pytest.mark.wide
        )
        for case in itertools.product(("layernorm", "crmsnorm"), (True, False))
    ],
)
def test_a_network_and_its_gradient_are_the_same_on_gpus(norm, tied, monkeypatch):
    config = tiny(norm=norm, tie_embeddings=tied, d_model=14, norm_affine=norm == "layernorm")
    params, tokens = random_params(config, 1, embedding_mean=1.0), random_inputs(config)

    def compiled():
        jax.clear_caches()  # JAX remembers what it traced for the other platform

        def loss(params):
            return jnp.square(build_model(config).apply({"params": params}, tokens)).mean()

        traced = jax.jit(jax.value_and_grad(loss)).trace(params)
        return str(traced.jaxpr), traced.lower().compile()(params)

    before, expected = compiled()
    monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda: "gpu")
    after, actual = compiled()
    assert after.count(" pad[") > before.count(" pad[")
    assert after.count("remat2[") > before.count("remat2["), "in unrolled blocks on CPUs n is kept"
    # Of all leaves together: the derivative by a key's bias is nothing but rounding.
    (loss, gradient), (expected_loss, expected_gradient) = actual, expected
    assert relative(loss, expected_loss) < 1e-13
    assert relative(ravel_pytree(gradient)[0], ravel_pytree(expected_gradient)[0]) < 1e-12
