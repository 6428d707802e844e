"""Certificates whose reference is the source's own library, in a process of its own."""

import dataclasses
import json
import shutil

import checkpoints as theirs
import pytest
from foreign import write

import prenorm_jax
from prenorm_jax import certify_checkpoint
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.safetensors import map_file
from prenorm_jax.train import convert_run
from prenorm_jax.train.checkpoint import Checkpoints

pytestmark = pytest.mark.reference

V, T, D, H = 13, 40, 24, 3
GPT2 = {"vocab_size": V, "n_positions": T, "n_embd": D, "n_layer": 2, "n_head": H, "layer_norm_epsilon": 3e-4}
NEOX = {"vocab_size": V, "max_position_embeddings": T, "hidden_size": D, "num_hidden_layers": 2}
NEOX |= {"num_attention_heads": H, "intermediate_size": 40}

# name -> (model_type, config.json, dtype of the file, norm, what import_checkpoint is told)
CASES = {
    "gpt2-float64": ("gpt2", GPT2, "float64", "rmsnorm", {}),
    "gpt2-bfloat16-kept": ("gpt2", GPT2, "bfloat16", "crmsnorm", {"dtype": "keep"}),
    "neox-float32": ("gpt_neox", NEOX, "float32", "crmsnorm", {}),
}


@pytest.mark.parametrize("name", CASES)
def test_what_the_library_computes_is_certified_and_a_swap_alone_is_not(name, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_run, "COMPARED_BYTES", 0)
    model_type, config, dtype, norm, told = CASES[name]
    theirs.make(model_type, **config).save_pretrained(tmp_path / "float64")
    config = json.loads((tmp_path / "float64" / "config.json").read_text())
    wide = map_file(tmp_path / "float64" / "model.safetensors")[1]
    write(tmp_path / "source", {name: x.astype(dtype) for name, x in wide.items()}, config)

    import_checkpoint(tmp_path / "source", tmp_path / "run", norm, **told)
    report = certify_checkpoint(tmp_path / "run", tmp_path / "source", reference="library")
    assert report["verdict"] == "PASS", report["failures"]
    assert report["reference"]["versions"].keys() == {"transformers", "torch"}
    rows = {(row["what"], row["dtype"]): row for row in report["rows"]}
    assert rows["source, Pre-LN", "float64"]["relative"] < 1e-9
    assert rows["conversion", "float64"]["relative"] < 1e-9
    assert ("checkpoint", report["stored_dtype"]) in rows
    assert b"base64" in (tmp_path / "run" / "certificate.html").read_bytes()

    naive, params = prenorm_jax.load(tmp_path / "source", **told)
    with Checkpoints(tmp_path / "naive") as made:
        made.save(0, params, None, dataclasses.replace(naive, norm="rmsnorm"))
    for kind in ("json", "npz"):  # the library's numbers, kept: its process need not run again
        shutil.copy(tmp_path / "run" / f"certificate.{kind}", tmp_path / "naive")
    monkeypatch.setattr("prenorm_jax.interop.certify.why_not", lambda *_: "not asked")
    report = certify_checkpoint(tmp_path / "naive", tmp_path / "source")
    assert report["reference"]["of_library"]
    assert report["verdict"] == "FAIL"
