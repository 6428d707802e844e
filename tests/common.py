"""Small models with random parameters of the awkward kind, for the tests."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from hypothesis import strategies as st
from ml_collections import ConfigDict
from pool import OPTIONS, pool, possible

from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.registry import build_model, model_config
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import (
    init_params,
    init_state,
    make_eval_step,
    make_gradients,
    make_train_step,
    state_formats,
)

TINY = {
    "vocab_size": 11,
    "max_len": 7,
    "depth": 2,
    "d_model": 12,
    "heads": 2,
    "dtype": "float64",
    "param_dtype": "float64",
}
TINY_ENCODER = TINY | {"family": "encoder"}
TINY_VIT = {"family": "vit", "image_size": 6, "patch_size": 2, "channels": 2, "classes": 5}
TINY_VIT |= {key: TINY[key] for key in ("depth", "d_model", "heads", "dtype", "param_dtype")}


def tiny(**changes: Any) -> ModelConfig:
    """A float64 GPT that compiles in a second."""
    return model_config(TINY | changes)


def tiny_encoder(**changes: Any) -> ModelConfig:
    """A float64 text encoder: a masked language model."""
    return model_config(TINY_ENCODER | changes)


def tiny_vit(**changes: Any) -> ModelConfig:
    """A float64 ViT of 9 patches."""
    return model_config(TINY_VIT | changes)


def changed(config: ModelConfig, **changes: Any) -> ModelConfig:
    """The checked config with these options."""
    return model_config(vars(config) | changes)


MAKERS = {"gpt": tiny, "vit": tiny_vit}


def converting_configs(family: str) -> st.SearchStrategy[ModelConfig]:
    """Pre-LN networks of a family with any of the options in `pool.OPTIONS`."""

    @st.composite
    def configs(draw: st.DrawFn) -> ModelConfig:
        options: dict[str, Any] = {}
        for name, values in OPTIONS[family].items():
            options[name] = draw(st.sampled_from([value for value in values if possible(options | {name: value})]))
        return MAKERS[family](**options)

    return configs()


gpt_configs, vit_configs = (functools.partial(converting_configs, family) for family in OPTIONS)


def pooled(family: str) -> list[Any]:
    """The configs of the family's pool as parameters of a test; one worker has all tests of each."""
    networks = {f"{family}{number}": MAKERS[family](**options) for number, options in enumerate(pool(family))}
    return [pytest.param(config, id=name, marks=pytest.mark.xdist_group(name)) for name, config in networks.items()]


def random_params(config: ModelConfig, seed: int, embedding_mean: float = 100.0) -> dict[str, Any]:
    """Widely spread γ and λ of both signs, β of size 1, kernels that keep activations of size 1, embeddings far off
    zero."""
    rng = np.random.default_rng(seed)
    flat = {}
    for path, abstract in abstract_params(config).items():
        leaf = abstract.value
        value = rng.normal(size=leaf.shape)
        if path[-1].endswith("scale"):
            value = np.exp(value) * rng.choice([-1, 1], size=leaf.shape)
        elif path[-1] == "kernel":
            value /= np.prod(leaf.shape[:-1]) ** 0.5
        elif (len(path) == 1 and leaf.ndim == 2) or path == ("patch_embedding", "bias"):  # tables of all kinds
            value += embedding_mean
        flat[path] = jnp.asarray(value, leaf.dtype)
    return unflatten_dict(flat)


def random_inputs(config: ModelConfig, seed: int = 0, batch: int = 2) -> np.ndarray:
    """(batch, max_len) int32 tokens, or images."""
    return build_model(config).example(batch, seed)


def logits(
    config: ModelConfig, params: Any, inputs: np.ndarray, train: bool = False, rngs: dict | None = None
) -> np.ndarray:
    """Of the jitted model, which is compiled once in a process (so not for tests that change what it is traced to)."""
    return np.asarray(_apply(config, train)(params, inputs, rngs))


@functools.lru_cache(maxsize=128)  # not all: a search through many networks would keep every program
def _apply(config: ModelConfig, train: bool) -> Callable[..., jax.Array]:
    model = build_model(config)
    return jax.jit(lambda params, inputs, rngs: model.apply({"params": params}, inputs, train=train, rngs=rngs))


class Programs(Run):
    """A run, and what is made of it."""

    def init_params(self) -> Any:
        return init_params(self)

    def init_state(self) -> Any:
        return init_state(self)

    def state_formats(self) -> Any:
        return state_formats(self)

    def gradients(self) -> Callable:
        return make_gradients(self)

    def train_step(self) -> Callable:
        return make_train_step(self)

    def eval_step(self) -> Callable:
        return make_eval_step(self)


def run_of(config: ConfigDict, devices: int = 1) -> Programs:
    """What the config says, on so many of the devices."""
    return Programs.create(config, make_mesh(config, jax.devices()[:devices]))


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest |difference| over the largest |expected|."""
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())
