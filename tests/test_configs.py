"""The files in configs/: that they are valid, and that what their docstrings say was run does run."""

import importlib
from pathlib import Path

import jax
import numpy as np
import pytest

from prenorm_jax.model_config import NORMS
from prenorm_jax.sharding import make_mesh
from prenorm_jax.step import count, init_state, make_train_step, run_models
from prenorm_jax.stream import abstract_params
from prenorm_jax.workdir import config_differences, literal_config

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))


def get_config(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("parameterization", ["pre_ln", "native"])
def test_configs_are_valid_and_their_stored_form_means_the_same(name, norm, parameterization):
    config = get_config(name)
    config.model.norm, config.parameterization = norm, parameterization
    config.stop_at = 7
    stored = literal_config(config)
    assert (config.stop_at, stored.stop_at) == (7, None), "a copy must not share keys with its source"
    assert run_models(stored) == run_models(config)
    assert config_differences(stored, literal_config(stored)) == []


def test_gpt2_has_the_size_it_is_known_by():
    trained = run_models(get_config("gpt2_wikitext103")).trained
    assert sum(leaf.value.size for leaf in abstract_params(trained).values()) == 124_439_808


def test_the_imagenet_config_takes_a_size():
    module = importlib.import_module("configs.vit_s16_imagenet")
    assert module.get_config().model.d_model == 384
    large = module.get_config("L/16").model
    assert (large.d_model, large.depth, large.patch_size) == (1024, 24, 16)


@pytest.mark.slow
def test_the_imagenet_vit_takes_the_same_step_under_each_norm():
    losses = []
    for norm in NORMS:
        config = get_config("vit_s16_imagenet")
        config.model.norm, config.batch_size = norm, 2
        models, mesh = run_models(config), make_mesh(config, jax.devices()[:1])
        state = jax.jit(lambda config=config, models=models: init_state(config, models))()
        assert count(state.params) == 22_050_664 - 384 + 24 * 384  # DeiT-S, less one position, with LayerScale
        images = np.random.default_rng(0).integers(256, size=(2, 256, 256, 3), dtype=np.uint8)
        batch = {"images": images, "labels": np.array([3, 7], np.int32), "weights": np.ones(2, np.float32)}
        train_step = make_train_step(config, models, mesh)
        for _ in range(2):
            state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)


@pytest.mark.slow
def test_gpt2_takes_the_same_step_under_each_norm():
    losses, sizes = [], []
    for norm in NORMS:
        config = get_config("gpt2_wikitext103")
        config.model.norm, config.batch_size = norm, 1
        models, mesh = run_models(config), make_mesh(config, jax.devices()[:1])
        state = jax.jit(lambda config=config, models=models: init_state(config, models))()
        sizes.append(count(state.params))
        tokens = np.random.default_rng(0).integers(50257, size=(1, 65)).astype(np.int32)
        batch = {"tokens": tokens, "weights": np.ones((1, 64), np.float32)}
        train_step = make_train_step(config, models, mesh)
        for _ in range(2):
            state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    assert sizes == [124_439_808] * 3
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
