"""Whisper, by a role table, beside transformers' own: its tensors recentred in its own format."""

import copy
import functools

import checkpoints as theirs
import numpy as np
import pytest
from common import relative
from foreign_trees import PROBES, refusals

from prenorm_jax import convert_foreign
from prenorm_jax.interop.safetensors import map_file
from prenorm_jax.interop.whisper import WHISPER

pytestmark = pytest.mark.reference

D = 12
CONFIG = {"vocab_size": 13, "num_mel_bins": 5, "d_model": D, "max_source_positions": 6, "max_target_positions": 7}
CONFIG |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
CONFIG |= {"encoder_ffn_dim": D, "decoder_ffn_dim": D, "dropout": 0.0, "pad_token_id": 0, "decoder_start_token_id": 1}
CONFIG |= {"bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": None, "begin_suppress_tokens": None}


@functools.cache
def whisper(depth=2):
    """A model of the library; `depth`: the layers of its encoder, and of its decoder."""
    library, layers = theirs.transformers(), {"encoder_layers": depth, "decoder_layers": depth}
    return theirs.awkward(library.WhisperForConditionalGeneration(library.WhisperConfig(**CONFIG | layers)))


def apply_of(model):
    """Its logits, of tensors by name, for a fixed spectrogram and tokens."""
    import torch

    rng = np.random.default_rng(1)
    heard = torch.tensor(rng.normal(size=(2, CONFIG["num_mel_bins"], 2 * CONFIG["max_source_positions"])))
    tokens = torch.tensor(rng.integers(13, size=(2, 7)))

    def apply(tensors):
        given = {name: torch.tensor(np.asarray(tensor)) for name, tensor in tensors.items()}
        options = {"input_features": heard, "decoder_input_ids": tokens, "use_cache": False}
        with torch.no_grad():
            return torch.func.functional_call(model, given, (), options).logits.numpy()

    return apply


def of_rms_norms(model):
    """A copy in which no norm centres: what enters the encoder is centred, and what the token embedding gives."""
    import torch

    class RMSNorm(torch.nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

        def forward(self, x):
            return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps) * self.weight + self.bias

    def centred(x):
        return x - x.mean(-1, keepdim=True)

    copied = copy.deepcopy(model)
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.LayerNorm):
                setattr(module, name, RMSNorm(child))
    first = copied.model.encoder.layers[0]
    first.register_forward_pre_hook(lambda _, args: (centred(args[0]), *args[1:]))
    copied.model.decoder.embed_tokens.register_forward_hook(lambda *call: centred(call[-1]))
    return copied


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whisper")
    whisper().save_pretrained(folder)
    return folder, dict(map_file(folder / "model.safetensors")[1])


@pytest.mark.parametrize("affine", ["keep", "plain"])
def test_whisper_is_recentred_in_its_own_format(saved, tmp_path, affine):
    import torch
    from safetensors.torch import save_file

    folder, tensors = saved
    apply, rms = apply_of(whisper()), apply_of(of_rms_norms(whisper()))
    expected = apply(tensors)
    new = convert_foreign(tensors, WHISPER, apply, rms, affine=affine)
    assert relative(rms(new), expected) < 1e-9
    assert relative(rms(tensors), expected) > 1e-2
    plain = np.unique(new["model.encoder.layer_norm.weight"]).tolist() == [1.0]
    assert plain == (affine == "plain")
    save_file(
        {name: torch.tensor(tensor) for name, tensor in new.items()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert relative(apply_of(theirs.load(tmp_path))({}), expected) < 1e-9


def test_every_writer_reader_and_feed_of_whispers_table_removed_or_swapped_is_refused(tmp_path):
    """Of a layer each: the table's lines are of every layer."""
    whisper(depth=1).save_pretrained(tmp_path)
    tensors = dict(map_file(tmp_path / "model.safetensors")[1])
    refused = refusals(tensors, WHISPER, apply_of(whisper(depth=1)))
    assert not [what for what, why in refused.items() if not why]
    assert sum(why.startswith(PROBES) for why in refused.values()) > 100
