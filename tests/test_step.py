"""Training equivalence in float64 and its negative controls; the parts of a step."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import TINY, TINY_VIT, Programs, changed, random_params, relative, run_of
from ml_collections import ConfigDict

from prenorm_jax.config import base_config
from prenorm_jax.models.config import NORMS
from prenorm_jax.train.loss import binary_cross_entropy, cross_entropy
from prenorm_jax.train.optim import make_optimizer, make_schedule

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
        weights_B = rng.integers(1, 3, size=size).astype(np.float64)
        return {"images": images.astype(np.uint8), "labels": labels_B.astype(np.int32), "weights": weights_B}
    tokens_BxT = (rng.integers(11, size=(size, 1)) + np.arange(8)) % 11
    return {"tokens": tokens_BxT.astype(np.int32), "weights": rng.integers(1, 3, size=(size, 7)).astype(np.float64)}


# What is trained: a family and its model's keys. The ViT has all that is random in it on, and images are mixed.
GPT = ("gpt", {"dropout": 0.0})
GPT_DROPOUT = ("gpt", {"dropout": 0.2})
GPT_UNTIED = ("gpt", {"tie_embeddings": False})
VIT = ("vit", {"dropout": 0.1, "stochastic_depth": 0.3, "stochastic_depth_schedule": "constant", "layer_scale": 0.3})
MODELS = {"gpt": GPT, "gpt-dropout": GPT_DROPOUT, "gpt-untied": GPT_UNTIED, "vit": VIT}


def run_for(model: str, norm: str, parameterization: str = "pre_ln", optimizer: str = "adamw") -> Programs:
    family, keys = MODELS[model]
    config = run_config(norm, parameterization, optimizer, family, **keys)
    if family == "vit":
        config.augment.update({"shift": 1, "mixup": 0.1, "label_smoothing": 0.05})
    return run_of(config)


# --- One step: the gradients through h are Pre-LN's, so those of every optimizer that is given them are too. ---


@functools.cache
def points(model: str) -> dict[str, dict]:
    """Pre-LN trees: at the start of training, and far from it."""
    run = run_for(model, "layernorm")
    return {"init": jax.device_get(jax.jit(run.init_state)().params), "random": random_params(run.trained, 1, 1.0)}


@functools.cache
def gradients_of(model: str, norm: str) -> dict[str, np.ndarray]:
    """`loss_and_gradient` of the model with this norm: one program for all that compare with it."""
    return loss_and_gradient(run_for(model, norm), model)


def loss_and_gradient(run: Programs, model: str) -> dict[str, np.ndarray]:
    """Of a batch, in one vector, at each of the points; by θ, the Pre-LN tree."""
    gradients = jax.jit(run.gradients())
    return {name: flat(gradients(params, batch_of(0, run.config), 3)) for name, params in points(model).items()}


def flat(tree: object) -> np.ndarray:
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


QUICK = {("gpt", "crmsnorm"), ("gpt-dropout", "crmsnorm")}


@pytest.mark.parametrize(
    ("model", "norm"),
    [
        pytest.param(
            *case, marks=[pytest.mark.xdist_group(f"step-{case[0]}"), *[pytest.mark.slow][: case not in QUICK]]
        )
        for case in itertools.product(MODELS, NORMS[1:])
    ],
)
def test_gradients_through_h_are_those_of_pre_ln(model, norm):
    for point, expected in gradients_of(model, "layernorm").items():
        assert relative(gradients_of(model, norm)[point], expected) < 1e-12, point


@pytest.mark.xdist_group("step-gpt-untied")
def test_those_of_a_swap_without_recentring_are_not():
    """The negative control: RMSNorm in LayerNorm's place, with the same tree."""
    run = run_for("gpt-untied", "layernorm")
    swapped = run.computing(changed(run.trained, norm="rmsnorm"))
    for point, actual in loss_and_gradient(swapped, "gpt-untied").items():
        assert relative(actual, gradients_of("gpt-untied", "layernorm")[point]) > 1e-3, point


# --- A hundred steps, of each optimizer. ---

# Each with a model and a norm; trained directly it is with the other norm.
RUNS = [
    ("adamw", "gpt-untied", "crmsnorm"),
    ("sgd", "gpt", "rmsnorm"),
    ("lamb", "vit", "crmsnorm"),
    ("muon", "gpt-dropout", "rmsnorm"),
    ("adafactor", "gpt", "crmsnorm"),
]


def runs(slow: bool = True) -> list:
    """One worker takes all of an optimizer, and so trains Pre-LN once; the first is quick, one more at most slow."""
    wide = [pytest.mark.wide]
    lengths = [[], wide, wide, [pytest.mark.slow] if slow else wide, wide]
    return [
        pytest.param(*case, id="-".join(case), marks=[pytest.mark.xdist_group(case[0]), *length])
        for case, length in zip(RUNS, lengths, strict=True)
    ]


@functools.cache
def losses(optimizer: str, model: str, norm: str, parameterization: str) -> np.ndarray:
    run = run_for(model, norm, parameterization, optimizer)
    step, batches = run.train_step(), [batch_of(i, run.config) for i in range(STEPS)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches)
    metrics = jax.jit(lambda batches: jax.lax.scan(step, run.init_state(), batches)[1])(stacked)
    return np.asarray(metrics["loss"])


def difference(optimizer: str, model: str, norm: str, parameterization: str) -> np.ndarray:
    """|Δloss| to Pre-LN, step by step."""
    expected = losses(optimizer, model, "layernorm", "pre_ln")
    assert expected[-20:].mean() < expected[:10].mean() - 0.1, "this run learns nothing, so it would show nothing"
    return np.abs(losses(optimizer, model, norm, parameterization) - expected)


@pytest.mark.parametrize(("optimizer", "model", "norm"), runs())
def test_pre_ln_parameterization_follows_pre_ln(optimizer, model, norm):
    assert difference(optimizer, model, norm, "pre_ln").max() <= 1e-9


@pytest.mark.parametrize(("optimizer", "model", "norm"), runs(slow=False))
def test_native_parameterization_does_not(optimizer, model, norm):
    """The negative control: the same function at the start, trained directly, goes another way."""
    other = {"rmsnorm": "crmsnorm", "crmsnorm": "rmsnorm"}[norm]
    apart = difference(optimizer, model, other, "native")
    assert apart[0] < 1e-12
    assert apart.max() > 1e-3


# --- The step's parts. ---


@functools.cache
def textbook() -> tuple[Programs, object, object]:
    """A run, its first state (on the host, since a step donates it) and its jitted step."""
    config = run_config("layernorm", "pre_ln")
    config.optimizer.update({"clip": 0.01, "weight_decay": 0.3, "warmup_steps": 4, "learning_rate": 0.1, "eps": 1e-8})
    run = run_of(config)
    return run, jax.device_get(jax.jit(run.init_state)()), run.train_step()


@pytest.mark.xdist_group("textbook")
def test_the_loss_weighs_tokens_not_sequences():
    run, state, step = textbook()
    batch = batch_of(0, run.config)
    batch["weights"][:, 3:] = 0
    batch["weights"][5:] = 0
    eval_step = run.eval_step()
    sums = eval_step(state.params, batch)
    nats, tokens = sums["nats"], sums["weight"]
    assert tokens == batch["weights"].sum()
    scrambled = dict(
        batch, tokens=np.where(np.pad(batch["weights"], ((0, 0), (1, 0)), constant_values=1) > 0, batch["tokens"], 0)
    )
    np.testing.assert_allclose(eval_step(state.params, scrambled)["nats"], nats, rtol=1e-12)
    np.testing.assert_allclose(step(state, batch)[1]["loss"], nats / tokens, rtol=1e-12)


@pytest.mark.xdist_group("textbook")
def test_the_pieces_of_a_batch_weigh_by_their_tokens():
    run, state, _ = textbook()
    batch = batch_of(0, run.config)
    batch["weights"][3:, 2:] = 0
    config = run.config.copy_and_resolve_references()
    config.accumulate = 2
    whole, pieces = (jax.jit(of.gradients())(state.params, batch, state.step) for of in (run, run_of(config)))
    np.testing.assert_allclose(pieces[0], whole[0], rtol=1e-12)
    np.testing.assert_allclose(flat(pieces[1]), flat(whole[1]), rtol=1e-9, atol=1e-12)


def test_the_schedule_warms_up_and_ends_at_its_fraction_of_the_peak():
    config = run_config("layernorm", "pre_ln")
    config.optimizer.update({"learning_rate": 2.0, "warmup_steps": 10, "final_learning_rate": 0.1})
    rates = np.array([make_schedule(config)(step) for step in range(STEPS + 1)])
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11))
    np.testing.assert_allclose(rates[-1], 0.2)
    assert (np.diff(rates[10:]) < 0).all()
    config.steps = 5  # shorter than the warm-up: it is cut off, nothing fails
    assert make_schedule(config)(4) == 1.0


@pytest.mark.xdist_group("textbook")
def test_adamw_step_is_the_textbooks():
    """One update against the formulas, through clip, decay mask and schedule (optax unbiases moments in float32)."""
    run, state, step = textbook()
    grads = jax.jit(run.gradients())(state.params, batch_of(0, run.config), state.step)[1]
    norm = np.linalg.norm(flat(grads))
    after, metrics = step(state, batch_of(0, run.config))
    np.testing.assert_allclose(metrics["grad_norm"], norm)
    np.testing.assert_allclose(metrics["learning_rate"], 0.025)
    rate = float(metrics["learning_rate"])  # which is rounded to float32

    def expected(p, g):
        g = g * min(1, 0.01 / norm)
        step = g / (np.abs(g) + 1e-8)  # both moments are unbiased after one step
        return p - rate * (step + (0.3 * p if p.ndim == 2 else 0))

    wanted = jax.tree.map(expected, state.params, jax.device_get(grads))
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
        jax.jit(jax.value_and_grad(total(f))) for f in (cross_entropy, optax.softmax_cross_entropy_with_integer_labels)
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
    run = run_of(run_config("crmsnorm", "pre_ln"))
    state = jax.eval_shape(run.init_state)
    jaxpr = str(run.train_step().trace(state, batch_of(0, run.config)).jaxpr)
    leaves = len(jax.tree.leaves(state.params))
    assert jaxpr.count("layout_constraint") >= leaves if platform == "tpu" else "layout_constraint" not in jaxpr


def test_binary_cross_entropy_takes_each_class_for_itself():
    logits, targets = np.array([[2.0, -1, 0.5]]), np.array([[0.7, 0.3, 0.0]])
    probability = 1 / (1 + np.exp(-logits))
    expected = -np.mean(np.log(np.where(targets > 0, probability, 1 - probability)))
    np.testing.assert_allclose(binary_cross_entropy(logits, targets), [expected], rtol=1e-12)


@pytest.mark.slow
def test_the_loss_that_is_asked_for_is_trained_and_augmentation_changes_with_step_and_seed():
    def program(**changes: object):
        config = run_config("layernorm", "pre_ln", family="vit")
        config.augment.shift = 2
        config.update(changes)
        gradients = run_of(config).gradients()
        return jax.jit(lambda step: gradients(params, batch_of(0, config), step)[0])

    params = jax.jit(run_of(run_config("layernorm", "pre_ln", family="vit")).init_params)()
    by_softmax, by_sigmoid, of_another_seed = program(), program(loss="sigmoid"), program(seed=1)
    assert by_softmax(0) == by_softmax(0)
    assert len({float(loss) for loss in (by_softmax(0), by_sigmoid(0), by_softmax(1), of_another_seed(0))}) == 4
    assert 0.5 < by_sigmoid(0) < 1  # log 2 a class, not log 5
