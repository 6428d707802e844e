"""Checkpoints written before the package was cut into rooms are read, evaluated, gone on with and converted as then.

data/gpt.tar.xz and data/vit.tar.xz are workdirs of runs that were stopped at step 3 of 6: a GPT with dropout on
data/corpus.txt, trained under pre_ln, and a ViT with LayerScale and mixup on the digits, trained natively; both
CRMSNorm. EXPECTED is what the code that wrote them found next, with jax 0.10.2.
"""

import tarfile
from pathlib import Path

import numpy as np
import pytest
from commands import evaluate, here, lines_of

from prenorm_jax.train.checkpoint import Checkpoints

DATA = Path(__file__).parent / "data"
EXPECTED = {
    "gpt": {
        "eval_loss": [5.454008901096439, 5.390443178253466],  # at steps 3 and 6
        "loss": [5.4508442878723145, 5.408502101898193, 5.415182590484619],  # of steps 4, 5 and 6
        "grad_norm": [0.9827787280082703, 0.9395939707756042, 0.9117151498794556],
    },
    "vit": {
        "eval_loss": [2.5098161630975833, 2.5122843319991173],
        "loss": [2.5318737030029297, 3.1951630115509033, 2.663723945617676],
        "grad_norm": [73.92599487304688, 21.257719039916992, 24.057634353637695],
    },
}


@pytest.fixture(params=["gpt", pytest.param("vit", marks=pytest.mark.slow)])
def run(request, tmp_path):
    """(its name, its workdir)."""
    with tarfile.open(DATA / f"{request.param}.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return request.param, tmp_path / request.param


@pytest.mark.slow
def test_a_run_of_old_goes_on_with_the_losses_it_would_have_had(run):
    name, workdir = run
    here("train.py", f"--workdir={workdir}")
    with Checkpoints(workdir, read_only=True) as checkpoints:
        assert checkpoints.steps() == [3, 6]
    later = [line for line in lines_of(workdir) if line["step"] > 3]
    for key, rtol in (("loss", 2e-6), ("grad_norm", 1e-5)):
        found = [line[key] for line in later if key in line]
        np.testing.assert_allclose(found, EXPECTED[name][key], rtol=rtol, err_msg=key)
    assert later[-1]["eval_loss"] == pytest.approx(EXPECTED[name]["eval_loss"][1], rel=2e-6)


def test_a_checkpoint_of_old_evaluates_as_it_did_and_so_does_its_conversion(run, tmp_path):
    name, workdir = run
    expected = pytest.approx(EXPECTED[name]["eval_loss"][0], rel=2e-6)
    assert evaluate(workdir)["eval_loss"] == expected
    here("-m", "prenorm_jax.convert", workdir, tmp_path / "ln", "--to=layernorm", "--reset-optimizer")
    converted = evaluate(tmp_path / "ln")
    assert converted["norm"] == "layernorm" and converted["eval_loss"] == expected
