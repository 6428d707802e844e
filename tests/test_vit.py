"""The ViT: against an independent NumPy implementation, its parts against known values, what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    logits,
    model_config,
    pooled,
    random_inputs,
    random_params,
    relative,
    tiny_vit,
    vit_configs,
)
from flax.traverse_util import flatten_dict, unflatten_dict
from hypothesis import given, settings
from oracle import numpy_vit

from prenorm_jax import PrenormError, build_model, convert_config, sizes
from prenorm_jax.config import base_config
from prenorm_jax.equivalence.choice import coordinate_choices
from prenorm_jax.equivalence.convert import convert_params
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import NORMS, ModelConfig
from prenorm_jax.models.positions import patch_angles, rotate_patches, sincos2d_table
from prenorm_jax.models.transformer import activate
from prenorm_jax.models.vit import PatchEmbedding


def check_against_numpy(config):
    params, images = random_params(config, 1, embedding_mean=3.0), random_inputs(config)
    assert relative(logits(config, params, images), numpy_vit(config, params, images)) < 1e-11


@pytest.mark.parametrize("config", pooled("vit"))
def test_matches_an_independent_implementation(config):
    check_against_numpy(config)


@pytest.mark.wide
@given(config=vit_configs())
@settings(max_examples=200, derandomize=False)
def test_any_network_matches_it(config):
    check_against_numpy(config)


SPECTROGRAM = {"image_size": 9, "image_width": 13, "patch_size": 3, "patch_stride": 2, "channels": 1}
SPECTROGRAM |= {"distillation_token": True, "pooling": "class_pair", "pooled_norm": True, "depth": 1}


@pytest.mark.parametrize("classes", [0, 5])
def test_a_spectrogram_of_overlapping_patches_matches_it_under_every_norm(classes):
    """The norm behind the pooling is no reader that could take up the final norm's affine: that stays."""
    config = tiny_vit(**SPECTROGRAM, classes=classes)
    check_against_numpy(config)
    params, images = random_params(config, 1, embedding_mean=3.0), random_inputs(config)
    for to in ("rmsnorm", "crmsnorm"):
        converted = convert_params(params, config, to)
        assert {"head_affine", "pooled_norm"} < converted.keys()
        assert relative(logits(convert_config(config, to), converted, images), logits(config, params, images)) < 1e-10


@pytest.mark.parametrize(
    "changes",
    [
        {"post_norm": True},
        {"final_norm": False},
        {"pooling": "attention", "norm_after_pooling": True},
    ],
)
def test_matches_it_where_conversion_is_refused(changes):
    check_against_numpy(tiny_vit(**changes))
    with pytest.raises(PrenormError, match="converts only with" if "post_norm" in changes else "not convertible"):
        convert_config(tiny_vit(**changes, norm_affine=False), "rmsnorm")


HEADLESS = {
    "class": {"pooling": "class"},
    "mean": {"pooling": "mean"},
    "mean, then the norm": {"pooling": "mean", "norm_after_pooling": True},
    "attention": {"pooling": "attention"},
    "tokens": {"pooling": "none"},
    "both class tokens": {"pooling": "class_pair", "distillation_token": True},
    "without an affine": {"pooling": "class", "final_norm_affine": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADLESS)
def test_without_a_head_the_features_are_the_same_under_every_norm(name):
    """The final norm keeps its affine where nothing reads it; that of a pooling by attention is folded into that."""
    config = tiny_vit(depth=1, classes=0, registers=2, **HEADLESS[name])
    params, images = random_params(config, 1, embedding_mean=3.0), random_inputs(config)
    expected = numpy_vit(config, params, images)
    assert expected.shape[-1] == config.d_model
    assert relative(logits(config, params, images), expected) < 1e-11
    for to in ("rmsnorm", "crmsnorm"):
        converted = convert_params(params, config, to)
        assert ("head_affine" in converted) == (name not in ("attention", "without an affine"))
        assert relative(logits(convert_config(config, to), converted, images), expected) < 1e-10, to
    with pytest.raises(
        PrenormError, match=r"model.final_norm=False with model.classes=0: the output is the raw stream"
    ):
        convert_config(tiny_vit(classes=0, final_norm=False), "rmsnorm")


def test_without_a_head_coordinates_are_chosen_as_for_one_that_is_the_identity():
    config = tiny_vit(depth=1, classes=0, pooling="none")
    params = random_params(config, 1)
    headed = tiny_vit(depth=1, classes=config.d_model, head_bias=False)
    with_head = {name: leaf for name, leaf in params.items() if name != "head_affine"}
    with_head |= {"head_norm": params["head_affine"], "head": {"kernel": np.eye(config.d_model)}}
    for own, expected in zip(coordinate_choices(params, config), coordinate_choices(with_head, headed), strict=True):
        assert own[:2] == expected[:2]
        assert own.error == pytest.approx(expected.error, rel=1e-12)


def test_the_patch_embedding_is_a_convolution():
    config = tiny_vit(patch_size=3)
    images = random_inputs(config)
    module = PatchEmbedding(config)
    variables = nn.unbox(module.init(jax.random.key(0), images))
    conv = nn.Conv(config.d_model, (3, 3), strides=(3, 3), padding="VALID", param_dtype="float64")
    convs = jax.eval_shape(conv.init, jax.random.key(0), images)
    assert jax.tree.map(jnp.shape, nn.unbox(convs)) == jax.tree.map(jnp.shape, variables)
    expected = conv.apply(variables, images).reshape(len(images), -1, config.d_model)
    np.testing.assert_allclose(module.apply(variables, images), expected, rtol=1e-6, atol=1e-6)


def test_the_sincos_table():
    table = sincos2d_table(3, 8)
    assert table.shape == (9, 8)
    np.testing.assert_allclose(table[0], [0, 0, 1, 1, 0, 0, 1, 1])
    # The second patch of the third row: x = 1, y = 2, frequencies 1 and 1/10000.
    expected = [f(n * w) for n in (1, 2) for f in (np.sin, np.cos) for w in (1, 1e-4)]
    np.testing.assert_allclose(table[7], expected)


@pytest.mark.parametrize("norm", NORMS)
def test_stochastic_depth_leaves_out_whole_branches_of_an_example(norm):
    """With its only branch scaled up or left out, each example's logits are one of two."""
    config = tiny_vit(
        norm=norm, depth=1, parallel=True, stochastic_depth=0.5, stochastic_depth_schedule="constant", mlp_dim=1
    )
    params = random_params(config, 1)
    params["block_0"]["mlp"]["down"] = jax.tree.map(jnp.zeros_like, params["block_0"]["mlp"]["down"])
    image = np.repeat(random_inputs(config)[:1], 64, axis=0)
    values = logits(config, params, image, train=True, rngs={"dropout": jax.random.key(0)})
    kept, counts = np.unique(np.round(values, 9), axis=0, return_counts=True)
    assert len(kept) == 2
    assert counts.min() > 16
    doubled = jax.tree.map(lambda x: x, params)
    doubled["block_0"]["attention"]["out"] = jax.tree.map(lambda x: x * 2, params["block_0"]["attention"]["out"])
    left_out = jax.tree.map(lambda x: x, params)
    left_out["block_0"]["attention"]["out"] = jax.tree.map(jnp.zeros_like, params["block_0"]["attention"]["out"])
    for expected in (doubled, left_out):
        distance = np.abs(kept - logits(config, expected, image[:1])).max(1).min()
        assert distance < 1e-7


def test_stochastic_depth_grows_from_the_first_block():
    """The first block of a linear schedule is never left out, the last is."""
    config = tiny_vit(depth=2, stochastic_depth=0.9)
    params, images = random_params(config, 1), random_inputs(config)
    params["block_1"] = jax.tree.map(jnp.zeros_like, params["block_1"])
    key = {"dropout": jax.random.key(0)}
    assert relative(logits(config, params, images, train=True, rngs=key), logits(config, params, images)) < 1e-12


def test_centring_before_the_layer_scale_is_another_function():
    """λ comes between the writer and the stream: it has to be folded in first."""
    config = tiny_vit(layer_scale=0.1)
    params, images = random_params(config, 1), random_inputs(config)
    expected = logits(config, params, images)
    folded = convert_params(params, config, "rmsnorm")
    assert relative(logits(convert_config(config, "rmsnorm"), folded, images), expected) < 1e-10
    unscaled = {path: leaf for path, leaf in flatten_dict(params).items() if not path[-1].endswith("_scale")}
    wrong = flatten_dict(convert_params(unflatten_dict(unscaled), tiny_vit(), "rmsnorm"))
    for path, scale in flatten_dict(params).items():
        if path[-1].endswith("_scale"):
            writer = (*path[:-1], path[-1].removesuffix("_scale"))
            wrong |= {(*writer, leaf): wrong[*writer, leaf] * scale for leaf in ("kernel", "bias")}
    assert relative(logits(convert_config(config, "rmsnorm"), unflatten_dict(wrong), images), expected) > 1e-3


def test_a_second_class_token_left_raw_or_pooling_rows_folded_otherwise_is_another_function():
    """Both class tokens write; of an attention pooling key and value read the stream, and the query does not."""
    config = tiny_vit(depth=1, distillation_token=True, pooling="attention", classes=0)
    params, images = random_params(config, 1, embedding_mean=3.0), random_inputs(config)
    converted, target = convert_params(params, config, "rmsnorm"), convert_config(config, "rmsnorm")
    expected = logits(config, params, images)
    assert relative(logits(target, converted, images), expected) < 1e-10
    scale, pool = params["pool_norm"]["scale"], converted["pool"]
    wrong = {
        "token": {"distillation_token": params["distillation_token"]},
        "query": {"pool": pool | {"query": pool["query"] | {"kernel": pool["query"]["kernel"] * scale[:, None]}}},
        "key": {"pool": pool | {"key": params["pool"]["key"]}},
        "value": {"pool": pool | {"value": params["pool"]["value"]}},
    }
    for name, leaves in wrong.items():
        assert relative(logits(target, converted | leaves, images), expected) > 1e-2, name


@pytest.mark.parametrize("grid", [(3, 3), (2, 4)])
def test_patches_are_turned_by_row_and_column_and_what_stands_before_them_not_at_all(grid):
    T, K = 3 + grid[0] * grid[1], 8
    angles = patch_angles(T, K, 100.0, grid)
    assert not angles[:3].any()
    y, x = np.divmod(np.arange(T - 3), grid[1])
    for part, place, size in ((angles[3:, :2], y, grid[0]), (angles[3:, 2:], x, grid[1])):
        middle = (2 * place + 1 - size) / size
        np.testing.assert_allclose(part, 2 * np.pi * np.stack([middle, middle / 10], 1), atol=1e-12)
    vectors = np.random.default_rng(0).normal(size=(1, T, 2, K))
    turned = rotate_patches(jnp.asarray(vectors), 100.0, grid)
    np.testing.assert_array_equal(turned[:, :3], vectors[:, :3])
    first, second = np.split(np.asarray(turned), 2, axis=-1)
    expected = (vectors[..., :4] + 1j * vectors[..., 4:]) * np.exp(1j * angles[None, :, None])
    np.testing.assert_allclose(first + 1j * second, expected, atol=1e-12)


def test_leaving_the_mean_in_normed_heads_is_another_function():
    config = tiny_vit(qk_norm=True)
    params, images = random_params(config, 1), random_inputs(config)
    converted = convert_params(params, config, "rmsnorm")
    expected = logits(config, params, images)
    key = converted["block_0"]["attention"]["key"]
    key["kernel"] = key["kernel"].at[0].add(0.5)
    assert relative(logits(convert_config(config, "rmsnorm"), converted, images), expected) > 1e-3
    with pytest.raises(PrenormError, match="block_0/attention/key/kernel is not zero-mean over each head"):
        convert_params(converted, convert_config(config, "rmsnorm"), "layernorm")


def of_size(name: str) -> ModelConfig:
    return model_config(base_config("vit").model.to_dict() | sizes.vit(name) | {"scan": True})  # one block is traced


def parameters(name: str) -> int:
    return sum(leaf.value.size for leaf in abstract_params(of_size(name)).values())


@pytest.mark.parametrize(
    ("name", "millions"),
    [("Ti/16", 5.7), ("S/16", 22.1), ("B/16", 86.6), ("L/16", 304.3), ("H/14", 632.0), ("g/14", 1011), ("G/14", 1843)],
)
def test_sizes_are_those_of_the_papers(name, millions):
    """With a class token and 1,000 classes at 224 pixels (the g and G of arXiv 2106.04560 differ in their head)."""
    assert parameters(name) / 1e6 == pytest.approx(millions, rel=0.01)


def test_22b_has_its_parameters():
    assert parameters("22B") == pytest.approx(21.7e9, rel=0.03)
    assert convert_config(of_size("22B"), "crmsnorm").qk_norm


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "model.patch_size=5 does not divide model.image_size=224"),
        (
            {"pooling": "max"},
            "model.pooling='max' is not one of class, mean, class_mean, distilled, class_pair, attention, none",
        ),
        ({"pooling": "none"}, "model.pooling='none' gives all tokens, which no head reads: set model.classes=0"),
        ({"pooling": "class_mean", "classes": 0}, "model.classes=0 gives one vector"),
        ({"pooling": "distilled"}, "model.pooling='distilled' needs model.distillation_token=True"),
        (
            {"distillation_token": True, "class_token": False},
            "model.distillation_token=True needs model.class_token=True",
        ),
        (
            {"pooling": "class_mean", "pooled_norm": True},
            "model.pooled_norm=True needs model.pooling='class', 'mean' or",
        ),
        ({"positions": "rotary2d", "head_dim": 6}, "'rotary2d' needs a model.head_dim divisible by 4, not 6"),
        ({"positions": "sincos2d", "image_width": 448}, "needs as many patches both ways: unset model.image_width"),
        ({"image_width": 100}, "model.patch_size=16 does not divide model.image_width=100"),
        ({"patch_stride": 10, "patch_size": 225}, "model.patch_size=225 is larger than the images"),
        ({"class_token": False}, "model.pooling='class' needs model.class_token=True"),
        ({"positions": "rotary"}, "model.positions='rotary' is not one of learned, sincos2d, rotary2d, none"),
        ({"positions": "sincos2d", "d_model": 6, "heads": 2}, "needs a model.d_model divisible by 4, not 6"),
        ({"vocab_size": 7}, "unknown key model.vocab_size"),
        ({"window": 7}, "unknown key model.window"),
        ({"stochastic_depth": 1.0}, "model.stochastic_depth=1.0 must be at least 0 and below 1"),
        ({"registers": -1}, "model.registers=-1 must be at least 0"),
        ({"family": "cnn"}, "model.family='cnn' is not one of gpt, encoder, vit"),
    ],
)
def test_a_wrong_config_is_named(changes, message):
    with pytest.raises(PrenormError) as error:
        build_model(base_config("vit").model.to_dict() | changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_images_that_do_not_fit_are_an_error():
    config = tiny_vit()
    with pytest.raises(PrenormError, match=r"images of shape \(6, 5, 2\) do not fit the model's, \(6, 6, 2\)"):
        build_model(config).apply({"params": random_params(config, 0)}, np.zeros((1, 6, 5, 2)))


def test_an_unknown_size_is_named():
    with pytest.raises(PrenormError, match="ViT size='XL' is not one of Ti, S, B"):
        sizes.vit("XL/16")


class PublicAttentionBlock(nn.Module):
    """A block with the module names that Flax gives in the public JAX checkpoints."""

    heads: int
    mlp_dim: int

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-6, name="LayerNorm_0")(x)
        x += nn.MultiHeadDotProductAttention(self.heads, name="MultiHeadDotProductAttention_1")(y, y)
        y = nn.LayerNorm(epsilon=1e-6, name="LayerNorm_2")(x)
        hidden = nn.gelu(nn.Dense(self.mlp_dim, name="MlpBlock_3/Dense_0")(y))
        return x + nn.Dense(x.shape[-1], name="MlpBlock_3/Dense_1")(hidden)


class PublicViT(nn.Module):
    """The same of the whole model, from Flax's own layers; a "/" in a name is a level of the checkpoint's tree."""

    config: ModelConfig

    @nn.compact
    def __call__(self, images):
        c = self.config
        P, d, B = c.patch_size, c.d_model, len(images)
        x = nn.Conv(d, (P, P), strides=(P, P), padding="VALID", name="embedding")(images).reshape(B, -1, d)
        token = self.param("cls", nn.initializers.normal(1), (1, 1, d))
        x = jnp.concatenate([jnp.tile(token, (B, 1, 1)), x], axis=1)
        x += self.param("Transformer/posembed_input/pos_embedding", nn.initializers.normal(1), (1, *x.shape[1:]))
        for i in range(c.depth):
            x = PublicAttentionBlock(c.heads, c.mlp_dim, name=f"Transformer/encoderblock_{i}")(x)
        x = nn.LayerNorm(epsilon=1e-6, name="Transformer/encoder_norm")(x)
        return nn.Dense(c.classes, name="head")(x[:, 0])


NAMES = {  # of configs/vit_s16_imagenet.py
    "patch_embedding": "embedding",
    "class_token": "cls",
    "position_embedding": "Transformer/posembed_input/pos_embedding",
    "block_0": "Transformer/encoderblock_0",
    "block_1": "Transformer/encoderblock_1",
    "attention_norm": "LayerNorm_0",
    "attention": "MultiHeadDotProductAttention_1",
    "mlp_norm": "LayerNorm_2",
    "mlp/up": "MlpBlock_3/Dense_0",
    "mlp/down": "MlpBlock_3/Dense_1",
    "head_norm": "Transformer/encoder_norm",
}


def test_the_layout_is_that_of_the_public_checkpoints_by_other_names():
    """Renaming, and reshapes that move no number, make their tree ours: the logits are the same."""
    config = tiny_vit(activation="gelu_tanh", dtype="float64", epsilon=1e-6)
    images = random_inputs(config).astype(np.float64)
    public = PublicViT(config)
    variables = jax.eval_shape(public.init, jax.random.key(0), images)
    rng = np.random.default_rng(0)
    theirs = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), variables["params"])
    expected = jax.jit(public.apply)({"params": theirs}, images)

    flat = {"/".join(path): leaf for path, leaf in flatten_dict(theirs).items()}
    ours = {}
    for path, leaf in abstract_params(config).items():
        name = "/".join(path).replace("mlp/up", NAMES["mlp/up"]).replace("mlp/down", NAMES["mlp/down"])
        name = "/".join(NAMES.get(part, part) for part in name.split("/"))
        ours[path] = flat.pop(name).reshape(leaf.value.shape)
    assert not flat
    assert relative(logits(config, unflatten_dict(ours), images), expected) < 1e-6


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_gelu_is_that_of_the_paper_in_every_dtype(dtype):
    """x Φ(x) and its derivative Φ(x) + x φ(x), arXiv 1606.08415."""
    config = tiny_vit(activation="gelu")
    x = jnp.linspace(-8, 8, 999).astype(dtype)
    value, slope = jax.jit(jax.vmap(jax.value_and_grad(lambda x: activate(config, x))))(x)
    assert value.dtype == slope.dtype == jnp.dtype(dtype)
    x = x.astype("float64")
    below = jax.scipy.stats.norm.cdf(x)
    eps, wide = (float(jnp.finfo(d).eps) for d in (dtype, jnp.promote_types(dtype, "float32")))
    for ours, expected in ((value, x * below), (slope, below + x * jax.scipy.stats.norm.pdf(x))):
        np.testing.assert_allclose(ours.astype("float64"), expected, rtol=2 * eps, atol=4 * wide)
