"""The training step and the evaluation step: each one function under one `jax.jit`.

With parameterization `pre_ln` the trained parameters θ are the Pre-LN tree, and the step computes φ = h(θ), the
variant's parameters, inside the differentiated loss. The gradients are then those of Pre-LN, so that any optimizer
follows the Pre-LN trajectory. With `native` the variant's own parameters are trained, from the same initial function.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from prenorm_jax.base.trees import at_least_float32
from prenorm_jax.data.augment import Examples
from prenorm_jax.data.kinds import Batch
from prenorm_jax.equivalence.convert import convert_params
from prenorm_jax.models.placement import computing_on, constrain
from prenorm_jax.models.registry import build_model, model_config
from prenorm_jax.models.stacking import stack_blocks
from prenorm_jax.train.loss import binary_cross_entropy, cross_entropy, rank_of_label
from prenorm_jax.train.optim import make_optimizer, make_schedule
from prenorm_jax.train.run import H_SCOPE, Params, Run
from prenorm_jax.train.sharding import (
    check_sharding,
    compiler_options,
    constrain_formats,
    replicated,
    row_major_formats,
    tree_sharding,
)

OPTIMIZER_SCOPE = "optimizer"  # as it is called in profiles


class TrainState(flax.struct.PyTreeNode):
    """What a run is between two steps.

    `step` counts the batches used; `nonfinite` those, since the process started, whose loss, gradient or new parameters
    were not finite. Both are scalar int32.
    """

    step: jax.Array
    nonfinite: jax.Array
    params: Params
    opt_state: optax.OptState


def init_params(run: Run) -> Params:
    """The trained parameters at step 0: the Pre-LN initialisation of the seed, converted if a variant is trained."""
    pre_ln = dataclasses.replace(model_config(run.config.model), norm="layernorm")
    model = build_model(dataclasses.replace(pre_ln, scan=False))  # so that stacked blocks begin with the same numbers
    params = model.init(_keys(run.config)[0], model.example())["params"]
    params = stack_blocks(params) if pre_ln.scan else params
    return params if run.trained.norm == "layernorm" else convert_params(params, pre_ln, run.trained.norm)


def init_state(run: Run) -> TrainState:
    """The state at step 0. Traceable: `jax.eval_shape(lambda: init_state(run))` makes no array."""
    params = init_params(run)
    step, nonfinite = (jnp.zeros((), jnp.int32) for _ in range(2))  # two buffers: the training step donates each
    return TrainState(step, nonfinite, params, make_optimizer(run.config).init(params))


@functools.lru_cache(maxsize=1)  # of one run, which asks several times as it starts: each takes a third of a second
def abstract_state(run: Run) -> TrainState:
    """`init_state` without arrays: shapes and dtypes."""
    return jax.eval_shape(lambda: init_state(run))


def state_formats(run: Run) -> TrainState:
    """The tree of formats in which the state is stored. Raises PrenormError: see `check_sharding`."""
    check_sharding(run.trained, run.mesh, run.config.mesh.largest_replicated)
    state = abstract_state(run)
    return row_major_formats(tree_sharding(state, run.trained, run.mesh), state)


def _keys(config: ConfigDict) -> tuple[jax.Array, jax.Array]:
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    return init_key, step_key


def make_gradients(run: Run) -> Callable[[Params, Batch, jax.Array], tuple[jax.Array, Params]]:
    """(trained params, batch, step) -> mean loss over the batch's weights, in nats, and its gradient.

    Dropout and augmentation are on. The conversion h and its derivative are computed once, whatever
    `config.accumulate`: in that many pieces, one after the other, the sum over examples is computed, and divided by the
    whole batch's weight at the end.
    """
    config, model = run.config, build_model(run.computed)
    criterion = binary_cross_entropy if config.get("loss") == "sigmoid" else cross_entropy

    def gradients(params: Params, batch: Batch, step: jax.Array) -> tuple[jax.Array, Params]:
        dropout_key = jax.random.fold_in(_keys(config)[1], step)
        examples = run.kind.examples(config, batch, key=jax.random.fold_in(dropout_key, 0))
        weight = examples.weights.sum()

        def loss(computed: Params, piece: Examples, key: jax.Array) -> jax.Array:
            logits = model.apply({"params": computed}, piece.inputs, train=True, rngs={"dropout": key})
            return (criterion(logits, piece.targets) * piece.weights).sum() / weight

        computed, pull_back = jax.vjp(run.computed_params, params)
        if config.accumulate == 1:
            value, grads = jax.value_and_grad(loss)(computed, examples, dropout_key)
        else:
            value, grads = _accumulated(jax.value_and_grad(loss), config.accumulate, computed, examples, dropout_key)
        with jax.named_scope(H_SCOPE):
            return value, pull_back(grads)[0]

    return computing_on(run.mesh)(gradients)


def _accumulated(
    value_and_grad: Callable[..., Any], pieces: int, computed: Params, examples: Examples, key: jax.Array
) -> tuple[jax.Array, Params]:
    """The sum over `pieces` pieces of the examples, taken in float32 at least. Each is split over the devices as the
    whole batch is."""

    def split(x: jax.Array) -> jax.Array:
        x = x.reshape(len(x) // pieces, pieces, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "batch", *[None] * (x.ndim - 2))

    def add(total: Any, piece: tuple[Examples, jax.Array]) -> tuple[Any, None]:
        value = value_and_grad(computed, *piece)
        with jax.named_scope("accumulation"):
            return jax.tree.map(lambda sum, x: sum + at_least_float32(x), total, value), None

    split_examples = jax.tree.map(split, examples)
    example = jax.tree.map(lambda x: x[0], split_examples)
    shapes = jax.eval_shape(value_and_grad, computed, example, key)
    zero = jax.tree.map(lambda x: at_least_float32(jnp.zeros_like(x)), shapes)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(pieces))
    total = jax.lax.scan(add, zero, (split_examples, keys))[0]
    return jax.tree.map(lambda sum, x: sum.astype(x.dtype), total, shapes)


def make_train_step(run: Run) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted step: (state, batch) -> (state, {loss, grad_norm, param_norm, learning_rate}). It donates the state.

    `param_norm` is that of the new parameters. A step for which one of the three is not finite leaves parameters and
    optimizer as they are. With `config.on_nonfinite` "stop" so do all steps after it, `step` included: the host, which
    learns of it some steps late, then still finds the last good state.
    """
    gradients, stored = make_gradients(run), state_formats(run)
    stop = run.config.on_nonfinite == "stop"
    optimizer, schedule = make_optimizer(run.config), make_schedule(run.config)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
        value, grads = gradients(state.params, batch, state.step)
        with computing_on(run.mesh):  # the state's formats, or the compiler may copy the state into the gradients'
            grads = constrain_formats(grads, stored.params)
        rate = schedule(state.step)
        with jax.named_scope(OPTIMIZER_SCOPE):
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, jax.tree.map(lambda update: rate * update, updates))
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}

        finite = jnp.isfinite(jnp.stack(list(metrics.values()))).all()
        good = finite & (state.nonfinite == 0) if stop else finite
        with jax.named_scope(OPTIMIZER_SCOPE):
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(good, new, old), (params, opt_state), (state.params, state.opt_state)
            )
        step = state.step + (good if stop else 1)
        return TrainState(step, state.nonfinite + ~finite, params, opt_state), metrics | {"learning_rate": rate}

    shardings = {"in_shardings": (stored, run.batch_sharding), "out_shardings": (stored, replicated(run.mesh))}
    return jax.jit(train_step, **shardings, donate_argnums=0, compiler_options=compiler_options(run.mesh))


def make_eval_step(run: Run) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """The jitted evaluation step: (computed params, batch) -> sums over the batch.

    They are of weight and nats (weight × loss) and, for each k of the kind of data's `top`, of topk: the weight where
    the label is among the first k.
    """
    model = build_model(run.computed)

    def eval_step(params: Params, batch: Batch) -> dict[str, jax.Array]:
        inputs, targets, weights = run.kind.examples(run.config, batch)
        with computing_on(run.mesh):
            logits = model.apply({"params": params}, inputs)
            sums = {"weight": weights.sum(), "nats": (cross_entropy(logits, targets) * weights).sum()}
            if run.kind.top:
                rank = rank_of_label(logits, targets)
                sums |= {f"top{k}": ((rank < k) * weights).sum() for k in run.kind.top}
        return sums

    shardings = {"in_shardings": (run.computed_formats, run.batch_sharding), "out_shardings": replicated(run.mesh)}
    return jax.jit(eval_step, **shardings, compiler_options=compiler_options(run.mesh))
