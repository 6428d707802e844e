"""What is said of a step whose loss, gradient or update is not finite."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from prenorm_jax.data import Data
from prenorm_jax.train.metrics import NonFinite
from prenorm_jax.train.run import Params, Run
from prenorm_jax.train.step import TrainState, make_gradients


def describe_nonfinite(error: NonFinite, run: Run, state: TrainState, data: Data) -> str:
    """Where it happened, and in which parameter it is worst. `state` is that before the step."""
    step = error.step - 1
    batch = run.global_batch(data.train_batch(run.config, step, run.local_rows))
    grads = jax.jit(make_gradients(run))(state.params, batch, np.int32(step))[1]
    numbers = ", ".join(f"{name} {value:.4g}" for name, value in error.values.items() if name != "learning_rate")
    first = step * run.config.batch_size
    return (
        f"step {error.step} is not finite ({numbers}): examples {first} to {first + run.config.batch_size - 1}, "
        f"{worst_leaf(grads, state.params)}; the state before it, step {int(state.step)}, is saved; "
        "--config.on_nonfinite=skip goes on without such steps"
    )


def worst_leaf(grads: Params, params: Params) -> str:
    """Says which leaf has the most gradients that are not finite or, if none has or all are, the largest numbers.

    A loss that is not finite gives no finite gradient anywhere: then the largest parameter is the better hint.
    """
    grads, params = (_extremes(tree) for tree in (grads, params))
    if min(bad for bad, _ in grads.values()) == 1:
        worst = max(params, key=lambda path: params[path][1])
        return f"no gradient is finite, the largest parameter is in {worst} ({params[worst][1]:.3g})"
    worst = max(grads, key=grads.__getitem__)
    bad, largest = grads[worst]
    return f"worst gradient in {worst} ({bad:.0%} not finite, up to {largest:.3g})"


@jax.jit
def _leaf_extremes(tree: Params) -> Any:
    return jax.tree.map(lambda x: (1 - jnp.isfinite(x).mean(), jnp.abs(x).max()), tree)


def _extremes(tree: Params) -> dict[str, tuple[float, float]]:
    """For each leaf the share of its numbers that are not finite, and its largest."""
    extremes = flatten_dict(jax.device_get(_leaf_extremes(tree)))
    return {"/".join(path): (float(bad), float(largest)) for path, (bad, largest) in extremes.items()}
