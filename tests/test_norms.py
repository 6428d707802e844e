"""The three norms against NumPy in float64, their dtypes, and their agreement on a zero-mean stream."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prenorm_jax.models.coordinates import center, drop_last, restore_last
from prenorm_jax.models.linear import read as read_kernel
from prenorm_jax.models.norms import CRMSNorm, LayerNorm, RMSNorm

MODULES = {"layernorm": LayerNorm, "rmsnorm": RMSNorm, "crmsnorm": CRMSNorm}
WIDTHS = [2, 3, 7, 33]  # few: each is compiled anew


def oracle(norm: str, x: np.ndarray, epsilon: float) -> np.ndarray:
    """By the definition: CRMSNorm by restoring the dropped entry."""
    if norm == "crmsnorm":
        z = np.concatenate([x, -x.sum(-1, keepdims=True)], -1)
        return oracle("rmsnorm", z, epsilon)[..., :-1]
    if norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).sum(-1, keepdims=True) / x.shape[-1] + epsilon)


@pytest.mark.parametrize("norm", MODULES)
@settings(max_examples=40)
@given(
    width=st.sampled_from(WIDTHS),
    epsilon=st.sampled_from([1e-12, 1e-6, 1e-5, 1.0]),
    scale=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_follows_its_formula(norm, width, epsilon, scale, bias, seed):
    rng = np.random.default_rng(seed)
    x, gamma, beta = rng.normal(3, 2, size=(4, width)), rng.normal(size=width), rng.normal(size=width)
    module = MODULES[norm](epsilon, use_scale=scale, use_bias=bias, param_dtype=jnp.float64)
    params = {name: value for name, value, used in (("scale", gamma, scale), ("bias", beta, bias)) if used}
    expected = oracle(norm, x, epsilon) * (gamma if scale else 1) + (beta if bias else 0)
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-11, atol=1e-11)
    variables = module.init(jax.random.key(0), x)
    assert set(variables.get("params", {})) == set(params)


@settings(max_examples=40)
@given(width=st.sampled_from(WIDTHS), seed=st.integers(0, 99), epsilon=st.sampled_from([1e-12, 1e-5, 0.1]))
def test_agree_on_a_zero_mean_stream(width, seed, epsilon):
    z = center(np.random.default_rng(seed).normal(5, 1, size=(3, width)))
    by_ln, by_rms = (module(epsilon, False, False).apply({}, z) for module in (LayerNorm, RMSNorm))
    by_crms = restore_last(CRMSNorm(epsilon, False, False).apply({}, drop_last(z)))
    np.testing.assert_allclose(by_rms, by_ln, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(by_crms, by_ln, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_centring_leaves_no_mean_but_that_of_rounding(dtype):
    eps = float(jnp.finfo(dtype).eps)
    x = jnp.asarray(np.random.default_rng(0).normal(min(1 / eps / 16, 1e6), 1, size=(8, 512)), dtype)
    wide, z = (np.asarray(value, np.longdouble) for value in (x, center(x)))
    exact = wide - wide.mean(-1, keepdims=True)
    assert center(x).dtype == dtype
    np.testing.assert_allclose(z, exact, rtol=eps, atol=eps * np.abs(exact).max())
    assert np.abs(z.mean(-1)).max() < eps * np.abs(z).max()


def test_disagree_when_the_mean_is_left_in():
    x = np.random.default_rng(0).normal(5, 1, size=(3, 16))
    assert np.abs(RMSNorm(use_scale=False, use_bias=False).apply({}, x) - oracle("layernorm", x, 1e-5)).max() > 0.1


@pytest.mark.parametrize("norm", MODULES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_result_has_the_inputs_dtype_and_statistics_are_not_in_it(norm, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(300, 1, size=(5, 4096)), dtype)
    if norm != "layernorm":
        x = center(x.astype("float64")).astype(dtype)
    y = MODULES[norm](param_dtype=jnp.float32).init_with_output(jax.random.key(0), x)[0]
    assert y.dtype == dtype
    # float16 would overflow at 65504 in the sum of squares, bfloat16 lose the mean of 300.
    expected = oracle(norm, np.asarray(x, np.float64), 1e-5)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2 * float(jnp.finfo(dtype).eps), atol=2e-5)
    assert MODULES[norm](dtype=jnp.float32).init_with_output(jax.random.key(0), x)[0].dtype == jnp.float32


def test_layernorm_does_not_cancel():
    x = np.random.default_rng(0).normal(1000, 1, size=(2, 512)).astype(np.float32)
    one_pass = (x - x.mean(-1, keepdims=True)) / np.sqrt(
        (x**2).mean(-1, keepdims=True) - x.mean(-1, keepdims=True) ** 2
    )
    expected = oracle("layernorm", x.astype(np.float64), 1e-5)
    error = np.abs(LayerNorm(use_scale=False, use_bias=False).apply({}, x) - expected).max()
    assert error < 2e-3 < np.abs(one_pass - expected).max()


def by_definition(norm, x, epsilon):
    """JAX, for derivatives line by line."""
    d = x.shape[-1] + (norm == "crmsnorm")
    if norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    squares = jnp.square(x).sum(-1, keepdims=True)
    if norm == "crmsnorm":
        squares += jnp.square(x.sum(-1, keepdims=True))
    return x / jnp.sqrt(squares / d + epsilon)


def derivatives(norm):
    """(ε, x, its direction, kernel, cotangent) -> for each way to normalise and multiply: value and derivatives."""

    def of(function, x, direction, kernel, cotangent):
        value, pull_back = jax.vjp(function, x, kernel)
        tangent = jax.jvp(function, (x, kernel), (direction, kernel))[1]
        gradient = jax.grad(lambda x: (function(x, kernel) * cotangent).sum())
        curvature = jax.jvp(gradient, (x,), (direction,))[1]  # a second derivative is exact too
        return [value, tangent, *pull_back(cotangent), curvature]

    @jax.jit
    def of_all(epsilon, *arguments):
        module = MODULES[norm](epsilon, False, False, param_dtype=jnp.float64)
        functions = {
            "multiplied": lambda x, kernel: module.apply({}, x) @ kernel,
            "read": lambda x, kernel: read_kernel(module.apply({}, x, method="for_readers"), kernel),
            "definition": lambda x, kernel: by_definition(norm, x, epsilon) @ kernel,
        }
        return {name: of(function, *arguments) for name, function in functions.items()}

    return of_all


@pytest.mark.parametrize("norm", MODULES)
def test_derivatives_are_those_of_the_formula_whether_it_is_multiplied_out_or_read(norm):
    compute = derivatives(norm)
    for width, epsilon, seed in itertools.product([2, 3, 33], [1e-12, 1e-5, 1.0], range(3)):
        rng = np.random.default_rng(seed)
        x, direction, kernel = rng.normal(1, 2, (3, width)), rng.normal(size=(3, width)), rng.normal(size=(width, 4))
        results = compute(epsilon, x, direction, kernel, rng.normal(size=(3, 4)))
        for name in ("multiplied", "read"):
            for ours, expected in zip(results[name], results["definition"], strict=True):
                np.testing.assert_allclose(ours, expected, rtol=1e-8, atol=1e-9 * max(1, np.abs(expected).max()))
