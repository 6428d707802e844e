"""Small models with random parameters of the awkward kind, for the tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import strategies as st

from prenorm_jax.model_config import ACTIVATIONS, GPTConfig, ModelConfig
from prenorm_jax.models import build_model

TINY = {
    "vocab_size": 11,
    "max_len": 7,
    "depth": 2,
    "d_model": 12,
    "heads": 2,
    "dtype": "float64",
    "param_dtype": "float64",
}


def tiny(**changes: Any) -> ModelConfig:
    """A float64 model that compiles in a second."""
    return ModelConfig.create(TINY | changes)


@st.composite
def model_configs(draw: st.DrawFn) -> ModelConfig:
    """Every option of a Pre-LN network that converts."""
    heads = draw(st.sampled_from([1, 2, 4]))
    dropout = st.sampled_from([0.0, 0.3])
    parallel = draw(st.booleans())
    return tiny(
        depth=draw(st.integers(1, 2)),
        d_model=draw(st.sampled_from([2, 5, 8, 13, 16])),
        heads=heads,
        kv_heads=draw(st.sampled_from([k for k in (1, 2, 4) if heads % k == 0])),
        head_dim=draw(st.sampled_from([2, 6])),
        mlp_dim=draw(st.sampled_from([1, 9])),
        gated_mlp=draw(st.booleans()),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        positions=draw(st.sampled_from(GPTConfig.choices["positions"])),
        parallel=parallel,
        shared_norm=parallel and draw(st.booleans()),
        embed_norm=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
        use_bias=draw(st.booleans()),
        reader_bias=draw(st.sampled_from([None, True, False])),
        head_bias=draw(st.booleans()),
        norm_affine=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
        final_norm_affine=draw(st.sampled_from([None, True, False])),
        kept_norm_affine=draw(st.sampled_from([None, True, False])),
        epsilon=draw(st.sampled_from([1e-12, 1e-6, 1e-5, 1e-3])),
        attention_dropout=draw(dropout),
        branch_dropout=draw(dropout),
        embed_dropout=draw(dropout),
    )


def random_params(config: ModelConfig, seed: int, embedding_mean: float = 100.0) -> dict[str, Any]:
    """Widely spread γ of both signs, β of size 1, kernels that keep activations of size 1, embeddings far off zero."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    flat = {}
    for path, leaf in flatten_dict(shapes).items():
        value = rng.normal(size=leaf.shape)
        if path[-1] == "scale":
            value = np.exp(value) * rng.choice([-1, 1], size=leaf.shape)
        elif path[-1].endswith("embedding"):
            value += embedding_mean
        elif path[-1] == "kernel":
            value /= leaf.shape[0] ** 0.5
        flat[path] = jnp.asarray(value, leaf.dtype)
    return unflatten_dict(flat)


def random_tokens(config: ModelConfig, seed: int = 0, batch: int = 2) -> np.ndarray:
    """(batch, max_len) int32."""
    return np.random.default_rng(seed).integers(config.vocab_size, size=(batch, config.max_len), dtype=np.int32)


def logits(config: ModelConfig, params: Any, tokens: np.ndarray, **kwargs: Any) -> np.ndarray:
    """Of the jitted model."""
    run = jax.jit(lambda params, tokens: build_model(config).apply({"params": params}, tokens, **kwargs))
    return np.asarray(run(params, tokens))


def relative(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest |difference| over the largest |expected|."""
    return float(np.abs(np.asarray(actual, np.float64) - expected).max() / np.abs(expected).max())
