"""Conversion in parts gives what conversion of the whole tree gives, and is never taken for complete before it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from commands import ROOT, command
from common import gpt_configs, random_params, tiny, vit_configs
from flax.traverse_util import flatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st

from prenorm_jax import PrenormError, convert_config, convert_params
from prenorm_jax.equivalence.stored import convert_stored, tiles
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.train.checkpoint import Checkpoints
from prenorm_jax.train.leaves import NewLeaves


def save(folder: Path, config: ModelConfig, params: dict) -> None:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(3, params, None, config, 1, "data")


def convert_in_parts(source: Path, target: Path, to: str, part_size: int) -> None:
    with Checkpoints(source, read_only=True) as old, Checkpoints(target) as made:
        config = old.model(3)
        new_config = convert_config(config, to)
        with made.save_leaves(3, param_shapes(new_config), new_config, 1, "data") as new, old.leaves(3) as stored:
            convert_stored(stored, new, config, to, part_size)


def load(folder: Path) -> tuple[ModelConfig, dict]:
    with Checkpoints(folder, read_only=True) as checkpoints:
        return checkpoints.params(3)


def check_chain(folder: Path, config: ModelConfig, params: dict, part_size: int, tolerance: float) -> None:
    """Every direction: each tree is converted in parts from the one before it."""
    save(folder / "0", config, params)
    for i, to in enumerate(["rmsnorm", "crmsnorm", "layernorm"]):
        params, config = convert_params(params, config, to), convert_config(config, to)
        convert_in_parts(folder / f"{i}", folder / f"{i + 1}", to, part_size)
        loaded_config, loaded = load(folder / f"{i + 1}")
        assert loaded_config == config
        loaded, expected = flatten_dict(loaded), flatten_dict(params)
        assert loaded.keys() == expected.keys()
        for path, leaf in expected.items():
            assert leaf.dtype == loaded[path].dtype, path
            np.testing.assert_allclose(
                loaded[path].astype(float), leaf.astype(float), rtol=tolerance, atol=tolerance, err_msg=str(path)
            )


def check_any(tmp_path_factory: pytest.TempPathFactory, config: ModelConfig) -> None:
    """NumPy sums up a single column in another order than several, hence the rounding."""
    check_chain(tmp_path_factory.mktemp("chain"), config, random_params(config, 1), 150, 1e-12)


@pytest.mark.wide
@given(config=st.one_of(gpt_configs(), vit_configs()))
@settings(max_examples=100)
def test_in_parts_is_as_at_once_for_many_models(tmp_path_factory, config):
    check_any(tmp_path_factory, config)


SLOW = [
    pytest.param("float32", 80, marks=pytest.mark.wide),
    pytest.param("float64", 80, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("dtype", "part_size"), [("bfloat16", 300), *SLOW])
def test_in_parts_is_bit_for_bit_as_at_once(tmp_path, dtype, part_size):
    config = tiny(param_dtype=dtype, tie_embeddings=False, layer_scale=0.1, gated_mlp=True)
    check_chain(tmp_path, config, random_params(config, 1, embedding_mean=1.0), part_size, 0.0)


def test_tiles_cover_a_module_once_along_axes_on_which_nothing_depends():
    leaves = {
        "kernel": [("layer", 3), ("read", 8), ("normed_heads", 12)],
        "bias": [("layer", 3), ("normed_heads", 12)],
        "scale": [("layer", 3), ("norm", 8)],
    }
    assert list(tiles(leaves, 4, 10**6)) == [{}]
    assert list(tiles(leaves, 4, 8 * 12)) == [{"layer": slice(i, i + 1)} for i in range(3)]
    parts = list(tiles(leaves, 4, 8 * 9))
    assert len(parts) == 6
    assert parts[:2] == [
        {"layer": slice(0, 1), "normed_heads": slice(0, 8)},
        {"layer": slice(0, 1), "normed_heads": slice(8, 12)},
    ]
    assert list(tiles({"kernel": [("patch", 3), ("patch", 3), ("channel", 2), ("write", 5)]}, 1, 1)) == [
        {"channel": slice(0, 1)},
        {"channel": slice(1, 2)},
    ]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, config = tmp_path_factory.mktemp("source"), tiny()
    save(folder, config, random_params(config, 1))
    return folder


def test_until_it_is_complete_it_counts_as_damaged(source, tmp_path, monkeypatch):
    whole = NewLeaves.write
    writes = []

    def write(self, path, part, array):
        writes.append(path)
        if len(writes) == stop:
            raise KeyboardInterrupt
        whole(self, path, part, array)

    stop = None
    monkeypatch.setattr(NewLeaves, "write", write)
    convert_in_parts(source, tmp_path / "whole", "crmsnorm", 100)
    total = len(writes)
    load(tmp_path / "whole")
    for stop in (1, total // 2, total):
        writes.clear()
        with pytest.raises(KeyboardInterrupt):
            convert_in_parts(source, tmp_path / f"{stop}", "crmsnorm", 100)
        with pytest.raises(PrenormError, match="is damaged"):
            load(tmp_path / f"{stop}")


def test_a_leaf_that_is_not_what_was_saved_is_found_on_the_way(source, tmp_path):
    folder = tmp_path / "changed"
    config, params = load(source)
    save(folder, config, params)
    base = {"driver": "file", "path": f"{folder}/checkpoints/3/params/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": "token_embedding/"}
    store = ts.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()
    store[2, 3].write(store[2, 3].read().result() + 1e-9).result()
    with pytest.raises(PrenormError, match="params differ from what was saved"):
        convert_in_parts(folder, tmp_path / "target", "rmsnorm", 40)
    with pytest.raises(PrenormError, match="params differ from what was saved"):
        load(folder)


def test_what_has_no_equivalent_is_refused_in_parts_too(tmp_path):
    pre_ln = tiny()
    config, params = convert_config(pre_ln, "rmsnorm"), convert_params(random_params(pre_ln, 0), pre_ln, "rmsnorm")
    params["block_1"]["mlp"]["down"]["kernel"] += 1.0
    save(tmp_path / "source", config, params)
    with pytest.raises(PrenormError, match="block_1/mlp/down/kernel is not zero-mean along the stream"):
        convert_in_parts(tmp_path / "source", tmp_path / "target", "layernorm", 40)


def test_no_room_is_one_line(source, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nand more")

    config = convert_config(tiny(), "rmsnorm")
    with Checkpoints(source, read_only=True) as old, Checkpoints(tmp_path) as made:
        with (
            pytest.raises(
                PrenormError, match="could not be written: RESOURCE_EXHAUSTED: No space left on device and m"
            ),
            made.save_leaves(3, param_shapes(config), config) as new,
            old.leaves(3) as stored,
        ):
            monkeypatch.setattr(ts, "open", lambda spec, **how: full() if "create" in how else ts.TensorStore)
            new.write(("token_embedding",), (slice(None),) * 2, np.zeros((11, 12)))
        del stored


def measure(folder: Path, *flags: str) -> dict:
    done = command("tests/measure_streaming.py", folder, *flags, PYTHONPATH=ROOT)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("to", ["crmsnorm"])
def test_memory_does_not_grow_with_the_checkpoint(tmp_path, to):
    result = measure(tmp_path, "--model=gpt:2x1024", f"--to={to}", "--vocab=50257", "--part-size=1048576")
    assert result["parameters_mb"] > 450
    assert result["peak_mb"] - result["before_mb"] < 270, result  # of 517
