"""Conversion keeps the function, in all six directions, over the options of the config; the wrong rules do not."""

import itertools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    changed,
    gpt_configs,
    logits,
    model_config,
    pooled,
    random_inputs,
    random_params,
    relative,
    tiny,
    vit_configs,
)
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from pool import OPTIONS, all_pairs, pairs_of, pool

from prenorm_jax import PrenormError, convert_config, convert_params
from prenorm_jax.config import base_config
from prenorm_jax.equivalence.convert import convert_leaves
from prenorm_jax.equivalence.roles import parameter_roles
from prenorm_jax.equivalence.rules import center_heads
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import ACTIVATIONS, NORMS, ModelConfig
from prenorm_jax.models.coordinates import center, coordinates

# From each norm to each other one, both ways: six directions.
ROUND = ["rmsnorm", "crmsnorm", "layernorm", "crmsnorm", "rmsnorm", "layernorm"]


def networks(quick: Callable[[int], bool] = lambda number: True, start: str | None = None) -> list:
    """Parameters of a test: those of both families' pools, where a start is given after it.

    Not all of them are quick, and of those that are not five of six are `wide`.
    """
    cases = []
    for number, case in itertools.chain.from_iterable(enumerate(pooled(family)) for family in OPTIONS):
        values, name = (case.values, case.id) if start is None else ((start, *case.values), f"{start}-{case.id}")
        length = pytest.mark.wide if number % 6 else pytest.mark.slow
        cases.append(pytest.param(*values, id=name, marks=[*case.marks, *[length][: not quick(number)]]))
    return cases


def shapes(config: ModelConfig) -> dict:
    return {path: leaf.value.shape for path, leaf in abstract_params(config).items()}


def convert(params: dict, config: ModelConfig, to: str) -> tuple[dict, ModelConfig]:
    """Tree and config; and the one is exactly what the other describes."""
    converted, to_config = convert_params(params, config, to), convert_config(config, to)
    assert to_config.norm == to
    assert {path: leaf.shape for path, leaf in flatten_dict(converted).items()} == shapes(to_config)
    return converted, to_config


def check_round(config: ModelConfig, params: dict, tolerance: float) -> None:
    params, inputs = jax.device_get(params), random_inputs(config)
    expected = logits(config, params, inputs)
    for to in ROUND:
        params, config = convert(params, config, to)
        assert relative(logits(config, params, inputs), expected) < tolerance, to


def check_in_training(config: ModelConfig, params: dict, tolerance: float) -> None:
    in_training = {"train": True, "rngs": {"dropout": jax.random.key(5)}}
    params, inputs = jax.device_get(params), random_inputs(config)
    expected = logits(config, params, inputs, **in_training)
    for to in NORMS[1:]:
        converted, to_config = convert(params, config, to)
        assert relative(logits(to_config, converted, inputs, **in_training), expected) < tolerance, to


def check_roles(config: ModelConfig) -> None:
    for norm in NORMS:
        variant = config if norm == "layernorm" else convert_config(config, norm)
        roles, widths = parameter_roles(variant), shapes(variant)
        assert widths.keys() == roles.keys()
        for path, role in roles.items():
            for axis in (role.writes, role.reads, None if role.affine is None else -1):
                assert axis is None or widths[path][axis] == variant.stream_width
            if role.reads is not None:
                assert role.norm is None if config.post_norm else role.norm.epsilon == config.epsilon


def check_born_as(start: str, config: ModelConfig) -> None:
    """With an affine of their own in their norms, and, for rmsnorm, zero-mean writers."""
    config = changed(config, norm=start)
    params = jax.device_get(random_params(config, 2))
    # What makes it the equivalent of a Pre-LN network: zero-mean writers, and queries and keys under a QK-norm.
    roles, flat = parameter_roles(config), flatten_dict(params)
    for path, role in roles.items():
        if start == "rmsnorm" and role.writes is not None:
            scale = flat.get((*path[:-2], f"{path[-2]}_scale"), 1) if len(path) > 1 else 1  # LayerScale comes first
            flat[path] = center(flat[path] * scale, role.writes) / scale
    params = unflatten_dict(center_heads(flat, roles))
    others = [norm for norm in NORMS if norm != start]
    inputs = random_inputs(config)
    expected = logits(config, params, inputs)
    for to in others:
        converted, to_config = convert(params, config, to)
        assert relative(logits(to_config, converted, inputs), expected) < 1e-10
    for to in [*others, start]:
        params, config = convert(params, config, to)
    assert relative(logits(config, params, inputs), expected) < 1e-10


def check_stacked(config: ModelConfig) -> None:
    """The roles count the stream axis from the end: leading (scanned) axes change nothing."""
    trees = [flatten_dict(jax.device_get(random_params(config, seed))) for seed in (1, 2)]
    for to in ROUND[:4]:
        stacked = {path: np.stack([tree[path] for tree in trees]) for path in trees[0]}
        to_config = convert_config(config, to)
        both = coordinates(config), coordinates(to_config)
        stacked = convert_leaves(stacked, parameter_roles(config), *both, shapes(to_config))
        trees = [flatten_dict(convert_params(unflatten_dict(tree), config, to)) for tree in trees]
        config = convert_config(config, to)
        assert stacked.keys() == trees[0].keys()
        for path, leaf in stacked.items():
            np.testing.assert_allclose(leaf, np.stack([tree[path] for tree in trees]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", OPTIONS)
def test_the_pool_has_every_value_and_nearly_all_pairs(family):
    """As many networks as there are could not have all: of two options with 5 and 4 values there are 20 pairs."""
    chosen, wanted = pool(family), all_pairs(family)
    for name, values in OPTIONS[family].items():
        assert {options[name] for options in chosen} == set(values)
    assert len(wanted.intersection(*[set().union(*map(pairs_of, chosen))])) > 0.9 * len(wanted)


def test_every_activation_is_in_a_pool():
    """They are in one place for both families, so that not each has all."""
    assert {value for options in OPTIONS.values() for value in options["activation"]} == set(ACTIVATIONS)


@pytest.mark.parametrize("config", networks(lambda number: number % 2 == 1))
def test_every_leaf_has_a_role_and_the_stream_has_the_right_width(config):
    check_roles(config)


# Of each network one of the next three tests is quick, and all are in the long ones.
@pytest.mark.parametrize("config", networks(lambda number: number % 6 in (1, 3, 4)))
def test_all_six_directions_in_float64(config):
    check_round(config, random_params(config, 1), 1e-10)


@pytest.mark.parametrize("config", networks(lambda number: number % 6 == 0))
def test_in_training_too_with_the_same_dropout_masks(config):
    check_in_training(config, random_params(config, 1), 1e-10)


@pytest.mark.parametrize(
    ("start", "config"),
    [
        *networks(lambda number: number % 6 == 2, "rmsnorm"),
        *networks(lambda number: number % 6 == 5, "crmsnorm"),
    ],
)
def test_from_networks_born_as_a_variant(start, config):
    check_born_as(start, config)


@pytest.mark.parametrize("config", networks(lambda number: number == 6))
def test_converts_layer_stacked_trees_by_the_same_rule(config):
    check_stacked(config)


@pytest.mark.wide
@given(config=st.one_of(gpt_configs(), vit_configs()), start=st.sampled_from(NORMS[1:]))
@settings(max_examples=200, derandomize=False)
def test_any_network(config, start):
    check_roles(config)
    check_round(config, random_params(config, 3, embedding_mean=1.0), 1e-10)
    check_in_training(config, random_params(config, 3), 1e-10)
    check_born_as(start, config)
    check_stacked(config)


@pytest.mark.slow
def test_post_ln_without_affine_converts():
    config = tiny(post_norm=True, norm_affine=False, embed_norm=True, tie_embeddings=False)
    check_round(config, random_params(config, 1), 1e-10)
    config = tiny(post_norm=True, norm_affine=False, embed_norm=True, final_norm=False)
    check_round(config, random_params(config, 1), 1e-10)


@pytest.mark.slow
@pytest.mark.xdist_group("float32")
@pytest.mark.parametrize("embedding_mean", [0.0, 100.0])
@pytest.mark.parametrize(("d_model", "tie_embeddings"), [(65, True), (65, False), (384, False)])
def test_float32_errs_no_more_than_twice_as_much_as_pre_ln(tie_embeddings, embedding_mean, d_model):
    """Error: root mean square over the logits of a model, against the float64 Pre-LN network."""
    changes = {"d_model": d_model, "head_dim": 16, "tie_embeddings": tie_embeddings, "max_len": 16, "vocab_size": 101}
    single = tiny(dtype="float32", param_dtype="float32", **changes)
    double = tiny(**changes)
    for seed in range(3):
        squares = dict.fromkeys(NORMS, 0.0)
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), random_params(double, seed, embedding_mean))
        tokens = random_inputs(double, seed)
        exact = logits(double, jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), tokens)
        for norm in NORMS:
            config, tree = single, params
            if norm != "layernorm":
                config, tree = convert_config(single, norm), convert_params(params, single, norm)
            assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(tree))
            squares[norm] = np.square(logits(config, tree, tokens) - exact).mean()
        for norm in ("rmsnorm", "crmsnorm"):
            assert squares[norm] ** 0.5 <= 2 * squares["layernorm"] ** 0.5, (seed, squares)


def test_jits_and_differentiates_like_the_host_conversion():
    config = tiny(dropout=0.1, tie_embeddings=False)
    params = random_params(config, 1)
    for to in ("rmsnorm", "crmsnorm"):

        @jax.jit
        def traced(params, to=to):
            converted, pull_back = jax.vjp(lambda params: convert_params(params, config, to), params)
            return converted, *pull_back(jax.tree.map(jnp.ones_like, converted))

        converted, grads = traced(params)
        expected = convert_params(params, config, to)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11), converted, expected)
        assert jax.tree.structure(grads) == jax.tree.structure(params)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": False, "use_bias": False}])
def test_keeps_what_it_was_given(changes):
    config = base_config().model
    config.update({"depth": 1, "d_model": 8, "heads": 2, "vocab_size": 5} | changes)
    params = random_params(model_config(config), 0)
    before = jax.tree.map(np.array, params)
    config_before = config.to_dict()
    crms_config = convert_config(config, to="crmsnorm")
    assert type(crms_config) is type(config)
    assert config.to_dict() == config_before
    converted = convert_params(params, config, to="crmsnorm")
    jax.tree.map(np.testing.assert_array_equal, params, before)
    assert config.to_dict() == config_before
    assert {path: leaf.shape for path, leaf in flatten_dict(converted).items()} == shapes(model_config(crms_config))
    assert isinstance(convert_config(config.to_dict(), to="rmsnorm")["norm"], str)
    # NumPy trees (as a checkpoint reader gives) stay NumPy.
    numpy_tree = convert_params(before, config, to="crmsnorm")
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(numpy_tree))
    jax.tree.map(np.testing.assert_array_equal, numpy_tree, converted)


@pytest.mark.parametrize("qk_norm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_converts_sharded_arrays_where_they_lie(qk_norm):
    """Along axes that are not the stream's: each device converts what it holds, and what comes out lies likewise."""
    shape = {"d_model": 24, "heads": 8, "head_dim": 4, "mlp_dim": 64, "vocab_size": 64, "max_len": 16}
    config = tiny(**shape, tie_embeddings=False, qk_norm=qk_norm)
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    divided = {"vocab", "heads", "kv_heads", "normed_heads", "normed_kv_heads", "mlp", "position"}

    def shardings(config: ModelConfig) -> dict:
        return {
            path: NamedSharding(mesh, PartitionSpec(*("devices" if name in divided else None for name in leaf.names)))
            for path, leaf in abstract_params(config).items()
        }

    params = random_params(config, 1)
    placed = jax.device_put(params, unflatten_dict(shardings(config)))
    for to in ROUND[:3]:
        program = (
            jax.jit(lambda params, config=config, to=to: convert_params(params, config, to)).lower(placed).compile()
        )
        for line in program.as_text().splitlines():
            if "all-gather" in line or "all-to-all" in line or "collective-permute" in line:
                sizes = re.findall(r"f64\[([\d,]+)\]", line)
                assert all(np.prod([int(n) for n in size.split(",")]) <= shape["mlp_dim"] for size in sizes), line
        (params, config), placed = convert(params, config, to), program(placed)
        flat, expected = flatten_dict(placed), flatten_dict(params)
        for path, sharding in shardings(config).items():
            assert flat[path].sharding.is_equivalent_to(sharding, flat[path].ndim), (path, flat[path].sharding)
            np.testing.assert_allclose(flat[path], expected[path], rtol=1e-12, atol=1e-12)


# --- Negative controls: the rules that look right and are wrong must not pass for right. ---


def wrongly(config: ModelConfig, params: dict, changes: dict, edit=lambda flat: flat) -> float:
    """Relative error of an rmsnorm network with `changes` in its config and `edit` on its converted leaves."""
    rms = convert_config(config, "rmsnorm")
    flat = flatten_dict(convert_params(params, config, "rmsnorm"))
    wrong = changed(rms, **changes)
    tokens = random_inputs(config)
    actual = logits(wrong, unflatten_dict(edit(flat)), tokens)
    return relative(actual, logits(config, params, tokens))


def test_a_swap_of_the_norm_without_recentring_is_another_function():
    config = tiny(norm_affine=False, tie_embeddings=False)
    params, tokens = random_params(config, 1, embedding_mean=1.0), random_inputs(config)
    swapped = changed(config, norm="rmsnorm")
    assert relative(logits(swapped, params, tokens), logits(config, params, tokens)) > 0.1


def test_centring_a_tied_table_changes_the_logits():
    config = tiny(tie_embeddings=True)
    params = random_params(config, 1, embedding_mean=1.0)
    table = ("token_embedding",)
    assert wrongly(config, params, {}) < 1e-10
    assert wrongly(config, params, {}, lambda flat: flat | {table: center(flat[table])}) > 0.1


def test_centring_the_weights_before_dropout_is_another_function():
    config = tiny(branch_dropout=0.5)
    params, tokens, key = random_params(config, 1), random_inputs(config), jax.random.key(1)
    rms, converted = convert_config(config, "rmsnorm"), flatten_dict(convert_params(params, config, "rmsnorm"))
    expected = logits(config, params, tokens, train=True, rngs={"dropout": key})
    actual = logits(rms, unflatten_dict(converted), tokens, train=True, rngs={"dropout": key})
    assert relative(actual, expected) < 1e-10
    for path in converted:
        if path[-1] == "kernel" and path[-2] in ("out", "down"):
            converted[path] = center(converted[path])
    actual = logits(rms, unflatten_dict(converted), tokens, train=True, rngs={"dropout": key})
    assert relative(actual, expected) > 1e-2


def test_another_epsilon_is_another_function():
    config = tiny(epsilon=1e-3, tie_embeddings=False)
    params = random_params(config, 1, embedding_mean=0.0)
    assert wrongly(config, params, {"epsilon": 1e-5}) > 1e-6


# --- What does not convert says so. ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final_norm": False}, "model.final_norm=False: the head reads the raw stream"),
        ({"post_norm": True}, "model.post_norm=True with model.norm_affine=True"),
        ({"post_norm": True, "norm_affine": False}, "block_0/attention reads the raw embedding"),
        (
            {"post_norm": True, "norm_affine": False, "embed_norm": True, "embed_dropout": 0.1},
            "model.embed_dropout=0",
        ),
    ],
)
def test_networks_without_an_equivalent_are_refused(changes, message):
    config = tiny(**changes)
    for action in (
        lambda: convert_config(config, "rmsnorm"),
        lambda: convert_params(random_params(config, 0), config, "rmsnorm"),
    ):
        with pytest.raises(PrenormError) as error:
            action()
        assert message in str(error.value)


@pytest.mark.parametrize("norm", NORMS)
def test_to_the_norm_it_has_or_to_none(norm):
    config = tiny(norm=norm)
    with pytest.raises(PrenormError, match=f"is {norm} already"):
        convert_params(random_params(config, 0), config, norm)
    with pytest.raises(PrenormError, match="unknown norm 'batchnorm'"):
        convert_config(config, "batchnorm")


@pytest.mark.parametrize("to", ["layernorm", "crmsnorm"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_an_rmsnorm_tree_that_is_not_zero_mean_is_refused(to, dtype):
    pre_ln = tiny(param_dtype=dtype, d_model=64)
    fine = convert_params(jax.device_get(random_params(pre_ln, 0)), pre_ln, "rmsnorm")
    config = convert_config(pre_ln, "rmsnorm")
    convert_params(fine, config, to)
    kernel = fine["block_1"]["mlp"]["down"]["kernel"]
    # By twice the rounding of its dtype, which is far less than what is random in it.
    shift = 2 * float(jnp.finfo(dtype).eps) * np.abs(kernel.astype(float)).mean()
    fine["block_1"]["mlp"]["down"]["kernel"] = (kernel.astype(float) + shift).astype(dtype)
    with pytest.raises(PrenormError, match="block_1/mlp/down/kernel is not zero-mean along the stream"):
        convert_params(fine, config, to)
    fine["block_1"]["mlp"]["down"]["kernel"] = kernel * np.nan
    with pytest.raises(PrenormError, match="block_1/mlp/down/kernel has entries that are not finite"):
        convert_params(fine, config, to)


def test_trees_that_are_not_the_models_are_refused():
    config = tiny()
    params = random_params(config, 0)
    with pytest.raises(PrenormError, match="unknown leaf extra/kernel; missing leaf head_affine/bias"):
        broken = {k: v for k, v in params.items() if k != "head_affine"} | {"extra": {"kernel": jnp.ones(3)}}
        convert_params(broken, config, "rmsnorm")
    with pytest.raises(PrenormError, match=r"token_embedding has shape \(12, 11\), not \(11, 12\)"):
        convert_params(params | {"token_embedding": params["token_embedding"].T}, config, "rmsnorm")
    with pytest.raises(PrenormError, match="whole train state: pass its 'params' entry"):
        convert_params({"params": params, "step": jnp.zeros(())}, config, "rmsnorm")
    with pytest.raises(PrenormError, match=r"and \d+ more"):
        convert_params({}, config, "rmsnorm")


@pytest.mark.parametrize("scale", [1.0, 1e-5, 3e-7])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_mean_is_zero_to_the_spacing_of_its_dtype_whatever_its_size_or_order(dtype, scale):
    """Subnormal float16 numbers are rounded absolutely; and the check's own sum must not round more than they."""
    pre_ln = tiny(param_dtype=dtype, d_model=64, layer_scale=None)
    params = jax.tree.map(lambda x: np.asarray(x * scale, dtype), jax.device_get(random_params(pre_ln, 0)))
    config, rms = convert_config(pre_ln, "rmsnorm"), convert_params(params, pre_ln, "rmsnorm")
    rms = jax.tree.map(np.asfortranarray, rms)
    convert_params(rms, config, "crmsnorm")
    kernel = rms["block_1"]["mlp"]["down"]["kernel"]
    gaps = np.abs(np.nextafter(np.abs(kernel), np.asarray(np.inf, kernel.dtype)) - np.abs(kernel)).astype(float)
    rms["block_1"]["mlp"]["down"]["kernel"] = (kernel.astype(float) + 3 * gaps.mean(-1, keepdims=True)).astype(dtype)
    with pytest.raises(PrenormError, match=r"block_1/mlp/down/kernel is not zero-mean along the stream \(in row \d+"):
        convert_params(rms, config, "crmsnorm")


def test_a_sum_over_many_rows_in_another_order_is_no_mean():
    pre_ln = tiny(d_model=1024, mlp_dim=512, heads=2)
    rms = convert_params(jax.device_get(random_params(pre_ln, 0)), pre_ln, "rmsnorm")
    convert_params(jax.tree.map(np.asfortranarray, rms), convert_config(pre_ln, "rmsnorm"), "layernorm")


@pytest.mark.parametrize(("narrow", "wide"), [("bfloat16", "float32"), ("float32", "float64")])
def test_what_a_narrower_dtype_rounded_is_refused_and_the_reason_said(narrow, wide):
    pre_ln = tiny(param_dtype=wide, d_model=64)
    rms = convert_params(jax.device_get(random_params(pre_ln, 0)), pre_ln, "rmsnorm")
    config, rounded = convert_config(pre_ln, "rmsnorm"), jax.tree.map(lambda x: x.astype(narrow), rms)
    convert_params(rounded, config, "crmsnorm")
    with pytest.raises(PrenormError, match=f"it is off by the rounding of {narrow}, to which its entries are rounded"):
        convert_params(jax.tree.map(lambda x: x.astype(wide), rounded), config, "crmsnorm")


@pytest.mark.parametrize("dtype", ["int8", "int32", "bool", "complex64", "object"])
def test_leaves_that_are_no_real_numbers_of_floating_point_are_refused(dtype):
    config, params = tiny(), jax.device_get(random_params(tiny(), 0))
    message = rf"block_0/mlp/up/kernel has dtype {dtype}, which is none of real"
    params["block_0"]["mlp"]["up"]["kernel"] = params["block_0"]["mlp"]["up"]["kernel"].astype(dtype)
    with pytest.raises(PrenormError, match=message):
        convert_params(params, config, "rmsnorm")
    if dtype != "object":
        with pytest.raises(PrenormError, match=message):
            jax.jit(lambda params: convert_params(params, config, "rmsnorm"))(params)


@pytest.mark.parametrize("leaf", [None, [1.0, 2.0], 3.0, "x"])
def test_leaves_that_are_no_arrays_are_refused(leaf):
    params = jax.device_get(random_params(tiny(), 0))
    params["block_0"]["mlp"]["up"]["kernel"] = leaf
    with pytest.raises(PrenormError, match="block_0/mlp/up/kernel is no NumPy or JAX array but of type builtins"):
        convert_params(params, tiny(), "rmsnorm")


def test_float8_converts_under_jit_as_on_the_host():
    pre_ln = tiny(d_model=64)
    params = jax.tree.map(lambda x: x.astype("float8_e4m3fn"), jax.device_get(random_params(pre_ln, 0)))
    host = convert_params(params, pre_ln, "crmsnorm")
    jitted = jax.jit(lambda params: convert_params(params, pre_ln, "crmsnorm"))(params)
    for path, leaf in flatten_dict(host).items():  # from float64 and from float32: an entry may round the other way
        other = flatten_dict(jitted)[path]
        assert other.dtype == leaf.dtype == jnp.float8_e4m3fn
        assert (np.asarray(other) == leaf).mean() > 0.99


def test_arrays_over_an_explicit_mesh_convert_or_are_refused_by_name():
    config, params = tiny(), random_params(tiny(), 0)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    explicit = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec())), params)
    expected = convert_params(params, config, "crmsnorm")
    jax.tree.map(np.testing.assert_array_equal, convert_params(explicit, config, "crmsnorm"), expected)
    with pytest.raises(PrenormError, match="is traced over a mesh of Explicit axes: convert outside of jit"):
        jax.jit(lambda params: convert_params(params, config, "crmsnorm"))(explicit)
