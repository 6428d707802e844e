"""`fold` on models in Equinox and Haiku, which know nothing of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import relative

from prenorm_jax import fold

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("library", ["equinox", "haiku"])
def test_a_model_of_another_library_folds_whole_and_stays_the_same_function(library: str) -> None:
    import other_models

    function, params = getattr(other_models, library)()
    tokens = other_models.TOKENS
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) + 0.3), params)
    folded = fold(function, params, tokens)
    expected = jax.jit(function)(params, tokens)
    assert relative(jax.jit(folded.apply)(folded.params, tokens), np.asarray(expected)) < 1e-12
    assert folded.report.count() == len(folded.report.norms) == 5, folded.report
    assert not folded.report.runtime
