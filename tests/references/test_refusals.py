"""Networks of other libraries that have no equivalent: refused by their config.json, and rightly: they feel a mean."""

import checkpoints as theirs
import numpy as np
import pytest
from common import relative

from prenorm_jax import PrenormError
from prenorm_jax.interop.explain import explain

pytestmark = pytest.mark.reference

D = 12
TEXT = {"vocab_size": 13, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
BART = {"vocab_size": 13, "d_model": D, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2}
BART |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 20, "pad_token_id": 0}
BART |= {"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
T5 = {"vocab_size": 13, "d_model": D, "d_kv": 6, "d_ff": 20, "num_layers": 2, "num_heads": 2}
OPT = {key: TEXT[key] for key in TEXT if key != "intermediate_size"} | {"ffn_dim": 20, "do_layer_norm_before": False}
IMAGE = {"image_size": 16, "patch_size": 2, "num_channels": 3}
VIT = IMAGE | {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 20}
SAM = VIT | {"mlp_dim": 20, "window_size": 4, "global_attn_indexes": [1], "output_channels": 8}

# class -> its config.json, a tensor that adds to the stream, what the refusal says
REFUSED = {
    "BertForMaskedLM": (TEXT, "layer.0.output.LayerNorm.bias", "Post-LN"),
    "RobertaForMaskedLM": (TEXT | {"pad_token_id": 0}, "layer.0.output.LayerNorm.bias", "Post-LN"),
    "BartForConditionalGeneration": (BART, "encoder.layers.0.final_layer_norm.bias", "Post-LN"),
    "OPTForCausalLM": (OPT, "layers.0.final_layer_norm.bias", "Post-LN"),
    "LlamaForCausalLM": (TEXT, "layers.0.mlp.down_proj.weight", "RMSNorms"),
    "T5ForConditionalGeneration": (T5, "encoder.block.0.layer.1.DenseReluDense.wo.weight", "RMSNorms"),
    "SwinModel": (
        IMAGE | {"embed_dim": D, "depths": [2, 1], "num_heads": [2, 2], "window_size": 2},
        "layers.0.blocks.0.mlp.fc2.weight",
        "four",
    ),
    "SamVisionModel": (SAM, "layers.0.mlp.lin2.bias", "a convolution behind its image encoder"),
    "ConvNextModel": ({"hidden_sizes": [D, D], "depths": [2, 1], "num_stages": 2}, "0.pwconv2.bias", "a depthwise"),
    "CLIPForImageClassification": ({"vision_config": VIT}, "layers.0.mlp.fc2.bias", "classifier reads the raw stream"),
}


def outputs(model):
    """The last of its outputs that a loss or a head is of, for tokens or images of its kind."""
    import torch

    rng = np.random.default_rng(1)
    given = {"input_ids": torch.tensor(rng.integers(3, 13, size=(2, 6)))}
    if model.main_input_name == "pixel_values":
        given = {"pixel_values": torch.tensor(rng.normal(size=(2, 3, 16, 16)))}
    elif model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"]
    with torch.no_grad():
        found = model(**given)
    return (found["logits"] if "logits" in found else found["last_hidden_state"]).numpy()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_by_its_config_feels_the_mean_that_conversion_would_remove(name, tmp_path):
    import torch

    config, tensor, why = REFUSED[name]
    kind = getattr(theirs.transformers(), name)
    model = theirs.awkward(kind(kind.config_class(**config)))
    model.config.architectures = [name]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(PrenormError, match=why):
        explain(tmp_path)
    expected, found = outputs(model), [key for key in dict(model.named_parameters()) if tensor in key]
    assert found, list(dict(model.named_parameters()))
    with torch.no_grad():
        parameter = dict(model.named_parameters())[found[0]]
        parameter += torch.tensor(np.random.default_rng(2).normal(size=parameter.shape[1:]))  # the same for all of d
    assert relative(outputs(model), expected) > 1e-3
