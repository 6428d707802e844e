"""Training equivalence in float64, its negative control, and the step on several devices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import TINY, TINY_VIT
from ml_collections import ConfigDict

from prenorm_jax.config import base_config
from prenorm_jax.models.config import NORMS
from prenorm_jax.train.loss import binary_cross_entropy, cross_entropy
from prenorm_jax.train.optim import make_optimizer, make_schedule
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import init_state, make_eval_step, make_gradients, make_train_step, run_models

STEPS = 100
# name -> (peak learning rate, other settings): rates at which each of them learns something in 100 steps.
OPTIMIZERS = {
    "sgd": (0.1, {"weight_decay": 0.0, "clip": 0.0}),
    "adamw": (0.01, {}),
    "adafactor": (0.03, {"weight_decay": 0.01}),
    "lamb": (0.03, {}),
    "muon": (0.03, {}),
}


def run_config(norm: str, parameterization: str, optimizer: str = "adamw", family: str = "gpt", **model) -> ConfigDict:
    config = base_config(family)
    config.steps, config.batch_size, config.parameterization = STEPS, 8, parameterization
    config.model.update((TINY if family == "gpt" else TINY_VIT) | {"norm": norm, "depth": 1, "d_model": 16} | model)
    config.optimizer.name = optimizer
    config.optimizer.learning_rate, others = OPTIMIZERS[optimizer]
    config.optimizer.update(others)
    config.optimizer.warmup_steps = 5
    return config


def batch_of(step: int, config: ConfigDict) -> dict[str, np.ndarray]:
    """Something to learn: each token follows from the one before, or each image's brightness is its class."""
    rng, size = np.random.default_rng(step), config.batch_size
    if config.model.family == "vit":
        labels_B = rng.integers(5, size=size)
        images = rng.integers(30, size=(size, 6, 6, 2)) + 50 * labels_B[:, None, None, None]
        return {"images": images.astype(np.uint8), "labels": labels_B.astype(np.int32), "weights": np.ones(size)}
    tokens_BxT = (rng.integers(11, size=(size, 1)) + np.arange(8)) % 11
    return {"tokens": tokens_BxT.astype(np.int32), "weights": rng.integers(1, 3, size=(size, 7)).astype(np.float64)}


def train(config: ConfigDict, steps: int = STEPS, devices: int = 1) -> tuple[np.ndarray, object]:
    """(losses, final state)."""
    models = run_models(config)
    mesh = make_mesh(config, jax.devices()[:devices])
    step = make_train_step(config, models, mesh)
    batches = jax.tree.map(lambda *leaves: np.stack(leaves), *[batch_of(i, config) for i in range(steps)])
    state, metrics = jax.jit(lambda batches: jax.lax.scan(step, init_state(config, models), batches))(batches)
    return np.asarray(metrics["loss"]), state


# What is trained: a family and its model's keys. The ViT has all that is random in it on, and images are mixed.
GPT = ("gpt", {"dropout": 0.0})
GPT_DROPOUT = ("gpt", {"dropout": 0.2})
GPT_UNTIED = ("gpt", {"tie_embeddings": False})
VIT = ("vit", {"dropout": 0.1, "stochastic_depth": 0.3, "stochastic_depth_schedule": "constant", "layer_scale": 0.3})
MODELS = {"gpt": GPT, "gpt-dropout": GPT_DROPOUT, "gpt-untied": GPT_UNTIED, "vit": VIT}


def model_config(model: str, norm: str, parameterization: str, optimizer: str) -> ConfigDict:
    family, keys = MODELS[model]
    config = run_config(norm, parameterization, optimizer, family, **keys)
    if family == "vit":
        config.augment.update({"shift": 1, "mixup": 0.1, "label_smoothing": 0.05})
    return config


@functools.lru_cache
def pre_ln_losses(model: str, optimizer: str) -> np.ndarray:
    losses = train(model_config(model, "layernorm", "pre_ln", optimizer))[0]
    assert losses[-20:].mean() < losses[:10].mean() - 0.1, "this run learns nothing, so it would show nothing"
    return losses


def differences(model: str, norm: str, parameterization: str, optimizer: str) -> np.ndarray:
    """|Δloss| to Pre-LN, step by step."""
    return np.abs(train(model_config(model, norm, parameterization, optimizer))[0] - pre_ln_losses(model, optimizer))


def case(norm: str, model: str, optimizer: str):
    """One worker takes all cases of an optimizer, and so computes its Pre-LN runs once."""
    marks = [pytest.mark.xdist_group(optimizer), *([] if model == "gpt" else [pytest.mark.slow])]
    return pytest.param(norm, model, optimizer, marks=marks)


def in_turn(number: int) -> str:
    return ("rmsnorm", "crmsnorm")[number % 2]


PAIRS = list(itertools.product(enumerate(MODELS), enumerate(OPTIMIZERS)))


@pytest.mark.parametrize(
    ("norm", "model", "optimizer"),
    [
        *(case(in_turn(m + o), model, optimizer) for (m, model), (o, optimizer) in PAIRS),
        # Of the first two models, and of adamw, the other norm too.
        *(
            case(in_turn(m + o + 1), model, optimizer)
            for (m, model), (o, optimizer) in PAIRS
            if m < 2 or optimizer == "adamw"
        ),
    ],
)
def test_pre_ln_parameterization_follows_pre_ln(norm, model, optimizer):
    assert differences(model, norm, "pre_ln", optimizer).max() <= 1e-9


@pytest.mark.parametrize(
    ("norm", "model", "optimizer"),
    [
        case(norm, model, optimizer)
        for norm in ("rmsnorm", "crmsnorm")
        for model, optimizer in [*(("gpt", name) for name in OPTIMIZERS), ("gpt-dropout", "adamw"), ("vit", "adamw")]
    ],
)
def test_native_parameterization_does_not(norm, model, optimizer):
    """The negative control: the same function at the start, trained directly, goes another way."""
    difference = differences(model, norm, "native", optimizer)
    assert difference[0] < 1e-12
    assert difference.max() > 1e-3


@pytest.mark.parametrize("norm", ["crmsnorm", *(pytest.param(n, marks=pytest.mark.slow) for n in NORMS[:2])])
@pytest.mark.parametrize("devices", [8, pytest.param(2, marks=pytest.mark.slow)])
def test_any_number_of_devices_takes_the_same_steps(norm, devices):
    config = run_config(norm, "pre_ln", dropout=0.2)
    alone, together = train(config, 20)[0], train(config, 20, devices)[0]
    np.testing.assert_allclose(together, alone, rtol=1e-11)


def test_the_loss_weighs_tokens_not_sequences():
    config = run_config("layernorm", "pre_ln")
    models, mesh = run_models(config), make_mesh(config, jax.devices()[:1])
    state, batch = init_state(config, models), batch_of(0, config)
    batch["weights"][:, 3:] = 0
    batch["weights"][5:] = 0
    eval_step = make_eval_step(config, models.computed, mesh)
    sums = eval_step(state.params, batch)
    nats, tokens = sums["nats"], sums["weight"]
    assert tokens == batch["weights"].sum()
    scrambled = dict(
        batch, tokens=np.where(np.pad(batch["weights"], ((0, 0), (1, 0)), constant_values=1) > 0, batch["tokens"], 0)
    )
    np.testing.assert_allclose(eval_step(state.params, scrambled)["nats"], nats, rtol=1e-12)
    loss = make_train_step(config, models, mesh)(state, batch)[1]["loss"]
    np.testing.assert_allclose(loss, nats / tokens, rtol=1e-12)


def test_the_schedule_warms_up_and_ends_at_its_fraction_of_the_peak():
    config = run_config("layernorm", "pre_ln")
    config.optimizer.update({"learning_rate": 2.0, "warmup_steps": 10, "final_learning_rate": 0.1})
    rates = np.array([make_schedule(config)(step) for step in range(STEPS + 1)])
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11))
    np.testing.assert_allclose(rates[-1], 0.2)
    assert (np.diff(rates[10:]) < 0).all()
    config.steps = 5  # shorter than the warm-up: it is cut off, nothing fails
    assert make_schedule(config)(4) == 1.0


def test_adamw_step_is_the_textbooks():
    """One update against the formulas, through clip, decay mask and schedule (optax unbiases moments in float32)."""
    config = run_config("layernorm", "pre_ln")
    config.optimizer.update({"clip": 0.01, "weight_decay": 0.3, "warmup_steps": 4, "learning_rate": 0.1, "eps": 1e-8})
    models, mesh = run_models(config), make_mesh(config, jax.devices()[:1])
    state = init_state(config, models)
    grads = make_gradients(config, models)(state.params, batch_of(0, config), state.step)[1]
    norm = optax.tree.norm(grads)
    before = jax.tree.map(np.array, state.params)
    after, metrics = make_train_step(config, models, mesh)(state, batch_of(0, config))
    np.testing.assert_allclose(metrics["grad_norm"], norm)
    np.testing.assert_allclose(metrics["learning_rate"], 0.025)

    def expected(path, p, g):
        g = g * min(1, 0.01 / norm)
        step = g / (np.abs(g) + 1e-8)  # both moments are unbiased after one step
        return p - 0.025 * (step + (0.3 * p if p.ndim == 2 else 0))

    wanted = jax.tree_util.tree_map_with_path(expected, before, grads)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9), after.params, wanted)


def test_an_unknown_optimizer_is_named():
    config = run_config("layernorm", "pre_ln")
    config.optimizer.name = "adam"
    with pytest.raises(ValueError, match=r"optimizer\.name='adam' is not one of adamw, lamb, sgd, adafactor, muon"):
        make_optimizer(config)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_cross_entropy_is_that_of_optax(offset, platform, monkeypatch):
    """Its value and gradient; large logits cost it no digits, impossible classes no NaN; and nothing is scattered."""
    monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda: platform)
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(4, 5, 7)) * 3 + offset).at[0, 0, 2].set(-jnp.inf)
    targets = jnp.asarray(rng.integers(7, size=(4, 5))).at[0, 0].set(1)

    def total(function):
        return lambda logits: (function(logits, targets) * jnp.arange(20.0).reshape(4, 5)).sum()

    ours, optaxs = (
        jax.value_and_grad(total(f)) for f in (cross_entropy, optax.softmax_cross_entropy_with_integer_labels)
    )
    for mine, expected in zip(ours(logits), optaxs(logits), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-12, atol=1e-12)
    assert np.isnan(cross_entropy(logits[0], jnp.asarray([7, -1, 100, -7, 2]))).tolist() == [True] * 4 + [False]
    assert "scatter" in str(jax.make_jaxpr(optaxs)(logits))
    assert "scatter" not in str(jax.make_jaxpr(ours)(logits))
    assert ("gather" in str(jax.make_jaxpr(total(cross_entropy))(logits))) == (platform != "tpu")


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_on_tpus_gradients_lie_as_the_state_does(platform, monkeypatch):
    monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda: platform)
    config = run_config("crmsnorm", "pre_ln")
    models, mesh = run_models(config), make_mesh(config, jax.devices()[:1])
    state = jax.eval_shape(lambda: init_state(config, models))
    jaxpr = str(make_train_step(config, models, mesh).trace(state, batch_of(0, config)).jaxpr)
    leaves = len(jax.tree.leaves(state.params))
    assert jaxpr.count("layout_constraint") >= leaves if platform == "tpu" else "layout_constraint" not in jaxpr


def test_binary_cross_entropy_takes_each_class_for_itself():
    logits, targets = np.array([[2.0, -1, 0.5]]), np.array([[0.7, 0.3, 0.0]])
    probability = 1 / (1 + np.exp(-logits))
    expected = -np.mean(np.log(np.where(targets > 0, probability, 1 - probability)))
    np.testing.assert_allclose(binary_cross_entropy(logits, targets), [expected], rtol=1e-12)


def test_the_loss_that_is_asked_for_is_trained_and_augmentation_changes_with_step_and_seed():
    def loss_of(step: int = 0, **changes: object) -> float:
        config = run_config("layernorm", "pre_ln", family="vit")
        config.augment.shift = 2
        for key, value in changes.items():
            config[key] = value
        models = run_models(config)
        params = init_state(run_config("layernorm", "pre_ln", family="vit"), models).params
        return float(jax.jit(make_gradients(config, models))(params, batch_of(0, config), step)[0])

    assert loss_of() == loss_of()
    assert len({loss_of(), loss_of(loss="sigmoid"), loss_of(step=1), loss_of(seed=1)}) == 4
    assert 0.5 < loss_of(loss="sigmoid") < 1  # log 2 a class, not log 5
