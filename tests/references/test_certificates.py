"""Certificates whose reference is the source's own library, in a process of its own."""

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import checkpoints as theirs
import library_process
import made_up_torchvision
import numpy as np
import pytest
import test_encoder_checkpoints as encoders
import test_image_checkpoints as images
from common import relative
from foreign import write

import prenorm_jax
from prenorm_jax import certify_checkpoint
from prenorm_jax.interop import certificate_page, reference
from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.interop.reference import by_library
from prenorm_jax.interop.safetensors import map_file
from prenorm_jax.train.checkpoint import Checkpoints

pytestmark = [pytest.mark.reference, pytest.mark.xdist_group("certificates")]
nothing_compared = theirs.nothing_compared

V, T, D, H = 13, 40, 24, 3
GPT2 = {"vocab_size": V, "n_positions": T, "n_embd": D, "n_layer": 2, "n_head": H, "layer_norm_epsilon": 3e-4}
NEOX = {"vocab_size": V, "max_position_embeddings": T, "hidden_size": D, "num_hidden_layers": 2}
NEOX |= {"num_attention_heads": H, "intermediate_size": 40}

# name -> (model_type and config.json, or a case of images, dtype of the file, norm)
CASES = {
    "neox-float32": (("gpt_neox", NEOX), "float32", "crmsnorm"),
    "dinov3-float32": ("dinov3", "float32", "rmsnorm"),
}


@pytest.fixture(scope="module")
def forked():
    with library_process.started() as run:
        yield run


@pytest.fixture
def at_hand(forked, monkeypatch):
    """The library's own process is forked from one that has imported it. Two tests start it as users do."""
    monkeypatch.setattr(reference, "subprocess", SimpleNamespace(run=forked))


@pytest.fixture
def undrawn(monkeypatch):
    """A certificate without its figure."""
    monkeypatch.setattr(certificate_page, "_figure", lambda *_: b"")


def make_up_torchvision(folder, monkeypatch):
    """For timm in its own process, too, into which Python imports this file when it starts."""
    folder.mkdir()
    code = Path(made_up_torchvision.__file__).read_text()
    (folder / "sitecustomize.py").write_text(f"{code}\nimport sys\nsys.meta_path.append(Finder())\n")
    monkeypatch.setenv("PYTHONPATH", str(folder))


def write_source(made, dtype, place):
    """A checkpoint that the library wrote, its tensors in this dtype: its folder."""
    if isinstance(made, str):
        images.save(made, place / "float64")
    else:
        theirs.make(made[0], **made[1]).save_pretrained(place / "float64")
    wide = map_file(place / "float64" / "model.safetensors")[1]
    config = json.loads((place / "float64" / "config.json").read_text())
    return write(place / "source", {name: x.astype(dtype) for name, x in wide.items()}, config).parent


def check_certified(run, source, norm, **told):
    import_checkpoint(source, run, norm, **told)
    report = certify_checkpoint(run, source, reference="library")
    assert report["verdict"] == "PASS", report["failures"]
    assert report["reference"]["versions"].keys() == {"transformers", "torch"}
    rows = {(row["what"], row["dtype"]): row for row in report["rows"]}
    assert rows["source, Pre-LN", "float64"]["relative"] < 1e-9
    assert rows["conversion", "float64"]["relative"] < 1e-9
    assert ("checkpoint", report["stored_dtype"]) in rows
    assert report["control"]["relative"] > 1e-2


def test_what_the_librarys_own_process_computes_is_certified_and_a_swap_alone_is_not(tmp_path, monkeypatch):
    source = write_source(("gpt2", GPT2), "bfloat16", tmp_path)
    check_certified(tmp_path / "run", source, "crmsnorm", dtype="keep")
    assert b"base64" in (tmp_path / "run" / "certificate.html").read_bytes()

    naive, params = prenorm_jax.load(source, dtype="keep")
    with Checkpoints(tmp_path / "naive") as made:
        made.save(0, params, None, dataclasses.replace(naive, norm="rmsnorm"))
    for kind in ("json", "npz"):  # the library's numbers, kept: its process need not run again
        shutil.copy(tmp_path / "run" / f"certificate.{kind}", tmp_path / "naive")
    monkeypatch.setattr("prenorm_jax.interop.certify.why_not", lambda *_: "not asked")
    monkeypatch.setattr(certificate_page, "_figure", lambda *_: b"")
    report = certify_checkpoint(tmp_path / "naive", source)
    assert report["reference"]["of_library"]
    assert report["verdict"] == "FAIL"


@pytest.mark.usefixtures("at_hand", "undrawn")
@pytest.mark.parametrize("name", CASES)
def test_what_the_library_computes_is_certified(name, tmp_path):
    made, dtype, norm = CASES[name]
    check_certified(tmp_path / "run", write_source(made, dtype, tmp_path), norm)


@pytest.mark.usefixtures("at_hand", "undrawn")
@pytest.mark.parametrize("name", ["esm2", "siglip"])
def test_what_the_library_computes_of_an_encoder_is_certified(name, tmp_path):
    """Stored frequencies of rotary positions are of float32 there and do not limit it."""
    case = encoders.Case(tmp_path / "source", name)
    import_checkpoint(case.name, tmp_path / "run", "crmsnorm")
    report = certify_checkpoint(tmp_path / "run", case.name, reference="library")
    assert report["verdict"] == "PASS", report["failures"]
    assert report["rows"][0]["relative"] < 1e-9
    outputs = {"logits": "logits", "last_hidden_state": "features"}
    assert report["output"] == outputs.get(case.output, "pooled output")


@pytest.mark.parametrize("name", ["deit", "mae", "siglip", "ast", "vit_medium_patch16_gap_240"])
def test_the_librarys_own_process_gives_the_output_that_a_model_here_has(name, tmp_path, monkeypatch, request):
    model, output, inputs = images.save(name, tmp_path / "source")
    if name in images.TIMM_CASES:
        make_up_torchvision(tmp_path / "site", monkeypatch)
    else:
        request.getfixturevalue("at_hand")
    config = prenorm_jax.load(tmp_path / "source")[0]
    found = by_library(tmp_path / "source", config, inputs[:, None], np.zeros(1, int))
    assert relative(found.outputs[:, 0], theirs.features(model, inputs, output)) < 1e-12
    assert ("timm" in found.by) == (name in images.TIMM_CASES)
