"""The .npz of JAX's ViT repositories, as these tests write them in both layouts, beside the ViT in NumPy (float64)."""

import json

import checkpoints as theirs
import ml_dtypes
import numpy as np
import pytest
from common import random_params, relative, tiny_vit
from oracle import numpy_vit

import prenorm_jax
from prenorm_jax import PrenormError
from prenorm_jax.interop.export import export_checkpoint
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.train import convert_run

pytestmark = pytest.mark.reference
nothing_compared = theirs.nothing_compared

BASE = {"activation": "gelu_tanh", "channels": 3, "mlp_dim": 20, "epsilon": 1e-6, "heads": 3}
# name -> (layout, prefix, whether the blocks are stacked, our config)
CASES = {
    "vision_transformer": ("vision_transformer", "", False, {}),
    "optimizer's target": ("vision_transformer", "opt/target/", False, {"pooling": "mean", "class_token": False}),
    "big_vision": ("big_vision", "params/", False, {"class_position": False}),
    "stacked": ("big_vision", "", True, {"pooling": "mean", "class_token": False, "positions": "sincos2d"}),
    "tower": ("big_vision", "params/img/", True, {"pooling": "attention", "class_token": False, "classes": 0}),
    "features": ("vision_transformer", "", False, {"classes": 0}),
}


def arrays_of(config, params, layout, prefix, stacked):
    """The tree's arrays as the layout has them, by hand."""
    first, attention, second, mlp = (
        ("LayerNorm_0", "MultiHeadDotProductAttention_1", "LayerNorm_2", "MlpBlock_3")
        if layout == "vision_transformer"
        else ("LayerNorm_0", "MultiHeadDotProductAttention_0", "LayerNorm_1", "MlpBlock_0")
    )
    p, H, K = {key: params[key] for key in params}, config.heads, config.head_dim

    def attended(name, tree):
        found = {}
        for part in ("query", "key", "value"):
            found[f"{name}/{part}/kernel"] = tree[part]["kernel"].reshape(-1, H, K)
            found[f"{name}/{part}/bias"] = tree[part]["bias"].reshape(H, K)
        return found | {
            f"{name}/out/kernel": tree["out"]["kernel"].reshape(H, K, -1),
            f"{name}/out/bias": tree["out"]["bias"],
        }

    def fed(name, tree):
        return {
            f"{name}/Dense_{i}/{leaf}": tree[part][leaf] for i, part in enumerate(("up", "down")) for leaf in tree[part]
        }

    def normed(name, tree):
        return {f"{name}/{leaf}": tree[leaf] for leaf in ("scale", "bias")}

    def block(tree):
        found = normed(first, tree["attention_norm"]) | attended(attention, tree["attention"])
        return found | normed(second, tree["mlp_norm"]) | fed(mlp, tree["mlp"])

    blocks = [block(p[f"block_{i}"]) for i in range(config.depth)]
    found = {f"embedding/{leaf}": p["patch_embedding"][leaf] for leaf in ("kernel", "bias")}
    if config.class_token:
        found["cls"] = p["class_token"][None]
    if config.positions == "learned":
        place = "Transformer/posembed_input/" if layout == "vision_transformer" else ""
        found[f"{place}pos_embedding"] = p["position_embedding"][None]
    if stacked:
        found |= {f"Transformer/encoderblock/{name}": np.stack([one[name] for one in blocks]) for name in blocks[0]}
    else:
        for i, one in enumerate(blocks):
            found |= {f"Transformer/encoderblock_{i}/{name}": x for name, x in one.items()}
    found |= normed("Transformer/encoder_norm", next(p[n] for n in ("head_norm", "pool_norm", "head_affine") if n in p))
    if "pool" in p:
        found |= {"MAPHead_0/probe": p["pool"]["probe"][None]} | fed("MAPHead_0/MlpBlock_0", p["pool"])
        found |= attended("MAPHead_0/MultiHeadDotProductAttention_0", p["pool"])
        found |= normed("MAPHead_0/LayerNorm_0", p["pool"]["mlp_norm"])
    if config.classes:
        found |= {f"head/{leaf}": p["head"][leaf] for leaf in ("kernel", "bias")}
    found = {prefix + name: np.asarray(x) for name, x in found.items()}
    return found | ({"params/txt/Dense_0/kernel": np.ones((3, 400)), "params/t": np.ones(1)} if "img" in prefix else {})


@pytest.fixture(scope="module", params=theirs.grouped(CASES))
def case(request, tmp_path_factory):
    """A file, its arrays, images, and the ViT's output in NumPy."""
    layout, prefix, stacked, changes = CASES[request.param]
    config = tiny_vit(**(BASE | changes))
    params = random_params(config, 1, embedding_mean=3.0)
    file = tmp_path_factory.mktemp("npz") / "ViT.npz"
    np.savez(file, **(arrays := arrays_of(config, params, layout, prefix, stacked)))
    if config.positions != "learned":
        file.with_suffix(".json").write_text(json.dumps({"image_size": config.image_size}))
    images = np.random.default_rng(1).normal(size=(2, 6, 6, 3)) + 1
    return file, arrays, images, numpy_vit(config, params, images)


def test_an_import_is_the_references_function_under_every_norm(case):
    file, _, images, expected = case
    theirs.check_function(file, images, expected, numpy_vit)


def test_an_import_comes_back_bit_for_bit_and_a_converted_one_as_the_same_function(case, tmp_path):
    file, arrays, images, expected = case
    import_checkpoint(file, tmp_path / "run", "layernorm")
    export_checkpoint(tmp_path / "run", tmp_path / "back", "layernorm")
    assert {path.name for path in (tmp_path / "back").iterdir()} - {"ViT.json"} == {"ViT.npz", "converted.json"}
    with np.load(tmp_path / "back" / "ViT.npz") as back:  # which checks the sums in the file, too
        assert set(back) == set(arrays)
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, back[name], strict=True, err_msg=name)
    import_checkpoint(file, tmp_path / "narrow", "crmsnorm")
    export_checkpoint(tmp_path / "narrow", tmp_path / "recentred", "layernorm")
    config, params = prenorm_jax.load(tmp_path / "recentred")
    assert relative(numpy_vit(config, params, images), expected) < 1e-9


@pytest.mark.parametrize("case", theirs.grouped(["big_vision"]), indirect=True)
def test_an_imported_workdir_is_converted_on_and_exported(case, tmp_path):
    file, _, images, expected = case
    import_checkpoint(file, tmp_path / "rms", "rmsnorm")
    convert_run.convert(tmp_path / "rms", tmp_path / "crms", "crmsnorm")
    export_checkpoint(tmp_path / "crms", tmp_path / "back", "layernorm")
    config, params = prenorm_jax.load(tmp_path / "back")
    assert relative(numpy_vit(config, params, images), expected) < 1e-9


@pytest.mark.parametrize("case", theirs.grouped(["vision_transformer", "stacked"]), indirect=True)
def test_bfloat16_and_compressed_arrays_are_read_as_they_are(case, tmp_path):
    _, arrays, _, _ = case
    narrow = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    np.savez_compressed(tmp_path / "ViT.npz", **{name: array.view("V2") for name, array in narrow.items()})
    (tmp_path / "ViT.json").write_text(json.dumps({"image_size": 6}))
    import_checkpoint(tmp_path / "ViT.npz", tmp_path / "run", "layernorm")
    export_checkpoint(tmp_path / "run", tmp_path / "back", "layernorm")
    with np.load(tmp_path / "back" / "ViT.npz") as back:
        for name, array in narrow.items():
            np.testing.assert_array_equal(array.view(np.uint16), back[name].view(np.uint16), err_msg=name)


def test_a_file_that_does_not_say_how_large_images_are_is_refused(tmp_path):
    config = tiny_vit(**(BASE | CASES["stacked"][3]))
    arrays = arrays_of(config, random_params(config, 1), *CASES["stacked"][:3])
    np.savez(tmp_path / "ViT.npz", **arrays)
    with pytest.raises(PrenormError, match=r"no pos_embedding, .* the same name with \.json"):
        prenorm_jax.load(tmp_path / "ViT.npz")
