"""Image models of other libraries, as far as no other library is needed (`references/` has the rest)."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from commands import error_of, here
from foreign import random_tensors, write

from prenorm_jax import PrenormError
from prenorm_jax.interop.families import FAMILIES
from prenorm_jax.interop.files import Source, open_source
from prenorm_jax.interop.leaves import ForeignLeaves
from prenorm_jax.interop.preprocessing import preprocessing, said
from prenorm_jax.interop.views import NOTHING, axis_sizes, read_table, tensor_shape
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.train import convert_run

VIT = {"image_size": 6, "patch_size": 2, "hidden_size": 12, "num_attention_heads": 3, "num_hidden_layers": 1}
DINO = VIT | {"model_type": "dinov2", "mlp_ratio": 2}
VIT |= {"model_type": "vit", "intermediate_size": 20}


def shapes_of(config: dict, classifier: tuple[int, ...] | None = None) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of a family's table; with a classifier of this shape."""
    family = FAMILIES[config["model_type"]]
    head = {"classifier.weight": classifier} if classifier else {}
    model = family.model(config, head)
    places = [place for place in read_table(family.lines(config, head), 1) if place.path in param_shapes(model)]
    sizes = axis_sizes(model) | family.sizes(model)
    return {place.tensor: tensor_shape(place, sizes) for place in places if place.tensor != NOTHING}


@pytest.fixture(autouse=True)
def nothing_compared(monkeypatch):
    monkeypatch.setattr(convert_run, "COMPARED_BYTES", 0)


def test_leaves_that_lie_in_one_tensor_are_read_once_and_written_as_their_sum():
    """The bias of a classifier of two vectors: folding gives each half one of its own."""
    shapes = shapes_of(DINO, (5, 24))
    tensors = {name: np.ones(shape) for name, shape in shapes.items()}
    leaves = ForeignLeaves(FAMILIES["dinov2"], DINO, FAMILIES["dinov2"].model(DINO, shapes), tensors)
    first, second = ("head", "class", "bias"), ("head", "mean", "bias")
    np.testing.assert_array_equal(leaves.read(first), np.ones(5))
    np.testing.assert_array_equal(leaves.read(second), np.zeros(5))
    tensors["classifier.bias"][...] = 0  # as an export begins
    leaves.write(second, (slice(1, 3),), np.full(2, 7.0))
    leaves.write(first, (), np.arange(5.0))
    np.testing.assert_array_equal(tensors["classifier.bias"], [0, 8, 9, 3, 4])


# family -> (config.json, what its files' names may be in place of these, tensors that older files have too)
OTHER_NAMES = {
    "dinov3_vit": (
        {},
        ("layer.", "model.layer."),
        {"rope_embeddings.inv_freq": (1,), "embeddings.mask_token": (1, 1, 12)},
    ),
    "beit": (
        {"use_relative_position_bias": True},
        ("embeddings.", "beit.embeddings."),
        {"encoder.layer.0.attention.attention.relative_position_bias.relative_position_index": (10, 10)},
    ),
    "siglip_vision_model": ({}, ("encoder.", "vision_model.encoder."), {"embeddings.position_ids": (1, 9)}),
    "vit_mae": ({}, ("layernorm.", "vit.layernorm."), {"decoder.decoder_layers.0.layernorm_after.bias": (8,)}),
}


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_files_of_other_versions_have_other_names_and_buffers(name):
    keys, (prefix, other), more = OTHER_NAMES[name]
    config, family = VIT | keys | {"model_type": name}, FAMILIES[name]
    shapes = shapes_of(config)
    renamed = {
        tensor.replace(prefix, other, 1) if tensor.startswith(prefix) else tensor: x for tensor, x in shapes.items()
    }
    assert renamed.keys() != shapes.keys()
    leaves = ForeignLeaves(
        family,
        config,
        family.model(config, renamed),
        {tensor: np.zeros(shape, np.float32) for tensor, shape in (renamed | more).items()},
    )
    assert leaves.ignored == more.keys()
    without_bias = [("block_0", "attention", "key", "bias")] if name in ("beit", "dinov3_vit") else []
    assert leaves.absent == without_bias


def test_what_folding_gives_a_key_without_a_bias_is_dropped_only_where_softmax_drops_it():
    path = ("block_0", "attention", "key", "bias")
    for name, drops in (("beit", True), ("dinov3_vit", False)):
        config, family = VIT | {"model_type": name}, FAMILIES[name]
        tensors = {tensor: np.zeros(shape) for tensor, shape in shapes_of(config).items()}
        leaves = ForeignLeaves(family, config, family.model(config), tensors)
        leaves.write(path, (), np.zeros(12))
        if drops:
            leaves.write(path, (), np.ones(12))
        else:
            with pytest.raises(PrenormError, match=r"dinov3_vit format has no place for .*key/bias.*--keep-affine"):
                leaves.write(path, (), np.ones(12))


# --- config.json alone. ---

SPECTROGRAM = {"num_mel_bins": 9, "max_length": 13, "frequency_stride": 2, "time_stride": 2, "patch_size": 3}
TOWER = {"vision_config": {key: VIT[key] for key in VIT if key != "model_type"}}
LABELS = {"id2label": {str(i): str(i) for i in range(5)}}
# (config.json, the class it names, the pooling, classes)
ALONE = {
    "vit": (VIT | LABELS, "ViTForImageClassification", "class", 5),
    "vit, labels by number": (VIT | {"num_labels": 3}, "ViTForImageClassification", "class", 3),
    "vit, tokens": (VIT | LABELS, "ViTModel", "none", 0),
    "dinov2": (DINO | LABELS, "Dinov2ForImageClassification", "class_mean", 5),
    "deit": (VIT | {"model_type": "deit"}, "DeiTForImageClassificationWithTeacher", "distilled", 2),
    "deit, one head": (VIT | LABELS | {"model_type": "deit"}, "DeiTForImageClassification", "class", 5),
    "beit": (VIT | LABELS | {"model_type": "beit"}, "BeitForImageClassification", "mean", 5),
    "beit, own bias": (
        VIT | {"model_type": "beit", "use_relative_position_bias": True, "use_mean_pooling": False},
        "BeitModel",
        "none",
        0,
    ),
    "beit, masked": (VIT | {"model_type": "beit"}, "BeitForMaskedImageModeling", "none", 0),
    "dinov3": (VIT | {"model_type": "dinov3_vit", "use_gated_mlp": True}, "DINOv3ViTModel", "none", 0),
    "siglip": (TOWER | {"model_type": "siglip"}, "SiglipModel", "attention", 0),
    "siglip, classes": (TOWER | LABELS | {"model_type": "siglip"}, "SiglipForImageClassification", "mean", 5),
    "siglip, tokens": (
        VIT | {"model_type": "siglip_vision_model", "vision_use_head": False},
        "SiglipVisionModel",
        "none",
        0,
    ),
    "ast": (
        VIT | LABELS | SPECTROGRAM | {"model_type": "audio-spectrogram-transformer"},
        "ASTForAudioClassification",
        "class_pair",
        5,
    ),
    "mae": (VIT | {"model_type": "vit_mae"}, "ViTMAEForPreTraining", "none", 0),
    "clip": (TOWER | {"model_type": "clip"}, "CLIPModel", "class", 0),
}


@pytest.mark.parametrize("name", ALONE)
def test_config_json_alone_says_of_the_network_what_its_tensors_do(name):
    config, architecture, pooling, classes = ALONE[name]
    config, family = config | {"architectures": [architecture]}, FAMILIES[config["model_type"]]
    model = family.model(config)
    assert (model.pooling, model.classes) == (pooling, classes)
    shapes = shapes_of(config)
    assert family.model(config, shapes) == model
    assert not family.unread(config, shapes)
    shapes |= {"lm_head.weight": (7, 12)} if "masked" in name else {}
    others = {key: value for key, value in config.items() if key != "architectures"}
    assert family.model(others, shapes) == model  # nor is it needed beside them


def test_of_a_clip_the_older_vision_config_counts_alone_and_what_nobody_reads_in_it_is_said():
    """As in transformers: with the defaults of what it leaves out."""
    family, config = FAMILIES["clip"], TOWER | {"model_type": "clip", "vision_config_dict": {"hidden_size": 96}}
    model = family.model(config)
    assert (model.d_model, model.patch_size, model.mlp_dim, model.activation) == (96, 32, 3072, "quick_gelu")
    config = {"model_type": "clip", "vision_config": {"hidden_size": 96, "window": 3}}
    assert family.unread(config) == ["vision_config.window"]


# --- How images are prepared. ---

SQUEEZED = {"do_resize": True, "size": {"height": 6, "width": 6}, "resample": 2, "image_mean": [0.5] * 3}
SQUEEZED |= {"image_std": [0.5] * 3, "rescale_factor": 1 / 255}
CUT = {"size": {"shortest_edge": 8}, "crop_size": {"height": 6, "width": 6}, "do_center_crop": True, "resample": 3}
CUT |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}
TIMM = {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3], "crop_pct": 0.7, "interpolation": "bicubic"}

# name -> (preprocessor_config.json, config.json) and (edge, mean, std, what is not applied)
PREPARED = {
    "squeezed": (SQUEEZED, {}, (6, (0.5,) * 3, (0.5,) * 3, r"squeezed to 6 × 6.*resampling is bilinear")),
    "squeezed, as of old": (
        {"size": 6, "feature_extractor_type": "ViTFeatureExtractor", "image_mean": [0.5], "image_std": [0.5]},
        {},
        (6, (0.5,), (0.5,), "squeezed to 6 × 6"),
    ),
    "cut": (CUT, {}, (8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "$^")),
    "cut, within a processor's": ({"image_processor": CUT}, {}, (8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "$^")),
    "not divided": (CUT | {"rescale_factor": 1.0}, {}, (8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "not divided by 255")),
    "not normalised": (CUT | {"do_normalize": False}, {}, (8, (0.0,), (1.0,), "$^")),
    "timm": (None, {"pretrained_cfg": TIMM}, (8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "$^")),
    "timm, squashed": (
        None,
        {"pretrained_cfg": TIMM | {"crop_mode": "squash", "interpolation": "bilinear"}},
        (8, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), "resampling is bilinear.*crop_mode='squash'"),
    ),
}


@pytest.mark.parametrize("name", PREPARED)
def test_what_a_source_does_with_images_is_set_and_what_is_not_is_said(name, tmp_path):
    given, config, (edge, mean, std, others) = PREPARED[name]
    if given is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(given))
    found = preprocessing(
        Source("source", tmp_path, config, {"model.safetensors": None}, {}), FAMILIES["vit"].model(VIT)
    )
    assert found[:3] == (edge, mean, std)
    assert re.search(others, "; ".join(found.others)), found.others


def test_an_imported_classifier_has_the_sources_normalisation_and_says_the_rest(tmp_path):
    labels = {"id2label": {"0": "cat", "1": "dog"}}
    shapes = {f"vit.{name}".replace("vit.classifier", "classifier"): s for name, s in shapes_of(VIT, (2, 12)).items()}
    write(tmp_path / "source", random_tensors(shapes), VIT | labels)
    (tmp_path / "source" / "preprocessor_config.json").write_text(json.dumps(CUT | {"resample": 2}))
    said_ = here("-m", "prenorm_jax.convert", tmp_path / "source", tmp_path / "run", "--to=rmsnorm").stdout
    data = json.loads((tmp_path / "run" / "config.json").read_text())["data"]
    assert (data["image_size"], data["mean"], data["std"]) == (8, [0.1, 0.2, 0.3], [1, 2, 3])
    assert (tmp_path / "run" / "source" / "preprocessor_config.json").is_file()
    assert "resampling is bilinear, here bicubic" in said_
    assert "labels: names of 2" in said_
    assert "tokenizer" not in said_
    assert "eval.py --workdir=" in said_


def test_without_a_word_of_images_that_is_said():
    model = FAMILIES["vit"].model(VIT)
    lines = said(None, model, Path("run"))
    assert "does not say how images are prepared" in lines[0]
    assert lines[-1] == "it has no classifier, so that it gives features (model.pooling=none)"


def test_of_spectrograms_nothing_is_asked_that_is_said_of_images(tmp_path):
    """A feature extractor's file has other keys, which would not be understood."""
    config = ALONE["ast"][0]
    model = FAMILIES[config["model_type"]].model(config)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"num_mel_bins": 9, "mean": -4.2, "std": 4.5}))
    assert preprocessing(Source("source", tmp_path, config, {"model.safetensors": None}, {}), model) is None
    assert said(None, model, Path("run")) == [
        "it takes spectrograms, 9 mel bins × 13 frames: no data here has any to evaluate it on"
    ]


# --- Refused, in one line. ---


def test_a_zip_of_objects_or_of_damaged_arrays_is_refused_and_nothing_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (pytest.fail, ("it was unpickled",))

    np.savez(tmp_path / "objects.npz", a=np.array([Bomb()], object))
    np.savez(tmp_path / "cut.npz", a=np.zeros(999))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-100])
    np.savez(tmp_path / "swapped.npz", a=np.zeros(3, ">f4"))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    for name, line in {
        "objects": "holds Python objects, which are not read",
        "cut": "is damaged, or no .npz of arrays",
        "swapped": "holds numbers of a dtype that is not read, a (>f4)",
        "other": "the file has no tensor embedding/kernel, which says what the network is",
    }.items():
        error = error_of("-m", "prenorm_jax.convert", tmp_path / f"{name}.npz", tmp_path / "run", "--to=rmsnorm")
        assert line in error, error
        assert not (tmp_path / "run").exists()


TIMMS = {"pos_embed": (1, 9, 12), "patch_embed.proj.weight": (12, 3, 2, 2), "blocks.0.mlp.fc2.weight": (12, 20)}
TIMMS |= {"blocks.0.mlp.fc1.weight": (20, 12), "reg_token": (1, 2, 12), "attn_pool.latent": (1, 1, 12)}
NAMED = {"architecture": "vit_base_patch16_siglip_224", "pretrained_cfg": {"input_size": [3, 6, 6]}}
REFUSED = {
    "rectangle": (VIT | {"image_size": [6, 8]}, {}, r"image_size=\[6, 8\] is no square"),
    "activation": (VIT | {"hidden_act": "gelu_10"}, {}, "hidden_act='gelu_10' changes"),
    "clip's classifier": (
        {"model_type": "clip_vision_model"},
        {"classifier.weight": (5, 768)},
        "a CLIP's classifier reads the raw stream",
    ),
    "a clip's classifier by its class": (
        TOWER | {"model_type": "clip", "architectures": ["CLIPForImageClassification"]},
        {},
        "a CLIP's classifier reads the raw stream",
    ),
    "strides": (
        {"model_type": "audio-spectrogram-transformer", "time_stride": 7},
        {},
        "frequency_stride=10 and time_stride=7 differ",
    ),
    "two biases": (
        {"model_type": "beit", "use_relative_position_bias": True, "use_shared_relative_position_bias": True},
        {},
        "no model here has both",
    ),
    "segmentation": (
        {"model_type": "beit"},
        {"decode_head.classifier.weight": (3, 3)},
        "a BEiT for segmentation reads the raw stream",
    ),
    "two norms": (
        {"model_type": "beit", "use_mean_pooling": False, "architectures": ["BeitForMaskedImageModeling"]},
        {},
        "use_mean_pooling=False: for masked image modelling a second norm",
    ),
    "deit's activation": ({"model_type": "deit", "hidden_act": "mish"}, {}, "hidden_act='mish' changes the function"),
    "siglip's rectangle": (
        {"model_type": "siglip", "vision_config": {"image_size": [224, 196]}},
        {},
        r"image_size=\[224, 196\] is no square",
    ),
    "dinov3's heads": (
        {"model_type": "dinov3_vit", "hidden_size": 18, "num_attention_heads": 3},
        {},
        "needs a model.head_dim divisible by 4, not 6",
    ),
    "dinov3's key": ({"model_type": "dinov3_vit", "key_bias": "no"}, {}, "key_bias='no' must be of type bool"),
    "mae's norm": ({"model_type": "vit_mae", "layer_norm_eps": "1e-5"}, {}, "layer_norm_eps='1e-5' must be of type"),
    "unknown to timm's table": (
        NAMED | {"architecture": "vit_base_patch16_rpn_224"},
        TIMMS,
        "'vit_base_patch16_rpn_224'",
    ),
    "of RMSNorms": (NAMED | {"architecture": "vit_base_patch16_xp_224"}, TIMMS, "is none of timm's that are known"),
    "arguments": (NAMED | {"model_args": {"act_layer": "relu"}}, TIMMS, "model_args: act_layer='relu' may change"),
    "pooling": (NAMED | {"global_pool": "avgmax"}, TIMMS, "global_pool='avgmax' changes the function"),
    "registers before a pooling": (NAMED, TIMMS, "pools the patches alone by attention"),
    "pre_logits": ({"model_type": "vit_npz"}, {"pre_logits/kernel": (3, 3)}, "tanh of one layer more"),
    "no square of patches": (
        {"model_type": "vit_npz"},
        {"embedding/kernel": (2, 2, 3, 12), "pos_embedding": (1, 7, 12)}
        | {"Transformer/encoderblock_0/MultiHeadDotProductAttention_1/query/kernel": (12, 3, 4)},
        "pos_embedding has 7 rows, which is no square",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_model_here_computes_is_refused_by_name(name):
    config, shapes, line = REFUSED[name]
    family = FAMILIES[config.get("model_type", "timm")]
    with pytest.raises(PrenormError, match=line):
        family.model(config, shapes)


def test_a_folder_of_timms_is_another_librarys_and_one_of_a_single_npz_too(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(NAMED))
    with pytest.raises(PrenormError, match="should hold one file of weights"):
        open_source(tmp_path)
    (tmp_path / "npz").mkdir()
    np.savez(tmp_path / "npz" / "B_16.npz", a=np.zeros(3))
    assert list(open_source(tmp_path / "npz").tensors) == ["a"]
