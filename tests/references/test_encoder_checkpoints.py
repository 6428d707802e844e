"""Imported, converted and exported text encoders beside the families' own library, in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import checkpoints as theirs
import numpy as np
import pytest
from common import relative

import prenorm_jax
from prenorm_jax import build_model, convert_config, convert_params
from prenorm_jax.interop.tokens import source_tokenizer

pytestmark = pytest.mark.reference
nothing_compared = theirs.nothing_compared

V, T, D = 13, 9, 24
BASE = {"vocab_size": V, "max_position_embeddings": T, "hidden_size": D, "num_hidden_layers": 2}
BASE |= {"num_attention_heads": 3, "intermediate_size": 40}
ROBERTA = BASE | {"max_position_embeddings": T + 3, "pad_token_id": 2, "layer_norm_eps": 3e-4}
ESM = BASE | {"pad_token_id": 1, "mask_token_id": 4, "token_dropout": True, "layer_norm_eps": 3e-4}
ESM2 = ESM | {"position_embedding_type": "rotary"}
ESM1 = ESM | {"max_position_embeddings": T + 2, "emb_layer_norm_before": True}
MODERN = BASE | {"num_hidden_layers": 5, "local_attention": 4, "pad_token_id": 1, "norm_eps": 3e-4}
LOCAL = {
    "rope_parameters": {
        name: {"rope_theta": base} for name, base in (("full_attention", 7.0), ("sliding_attention", 90.0))
    }
}
CLASSIFIER = {"num_labels": 3, "classifier_bias": True, "norm_bias": True}
CLIP = BASE | {"projection_dim": 7, "eos_token_id": 5, "layer_norm_eps": 3e-4}

TOWER = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 8}
TOWER |= {"image_size": 4, "patch_size": 2}
WHOLE = {"text_config": CLIP, "vision_config": TOWER | {"projection_dim": 7}, "projection_dim": 7}
SIGLIP = {"text_config": BASE | {"projection_size": 12}, "vision_config": TOWER}

# name -> (class, config.json, which of its outputs, whether all that is folded has a bias to go to in the format)
CASES = {
    "roberta": ("RobertaPreLayerNormForMaskedLM", ROBERTA, "logits", True),
    "roberta-untied": ("RobertaPreLayerNormForMaskedLM", ROBERTA | {"tie_word_embeddings": False}, "logits", True),
    "roberta-tokens": ("RobertaPreLayerNormModel", ROBERTA | {"hidden_act": "relu"}, "last_hidden_state", True),
    "esm2": ("EsmForMaskedLM", ESM2, "logits", True),
    "esm2-tokens": ("EsmModel", ESM2 | {"token_dropout": False}, "last_hidden_state", True),
    "esm1b": ("EsmForMaskedLM", ESM1, "logits", True),
    "clip-old": ("CLIPTextModelWithProjection", CLIP | {"eos_token_id": 2}, None, True),
    "clip-whole": ("CLIPModel", WHOLE, None, True),
    "siglip-whole": ("SiglipModel", SIGLIP, None, True),
    "modernbert": ("ModernBertForMaskedLM", MODERN, "logits", True),
    "modernbert-untied": ("ModernBertForMaskedLM", MODERN | LOCAL | {"tie_word_embeddings": False}, "logits", True),
    "modernbert-tokens": ("ModernBertModel", MODERN | {"mlp_bias": True}, "last_hidden_state", True),
    "modernbert-classes": (
        "ModernBertForSequenceClassification",
        MODERN | CLASSIFIER | {"attention_bias": True, "classifier_pooling": "mean"},
        "logits",
        False,
    ),
    "modernbert-labels": ("ModernBertForTokenClassification", MODERN | CLASSIFIER, "logits", False),
    "siglip": ("SiglipTextModel", BASE | {"projection_size": 7}, "pooler_output", True),
}


def texts() -> tuple[np.ndarray, np.ndarray]:
    """Token ids (3, T), and which are none of padding; with mask tokens and ends of text, and padding behind."""
    tokens = np.random.default_rng(1).integers(6, V, size=(3, T))
    tokens[:, 4], tokens[0, 6], tokens[1, 2] = 4, 5, 4
    mask = np.ones_like(tokens)
    mask[1, 7:] = mask[2, 5:] = 0
    tokens[2, 3] = 5
    return tokens, mask


def outputs(model: Any, output: str | None, tokens: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """One of the library's outputs; None: the pooled one, of the tower within."""
    import torch

    given = {} if mask is None else {"attention_mask": torch.tensor(mask)}
    with torch.no_grad():
        tower = model if output else model.text_model
        return tower(input_ids=torch.tensor(tokens), **given)[output or "pooler_output"].numpy()


class Case:
    """A folder that the library wrote, and what the library makes of texts with a mask and without."""

    def __init__(self, folder: Path, name: str):
        kind, config, self.output, self.folds = CASES[name]
        kind = getattr(theirs.transformers(), kind)
        self.model = theirs.awkward(kind(kind.config_class(**config)))
        self.model.save_pretrained(folder)
        self.tower = ":text" if name.endswith("whole") else ""
        self.name = f"{folder}{self.tower}"
        self.folder, self.padding = folder, config.get("pad_token_id", 0)
        self.inputs = [self.padded(mask) for mask in (None, texts()[1])]
        self.expected = [outputs(self.model, self.output, *given) for given in self.inputs]

    def padded(self, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
        tokens = texts()[0]
        return (tokens if mask is None else np.where(mask, tokens, self.padding)), mask

    def off(self, config: Any, params: Any) -> float:
        """How far the model is from the library, at tokens that are none of padding."""
        found = []
        for (tokens, mask), expected in zip(self.inputs, self.expected, strict=True):
            actual = np.asarray(build_model(config).apply({"params": params}, tokens, mask_BxT=mask))
            counted = slice(None) if mask is None or actual.ndim == 2 else mask.astype(bool)
            found.append(relative(actual[counted], expected[counted]))
        return max(found)


@pytest.fixture(scope="module", params=theirs.grouped(CASES))
def case(request, tmp_path_factory):
    return Case(tmp_path_factory.mktemp(request.param) / "source", request.param)


def test_an_import_is_the_librarys_function_under_every_norm_with_padding_and_without(case):
    config, params = prenorm_jax.load(case.name)
    assert case.off(config, params) < 1e-9
    for to in ("rmsnorm", "crmsnorm"):
        assert case.off(convert_config(config, to), convert_params(params, config, to)) < 1e-9, to
    assert case.off(theirs.changed(config, norm="rmsnorm"), params) > 1e-2


def test_an_import_comes_back_bit_for_bit(case, tmp_path):
    theirs.check_way_back(case.name, tmp_path)


@pytest.mark.parametrize("to", ["rmsnorm", "crmsnorm"])
def test_what_was_converted_is_exported_as_a_network_that_the_library_loads(case, tmp_path, to):
    if (exported := theirs.exported(case.name, tmp_path, to, case.folds)) is None:
        return
    for given, expected in zip(case.inputs, case.expected, strict=True):
        counted = slice(None) if given[1] is None or expected.ndim == 2 else given[1].astype(bool)
        assert relative(outputs(exported, case.output, *given)[counted], expected[counted]) < 1e-9


def test_residues_are_read_as_esms_own_tokenizer_reads_them(tmp_path):
    words = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO.-", "<null_1>", "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "esm"}))
    own = theirs.transformers().EsmTokenizer(str(tmp_path / "vocab.txt"))
    ours = source_tokenizer(tmp_path, {"model_type": "esm"}, len(words))
    for text in ("MKTAYIAK", "MK<mask>TA", "M KT A.-", "MJK", "mkt", "<cls>MK<eos>", "MK<null_1>", ""):
        assert ours.encode(text).ids == own(text)["input_ids"], text
