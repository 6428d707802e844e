"""Imported, converted and exported image models beside the families' own libraries, in float64."""

import json

import checkpoints as theirs
import numpy as np
import pytest
import test_npz_checkpoints as npz
from common import logits, random_params, relative, tiny_vit
from oracle import ACTIVATE, numpy_vit

import prenorm_jax
from prenorm_jax.interop.export import export_checkpoint
from prenorm_jax.interop.families.timm import FAMILY, _heads
from prenorm_jax.interop.family import Given
from prenorm_jax.models.positions import patch_angles

pytestmark = pytest.mark.reference
nothing_compared = theirs.nothing_compared

SIDE, FRAMES, D = 9, 13, 24
VIT = {"image_size": SIDE, "patch_size": 3, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 3}
VIT |= {"layer_norm_eps": 3e-4}
LABELS = {"id2label": {i: f"label {i}" for i in range(5)}, "label2id": {f"label {i}": i for i in range(5)}}
REGISTERS = VIT | {"num_register_tokens": 2}
TEXT = {"vocab_size": 11, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3}
CLIP = {"vision_config": VIT | {"intermediate_size": 40, "projection_dim": 7}, "projection_dim": 7}
CLIP |= {"text_config": TEXT | {"projection_dim": 7, "max_position_embeddings": 6}}
PLAIN = VIT | {"intermediate_size": 40}
MAE = PLAIN | {"mask_ratio": 0.0, "decoder_hidden_size": 12, "decoder_num_hidden_layers": 1}
MAE |= {"decoder_num_attention_heads": 3, "decoder_intermediate_size": 16}
SIGLIP = {"vision_config": PLAIN, "text_config": TEXT | {"max_position_embeddings": 6, "projection_size": D}}
AST = {key: PLAIN[key] for key in PLAIN.keys() - {"image_size"}} | {"frequency_stride": 2, "time_stride": 2}
AST |= {"num_mel_bins": SIDE, "max_length": FRAMES}
BEIT = PLAIN | {"use_shared_relative_position_bias": True, "use_mask_token": True}
DINOV3 = PLAIN | {"num_register_tokens": 2, "rope_theta": 10.0}

# name -> (class, its configuration's, config.json, which of its outputs)
CASES = {
    "vit": ("ViTForImageClassification", VIT | LABELS | {"intermediate_size": 40}, "logits"),
    "vit-tokens": ("ViTModel", VIT | {"intermediate_size": 40, "qkv_bias": False}, "last_hidden_state"),
    "dinov2": ("Dinov2ForImageClassification", VIT | LABELS, "logits"),
    "dinov2-gated": ("Dinov2Model", VIT | {"use_swiglu_ffn": True}, "last_hidden_state"),
    "registers": ("Dinov2WithRegistersForImageClassification", REGISTERS | LABELS, "logits"),
    "clip-vision": ("CLIPVisionModel", CLIP["vision_config"], "pooler_output"),
    "clip-projected": ("CLIPVisionModelWithProjection", CLIP["vision_config"] | {"hidden_act": "gelu"}, None),
    "clip": ("CLIPModel", CLIP, None),
    "deit": ("DeiTForImageClassificationWithTeacher", PLAIN | LABELS, "logits"),
    "deit-one-head": ("DeiTForImageClassification", PLAIN | LABELS, "logits"),
    "mae": ("ViTMAEModel", MAE, "last_hidden_state"),
    "beit": ("BeitForImageClassification", PLAIN | LABELS | {"use_relative_position_bias": True}, "logits"),
    "beit-shared": (
        "BeitModel",
        BEIT | {"use_absolute_position_embeddings": True, "use_mean_pooling": False},
        "last_hidden_state",
    ),
    "beit-plain": ("BeitModel", PLAIN | {"layer_scale_init_value": 0.0}, "pooler_output"),
    "dinov3": ("DINOv3ViTModel", DINOV3, "last_hidden_state"),
    "dinov3-gated": (
        "DINOv3ViTModel",
        PLAIN | {"use_gated_mlp": True, "proj_bias": False, "key_bias": True, "hidden_act": "silu"},
        "last_hidden_state",
    ),
    "siglip-vision": ("SiglipVisionModel", PLAIN, "pooler_output"),
    "siglip": ("SiglipModel", SIGLIP, None),
    "siglip-classes": ("SiglipForImageClassification", SIGLIP | LABELS, "logits"),
    "ast": ("ASTForAudioClassification", AST | LABELS, "logits"),
    "ast-tokens": ("ASTModel", AST, "last_hidden_state"),
}
CANNOT_FOLD = {"dinov3"}  # whose keys are turned, and have no bias that could take up a norm's


TIMM = {"img_size": 12, "patch_size": 4, "embed_dim": 24, "depth": 2}
TIMM_CASES = {
    "vit_tiny_patch16_224": {"num_classes": 5},
    "deit3_small_patch16_224": {"num_classes": 5, "in_chans": 1},
    "vit_giant_patch14_reg4_dinov2": {"num_heads": 4},
    "vit_medium_patch16_reg4_gap_256": {"num_classes": 5},
    "vit_medium_patch16_gap_240": {"num_classes": 5, "qk_norm": True},
    "vit_base_patch16_siglip_224": {},
    "vit_base_patch16_clip_quickgelu_224": {"num_classes": 5},
}


def save(name, folder):
    """Writes a case's folder: the model, which of its outputs is compared, and images."""
    rng = np.random.default_rng(1)
    if name in TIMM_CASES:
        library = theirs.timm()
        model = theirs.awkward(library.create_model(name, **(TIMM | TIMM_CASES[name])))
        library.models.save_for_hf(model, folder, safe_serialization=True)
        return model, "", rng.normal(size=(2, 12, 12, TIMM_CASES[name].get("in_chans", 3))) + 1
    kind, config, output = CASES[name]
    kind = getattr(theirs.transformers(), kind)
    model = theirs.awkward(kind(kind.config_class(**config)))
    model.save_pretrained(folder)
    return model, output, rng.normal(size=(2, SIDE, FRAMES, 1) if "max_length" in config else (2, SIDE, SIDE, 3)) + 1


@pytest.fixture(scope="module", params=theirs.grouped([*CASES, *TIMM_CASES]))
def case(request, tmp_path_factory):
    """A folder that the library wrote, images, what the library makes of them, and which output that is."""
    folder = tmp_path_factory.mktemp(request.param) / "source"
    model, output, images = save(request.param, folder)
    return folder, images, theirs.features(model, images, output), output


def test_an_import_is_the_librarys_function_under_every_norm(case):
    folder, images, expected, _ = case
    theirs.check_function(folder, images, expected, numpy_vit)


def test_an_import_comes_back_bit_for_bit(case, tmp_path):
    theirs.check_way_back(case[0], tmp_path)


@pytest.mark.parametrize("to", ["rmsnorm", "crmsnorm"])
def test_what_was_converted_is_exported_as_a_network_that_the_library_loads(case, tmp_path, to):
    folder, images, expected, output = case
    folds = prenorm_jax.load(folder)[0].qkv_bias and folder.parent.name.rstrip("0") not in CANNOT_FOLD
    if (exported := theirs.exported(folder, tmp_path, to, folds)) is None:
        return
    assert relative(theirs.features(exported, images, output), expected) < 1e-9
    if output is None:  # text tower and projections came along
        embeds = (theirs.embeds(network, images) for network in (exported, theirs.load(folder)))
        assert relative(*embeds) < 1e-9


def test_the_tokens_of_a_beit_of_masked_images_are_what_its_head_reads(tmp_path):
    library = theirs.transformers()
    model = theirs.awkward(library.BeitForMaskedImageModeling(library.BeitConfig(**BEIT, vocab_size=7)))
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(1).normal(size=(2, SIDE, SIDE, 3)) + 1
    expected = theirs.features(model, images, "logits")
    tokens = logits(*prenorm_jax.load(tmp_path), images)[:, 1:]
    head = model.lm_head
    assert relative(tokens @ head.weight.detach().numpy().T + head.bias.detach().numpy(), expected) < 1e-9


def test_dinov3_with_its_class_token_and_registers_turned_too_is_another_function(tmp_path, monkeypatch):
    model = theirs.awkward(theirs.transformers().DINOv3ViTModel(theirs.transformers().DINOv3ViTConfig(**DINOV3)))
    model.save_pretrained(tmp_path)
    images = np.random.default_rng(1).normal(size=(1, SIDE, SIDE, 3))
    expected = theirs.features(model, images, "last_hidden_state")
    config, params = prenorm_jax.load(tmp_path)

    def all_turned(tokens, width, base, grid):
        return np.resize(patch_angles(9, width, base, grid), (tokens, width // 2))

    monkeypatch.setattr("prenorm_jax.models.positions.patch_angles", all_turned)
    wrong = prenorm_jax.build_model(config).apply({"params": params}, images)
    assert relative(wrong, expected) > 1e-2


@pytest.mark.parametrize("case", theirs.grouped([*TIMM_CASES, "vit"]), indirect=True)
def test_a_converted_vit_of_timms_is_timms_own_with_rmsnorms_or_is_refused(case, tmp_path):
    folder, images, expected, output = case
    refused = {"dinov2": "head_affine/bias", "qk_norm": "qk_norm", "siglip": "pooling", "clip": "embed_norm"}
    if output != "":
        refused = {"": "is of timm's ViTs"}  # other libraries' formats
    run = theirs.imported(folder, "rmsnorm")
    name = json.loads((folder / "config.json").read_text()).get("architecture", "")
    name += "_qk_norm" if "gap_240" in name else ""
    if said := [words for part, words in refused.items() if part in name]:
        with pytest.raises(prenorm_jax.PrenormError, match=said[0]):
            export_checkpoint(run, tmp_path / "rms", "rmsnorm", form="timm-rmsnorm")
        assert not (tmp_path / "rms").exists()
        return
    export_checkpoint(run, tmp_path / "rms", "rmsnorm", form="timm-rmsnorm")
    theirs_of_rmsnorms = theirs.load(tmp_path / "rms")
    assert type(theirs_of_rmsnorms.blocks[0].norm1).__name__ == "RmsNorm"
    assert relative(theirs.features(theirs_of_rmsnorms, images, output), expected) < 1e-9
    theirs_of_rmsnorms.load_state_dict(theirs.load(folder).state_dict(), strict=False)  # not recentred
    assert relative(theirs.features(theirs_of_rmsnorms, images, output), expected) > 1e-2


def test_every_name_of_timms_that_is_known_has_its_heads_activation_and_epsilon():
    """Which no tensor shows. One block, whose parameters are never made."""
    import torch

    library, known = theirs.timm(), 0
    for name in library.list_models(["vit_*", "deit*"]):
        config = {"architecture": name, "pretrained_cfg": {"input_size": [3, 224, 224]}}
        try:
            _heads(name, {})
        except prenorm_jax.PrenormError:
            continue
        with torch.device("meta"):
            model = library.create_model(name, depth=1)
        config["global_pool"] = model.global_pool
        shapes = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
        ours = FAMILY.config(Given(config, shapes))
        block, known = model.blocks[0], known + 1
        assert type(block).__name__ == "Block", name
        assert (ours["heads"], ours["epsilon"]) == (block.attn.num_heads, block.norm1.eps), name
        x = np.linspace(-3, 3, 99)
        same = ACTIVATE[ours["activation"]](x)
        np.testing.assert_allclose(same, block.mlp.act(torch.tensor(x)).numpy(), atol=1e-12, err_msg=name)
    assert known > 80


# Case of the .npz -> timm's architecture and arguments.
LOADED_BY_TIMM = {
    "vision_transformer": ("vit_tiny_patch16_224", {"num_classes": 5}),
    "big_vision": ("vit_tiny_patch16_224", {"num_classes": 5, "no_embed_class": True}),
    "tower": ("vit_base_patch16_siglip_224", {}),
}


@pytest.mark.parametrize("name", LOADED_BY_TIMM)
def test_an_npz_means_to_timms_own_loader_what_it_means_here(name, tmp_path):
    """The names of its arrays are no invention of these tests, then."""
    layout, prefix, stacked, changes = npz.CASES[name]
    config = tiny_vit(**(npz.BASE | changes))
    arrays = npz.arrays_of(config, random_params(config, 1, embedding_mean=3.0), layout, prefix, stacked)
    np.savez(tmp_path / "ViT.npz", **arrays)
    architecture, arguments = LOADED_BY_TIMM[name]
    sizes = {"img_size": 6, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 20 / 12}
    model = theirs.timm().create_model(architecture, act_layer="gelu_tanh", **sizes, **arguments).eval()
    model.load_pretrained(str(tmp_path / "ViT.npz"))
    images = np.random.default_rng(1).normal(size=(2, 6, 6, 3)) + 1
    expected = theirs.features(model, images, "")
    assert relative(logits(*prenorm_jax.load(tmp_path / "ViT.npz"), images), expected) < 1e-9
