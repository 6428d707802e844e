"""Every mesh, layout of the blocks, rematerialisation and accumulation gives the loss curve of one device."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest
from common import tiny
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.config import base_config
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import NORMS, ModelConfig
from prenorm_jax.models.placement import partition_spec
from prenorm_jax.models.registry import build_model, model_config
from prenorm_jax.models.stacking import stack_blocks, unstack_blocks
from prenorm_jax.train.sharding import check_sharding, make_mesh, sharding_table, tree_sharding
from prenorm_jax.train.step import init_params, init_state, make_train_step, run_models, state_sharding

STEPS = 20
# (data, fsdp, tensor) with a product of 1, 2, 4 or 8.
MESHES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) in (1, 2, 4, 8)]
LAYOUTS = list(itertools.product((False, True), (1, 2), ("none", "full"), ("float64", "float32")))
MODEL = {"depth": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp_dim": 32}
FAMILIES = {
    "gpt": {"vocab_size": 16, "max_len": 8},
    "vit": {"image_size": 6, "patch_size": 2, "channels": 2, "classes": 8, "qk_norm": True, "gated_mlp": True},
}


def run_config(family: str, norm: str, dtype: str) -> ConfigDict:
    config = base_config(family)
    config.steps, config.batch_size = 2 * STEPS, 16
    config.parameterization = "native" if family == "vit" else "pre_ln"
    config.model.update(MODEL | FAMILIES[family] | {"norm": norm, "dtype": dtype, "param_dtype": dtype})
    config.optimizer.warmup_steps = 2
    if family == "vit":
        # Calm: at twice the rate the gradient's norm passes 39 under crmsnorm, which turns the parameters' rounding in
        # float32 (3e-7) into 1e-5 of loss.
        config.optimizer.learning_rate = 5e-4
        config.augment.update({"shift": 1, "mixup": 0.1})
    return config


def batch_of(step: int, config: ConfigDict) -> dict[str, np.ndarray]:
    """Tokens that follow from the one before, with unequal weights; or images whose brightness is their class."""
    rng, size = np.random.default_rng(step), config.batch_size
    if config.model.family == "vit":
        labels_B = rng.integers(8, size=size)
        images = rng.integers(30, size=(size, 6, 6, 2)) + 25 * labels_B[:, None, None, None]
        batch = {"images": images.astype(np.uint8), "labels": labels_B.astype(np.int32)}
        return batch | {"weights": rng.integers(1, 4, size=size).astype(np.float32)}
    tokens_BxT = (rng.integers(16, size=(size, 1)) + np.arange(9)) % 16
    return {"tokens": tokens_BxT.astype(np.int32), "weights": rng.integers(1, 4, size=(size, 8)).astype(np.float32)}


def train(config: ConfigDict, devices: int) -> np.ndarray:
    models, mesh = run_models(config), make_mesh(config, jax.devices()[:devices])
    assert mesh.size == devices
    trained = dataclasses.replace(models.trained, remat="none")
    state = first_state(config.model.family, trained, models.computed.norm)
    state = jax.device_put(state, state_sharding(config, models, mesh))
    step, losses = make_train_step(config, models, mesh), []
    for i in range(STEPS):
        state, metrics = step(state, batch_of(i, config))
        losses.append(metrics["loss"])
    return np.array(jax.device_get(losses), np.float64)


@functools.lru_cache
def first_state(family: str, trained: ModelConfig, norm: str) -> Any:
    """The state at step 0, on the host: how it is split when it is made is tested below."""
    config = run_config(family, norm, trained.dtype)
    config.model.scan = trained.scan
    return jax.device_get(jax.jit(lambda: init_state(config, run_models(config)))())


@functools.lru_cache
def single_device(family: str, norm: str, dtype: str) -> np.ndarray:
    losses = train(run_config(family, norm, dtype), devices=1)
    assert losses[-1] < losses[0] - 0.1, "this run learns nothing, so it would show nothing"
    return losses


def check_same_curve(family, norm, shape, layout):
    scan, accumulate, remat, dtype = layout
    config = run_config(family, norm, dtype)
    config.mesh.fsdp, config.mesh.tensor = shape[1:]
    config.accumulate = accumulate
    config.model.update({"scan": scan, "remat": remat})
    difference = np.abs(train(config, int(np.prod(shape))) - single_device(family, norm, dtype)).max()
    assert difference < (1e-10 if dtype == "float64" else 1e-5), difference


@pytest.mark.parametrize(
    ("family", "norm", "shape", "layout"),
    [
        ("gpt", "crmsnorm", (2, 2, 2), (True, 2, "full", "float64")),
        ("vit", "rmsnorm", (1, 4, 2), (False, 1, "dots", "float32")),
    ],
)
def test_some_meshes(family, norm, shape, layout):
    check_same_curve(family, norm, shape, layout)


@pytest.mark.parametrize(
    ("family", "norm", "shape", "layout"),
    [
        ("gpt", "rmsnorm", (2, 2, 2), (True, 2, "none", "float64")),
        pytest.param("vit", "crmsnorm", (1, 2, 4), (False, 1, "dots", "float64"), marks=pytest.mark.slow),
    ],
)
def test_on_tpus_layouts_are_asked_for_and_no_number_changes(family, norm, shape, layout, monkeypatch):
    single_device(family, norm, "float64")  # as elsewhere
    monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda: "tpu")
    check_same_curve(family, norm, shape, layout)


def turns() -> Iterator[tuple[str, str, int, int]]:
    """Every mesh with every norm; families and layouts go round.

    So each family meets each mesh and each layout, each norm each layout, and each of the layouts' four choices each
    family and norm together.
    """
    for number, norm in itertools.product(range(len(MESHES)), NORMS):
        turn = NORMS.index(norm)
        family = list(FAMILIES)[(number // 3 + turn) % 2]
        yield family, norm, number, (number + 5 * turn) % len(LAYOUTS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "norm", "number", "layout"),
    [pytest.param(*case, marks=pytest.mark.xdist_group("-".join(case[:2]))) for case in turns()],
)
def test_every_mesh(family, norm, number, layout):
    check_same_curve(family, norm, MESHES[number], LAYOUTS[layout])


def test_there_are_eight_devices_and_all_mesh_shapes():
    """Without the devices the tests above would say less than they seem to."""
    assert jax.device_count() == 8 and len(MESHES) == 20


def test_state_is_split_along_all_axes_but_the_streams():
    config = run_config("gpt", "crmsnorm", "float64")
    config.mesh.fsdp, config.mesh.tensor, config.model.scan, config.parameterization = 2, 4, True, "native"
    models, mesh = run_models(config), make_mesh(config)
    sharding = state_sharding(config, models, mesh)
    state = jax.jit(lambda: init_state(config, models), out_shardings=sharding)()
    mu = state.opt_state[1][0].mu
    for tree in (state.params, mu):
        kernel = tree["blocks"]["mlp"]["up"]["kernel"]  # (depth, d-1, 32)
        assert kernel.addressable_shards[0].data.shape == (2, 15, 4)
        assert tree["blocks"]["mlp"]["down"]["kernel"].addressable_shards[0].data.shape == (2, 4, 15)
        assert tree["token_embedding"].addressable_shards[0].data.shape == (2, 16)  # tied: raw, d wide
    table = sharding_table(models.trained, mesh)
    assert "blocks/mlp/up/kernel" in table and "-, -, tensor+fsdp" in table
    # After a step it still is.
    state, _ = make_train_step(config, models, mesh)(state, batch_of(0, config))
    assert state.params["blocks"]["mlp"]["up"]["kernel"].addressable_shards[0].data.shape == (2, 15, 4)


def test_bad_meshes_are_refused():
    config = run_config("gpt", "rmsnorm", "float64")
    config.mesh.fsdp = 3
    with pytest.raises(PrenormError, match=r"mesh\.fsdp=3 times mesh.tensor=1 does not divide the 8 devices"):
        make_mesh(config)
    config.mesh.fsdp, config.accumulate = 2, 4
    with pytest.raises(PrenormError, match="batch_size=16 is not a multiple of the 8 groups of devices times accum"):
        make_mesh(config)
    config.accumulate, config.model.vocab_size = 1, 17
    model, mesh = run_models(config).trained, make_mesh(config)
    check_sharding(model, mesh, largest=17 * 16)
    with pytest.raises(PrenormError, match=r"every device would hold 272 numbers of token_embedding \(17, 16\)"):
        check_sharding(model, mesh, largest=17 * 16 - 1)
    # Split by one axis of two is not split enough.
    config.model.vocab_size, config.mesh.tensor = 18, 4
    model, mesh = run_models(config).trained, make_mesh(config)
    assert mesh.shape["fsdp"] == 2
    with pytest.raises(PrenormError, match=r"144 numbers of token_embedding \(18, 16\)"):
        check_sharding(model, mesh, largest=17 * 8)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "lamb", "muon"])
def test_moments_are_split_as_their_parameters_are(name):
    config = run_config("gpt", "rmsnorm", "float64")
    config.optimizer.name, config.mesh.fsdp = name, 8
    models, mesh = run_models(config), make_mesh(config)
    state = jax.eval_shape(lambda: init_state(config, models))
    sharding = tree_sharding(state.opt_state, models.trained, mesh)
    kernel = [
        (leaf.shape, place.shard_shape(leaf.shape))
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(state.opt_state), jax.tree.leaves(sharding), strict=True
        )
        if "'up'" in jax.tree_util.keystr(path) and leaf.shape == (16, 32)
    ]
    assert all(held == (16, 4) for _, held in kernel) and (kernel or name == "adafactor")  # which factors its moments


def test_axes_that_do_not_divide_are_not_split():
    config = run_config("gpt", "rmsnorm", "float64")
    config.mesh.fsdp, config.mesh.tensor = 2, 4
    mesh = make_mesh(config)
    assert partition_spec(("read", "mlp"), (15, 32), mesh, stored=True) == jax.P(None, ("tensor", "fsdp"))
    assert partition_spec(("read", "mlp"), (15, 32), mesh, stored=False) == jax.P(None, ("tensor",))
    assert partition_spec(("read", "mlp"), (15, 6), mesh, stored=True) == jax.P(None, ("fsdp",))


@pytest.mark.parametrize("norm", ["crmsnorm", *(pytest.param(n, marks=pytest.mark.slow) for n in NORMS[:2])])
def test_layouts_hold_the_same_numbers(norm):
    config = run_config("gpt", norm, "float64")
    params = init_params(config, run_models(config))
    config.model.scan = True
    stacked = init_params(config, run_models(config))
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(params), stacked)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), params)
    model = run_models(config).trained
    shapes = {path: leaf.value.shape for path, leaf in abstract_params(model).items()}
    assert shapes["blocks", "mlp", "up", "bias"] == (2, 32)
    tokens = build_model(model).example(2, seed=0)
    unrolled = build_model(dataclasses.replace(model, scan=False)).apply({"params": params}, tokens)
    np.testing.assert_allclose(build_model(model).apply({"params": stacked}, tokens), unrolled, atol=1e-13)


def test_scan_refuses_what_differs_by_block():
    with pytest.raises(PrenormError, match=r"model.scan=True makes all blocks one, but model.stochastic_depth"):
        tiny(scan=True, stochastic_depth=0.1)
    config = run_config("gpt", "rmsnorm", "float64")
    config.model.scan, config.optimizer.name = True, "lamb"
    with pytest.raises(PrenormError, match="stacks those of all blocks"):
        init_state(config, run_models(config))
    assert model_config(config.model).scan
