"""Text encoders beside the same in NumPy; padding, poolings, and what a config of one may not say."""

import functools

import jax
import numpy as np
import pytest
from common import changed, logits, random_inputs, random_params, relative, tiny_encoder
from flax.traverse_util import flatten_dict, unflatten_dict
from oracle import numpy_encoder

from prenorm_jax import PrenormError, TextEncoder, convert_config, convert_params
from prenorm_jax.models.coordinates import center
from prenorm_jax.models.registry import build_model

MASK = np.array([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1, 1]])
MODERN = {"first_norm": False, "embed_norm": True, "positions": "rotary", "depth": 3, "window": 3}
MODERN |= {"attention_pattern": "gll", "global_rotary_base": 50.0, "norm_bias": True, "use_bias": False}
POOLED = {"tie_embeddings": False, "transform": False}
NETWORKS = {
    "masked": {"pad_token": 2, "token_types": 2, "embed_norm": True},
    "modern": MODERN,
    "protein": {"mask_token": 3, "positions": "rotary", "tie_embeddings": False, "outputs": 11},
    "mean": POOLED | {"outputs": 5, "pooling": "mean"},
    "eos": POOLED | {"pooling": "eos", "eos_token": 3, "causal": True},
    "highest": POOLED | {"pooling": "eos", "causal": True, "outputs": 2},
    "last": POOLED | {"outputs": 4, "pooling": "last"},
    "first": {"tie_embeddings": False, "outputs": 4, "pooling": "first"},
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """A config, awkward parameters, tokens, and what the network in NumPy makes of them under MASK."""
    config = tiny_encoder(**NETWORKS[request.param])
    params, tokens = jax.device_get(random_params(config, 1)), random_inputs(config)
    return config, params, tokens, numpy_encoder(config, params, tokens, MASK)


def masked(config, params, tokens):
    """The outputs, at tokens that are none of padding."""
    return counted(config, np.asarray(program(config)(params, tokens)))


@functools.cache
def program(config):
    """One for all trees of a config: another's, and what came back."""
    return jax.jit(lambda params, tokens: build_model(config).apply({"params": params}, tokens, mask_BxT=MASK))


def counted(config, outputs):
    return outputs[MASK != 0] if config.token_outputs else outputs


@pytest.mark.slow
def test_matches_it_under_every_norm_and_back_with_padding(network):
    config, params, tokens, expected = network
    expected = counted(config, expected)
    assert relative(masked(config, params, tokens), expected) < 1e-12
    assert relative(masked(changed(config, norm="rmsnorm"), params, tokens), expected) > 1e-2
    for to in ("rmsnorm", "crmsnorm", "layernorm"):  # each from the one before
        params, config = convert_params(params, config, to), convert_config(config, to)
        assert relative(masked(config, params, tokens), expected) < 1e-10, to


@pytest.mark.slow
def test_a_network_whose_block_0_reads_the_centred_embedding_is_another():
    """The rule of ModernBERT: it reads its norm's output as it is, mean and all."""
    config = tiny_encoder(**MODERN)
    params, tokens = jax.device_get(random_params(config, 1)), random_inputs(config)
    expected, flat = logits(config, params, tokens), flatten_dict(params)
    for name in ("query", "key", "value"):
        path = ("block_0", "attention", name, "kernel")
        flat[path] = center(flat[path], 0)  # as if what it reads were centred
    assert relative(logits(config, unflatten_dict(flat), tokens), expected) > 1e-2


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("masked", {"token_types": 0}),
        ("masked", {"pad_token": 3}),
        ("modern", {"window": None}),
        ("modern", {"global_rotary_base": None}),
        ("modern", {"attention_pattern": "l", "global_rotary_base": None}),
        ("protein", {"mask_token": None}),
        ("mean", {"pooling": "first"}),
        ("eos", {"eos_token": None}),
        ("eos", {"causal": False}),
        ("highest", {"eos_token": 3}),
        ("last", {"pooling": "first"}),
    ],
)
def test_a_key_that_is_ignored_makes_it_another_function(name, ignored):
    """For the network in NumPy, so that the comparison above would show it."""
    config = tiny_encoder(**NETWORKS[name])
    params, tokens = jax.device_get(random_params(config, 1)), random_inputs(config)
    found, other = (numpy_encoder(each, params, tokens, MASK) for each in (config, changed(config, **ignored)))
    assert relative(other, found) > 1e-3


def test_what_stands_at_padding_is_never_felt():
    config = tiny_encoder(**MODERN)
    params, tokens = jax.device_get(random_params(config, 1)), random_inputs(config)
    run = jax.jit(lambda tokens, mask: build_model(config).apply({"params": params}, tokens, mask_BxT=mask))
    others = np.where(MASK, tokens, (tokens + 1) % config.vocab_size)
    found = [np.asarray(run(given, MASK))[MASK != 0] for given in (tokens, others)]
    np.testing.assert_array_equal(*found)
    assert np.isfinite(run(tokens, np.zeros_like(MASK))).all()  # NaN at padding would spread to all
    assert relative(np.asarray(run(others, np.ones_like(MASK)))[MASK != 0], found[0]) > 1e-2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outputs": 3}, "model.tie_embeddings=True is an encoder's masked language model"),
        ({"pooling": "mean"}, "model.tie_embeddings=True is an encoder's masked language model"),
        ({"tie_embeddings": False}, "model.transform=True needs a head"),
        ({"first_norm": False, "scan": True}, "model.first_norm=False leaves block 0 one norm fewer: set model.scan="),
        ({"first_norm": False, "parallel": True}, "one norm fewer: set model.parallel=False"),
        ({"pooling": "max"}, "model.pooling='max' is not one of"),
        ({"positions": "alibi"}, "model.positions='alibi' is not one of"),
        ({"embed_scale": 2.0}, "model.embed_scale=2 is a GPT's: an encoder has none"),
        ({"pad_token": -1}, "model.pad_token=-1 must be at least 0"),
    ],
)
def test_what_an_encoder_cannot_be_is_refused(changes, words):
    with pytest.raises(PrenormError, match=words):
        tiny_encoder(**changes)


def test_the_last_token_of_a_text_is_its_own_and_not_the_padding_and_what_is_no_text_is_refused():
    config = tiny_encoder(transform=False, tie_embeddings=False, outputs=0, vocab_size=11)
    encoder = TextEncoder(config, random_params(config, 1), None, padding=0)
    texts = [[3, 4, 5], [6, 7]]
    alone = np.concatenate([encoder.embed([text], "last") for text in texts])
    together = encoder.embed(texts, "last")
    np.testing.assert_allclose(together, alone, atol=1e-6)
    assert np.abs(together - encoder.embed(texts, "first")).max() > 1e-2
    for wrong, message in (
        ([], "there is no text"),
        ([[]], "no token"),
        ([[11]], "no token 11"),
        ([[-1]], "no token -1"),
    ):
        with pytest.raises(PrenormError, match=message):
            encoder.embed(wrong)
