"""PyTorch's own files, in processes of their own: where its float32 means float64 (`checkpoints.py`) it reads none."""

import json

import ml_dtypes
import numpy as np
import pytest
from commands import command
from foreign import GPT2, gpt2_shapes, random_tensors

import prenorm_jax
from prenorm_jax.interop.safetensors import map_file

pytestmark = pytest.mark.reference

SAVE = """
import sys, numpy, torch
tensors = {name: torch.tensor(x) for name, x in numpy.load(sys.argv[1]).items()}
tensors = {name: x.to(torch.bfloat16 if x.ndim < 4 else torch.bool) for name, x in tensors.items()}
state = {"model": tensors, "optimizer": {}, "step": 3} if sys.argv[3] == "training" else tensors
torch.save(state, sys.argv[2], _use_new_zipfile_serialization=sys.argv[3] != "old")
"""


@pytest.mark.parametrize("kind", ["new", "old", "training"])
def test_a_bin_of_bfloat16_is_read_and_a_training_state_is_refused(tmp_path, kind):
    tensors = random_tensors(gpt2_shapes())
    np.savez(tmp_path / "tensors.npz", **tensors)
    (source := tmp_path / "source").mkdir()
    (source / "config.json").write_text(json.dumps(GPT2))
    command("-c", SAVE, tmp_path / "tensors.npz", source / "pytorch_model.bin", kind)
    convert = ("-m", "prenorm_jax.convert", source, tmp_path / "run", "--to=layernorm", "--dtype=keep")
    if kind == "training":
        error = command(*convert, status=2).stderr
        assert "holds model, optimizer, step beside tensors, as a training state does" in error
        return
    command(*convert)
    assert prenorm_jax.load(tmp_path / "run")[0].param_dtype == "bfloat16"
    command("-m", "prenorm_jax.convert", tmp_path / "run", tmp_path / "out", "--to=layernorm", "--format=source")
    for name, x in map_file(tmp_path / "out" / "model.safetensors")[1].items():
        expected = tensors[name].astype(ml_dtypes.bfloat16 if x.ndim < 4 else bool)
        np.testing.assert_array_equal(x.view(np.uint8), expected.view(np.uint8), err_msg=name)
