"""Text encoders of other libraries: configs and names, without these libraries; masks filled, embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import error_of
from common import relative
from flax.traverse_util import flatten_dict
from foreign import random_tensors, write

import prenorm_jax
from prenorm_jax import PrenormError, TextEncoder
from prenorm_jax.interop.explain import explain, plain_text
from prenorm_jax.interop.families import FAMILIES
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.views import axis_sizes, read_table, tensor_shape
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.train import convert_run

BASE = {"vocab_size": 33, "max_position_embeddings": 20, "hidden_size": 12, "num_hidden_layers": 2}
BASE |= {"num_attention_heads": 3, "intermediate_size": 16}
ROBERTA = BASE | {"model_type": "roberta-prelayernorm", "architectures": ["RobertaPreLayerNormForMaskedLM"]}
ESM = BASE | {"model_type": "esm", "architectures": ["EsmForMaskedLM"], "position_embedding_type": "rotary"}
ESM |= {"mask_token_id": 32, "pad_token_id": 1, "token_dropout": True}
MODERN = BASE | {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "local_attention": 4}
CLIP, SIGLIP = BASE | {"model_type": "clip_text_model"}, BASE | {"model_type": "siglip_text_model"}


def tensors_of(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Random ones of the names in the family's table."""
    family = FAMILIES[config["model_type"]]
    model = family.model(config)
    sizes, shapes = axis_sizes(model) | family.sizes(model), param_shapes(model)
    places = [place for place in read_table(family.lines(config), model.depth) if place.path in shapes]
    shapes = {place.tensor: tensor_shape(place, sizes) for place in places if not place.copy and place.tensor != "-"}
    return random_tensors(shapes)


@pytest.mark.parametrize(
    ("config", "renamed"),
    [
        (ROBERTA, {"": "roberta_prelayernorm."}),
        (ESM, {"": "esm.", "LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}),
        (MODERN, {"": "model."}),
        (CLIP, {"": "text_model."}),
        (SIGLIP, {"": "text_model."}),
    ],
)
def test_a_file_says_the_same_in_its_other_spelling(tmp_path, config, renamed):
    tensors, others = tensors_of(config), {}
    for name, tensor in tensors.items():
        other = name if name.startswith(("lm_head", "head.dense", "head.norm", "decoder")) else renamed[""] + name
        for one, two in renamed.items():
            other = other.replace(one, two) if one else other
        others[other] = tensor
    if config is ESM:  # buffers, and the head once more
        others["esm.encoder.layer.0.attention.self.rotary_embeddings.inv_freq"] = np.ones(2, np.float32)
        others["esm.contact_head.regression.weight"] = np.ones((1, 6), np.float32)
        others["lm_head.decoder.weight"] = tensors["embeddings.word_embeddings.weight"]
    if config is ROBERTA:
        others["lm_head.decoder.bias"] = tensors["lm_head.bias"]
    write(tmp_path / "one", tensors, config)
    write(tmp_path / "other", others, config)
    (one, params), (other, same) = (prenorm_jax.load(tmp_path / name) for name in ("one", "other"))
    assert one == other
    for path, leaf in flatten_dict(params).items():
        np.testing.assert_array_equal(leaf, flatten_dict(same)[path])


def test_a_heads_bias_that_is_there_twice_and_not_the_same_is_refused(tmp_path):
    tensors = tensors_of(ROBERTA)
    write(tmp_path, tensors | {"lm_head.decoder.bias": tensors["lm_head.bias"] + 1}, ROBERTA)
    with pytest.raises(PrenormError, match=r"lm_head\.decoder\.bias should be the same as head_bias and is not"):
        prenorm_jax.load(tmp_path)


OLD_ROPE = {"global_rope_theta": 7.0, "local_rope_theta": 9.0, "global_attn_every_n_layers": 2}
NEW_ROPE = {"layer_types": ["full_attention", "sliding_attention"]}
NEW_ROPE["rope_parameters"] = {"full_attention": {"rope_theta": 7.0}, "sliding_attention": {"rope_theta": 9.0}}


def test_modernberts_two_spellings_of_its_layers_are_one():
    old, new = (FAMILIES["modernbert"].model(MODERN | rope) for rope in (OLD_ROPE, NEW_ROPE))
    assert old == new
    assert (old.attention_pattern, old.rotary_base, old.global_rotary_base, old.window) == ("gl", 9.0, 7.0, 3)


SCALED = {"full_attention": {"rope_type": "yarn"}}
REFUSED = {
    "decoder": (ROBERTA | {"is_decoder": True}, {}, "is_decoder=True changes the function"),
    "cross attention": (ROBERTA | {"add_cross_attention": True}, {}, "add_cross_attention=True changes"),
    "relative positions": (ROBERTA | {"position_embedding_type": "relative_key"}, {}, "'relative_key' changes"),
    "another activation than the head's": (ROBERTA | {"hidden_act": "relu"}, {}, "its head's activation is gelu"),
    "relative positions of proteins": (ESM | {"position_embedding_type": "relative_key"}, {}, "changes the function"),
    "folding": (ESM | {"is_folding_model": True}, {}, "no model here folds proteins"),
    "yarn": (MODERN | {"rope_parameters": SCALED}, {}, "rope_type='yarn' changes the function"),
    "scaled": (MODERN | {"rope_scaling": {"factor": 2}}, {}, "rope_scaling changes the function"),
    "unknown layers": (MODERN | {"layer_types": ["full_attention", "linear"]}, {}, "layer_types must name"),
    "too few layers": (MODERN | {"layer_types": ["full_attention"]}, {}, "layer_types must name"),
    "head's activation": (MODERN | {"classifier_activation": "silu"}, {}, "classifier_activation='silu' changes"),
    "classifier": (
        MODERN | {"architectures": ["ModernBertForMultipleChoice"]},
        {"classifier.weight": (1, 12)},
        r"architectures name no ModernBERT whose classifier is known here \('MultipleChoice'\)",
    ),
    "activation": (CLIP | {"hidden_act": "gelu_10"}, {}, "hidden_act='gelu_10' changes"),
    "two names": (MODERN | {"hidden_size": "12"}, {}, "hidden_size='12' must be of type int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_encoder_here_computes_is_refused_by_name(name):
    config, shapes, line = REFUSED[name]
    with pytest.raises(PrenormError, match=line):
        FAMILIES[config["model_type"]].model(config, shapes)


def test_explain_says_what_becomes_of_each_norm_and_that_block_0_has_none(tmp_path):
    write(tmp_path, tensors_of(MODERN), MODERN)
    report = explain(tmp_path)
    becomes = {site["norm"]: (site["becomes"], site["feeds"]) for site in report["norms"]}
    assert becomes == {
        "block_0/mlp_norm": ("folded", ["gate", "up"]),
        "block_1/attention_norm": ("folded", ["key", "query", "value"]),
        "block_1/mlp_norm": ("folded", ["gate", "up"]),
        "head_norm": ("folded", ["transform"]),
        "embedding_norm": ("kept", ["block 0's attention, the stream"]),
        "transform_norm": ("kept", ["the head"]),
    }
    assert "the head is the token embedding" in plain_text(report)


# --- Masks filled, embeddings. ---

RESIDUES = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]


@pytest.fixture(scope="module")
def protein(tmp_path_factory) -> Path:
    """An ESM-2 with its vocabulary, and, imported, `kept` and `folded`."""
    place = tmp_path_factory.mktemp("protein")
    write(place / "source", tensors_of(ESM), ESM)
    (place / "source" / "vocab.txt").write_text("\n".join(RESIDUES))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_run, "COMPARED_BYTES", 0)
        import_checkpoint(place / "source", place / "kept", "rmsnorm", keep_affine=True)
        import_checkpoint(place / "source", place / "folded", "crmsnorm")
    return place


@pytest.mark.slow
def test_masks_are_filled_the_same_whatever_the_norm_and_by_what_stands_around(protein):
    one, other = (TextEncoder.load(protein / name) for name in ("source", "folded"))
    assert one.tokenizer.encode("MK<mask>").ids == [0, 20, 15, 32, 2]
    found, again = (encoder.fill_mask("MK<mask>TA<mask>", top=3) for encoder in (one, other))
    assert len(found) == 2
    assert [[word for word, _ in best] for best in found] == [[word for word, _ in best] for best in again]
    assert found != one.fill_mask("MG<mask>TA<mask>", top=3)
    assert sum(chance for _, chance in one.fill_mask("MK<mask>", top=33)[0]) == pytest.approx(1, abs=1e-5)
    with pytest.raises(PrenormError, match="the text has no mask token"):
        one.fill_mask("MK")


@pytest.mark.slow
def test_embeddings_are_the_final_norms_of_each_text_alone(protein):
    texts = ["MKTA", "G", "LLGWWVAS"]
    one, other = (TextEncoder.load(protein / name) for name in ("source", "kept"))
    found = one.embed(texts)
    assert found.shape == (3, 12)
    assert relative(other.embed(texts), found) < 1e-5
    for text, vector in zip(texts, found, strict=True):
        assert relative(one.embed([text])[0], vector) < 1e-5
    assert relative(one.embed(texts, pooling="first"), found) > 1e-2
    with pytest.raises(PrenormError, match=r"the final norm was folded into the head.*--keep-affine"):
        TextEncoder.load(protein / "folded").embed(texts)


@pytest.mark.slow
def test_eval_generate_and_training_say_what_they_do_not_do_for_an_encoder(protein):
    run, new = protein / "folded", protein / "new"
    line = "model.family='encoder' has no loss here, to train by or to evaluate"
    assert line in error_of("eval.py", f"--workdir={run}")
    assert line in error_of("train.py", f"--config=configs/finetune.py:{run}", f"--workdir={new}", "--config.steps=1")
    assert not new.exists()
    assert "is the run of an encoder: only a gpt writes text; it fills masks" in error_of(
        "-m", "prenorm_jax.generate", run
    )
    assert json.loads((run / "config.json").read_text())["model"]["family"] == "encoder"
