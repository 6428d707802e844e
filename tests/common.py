"""Small models with random parameters of the awkward kind, for the tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from hypothesis import strategies as st

from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import ACTIVATIONS, ModelConfig
from prenorm_jax.models.gpt import GPTConfig
from prenorm_jax.models.registry import build_model, model_config
from prenorm_jax.models.vit import ViTConfig

TINY = {
    "vocab_size": 11,
    "max_len": 7,
    "depth": 2,
    "d_model": 12,
    "heads": 2,
    "dtype": "float64",
    "param_dtype": "float64",
}
TINY_VIT = {"family": "vit", "image_size": 6, "patch_size": 2, "channels": 2, "classes": 5}
TINY_VIT |= {key: TINY[key] for key in ("depth", "d_model", "heads", "dtype", "param_dtype")}


def tiny(**changes: Any) -> ModelConfig:
    """A float64 GPT that compiles in a second."""
    return model_config(TINY | changes)


def tiny_vit(**changes: Any) -> ModelConfig:
    """A float64 ViT of 9 patches."""
    return model_config(TINY_VIT | changes)


def transformer_options(draw: st.DrawFn) -> dict[str, Any]:
    """Every option that the families share, of a Pre-LN network that converts; but for d_model."""
    heads = draw(st.sampled_from([1, 2, 4]))
    dropout = st.sampled_from([0.0, 0.3])
    flag = st.sampled_from([None, True, False])
    parallel = draw(st.booleans())
    return {
        "depth": draw(st.integers(1, 2)),
        "heads": heads,
        "kv_heads": draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])),
        "head_dim": draw(st.sampled_from([2, 6])),
        "mlp_dim": draw(st.sampled_from([1, 9])),
        "gated_mlp": draw(st.booleans()),
        "activation": draw(st.sampled_from(ACTIVATIONS)),
        "parallel": parallel,
        "shared_norm": parallel and draw(st.booleans()),
        "embed_norm": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "layer_scale": draw(st.sampled_from([None, 0.1])),
        "use_bias": draw(st.booleans()),
        "reader_bias": draw(flag),
        "qkv_bias": draw(flag),
        "head_bias": draw(st.booleans()),
        "norm_affine": draw(st.booleans()),
        "norm_bias": draw(st.booleans()),
        "final_norm_affine": draw(flag),
        "kept_norm_affine": draw(flag),
        "epsilon": draw(st.sampled_from([1e-12, 1e-6, 1e-5, 1e-3])),
        "attention_dropout": draw(dropout),
        "branch_dropout": draw(dropout),
        "embed_dropout": draw(dropout),
        "stochastic_depth": draw(dropout),
        "stochastic_depth_schedule": draw(st.sampled_from(["linear", "constant"])),
    }


@st.composite
def gpt_configs(draw: st.DrawFn) -> ModelConfig:
    """Every option of a GPT that converts."""
    return tiny(
        **transformer_options(draw),
        d_model=draw(st.sampled_from([2, 5, 8, 13, 16])),
        positions=draw(st.sampled_from(GPTConfig.choices["positions"])),
        tie_embeddings=draw(st.booleans()),
    )


@st.composite
def vit_configs(draw: st.DrawFn) -> ModelConfig:
    """Every option of a ViT that converts."""
    positions = draw(st.sampled_from(ViTConfig.choices["positions"]))
    pooling = draw(st.sampled_from(ViTConfig.choices["pooling"]))
    return tiny_vit(
        **transformer_options(draw),
        d_model=draw(st.sampled_from([4, 8, 16] if positions == "sincos2d" else [2, 5, 8, 13, 16])),
        patch_size=draw(st.sampled_from([2, 3, 6])),
        patch_bias=draw(st.booleans()),
        positions=positions,
        class_token=pooling.startswith("class") or draw(st.booleans()),
        class_position=draw(st.booleans()),
        registers=draw(st.sampled_from([0, 2])),
        pooling=pooling,
        norm_after_pooling=pooling != "attention" and draw(st.booleans()),
    )


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


def logits(config: ModelConfig, params: Any, tokens: np.ndarray, **kwargs: Any) -> np.ndarray:
    """Of the jitted model."""
    run = jax.jit(lambda params, tokens: build_model(config).apply({"params": params}, tokens, **kwargs))
    return np.asarray(run(params, tokens))


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest |difference| over the largest |expected|."""
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())
