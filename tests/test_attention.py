"""Blocked attention against the plain formula, in float64: values, both kinds of derivative, dropout."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative

from prenorm_jax.models.attention import _cudnn_serves, attend
from prenorm_jax.models.placement import MESH_AXES, computing_on, computing_platform


@pytest.fixture(autouse=True, params=["cpu", "gpu", "tpu"])
def platform(request, monkeypatch):
    """What is done for TPUs must be right wherever it is done. (GPUs have the axes of the one and the columns of the
    other: long tests leave them out.)"""
    monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda: request.param)
    return request.param


def plain(q_BxTxHxK, k_BxSxGxK, v_BxSxGxK, causal, window=None, scale=None, bias=None):
    """One product, one softmax; key heads repeated. Of a window the width is that of a band of the scores."""
    B, T, H, K = q_BxTxHxK.shape
    S, G = k_BxSxGxK.shape[1:3]
    k, v = (jnp.repeat(x, H // G, axis=2) for x in (k_BxSxGxK, v_BxSxGxK))
    scores = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k) * (scale or K**-0.5)
    if bias:
        scores += bias(S - T + jnp.arange(T), jnp.arange(S))
    ahead = 0 if causal else S if window is None else window - 1
    scores = jnp.where(np.tri(T, S, S - T + ahead) - np.tri(T, S, S - T - (window or S)) > 0, scores, -jnp.inf)
    return jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), v).reshape(B, T, H * K)


def random_heads(T, H=4, G=2, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(2, T, heads, 3))) for heads in (H, G, G)]


def biased(t_T, s_S):
    """Of four heads; no function of the distance alone."""
    return jnp.sin(jnp.arange(1, 5)[:, None, None] * t_T[:, None] + s_S)


# Blocks of queries there are where a query does not see all keys: of 32 tokens at least (33), else four (130). Windows
# within a block, over two of them, and wider than the sequence.
# Both ways, too.
LENGTHS = [(1, False, None), (1, True, None), (31, False, None), (33, True, None), (130, True, None), (130, True, 40)]
LENGTHS += [(130, False, 40)]
MORE_LENGTHS = [(130, False, None), (128, True, None), (33, True, 2), (130, True, 999), (33, False, 1)]
MOST_LENGTHS = [(31, True, None), (33, False, None), (128, False, None), (257, False, None), (257, True, None)]
MOST_LENGTHS += [(31, True, 1), (128, True, 32)]


@pytest.mark.parametrize(
    ("T", "causal", "window"),
    [
        *LENGTHS,
        *(pytest.param(*case, marks=pytest.mark.slow) for case in MORE_LENGTHS),
        *(pytest.param(*case, marks=pytest.mark.wide) for case in MOST_LENGTHS),
    ],
)
def test_blocks_are_the_plain_formula_and_so_are_their_derivatives(T, causal, window):
    inputs, directions = random_heads(T), random_heads(T, seed=1)
    cotangent = jnp.asarray(np.random.default_rng(2).normal(size=(2, T, 12)))

    def results(function):
        more = {"scale": 0.7, "bias": biased} if window else {}
        function = functools.partial(function, causal=causal, window=window, **more)
        value, pull_back = jax.vjp(function, *inputs)
        tangent = jax.jvp(function, inputs, directions)[1]
        return [value, tangent, *pull_back(cotangent)]

    for ours, expected in zip(*jax.jit(lambda: (results(attend), results(plain)))(), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-12)


def jaxpr_of(K: int) -> str:
    """Of 40 causal queries in two heads, of one sequence."""
    heads = [jax.ShapeDtypeStruct((1, 40, 2, K), jnp.float32)] * 3
    return str(jax.make_jaxpr(lambda *qkv: attend(*qkv, True))(*heads))


@pytest.mark.parametrize("K", [3, 64, 128])
def test_on_tpus_the_values_have_a_column_of_ones_where_there_is_room(K, platform):
    leading = "2" if platform == "cpu" else "1,2"
    jaxpr = jaxpr_of(K)
    assert f"f32[{leading},40,{K}]" in jaxpr
    assert (f"f32[{leading},40,{K + 1}]" in jaxpr) == (platform == "tpu" and K < 128)


@pytest.mark.parametrize("shape", [(2, 2, 1), (1, 1, 2)])
def test_heads_that_tensor_splits_stay_an_axis(shape, platform):
    """Else they would be gathered, which no result shows."""
    joined = platform == "cpu" and shape[2] == 1
    with computing_on(jax.sharding.AbstractMesh(shape, MESH_AXES)):
        jaxpr = jaxpr_of(3)
    scores = {True: "f32[2,32,32]", False: "f32[1,2,1,32,32]"}  # of the first block
    assert scores[joined] in jaxpr and scores[not joined] not in jaxpr


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    id: int
    device_kind: str = ""
    compute_capability: str = ""


H100 = Device("gpu", 0, "NVIDIA H100 80GB HBM3", "9.0")


def two_byte_heads(T, S, K, H=4, G=2):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=(2, n, heads, K)), jnp.bfloat16) for n, heads in ((T, H), (S, G), (S, G))]


@pytest.mark.parametrize("platform", ["gpu"], indirect=True)
@pytest.mark.parametrize(
    ("T", "causal", "window", "cudnns"),
    [
        (34, True, None, True),
        (34, True, 5, True),
        (34, False, None, True),
        (34, False, 5, False),  # JAX refuses it: the kernel knows no window on both sides
        (2, False, None, True),
        (2, False, 5, False),
        (2, True, None, False),
        (2, True, 5, False),
    ],
)
def test_on_nvidia_gpus_cudnn_is_given_what_it_takes(T, causal, window, cudnns, monkeypatch):
    """There is none here: JAX's own implementation stands in for it, with the same conventions."""
    asked, own = [], jax.nn.dot_product_attention

    def stand_in(*qkv, implementation, **options):
        asked.append(implementation)
        return own(*qkv, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    qkv = two_byte_heads(T, 34, 8)
    expected = jax.jit(lambda *qkv: plain(*(x.astype(jnp.float64) for x in qkv), causal, window))(*qkv)
    for device, options, asks in ((H100, {}, cudnns), (H100, {"kernel": "xla"}, False), (Device("tpu", 0), {}, False)):
        monkeypatch.setattr("prenorm_jax.models.attention.computing_device", lambda device=device: device)
        asked.clear()
        ours = jax.jit(lambda *qkv, options=options: attend(*qkv, causal, window=window, **options))(*qkv)
        assert relative(ours, expected) < 0.01
        assert asked == ["cudnn"] * asks
    monkeypatch.setattr("prenorm_jax.models.attention.computing_device", lambda: H100)
    jax.eval_shape(lambda *qkv: attend(*qkv, causal, 0.1, jax.random.key(0)), *qkv)
    assert not asked, "the kernel's dropout is not ours"


@pytest.mark.parametrize(
    ("device", "heads", "served"),
    [
        (H100, two_byte_heads(34, 34, 128), True),
        (H100, two_byte_heads(1, 34, 64), False),
        (H100, two_byte_heads(34, 197, 64), False),
        (H100, two_byte_heads(34, 34, 136), False),
        (H100, two_byte_heads(34, 34, 12), False),
        (H100, [x.astype(jnp.float32) for x in two_byte_heads(34, 34, 64)], False),
        (Device("gpu", 0, "NVIDIA A100-SXM4-40GB", "8.0"), two_byte_heads(34, 34, 64), True),
        (Device("gpu", 0, "NVIDIA B200", "10.0"), two_byte_heads(34, 34, 64), True),
        (Device("gpu", 0, "Tesla V100-SXM2-16GB", "7.0"), two_byte_heads(34, 34, 64), False),
        (Device("gpu", 0, "NVIDIA Quadro RTX 8000", "7.5"), two_byte_heads(34, 34, 64), False),
        (Device("gpu", 0, "AMD Instinct MI300X", "gfx942"), two_byte_heads(34, 34, 64), False),
        (Device("cpu", 0, "cpu"), two_byte_heads(34, 34, 64), False),
    ],
)
def test_cudnn_serves_what_it_takes(device, heads, served, monkeypatch):
    monkeypatch.setattr("prenorm_jax.models.attention.computing_device", lambda: device)
    assert _cudnn_serves(heads[0], *heads[1].shape[1:3]) == served


@pytest.mark.parametrize(("G", "tensor", "served"), [(2, 2, True), (2, 4, False), (1, 2, False), (4, 4, True)])
def test_cudnn_is_given_whole_heads_of_queries_and_keys(G, tensor, served, monkeypatch):
    monkeypatch.setattr("prenorm_jax.models.attention.computing_device", lambda: H100)
    q, k, _ = two_byte_heads(34, 34, 64, G=G)
    with computing_on(jax.sharding.AbstractMesh((1, 1, tensor), MESH_AXES)):
        assert _cudnn_serves(q, *k.shape[1:3]) == served


def test_the_platform_is_that_of_the_mesh():
    assert computing_platform() == "cpu"
    for kind, expected in (("tpu", "tpu"), ("gpu", "gpu")):
        mesh = jax.sharding.Mesh(np.array([[[Device(kind, 0)]]], object), MESH_AXES)
        with computing_on(mesh):
            assert computing_platform() == expected
    with computing_on(jax.sharding.AbstractMesh((1, 1, 1), MESH_AXES)):  # of no devices
        assert computing_platform() == "cpu"


@pytest.mark.parametrize("window", [None, 2, 40])
def test_a_query_sees_its_window_and_nothing_before_or_after_it(window):
    T = 130
    q, k, v = random_heads(T)
    derive = jax.jit(jax.grad(lambda k, v, t: attend(q, k, v, True, window=window)[:, t].sum(), argnums=(0, 1)))
    for t in (0, 31, 32, 33, 100, T - 1):
        seen = (np.arange(T) <= t) & (np.arange(T) > t - (window or T))
        by_k, by_v = (jnp.abs(gradient).max((0, 2, 3)) > 0 for gradient in derive(k, v, t))
        np.testing.assert_array_equal(by_v, seen)
        np.testing.assert_array_equal(by_k, seen & (t > 0))  # of a single key the weight is 1, whatever the key


def test_huge_scores_do_not_overflow():
    q, k, v = random_heads(40)
    ours, expected = jax.jit(lambda q, k: (attend(q, k, v, True), plain(q, k, v, True)))(1e4 * q, 1e4 * k)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)


@pytest.mark.parametrize("platform", ["cpu", "tpu"], indirect=True)
@pytest.mark.parametrize("causal", [True, False])
def test_sums_of_large_values_do_not_overflow_float16(causal):
    """Weights near one, before they are divided: 256 values of 300 sum up to more than 65504."""
    rng = np.random.default_rng(0)
    sizes = (0, 0.1), (0, 0.1), (300, 1)
    q, k, v = (jnp.asarray(rng.normal(*size, size=(1, 256, 1, 2)), jnp.float16) for size in sizes)
    cotangent = jnp.asarray(rng.normal(size=(1, 256, 2)), jnp.float16)

    def results(function, dtype):
        value, pull_back = jax.vjp(lambda *qkv: function(*qkv, causal), *(x.astype(dtype) for x in (q, k, v)))
        return value, pull_back(cotangent.astype(dtype))[2]

    compute = jax.jit(results, static_argnums=(0, 1))
    value, by_v = compute(attend, jnp.float16)
    expected, expected_by_v = compute(plain, jnp.float64)
    assert value.dtype == by_v.dtype == jnp.float16
    np.testing.assert_allclose(value, expected, rtol=1e-3)
    assert relative(by_v, expected_by_v) < 5e-3


def test_the_causal_half_is_not_computed_nor_what_lies_before_a_window():
    """With 4 blocks, 10 of 16 squares, and of a window of one square 7: FLOPs as XLA counts them, forward."""
    q, k, v = random_heads(256)
    flops = [
        jax.jit(functools.partial(attend, **options)).lower(q, k, v).cost_analysis()["flops"]
        for options in ({"causal": True, "window": 64}, {"causal": True}, {"causal": False})
    ]
    assert flops[0] < 0.75 * flops[1] and flops[1] < 0.7 * flops[2]


@pytest.mark.parametrize("platform", ["cpu", "tpu"], indirect=True)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dropout", [False, True])
def test_no_attention_matrix_is_kept_for_the_backward_pass(causal, dropout):
    """What `jax.vjp` keeps is queries, keys and values, once for all blocks."""
    inputs = random_heads(256)
    options = (0.3, jax.random.key(0)) if dropout else ()

    def kept(*inputs):
        return jax.tree.leaves(jax.vjp(lambda *qkv: attend(*qkv, causal, *options), *inputs)[1])

    variables = {id(var): var.aval.size for var in jax.make_jaxpr(kept)(*inputs).jaxpr.outvars}
    assert sum(variables.values()) < 1.2 * sum(x.size for x in inputs)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cpu", "tpu"], indirect=True)
@pytest.mark.parametrize("causal", [True, False])
def test_dropout_keeps_the_mean_and_needs_its_key(causal):
    q, k, v = random_heads(40)
    without = jax.jit(lambda: attend(q, k, v, causal))()
    draw = jax.jit(jax.vmap(lambda key: attend(q, k, v, causal, 0.3, key)))
    keys = jax.random.split(jax.random.key(0), 200)
    draws, again = np.split(draw(jnp.concatenate([keys, keys[:2]])), [200])
    error = np.abs(draws.mean(0) - without) / (draws.std(0) / np.sqrt(len(draws)) + 1e-12)
    assert error.max() < 6  # standard errors, of 960 numbers
    assert draws[:, :, 1:].std(0).min() > 0
    np.testing.assert_array_equal(again, draws[:2])
    total = jax.jit(jax.value_and_grad(lambda v: attend(q, k, v, causal, 0.3, jax.random.key(1)).sum()))
    before, gradient = total(v)
    after, _ = total(v + 1e-6)
    np.testing.assert_allclose(1e-6 * gradient.sum(), after - before, rtol=1e-8)  # the same mask, computed anew


@pytest.mark.parametrize("platform", ["cpu"], indirect=True)
@pytest.mark.parametrize("causal", [True, False])
def test_all_platforms_draw_the_same_dropout_masks(causal, platform, monkeypatch):
    inputs, results = random_heads(40), []
    for kind in ("cpu", "gpu", "tpu"):
        monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda kind=kind: kind)

        @jax.jit
        def derive(*inputs):
            value, pull_back = jax.vjp(lambda *qkv: attend(*qkv, causal, 0.3, jax.random.key(1)), *inputs)
            return value, *pull_back(value)

        results.append(derive(*inputs))
    for expected, *others in zip(*results, strict=True):
        for ours in others:
            np.testing.assert_allclose(ours, expected, rtol=1e-11, atol=1e-12)
