"""Certificates whose reference is the source's own library, in a process of its own."""

import dataclasses
import json
import shutil
from pathlib import Path

import checkpoints as theirs
import made_up_torchvision
import numpy as np
import pytest
import test_image_checkpoints as images
from common import relative
from foreign import write

import prenorm_jax
from prenorm_jax import certify_checkpoint
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.reference import by_library
from prenorm_jax.interop.safetensors import map_file
from prenorm_jax.train import convert_run
from prenorm_jax.train.checkpoint import Checkpoints

pytestmark = pytest.mark.reference

V, T, D, H = 13, 40, 24, 3
GPT2 = {"vocab_size": V, "n_positions": T, "n_embd": D, "n_layer": 2, "n_head": H, "layer_norm_epsilon": 3e-4}
NEOX = {"vocab_size": V, "max_position_embeddings": T, "hidden_size": D, "num_hidden_layers": 2}
NEOX |= {"num_attention_heads": H, "intermediate_size": 40}

# name -> (model_type, config.json, dtype of the file, norm, what import_checkpoint is told)
TEXTS = {
    "gpt2-float64": ("gpt2", GPT2, "float64", "rmsnorm", {}),
    "gpt2-bfloat16-kept": ("gpt2", GPT2, "bfloat16", "crmsnorm", {"dtype": "keep"}),
    "neox-float32": ("gpt_neox", NEOX, "float32", "crmsnorm", {}),
}


# Of images: name -> (dtype of the file, norm).
IMAGES = {"dinov3": ("float32", "rmsnorm")}


def make_up_torchvision(folder, monkeypatch):
    """For timm in its own process, too, into which Python imports this file when it starts."""
    folder.mkdir()
    code = Path(made_up_torchvision.__file__).read_text()
    (folder / "sitecustomize.py").write_text(f"{code}\nimport sys\nsys.meta_path.append(Finder())\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize("name", [*TEXTS, *IMAGES])
def test_what_the_library_computes_is_certified_and_a_swap_alone_is_not(name, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_run, "COMPARED_BYTES", 0)
    if name in TEXTS:
        model_type, config, dtype, norm, told = TEXTS[name]
        theirs.make(model_type, **config).save_pretrained(tmp_path / "float64")
    else:
        (dtype, norm), told = IMAGES[name], {}
        images.save(name, tmp_path / "float64")
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


@pytest.mark.parametrize("name", ["deit", "mae", "siglip", "ast", "vit_medium_patch16_gap_240"])
def test_the_librarys_own_process_gives_the_output_that_a_model_here_has(name, tmp_path, monkeypatch):
    model, output, inputs = images.save(name, tmp_path / "source")
    if name in images.TIMM_CASES:
        make_up_torchvision(tmp_path / "site", monkeypatch)
    config = prenorm_jax.load(tmp_path / "source")[0]
    found = by_library(tmp_path / "source", config, inputs[:, None], np.zeros(1, int))
    assert relative(found.outputs[:, 0], theirs.features(model, inputs, output)) < 1e-12
    assert ("timm" in found.by) == (name in images.TIMM_CASES)
