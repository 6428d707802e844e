"""Learning-rate schedule and optimizers, all from optax, chosen by `config.optimizer`."""

from collections.abc import Callable
from typing import Any

import jax
import optax
import optax.contrib
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.stacking import STACKED


def make_schedule(config: ConfigDict) -> Callable[[Any], jax.Array]:
    """Updates made so far -> learning rate: linear warm-up to the peak, then a cosine that ends at `config.steps`."""
    o = config.optimizer
    warmup = o.warmup_steps
    cosine = optax.cosine_decay_schedule(o.learning_rate, max(config.steps - warmup, 1), alpha=o.final_learning_rate)
    # Optax's own linear schedule subtracts, which costs float32 a digit.
    return optax.join_schedules([lambda step: o.learning_rate * (step + 1) / max(warmup, 1), cosine], [warmup])


def _is_matrix(params: Any) -> Any:
    # Kernels and embeddings have two axes, biases and norms one; stacked blocks have one more.
    def is_matrix(path: Any, leaf: Any) -> bool:
        return leaf.ndim >= 2 + (path[0] == jax.tree_util.DictKey(STACKED))

    return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Global-norm clipping, then the named optimizer, decoupled weight decay on matrices included.

    Its updates are for a learning rate of 1: the training step multiplies them by the schedule, which so depends on
    the step alone and not on a counter in the optimizer's state. Raises PrenormError on an unknown name.
    """
    o = config.optimizer
    decay = {"weight_decay": o.weight_decay, "mask": _is_matrix}
    makers: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.adamw(1.0, o.b1, o.b2, o.eps, **decay),
        "lamb": lambda: optax.lamb(1.0, o.b1, o.b2, o.eps, **decay),
        "sgd": lambda: optax.chain(optax.trace(o.b1), optax.add_decayed_weights(**decay), optax.scale(-1.0)),
        "adafactor": lambda: optax.adafactor(1.0, weight_decay_rate=o.weight_decay, weight_decay_mask=_is_matrix),
        "muon": lambda: optax.contrib.muon(
            1.0, beta=o.b1, weight_decay=o.weight_decay, weight_decay_mask=_is_matrix, adam_b2=o.b2
        ),
    }
    if o.name not in makers:
        raise PrenormError(f"optimizer.name={o.name!r} is not one of {', '.join(makers)}")
    if config.model.get("scan") and o.name in ("lamb", "adafactor", "muon"):
        raise PrenormError(
            f"optimizer.name={o.name!r} treats each matrix as a whole, and model.scan=True stacks those of all blocks: "
            "choose adamw or sgd, or set model.scan=False"
        )
    if o.clip > 0:
        return optax.chain(optax.clip_by_global_norm(o.clip), makers[o.name]())
    return makers[o.name]()
