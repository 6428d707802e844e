"""The files in configs/: that they are valid, and that what their docstrings say was run does run."""

import importlib
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import error_of

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.trees import count
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import NORMS
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import init_state, make_train_step
from prenorm_jax.train.workdir import config_differences, literal_config

CONFIGS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py"))
CONFIGS.remove("finetune")  # which takes a run: tests/test_interop_text.py


def get_config(name: str):
    return importlib.import_module(f"configs.{name}").get_config()


def models_of(config) -> tuple:
    run = Run.create(config)
    return run.trained, run.computed


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("parameterization", ["pre_ln", "native"])
def test_configs_are_valid_and_their_stored_form_means_the_same(name, norm, parameterization):
    config = get_config(name)
    config.model.norm, config.parameterization = norm, parameterization
    config.stop_at = 7
    stored = literal_config(config)
    assert (config.stop_at, stored.stop_at) == (7, None), "a copy must not share keys with its source"
    assert models_of(stored) == models_of(config)
    assert config_differences(stored, literal_config(stored)) == []


def test_gpt2_has_the_size_it_is_known_by():
    trained = Run.create(get_config("gpt2_wikitext103")).trained
    assert sum(leaf.value.size for leaf in abstract_params(trained).values()) == 124_439_808


def test_the_imagenet_config_takes_a_size():
    module = importlib.import_module("configs.vit_s16_imagenet")
    assert module.get_config().model.d_model == 384
    large = module.get_config("L/16").model
    assert (large.d_model, large.depth, large.patch_size) == (1024, 24, 16)


def test_gpt3_has_the_settings_of_its_paper():
    """Of table 2.1 of arXiv 2005.14165, which gives batch sizes and counts rounded."""
    module = importlib.import_module("configs.gpt3")
    millions = {"Small": 0.5, "Medium": 0.5, "Large": 0.5, "XL": 1, "2.7B": 1, "6.7B": 2, "13B": 2, "175B": 3.2}
    rates = {"Small": 6e-4, "Medium": 3e-4, "Large": 2.5e-4, "XL": 2e-4, "2.7B": 1.6e-4}
    rates |= {"6.7B": 1.2e-4, "13B": 1e-4, "175B": 0.6e-4}
    for size, million in millions.items():
        config = module.get_config(size)
        tokens = config.batch_size * config.data.seq_len
        assert tokens == pytest.approx(1e6 * million, rel=0.06) and config.optimizer.learning_rate == rates[size]
        assert config.steps * tokens == pytest.approx(300e9, rel=1e-4)
        assert config.optimizer.warmup_steps * tokens == pytest.approx(375e6, rel=0.01)
        assert (config.model.max_len, config.data.seq_len, config.model.dtype) == (2048, 2048, "bfloat16")
    assert module.get_config().model.d_model == 768
    largest = get_config("gpt3_175b")
    assert largest.model.to_dict() == module.get_config("175B").model.to_dict()
    assert largest.batch_size % (largest.mesh.fsdp * largest.accumulate) == 0
    with pytest.raises(PrenormError, match=r"GPT-3 size='3B' is not one of Small, Medium"):
        module.get_config("3B")


def quick_and_wide(quick: dict, wide: dict) -> list:
    return [*quick.items(), *(pytest.param(*item, marks=pytest.mark.wide) for item in wide.items())]


GPT3 = {
    "Medium": 0.355,
    "Large": 0.76,
    "XL": 1.5,
    "2.7B": 2.65,
    "6.7B": 6.7,
    "13B": 13.0,
}  # XL: its heads are wider than d


@pytest.mark.parametrize(("size", "billions"), quick_and_wide({"Small": 0.125, "175B": 175.0}, GPT3))
def test_gpt3_has_the_sizes_it_is_known_by(size, billions):
    config = importlib.import_module("configs.gpt3").get_config(size)
    config.model.norm = "crmsnorm"
    shapes = {path: leaf.value.shape for path, leaf in abstract_params(Run.create(config).trained).items()}
    assert sum(map(math.prod, shapes.values())) == pytest.approx(1e9 * billions, rel=0.02)
    (vocabulary,) = [shape[0] for path, shape in shapes.items() if path[0] == "token_embedding"]
    assert vocabulary == 50304 and vocabulary % 128 == 0


VIT = {
    "Ti/16": 5.7,
    "L/16": 304,
    "H/14": 632,
    "g/14": 1012,
    "G/14": 1843,
    "22B/14": 22_210,
}  # 22B: its pooling included


@pytest.mark.parametrize(("size", "millions"), quick_and_wide({"S/16": 22, "B/16": 86.6}, VIT))
def test_vit_has_the_sizes_it_is_known_by(size, millions):
    config = importlib.import_module("configs.vit").get_config(size)
    leaves = abstract_params(Run.create(config).trained).values()
    assert sum(leaf.value.size for leaf in leaves) == pytest.approx(1e6 * millions, rel=0.02)


def test_vit_takes_a_size():
    get = importlib.import_module("configs.vit").get_config
    assert get().model.d_model == 384
    assert (get("B/16").optimizer.learning_rate, get("B/16").model.stochastic_depth) == (3e-3, 0.2)
    for size in ("Ti/16", "B/16", "22B/14"):
        assert get(size).model.dtype == "bfloat16" and (get(size).model.layer_scale is None) == (size == "22B/14")
    with pytest.raises(PrenormError, match="ViT size='XS'"):
        get("XS/16")


def test_an_unknown_size_is_one_line(tmp_path):
    message = error_of("train.py", "--config=configs/gpt3.py:3B", f"--workdir={tmp_path}")
    assert message.startswith("error: --config=configs/gpt3.py:3B: GPT-3 size='3B' is not one of Small, Medium")


def test_gpt2_on_a_streamed_corpus_takes_each_token_once():
    config = get_config("gpt2_fineweb")
    assert config.steps * config.batch_size * config.data.seq_len <= config.data.stream_tokens
    assert config.model.max_len == config.data.seq_len == 1024


def size_of(config) -> int:
    return count(jax.eval_shape(lambda: init_state(Run.create(config))).params)


def check_steps(config, batch: dict, size: int) -> None:
    """Two steps of the config's model under the first and the last norm, with one block: more take minutes to compile.

    With all of its blocks it has `size` parameters, under each norm.
    """
    assert config.parameterization == "pre_ln"  # so that all norms start from the same state
    for norm in NORMS:
        config.model.norm = norm
        assert size_of(config) == size
    config.model.depth, losses = 1, []
    start = jax.device_get(jax.jit(lambda: init_state(Run.create(config)))())
    for norm in NORMS[::2]:
        config.model.norm = norm
        run = Run.create(config, make_mesh(config, jax.devices()[:1]))
        state, train_step = start, make_train_step(run)
        for _ in range(2):
            state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    assert np.isfinite(losses).all()


@pytest.mark.wide  # most of a minute, and the ViTs of other tests take the same steps
def test_the_imagenet_vit_takes_the_same_step_under_each_norm():
    config = get_config("vit_s16_imagenet")
    config.batch_size = 2
    images = np.random.default_rng(0).integers(256, size=(2, 256, 256, 3), dtype=np.uint8)
    batch = {"images": images, "labels": np.array([3, 7], np.int32), "weights": np.ones(2, np.float32)}
    check_steps(config, batch, 22_050_664 - 384 + 24 * 384)  # DeiT-S, less one position, with LayerScale


@pytest.mark.wide  # half a minute, and the GPTs of other tests take the same steps
def test_gpt2_takes_the_same_step_under_each_norm():
    config = get_config("gpt2_wikitext103")
    config.batch_size = 1
    tokens = np.random.default_rng(0).integers(50257, size=(1, 65)).astype(np.int32)
    check_steps(config, {"tokens": tokens, "weights": np.ones((1, 64), np.float32)}, 124_439_808)
