"""A tree fitted to a configuration with other leaves computes the same function, or is refused."""

import pytest
from common import logits, random_inputs, random_params, relative, tiny

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.equivalence.convert import convert_config, convert_params
from prenorm_jax.equivalence.fit import fit_params
from prenorm_jax.models.config import NORMS


def test_fit_params_keeps_the_function_or_refuses():
    pre_ln = tiny(use_bias=False, norm_bias=False)
    params, tokens = random_params(pre_ln, 0), random_inputs(pre_ln)
    crms = convert_config(pre_ln, "crmsnorm")
    fitted = fit_params(convert_params(params, pre_ln, "crmsnorm"), crms, pre_ln)
    assert relative(logits(pre_ln, fitted, tokens), logits(pre_ln, params, tokens)) < 1e-10
    with_bias = tiny(use_bias=True)
    biased = random_params(with_bias, 0)
    fitted = fit_params(params, pre_ln, with_bias)
    assert relative(logits(with_bias, fitted, tokens), logits(pre_ln, params, tokens)) < 1e-10
    with pytest.raises(PrenormError, match="the config has no place for"):
        fit_params(biased, with_bias, pre_ln)
    with pytest.raises(PrenormError, match=r"model\.epsilon"):
        fit_params(params, pre_ln, tiny(use_bias=False, norm_bias=False, epsilon=1e-3))


@pytest.mark.parametrize("tie_embeddings", [pytest.param(True, marks=pytest.mark.wide), False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("to", NORMS)
def test_fit_params_keeps_the_function_when_dropout_comes_or_goes(norm, to, tie_embeddings):
    """Dropout decides whether weights are stored centred (or compressed) or raw."""
    for rates in (0.1, 0.0), (0.0, 0.1):
        given, wanted = (tiny(tie_embeddings=tie_embeddings, head_bias=True, dropout=rate) for rate in rates)
        params, tokens = random_params(given, 0), random_inputs(given)
        expected = logits(given, params, tokens)
        if norm != "layernorm":
            params, given = convert_params(params, given, norm), convert_config(given, norm)
        wanted = convert_config(wanted, to) if to != "layernorm" else wanted
        fitted = fit_params(params, given, wanted)
        assert relative(logits(wanted, fitted, tokens), expected) < 1e-10
