"""Gradients in two bytes: those of the variants are as near to float64's as Pre-LN's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import run_of
from flax.traverse_util import flatten_dict, unflatten_dict

from prenorm_jax.config import base_config
from prenorm_jax.models.config import NORMS
from prenorm_jax.train.step import init_state, make_gradients


def configured(family: str, norm: str, dtype: str, **changes: object):
    """A run of some 4,000 tokens a batch, and Pre-LN parameters in param_dtype float32 (or float64)."""
    config = base_config(family)
    wide = "float64" if dtype == "float64" else "float32"
    config.model.update({"depth": 2, "d_model": 64, "heads": 2, "norm": norm, "dtype": dtype, "param_dtype": wide})
    config.batch_size = 16
    if family == "gpt":
        config.data.seq_len = config.model.max_len = 256
        config.model.update({"tie_embeddings": False, "vocab_size": 257})
    else:
        config.batch_size = 64
        config.model.update({"image_size": 32, "patch_size": 4, "layer_scale": 0.5, "registers": 2})
    for key, value in changes.items():
        (config.model if key in config.model else config)[key] = value
    return run_of(config)


def outliers(params: dict) -> dict:
    """A few channels of the stream 60 times the others, with a small γ there; β everywhere."""
    rng, flat = np.random.default_rng(0), flatten_dict(jax.device_get(params))
    few = np.array([3, 17, 40, 63])
    for path, leaf in flat.items():
        leaf = np.array(leaf, np.float64)
        if path[-2:-1] and path[-2].endswith("norm"):
            leaf = rng.normal(1, 0.1, leaf.shape) if path[-1] == "scale" else rng.normal(0, 0.5, leaf.shape)
            if path[-1] == "scale":
                leaf[..., few] = 0.03
        elif (path[-1] == "kernel" and path[-2] in ("out", "down", "patch_embedding")) or path[-1].endswith(
            "embedding"
        ):
            leaf = rng.normal(0, 0.1, leaf.shape)
            leaf[..., few] *= 60
        else:
            leaf = leaf + rng.normal(0, 0.05, leaf.shape)
        flat[path] = leaf
    return unflatten_dict(flat)


def gradient(run, params: dict, batch: dict) -> np.ndarray:
    params = jax.tree.map(lambda x: jnp.asarray(x, run.config.model.param_dtype), params)
    _, grads = jax.jit(make_gradients(run))(params, batch, np.int32(0))
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten_dict(grads).items()}


def errors(family: str, dtype: str, **changes: object) -> dict[str, float]:
    """norm -> the relative error of the gradient of the Pre-LN parameters, over all of them."""
    reference = configured(family, "layernorm", "float64", **changes)
    params = outliers(init_state(reference).params)
    batch = reference.kind.sample(reference.config) if family == "gpt" else random_images(reference.config)
    expected = gradient(reference, params, batch)
    size = np.sqrt(sum((leaf**2).sum() for leaf in expected.values()))
    result = {}
    for norm in NORMS:
        actual = gradient(configured(family, norm, dtype, **changes), params, batch)
        result[norm] = np.sqrt(sum(((actual[path] - leaf) ** 2).sum() for path, leaf in expected.items())) / size
    return result


def random_images(config) -> dict:
    rng, side = np.random.default_rng(1), config.model.image_size
    labels = rng.integers(config.model.classes, size=config.batch_size).astype(np.int32)
    images = rng.integers(256, size=(config.batch_size, side, side, config.model.channels), dtype=np.uint8)
    return {"images": images, "labels": labels, "weights": np.ones(config.batch_size, np.float32)}


@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        pytest.param("gpt", "bfloat16", {}, id="gpt", marks=pytest.mark.wide),
        pytest.param("vit", "bfloat16", {}, id="vit", marks=pytest.mark.wide),
        pytest.param("vit", "float16", {}, id="vit-float16", marks=pytest.mark.wide),
        pytest.param("gpt", "float16", {"accumulate": 2, "scan": True}, id="gpt-pieces", marks=pytest.mark.slow),
        pytest.param("vit", "bfloat16", {"accumulate": 2, "scan": True}, id="vit-pieces", marks=pytest.mark.wide),
    ],
)
def test_in_two_bytes_a_variants_gradient_is_as_near_to_the_truth_as_layernorms(family, dtype, changes):
    found = errors(family, dtype, **changes)
    print(family, dtype, changes, found)
    assert max(found["rmsnorm"], found["crmsnorm"]) < 1.15 * found["layernorm"], found
