"""Every mesh, layout of the blocks, rematerialisation and accumulation gives the loss curve of one device."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import changed, logits, random_inputs, random_params, run_of, tiny, tiny_vit
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.config import base_config
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import NORMS
from prenorm_jax.models.placement import computing_on, partition_spec
from prenorm_jax.models.registry import build_model
from prenorm_jax.models.stacking import stack_blocks, unstack_blocks
from prenorm_jax.train.sharding import check_sharding, sharding_table, tree_sharding

STEPS = 8
# (data, fsdp, tensor) with a product of 1, 2, 4 or 8.
MESHES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) in (1, 2, 4, 8)]
MODEL = {"depth": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp_dim": 32}
FAMILIES = {
    "gpt": {"vocab_size": 16, "max_len": 8, "window": 5, "clip_qkv": 0.1},
    "vit": {"image_size": 6, "patch_size": 2, "channels": 2, "classes": 8, "qk_norm": True, "gated_mlp": True},
}
FAMILIES["vit"] |= {"distillation_token": True, "pooling": "distilled", "positions": "rotary2d"}
FAMILIES["vit"] |= {"relative_bias": "shared"}


def run_config(family: str, norm: str, dtype: str) -> ConfigDict:
    config = base_config(family)
    config.steps, config.batch_size = 2 * STEPS, 16
    config.parameterization = "native" if family == "vit" else "pre_ln"
    config.model.update(MODEL | FAMILIES[family] | {"norm": norm, "dtype": dtype, "param_dtype": dtype})
    config.optimizer.warmup_steps = 2
    if family == "vit":
        # Calm: at twice the rate the gradient's norm passes 39 under crmsnorm, which turns the parameters' rounding in
        # float32 (3e-7) into 1e-5 of loss.
        config.optimizer.learning_rate = 5e-4
        config.augment.update({"shift": 1, "mixup": 0.1})
    return config


def batch_of(step: int, config: ConfigDict) -> dict[str, np.ndarray]:
    """Tokens that follow from the one before, with unequal weights; or images whose brightness is their class."""
    rng, size = np.random.default_rng(step), config.batch_size
    if config.model.family == "vit":
        labels_B = rng.integers(8, size=size)
        images = rng.integers(30, size=(size, 6, 6, 2)) + 25 * labels_B[:, None, None, None]
        batch = {"images": images.astype(np.uint8), "labels": labels_B.astype(np.int32)}
        return batch | {"weights": rng.integers(1, 4, size=size).astype(np.float32)}
    tokens_BxT = (rng.integers(16, size=(size, 1)) + np.arange(9)) % 16
    return {"tokens": tokens_BxT.astype(np.int32), "weights": rng.integers(1, 4, size=(size, 8)).astype(np.float32)}


def train(config: ConfigDict, devices: int) -> np.ndarray:
    """The losses. The last batch is the first one again, to see whether something is learned."""
    run = run_of(config, devices)
    assert run.mesh.size == devices
    shardings = run.state_formats()
    state = jax.device_put(first_state(config), shardings)
    step, losses = run.train_step(), []
    for i in range(STEPS):
        state, metrics = step(state, batch_of(i % (STEPS - 1), config))
        losses.append(metrics["loss"])

    def check_it_lies_as_before(leaf, place):
        assert leaf.sharding.is_equivalent_to(getattr(place, "sharding", place), leaf.ndim)

    jax.tree.map(check_it_lies_as_before, state, shardings)
    return np.array(jax.device_get(losses), np.float64)


@functools.cache
def initial(family: str, norm: str) -> Any:
    """The state at step 0 in float64, unrolled, on the host: how it is split when it is made is tested below."""
    return jax.device_get(jax.jit(run_of(run_config(family, norm, "float64")).init_state)())


def first_state(config: ConfigDict) -> Any:
    """The same numbers in the config's layout and dtype."""
    state = initial(config.model.family, norm_trained(config))
    if config.model.scan:
        params, opt_state = jax.jit(stack_blocks)((state.params, state.opt_state))
        state = state.replace(params=params, opt_state=opt_state)
    dtype = config.model.param_dtype
    return jax.tree.map(lambda x: np.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), state)


def norm_trained(config: ConfigDict) -> str:
    return config.model.norm if config.parameterization == "native" else "layernorm"


@functools.cache
def single_device(family: str, norm: str, dropout: float = 0.0) -> np.ndarray:
    """Losses in float64, without any of what must not change them."""
    config = run_config(family, norm, "float64")
    config.model.dropout = dropout
    losses = train(config, devices=1)
    assert losses[-1] < losses[0] - 0.01, "this run learns nothing, so it would show nothing"
    return losses


def check_same_curve(config: ConfigDict, shape: tuple[int, int, int]) -> None:
    """With that of one device; of Pre-LN, where it is what is trained."""
    model = config.model
    expected = single_device(model.family, norm_trained(config), model.dropout)
    config.mesh.fsdp, config.mesh.tensor = shape[1:]
    difference = np.abs(train(config, int(np.prod(shape))) - expected).max()
    assert difference < (1e-10 if model.dtype == "float64" else 1e-5), difference


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a mesh is tested with."""

    shape: tuple[int, int, int]
    family: str
    norm: str
    scan: bool
    accumulate: int
    remat: str
    dtype: str

    def config(self) -> ConfigDict:
        config = run_config(self.family, self.norm, self.dtype)
        config.accumulate = self.accumulate
        config.model.update({"scan": self.scan, "remat": self.remat, "dropout": self.dropout})
        return config

    @property
    def dropout(self) -> float:
        """Of GPTs, where each piece of a batch and each block of a scan does not draw masks of its own."""
        return 0.2 if self.family == "gpt" and not self.scan and self.accumulate == 1 else 0.0


# Every mesh once, and all else in turn.
TURNS = [
    Turn(
        shape,
        family=list(FAMILIES)[n // 2 % 2],
        norm=NORMS[(n + n // 6) % 3],
        scan=n // 3 % 2 == 1,
        accumulate=1 + n % 2,
        remat=("none", "dots", "full")[n // 3 % 3],
        dtype=("float32", "float64")[n // 4 % 4 > 0],
    )
    for n, shape in enumerate(MESHES)
]
LONG = [(1, 2, 2), (1, 4, 2), (2, 4, 1), (4, 1, 2)]  # the others are `wide`; all of two axes, for TPUs below of three


def how_long(shape: tuple[int, int, int]) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow if shape in LONG else pytest.mark.wide]


def test_turns_meet():
    """Each family with each norm meets every axis of the mesh; all else meets those, the axes, and one another."""
    fields = [field.name for field in dataclasses.fields(Turn)[1:]]
    values = {name: {getattr(turn, name) for turn in TURNS} for name in fields}
    assert [len(values[name]) for name in fields] == [2, 3, 2, 2, 3, 2]
    for one, other in itertools.combinations(fields, 2):
        met = {(getattr(turn, one), getattr(turn, other)) for turn in TURNS}
        assert met == set(itertools.product(values[one], values[other])), (one, other)
    for axis in range(3):
        assert any(turn.dropout and turn.shape[axis] > 1 for turn in TURNS)
        split = [turn for turn in TURNS if turn.shape[axis] > 1]
        assert {(turn.family, turn.norm) for turn in split} == set(itertools.product(FAMILIES, NORMS))
        assert all({getattr(turn, name) for turn in split} == values[name] for name in fields)


@pytest.mark.parametrize(
    "turn",
    [
        pytest.param(
            turn,
            id="x".join(map(str, turn.shape)),
            marks=[pytest.mark.xdist_group(turn.family), *how_long(turn.shape)],
        )
        for turn in TURNS
    ],
)
def test_every_mesh_takes_the_same_steps(turn):
    check_same_curve(turn.config(), turn.shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    "turn",
    [
        pytest.param(turn, id=turn.family, marks=pytest.mark.xdist_group(turn.family))
        for turn in (
            Turn((2, 2, 2), "gpt", "rmsnorm", True, 2, "none", "float64"),
            Turn((1, 2, 4), "vit", "crmsnorm", False, 1, "dots", "float64"),
        )
    ],
)
def test_on_tpus_layouts_are_asked_for_and_no_number_changes(turn, monkeypatch):
    single_device(turn.family, norm_trained(turn.config()), turn.dropout)  # as elsewhere
    monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda: "tpu")
    check_same_curve(turn.config(), turn.shape)


def test_there_are_eight_devices_and_all_mesh_shapes():
    """Without the devices the tests above would say less than they seem to."""
    assert jax.device_count() == 8 and len(MESHES) == 20


def test_state_is_split_along_all_axes_but_the_streams():
    config = run_config("gpt", "crmsnorm", "float64")
    config.mesh.fsdp, config.mesh.tensor, config.model.scan, config.parameterization = 2, 4, True, "native"
    run = run_of(config, 8)
    state = jax.jit(run.init_state, out_shardings=run.state_formats())()
    mu = state.opt_state[1][0].mu
    for tree in (state.params, mu):
        kernel = tree["blocks"]["mlp"]["up"]["kernel"]  # (depth, d-1, 32)
        assert kernel.addressable_shards[0].data.shape == (2, 15, 4)
        assert tree["blocks"]["mlp"]["down"]["kernel"].addressable_shards[0].data.shape == (2, 4, 15)
        assert tree["token_embedding"].addressable_shards[0].data.shape == (2, 16)  # tied: raw, d wide
    table = sharding_table(run.trained, run.mesh)
    assert "blocks/mlp/up/kernel" in table and "-, -, tensor+fsdp" in table


def test_bad_meshes_are_refused():
    config = run_config("gpt", "rmsnorm", "float64")
    config.mesh.fsdp = 3
    with pytest.raises(PrenormError, match=r"mesh\.fsdp=3 times mesh.tensor=1 does not divide the 8 devices"):
        run_of(config, 8)
    config.mesh.fsdp, config.accumulate = 2, 4
    with pytest.raises(PrenormError, match="batch_size=16 is not a multiple of the 8 groups of devices times accum"):
        run_of(config, 8)
    config.accumulate, config.model.vocab_size = 1, 17
    run = run_of(config, 8)
    check_sharding(run.trained, run.mesh, largest=17 * 16)
    with pytest.raises(PrenormError, match=r"every device would hold 272 numbers of token_embedding \(17, 16\)"):
        check_sharding(run.trained, run.mesh, largest=17 * 16 - 1)
    # Split by one axis of two is not split enough.
    config.model.vocab_size, config.mesh.tensor = 18, 4
    run = run_of(config, 8)
    assert run.mesh.shape["fsdp"] == 2
    with pytest.raises(PrenormError, match=r"144 numbers of token_embedding \(18, 16\)"):
        check_sharding(run.trained, run.mesh, largest=17 * 8)


@pytest.mark.parametrize("name", ["adamw", "sgd", "adafactor", "lamb", "muon"])
def test_moments_are_split_as_their_parameters_are(name):
    config = run_config("gpt", "rmsnorm", "float64")
    config.optimizer.name, config.mesh.fsdp = name, 8
    run = run_of(config, 8)
    state = jax.eval_shape(run.init_state)
    sharding = tree_sharding(state.opt_state, run.trained, run.mesh)
    kernel = [
        (leaf.shape, place.shard_shape(leaf.shape))
        for (path, leaf), place in zip(
            jax.tree_util.tree_leaves_with_path(state.opt_state), jax.tree.leaves(sharding), strict=True
        )
        if "'up'" in jax.tree_util.keystr(path) and leaf.shape == (16, 32)
    ]
    assert all(held == (16, 4) for _, held in kernel) and (kernel or name == "adafactor")  # which factors its moments


def test_axes_that_do_not_divide_are_not_split():
    config = run_config("gpt", "rmsnorm", "float64")
    config.mesh.fsdp, config.mesh.tensor = 2, 4
    mesh = run_of(config, 8).mesh
    assert partition_spec(("read", "mlp"), (15, 32), mesh, stored=True) == jax.P(None, ("tensor", "fsdp"))
    assert partition_spec(("read", "mlp"), (15, 32), mesh, stored=False) == jax.P(None, ("tensor",))
    assert partition_spec(("read", "mlp"), (15, 6), mesh, stored=True) == jax.P(None, ("fsdp",))


@pytest.mark.slow
def test_layouts_hold_the_same_numbers():
    def run(scan: bool):
        config = run_config("gpt", "crmsnorm", "float64")
        config.parameterization, config.model.scan = "native", scan
        return run_of(config)

    unrolled, scanned = run(False), run(True)
    params, stacked = (jax.device_get(jax.jit(run.init_params)()) for run in (unrolled, scanned))
    jax.tree.map(np.testing.assert_array_equal, stack_blocks(params), stacked)
    jax.tree.map(np.testing.assert_array_equal, unstack_blocks(stacked), params)
    shapes = {path: leaf.value.shape for path, leaf in abstract_params(scanned.trained).items()}
    assert shapes["blocks", "mlp", "up", "bias"] == (2, 32)
    tokens = random_inputs(scanned.trained)
    expected = logits(unrolled.trained, params, tokens)
    np.testing.assert_allclose(logits(scanned.trained, stacked, tokens), expected, atol=1e-13)


ATTENTION = {
    "partial rotary": {
        "positions": "rotary",
        "rotary_dim": 4,
        "rotary_interleaved": True,
        "window": 3,
        "clip_qkv": 0.5,
    },
    "alibi": {"positions": "alibi", "qk_norm": True, "qk_norm_by_head": True, "score_scale": 0.7, "embed_scale": 2.0},
    "by block": {"positions": "rotary", "window": 3, "attention_pattern": "gl", "global_rotary_base": 0.0},
    "patches": {"positions": "rotary2d", "relative_bias": "layer", "registers": 1, "clip_qkv": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_the_same_in_stacked_blocks_rematerialised_with_heads_on_other_devices(name):
    heads = {"heads": 4, "kv_heads": 2, "head_dim": 4 if name == "patches" else 6, "activation": "quick_gelu"}
    config = (tiny_vit if name == "patches" else tiny)(**ATTENTION[name], **heads)
    params, tokens = random_params(config, 1, embedding_mean=1.0), random_inputs(config)

    def gradient(config, params, mesh):
        def loss(params):
            with computing_on(mesh):
                return jnp.square(build_model(config).apply({"params": params}, tokens, train=True)).sum()

        return jax.device_get(jax.jit(jax.grad(loss))(params))

    run = run_config(config.family, "layernorm", "float64")
    run.mesh.tensor = 2
    alike = name != "by block"  # else scan refuses them
    given = stack_blocks(params) if alike else params
    found = unstack_blocks(gradient(changed(config, scan=alike, remat="full"), given, run_of(run, 4).mesh))
    for ours, expected in zip(*map(jax.tree.leaves, (found, gradient(config, params, None))), strict=True):
        # Of size 1 at least, but where keys are not turned, whose bias has none.
        assert np.abs(ours - expected).max() < 1e-11 * max(np.abs(expected).max(), 1)


def test_scan_refuses_what_differs_by_block():
    with pytest.raises(PrenormError, match=r"model.scan=True makes all blocks one, but model.stochastic_depth"):
        tiny(scan=True, stochastic_depth=0.1)
    with pytest.raises(
        PrenormError, match=r"model.scan=True makes all blocks one, but by model.attention_pattern='lg'"
    ):
        tiny(scan=True, window=3, attention_pattern="lg")
    tiny(scan=True, window=3, attention_pattern="lg", depth=1)
    config = run_config("gpt", "rmsnorm", "float64")
    config.model.scan, config.optimizer.name = True, "lamb"
    with pytest.raises(PrenormError, match="stacks those of all blocks"):
        jax.eval_shape(run_of(config).init_state)
