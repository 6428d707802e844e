"""PyTorch's own files, in a process of its own: where its float32 means float64 (`checkpoints.py`) it reads none."""

import json

import ml_dtypes
import numpy as np
import pytest
from commands import command
from foreign import GPT2, gpt2_shapes, random_tensors

import prenorm_jax
from prenorm_jax.interop.safetensors import map_file

pytestmark = [pytest.mark.reference, pytest.mark.xdist_group("torch files")]

# Saves all kinds, and converts there and back the two that are a model's.
PROCESS = """
import sys, numpy, torch
from pathlib import Path
from prenorm_jax import PrenormError
from prenorm_jax.interop.export import export_checkpoint
from prenorm_jax.interop.importing import import_checkpoint

place = Path(sys.argv[1])
tensors = {name: torch.tensor(x) for name, x in numpy.load(place / "tensors.npz").items()}
tensors = {name: x.to(torch.bfloat16 if x.ndim < 4 else torch.bool) for name, x in tensors.items()}
for kind in ("new", "old", "training"):
    state = {"model": tensors, "optimizer": {}, "step": 3} if kind == "training" else tensors
    torch.save(state, place / kind / "pytorch_model.bin", _use_new_zipfile_serialization=kind != "old")
    try:
        import_checkpoint(place / kind, place / f"{kind}-run", "layernorm", dtype="keep")
    except PrenormError as error:
        (place / f"{kind}-refused").write_text(str(error))
    else:
        export_checkpoint(place / f"{kind}-run", place / f"{kind}-out", "layernorm")
"""


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder where the process has been, and the tensors."""
    place, tensors = tmp_path_factory.mktemp("torch"), random_tensors(gpt2_shapes())
    np.savez(place / "tensors.npz", **tensors)
    for kind in ("new", "old", "training"):
        (place / kind).mkdir()
        (place / kind / "config.json").write_text(json.dumps(GPT2))
    command("-c", PROCESS, place)
    return place, tensors


@pytest.mark.parametrize("kind", ["new", "old"])
def test_a_bin_of_bfloat16_is_read(converted, kind):
    place, tensors = converted
    assert not (place / f"{kind}-refused").exists()
    assert prenorm_jax.load(place / f"{kind}-run")[0].param_dtype == "bfloat16"
    for name, x in map_file(place / f"{kind}-out" / "model.safetensors")[1].items():
        expected = tensors[name].astype(ml_dtypes.bfloat16 if x.ndim < 4 else bool)
        np.testing.assert_array_equal(x.view(np.uint8), expected.view(np.uint8), err_msg=name)


def test_a_training_state_is_refused(converted):
    place, _ = converted
    error = (place / "training-refused").read_text()
    assert "holds model, optimizer, step beside tensors, as a training state does" in error
    assert not (place / "training-run").exists()
