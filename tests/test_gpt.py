"""The model itself: against an independent NumPy implementation, causality, dropout, parameter counts, bad configs."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    changed,
    gpt_configs,
    logits,
    pooled,
    random_inputs,
    random_params,
    relative,
    run_of,
    tiny,
    tiny_vit,
)
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from oracle import numpy_gpt, numpy_vit

from prenorm_jax import PrenormError, build_model, convert_config
from prenorm_jax.config import base_config
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import NORMS
from prenorm_jax.models.placement import computing_on
from prenorm_jax.models.transformer import as_stream

ORACLES = {"gpt": numpy_gpt, "vit": numpy_vit}


def check_against_numpy(config):
    params, tokens = random_params(config, 1, embedding_mean=3.0), random_inputs(config)
    assert relative(logits(config, params, tokens), numpy_gpt(config, params, tokens)) < 1e-11


@pytest.mark.parametrize("config", pooled("gpt"))
def test_matches_an_independent_implementation(config):
    check_against_numpy(config)


@pytest.mark.wide
@given(config=gpt_configs())
@settings(max_examples=200, derandomize=False)
def test_any_network_matches_it(config):
    check_against_numpy(config)


ROTARY = {"positions": "rotary", "head_dim": 6}


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        (ROTARY | {"rotary_dim": 4, "rotary_interleaved": False}, {"rotary_dim": None}),
        (ROTARY | {"rotary_dim": 4, "rotary_interleaved": True}, {"rotary_interleaved": False}),
        (ROTARY | {"rotary_interleaved": False}, {"rotary_interleaved": True}),
        ({"window": 3}, {"window": None}),
        ({"window": 3, "attention_pattern": "gl"}, {"attention_pattern": "l", "global_rotary_base": None}),
        ({"attention_pattern": "gl", "global_rotary_base": 0.0}, {"global_rotary_base": None}),
        ({"attention_pattern": "gl", "global_rotary_base": 50.0}, {"global_rotary_base": None}),
        ({"positions": "alibi", "alibi_rounded": False}, {"positions": "none"}),
        ({"positions": "alibi", "alibi_rounded": True}, {"alibi_rounded": False}),
        ({"score_scale": 0.7}, {"score_scale": None}),
        ({"clip_qkv": 0.5, "qk_norm": True}, {"clip_qkv": None}),
        ({"positions": "fairseq"}, {"positions": "sinusoidal"}),
        ({"embed_scale": 3.0}, {"embed_scale": 1.0}),
        ({"logit_scale": 0.1}, {"logit_scale": 1.0}),
        ({"activation": "quick_gelu"}, {"activation": "gelu"}),
        ({"activation": "relu2"}, {"activation": "relu"}),
    ],
)
def test_the_pool_has_a_network_that_shows_when_an_option_is_ignored(options, ignored):
    """For the oracle it is another function, by far."""

    def shows(config):
        params, inputs, oracle = random_params(config, 1, 3.0), random_inputs(config, batch=1), ORACLES[config.family]
        return relative(oracle(changed(config, **ignored), params, inputs), oracle(config, params, inputs)) > 1e-3

    networks = [case.values[0] for family in ORACLES for case in pooled(family)]
    assert any(shows(config) for config in networks if options.items() <= vars(config).items())


@pytest.mark.parametrize(
    "changes", [{"post_norm": True}, {"final_norm": False}, {"final_norm": False, "tie_embeddings": False}]
)
def test_matches_it_where_conversion_is_refused(changes):
    check_against_numpy(tiny(**changes))


OF_ALL_KINDS = [
    {},
    {"parallel": True, "positions": "rotary", "kv_heads": 1, "window": 3, "attention_pattern": "lgl", "depth": 1},
    {"embed_dropout": 0.2, "branch_dropout": 0.2},
]


@pytest.mark.parametrize(
    ("norm", "changes"),
    [
        pytest.param(norm, changes, marks=[[], pytest.mark.slow, pytest.mark.wide][(m - n) % 3])
        for n, norm in enumerate(NORMS)
        for m, changes in enumerate(OF_ALL_KINDS)
    ],
)
def test_is_causal(norm, changes):
    # Each position has a token of its own, so that a row of the table is the embedding of one position.
    # The head must be untied: else it would read the table too.
    config = tiny(norm=norm, vocab_size=7, max_len=7, tie_embeddings=False, **changes)
    params = random_params(config, 2)

    def logits_of(table_TxD):
        return build_model(config).apply({"params": params | {"token_embedding": table_TxD}}, jnp.arange(7)[None])[0]

    jacobian_TxVxTxD = jax.jit(jax.jacrev(logits_of))(params["token_embedding"])
    reached_TxT = np.abs(jacobian_TxVxTxD).max((1, 3))
    back = 7 if config.window is None else config.depth * (config.window - 1)  # each block hands on what it saw
    in_sight_TxT = (np.tri(7) - np.tri(7, k=-back - 1)).astype(bool)
    assert (reached_TxT[~in_sight_TxT] == 0).all(), "a prediction depends on a token that is later, or too far back"
    assert (reached_TxT[in_sight_TxT] > 0).all(), "a prediction does not depend on a token in its sight"


@pytest.mark.parametrize("norm", NORMS)
def test_dropout_is_on_in_training_alone_and_keyed(norm):
    config = tiny(norm=norm, dropout=0.5)
    params, tokens = random_params(config, 3), random_inputs(config)
    one, same, other = (
        logits(config, params, tokens, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)
    )
    assert (one == same).all()
    assert relative(other, one) > 1e-3
    assert relative(logits(config, params, tokens), one) > 1e-3
    # Without the key it is an error of Flax, never silently no dropout.
    with pytest.raises(Exception, match="dropout"):
        logits(config, params, tokens, train=True)


@pytest.mark.parametrize("rate_of", ["attention_dropout", "branch_dropout", "embed_dropout"])
def test_each_dropout_does_something(rate_of):
    config = tiny(**{rate_of: 0.5})
    params, tokens = random_params(config, 3), random_inputs(config)
    dropped = logits(config, params, tokens, train=True, rngs={"dropout": jax.random.key(0)})
    assert relative(dropped, logits(config, params, tokens)) > 1e-3


@pytest.mark.parametrize("norm", [*(pytest.param(norm, marks=pytest.mark.slow) for norm in NORMS[:2]), "crmsnorm"])
def test_second_derivatives_pass_through_what_blocks_hand_on(norm):
    config = tiny(norm=norm, norm_affine=False, scan=True)
    handed_on = as_stream(config, jnp.ones((1, 1, config.stream_width)), train=False)
    assert (handed_on.statistics is None) == (norm == "layernorm")
    params, tokens = random_params(config, 4, embedding_mean=1.0), random_inputs(config)
    direction = random_params(config, 5, embedding_mean=0.0)
    gradient = jax.jit(jax.grad(lambda params: jnp.square(build_model(config).apply({"params": params}, tokens)).sum()))

    def moved(step):
        return gradient(jax.tree.map(lambda leaf, along: leaf + step * along, params, direction))

    exact = jax.jit(lambda *at: jax.jvp(gradient, at[:1], at[1:])[1])(params, direction)
    difference = jax.tree.map(lambda above, below: (above - below) / 2e-6, moved(1e-6), moved(-1e-6))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(exact))
    for path, ours in flatten_dict(exact).items():
        np.testing.assert_allclose(ours, flatten_dict(difference)[path], rtol=1e-5, atol=1e-7 * largest, err_msg=path)


def test_what_tpus_alone_are_told_changes_no_number(monkeypatch):
    config = tiny(norm="crmsnorm", norm_affine=False, scan=True, tie_embeddings=False)
    params, tokens = random_params(config, 6), random_inputs(config)
    mesh = run_of(base_config("gpt")).mesh

    def run(train, config=config, mesh=mesh):
        def forward(params):
            with computing_on(mesh):
                return build_model(config).apply({"params": params}, tokens, train=train)

        return jax.jit(forward)

    expected = run(train=True)(params)
    for train in (True, False):
        jaxpr = str(run(train).trace(params).jaxpr)
        assert "layout_constraint" not in jaxpr and "optimization_barrier" not in jaxpr
    monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda: "tpu")
    in_training, otherwise = (str(run(train).trace(params).jaxpr) for train in (True, False))
    assert "layout_constraint" in in_training and "optimization_barrier" not in in_training
    assert "layout_constraint" not in otherwise and "optimization_barrier" in otherwise
    # Where the devices are not known: of an array that many hold parts of, each might make the whole.
    assert "layout_constraint" not in str(run(True, mesh=None).trace(params).jaxpr)
    for train in (True, False):
        np.testing.assert_allclose(run(train)(params), expected, rtol=1e-12)
    tied = dataclasses.replace(config, tie_embeddings=True)  # its table and what it is multiplied by, in training
    assert "optimization_barrier" in str(run(True, tied).trace(random_params(tied, 6)).jaxpr)


def test_parameter_count_does_not_grow_with_a_tied_table():
    pre_ln = tiny(norm="layernorm", tie_embeddings=True)

    def size(config):
        return sum(leaf.value.size for leaf in abstract_params(config).values())

    for norm in ("rmsnorm", "crmsnorm"):
        assert size(convert_config(pre_ln, norm)) < size(pre_ln)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_parameters_and_logits_have_the_dtypes_asked_for(dtype):
    config = tiny(param_dtype=dtype, dtype="float32", embed_norm=True, head_bias=True)
    assert {leaf.value.dtype.name for leaf in abstract_params(config).values()} == {dtype}
    assert logits(config, random_params(config, 0), random_inputs(config)).dtype == "float32"


def test_init_gives_plain_arrays_and_jits():
    model = build_model(tiny(depth=1))
    plain = model.init(jax.random.key(0), jnp.zeros((1, 3), int))
    assert all(type(leaf).__name__ == "ArrayImpl" for leaf in jax.tree.leaves(plain))
    jitted = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), int))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), plain, jitted)


def test_a_leaf_without_a_role_is_an_error(monkeypatch):
    import prenorm_jax.equivalence.roles as stream

    monkeypatch.setattr(stream, "OTHER_AXES", tuple(name for name in stream.OTHER_AXES if name != "mlp"))
    stream.parameter_roles.cache_clear()
    with pytest.raises(ValueError, match="mlp"):
        stream.parameter_roles(tiny())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batchnorm"}, "model.norm='batchnorm' is not one of layernorm, rmsnorm, crmsnorm"),
        ({"nrom": "rmsnorm"}, "unknown key model.nrom"),
        ({"d_model": 10, "heads": 4}, "model.heads=4 does not divide model.d_model=10"),
        ({"heads": 4, "kv_heads": 3}, "model.kv_heads=3 does not divide model.heads=4"),
        ({"d_model": "64"}, "model.d_model='64' must be of type int, not str"),
        ({"d_model": 64.0}, "model.d_model=64.0 must be of type int, not float"),
        ({"depth": 0}, "model.depth=0 must be at least 1"),
        ({"dropout": 1.0}, "model.dropout=1.0 must be at least 0 and below 1"),
        ({"epsilon": -1e-5}, "model.epsilon=-1e-05 must be at least 0"),
        ({"positions": "rotary", "head_dim": 3}, "needs an even model.head_dim, not 3"),
        ({"positions": "rotary", "rotary_dim": 5}, "model.rotary_dim=5 must be even and at most model.head_dim=32"),
        ({"positions": "rotary", "rotary_dim": 34}, "model.rotary_dim=34 must be even and at most model.head_dim=32"),
        ({"rotary_dim": 4}, "model.rotary_dim needs model.positions='rotary', not 'learned'"),
        ({"rotary_interleaved": True}, "model.rotary_interleaved needs model.positions='rotary', not 'learned'"),
        ({"window": 0}, "model.window=0 must be at least 1"),
        ({"clip_qkv": 0.0}, "model.clip_qkv=0.0 makes queries, keys and values zero"),
        ({"positions": "relative"}, "model.positions='relative' is not one of"),
        ({"alibi_rounded": True}, "model.alibi_rounded needs model.positions='alibi', not 'learned'"),
        ({"attention_pattern": "lx"}, "model.attention_pattern='lx' must be of the letters l and g"),
        ({"attention_pattern": ""}, "model.attention_pattern='' must be of the letters l and g"),
        (
            {"attention_pattern": "lg", "scan": True},
            "by model.attention_pattern='lg' they differ: set model.scan=False",
        ),
        ({"attention_pattern": "g", "global_rotary_base": 0.0}, "model.global_rotary_base=0 needs model.positions="),
        ({"positions": "rotary", "global_rotary_base": 9.0}, "model.global_rotary_base=9 needs model.positions="),
        ({"qk_norm_by_head": True}, "model.qk_norm_by_head=True needs model.qk_norm=True"),
        ({"activation": "swish"}, "model.activation='swish' is not one of"),
        ({"dtype": "fp32"}, "model.dtype='fp32' is not one of"),
        ({"shared_norm": True}, "model.shared_norm=True needs model.parallel=True"),
    ],
)
def test_a_wrong_config_is_named(changes, message):
    config = base_config().model.to_dict() | changes
    with pytest.raises(PrenormError) as error:
        build_model(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_float64_without_64_bit_mode_is_an_error():
    jax.config.update("jax_enable_x64", False)
    try:
        with pytest.raises(PrenormError, match="JAX_ENABLE_X64=1"):
            build_model(base_config().model.to_dict() | {"dtype": "float64"})
    finally:
        jax.config.update("jax_enable_x64", True)


def test_a_sequence_that_is_too_long_is_an_error():
    with pytest.raises(PrenormError, match=r"a sequence of 8 tokens is longer than model\.max_len=7"):
        build_model(tiny()).init(jax.random.key(0), jnp.zeros((1, 8), int))


def test_the_derivative_by_a_frequent_tokens_row_is_not_summed_in_two_bytes():
    config = tiny(tie_embeddings=False, param_dtype="float32", dtype="float32")
    params, tokens = random_params(config, 1, embedding_mean=0.0), jnp.zeros((512, 7), int)

    def row_0(dtype):
        def first_logits(table):
            model = build_model(dataclasses.replace(config, dtype=dtype))
            return model.apply({"params": params | {"token_embedding": table}}, tokens)[..., 0].sum()

        return np.asarray(jax.jit(jax.grad(first_logits))(params["token_embedding"])[0])

    assert relative(row_0("bfloat16"), row_0("float32")) < 0.05
    # So it would be, where JAX derives it: from 256 terms on a further one is half of the last digit, and rounded away.
    ones = jax.grad(lambda table: jnp.take(table, tokens, axis=0).sum())(jnp.ones((11, 2), jnp.bfloat16))
    assert ones[0, 0] < 0.5 * tokens.size


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("make", [tiny, tiny_vit])
def test_an_empty_batch_gives_an_empty_result(make, norm):
    config = make(norm=norm)
    model = build_model(config)
    inputs = model.example(batch=2, seed=0)
    shape = jax.eval_shape(model.apply, {"params": random_params(config, 0)}, inputs[:0]).shape
    assert shape == (0, *jax.eval_shape(model.apply, {"params": random_params(config, 0)}, inputs).shape[1:])
