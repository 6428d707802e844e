"""What `aot` says of a training step. Here for eight CPU devices; .ci/run compiles one for TPUs with their compiler."""

import math
import re
from types import SimpleNamespace
from unittest import mock

import jax
import pytest
from commands import command, error_of, here

from prenorm_jax.bench import hlo
from prenorm_jax.bench.compiled import compile_step, part_of, planned_memory, report_text
from prenorm_jax.config import base_config
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import init_state, make_train_step, state_formats


@pytest.fixture(scope="module")
def config():
    config = base_config()
    config.data.seq_len = 8
    config.model.update({"depth": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 4, "mlp_dim": 32})
    config.model.update({"vocab_size": 16, "max_len": 8, "norm": "crmsnorm"})
    config.mesh.fsdp, config.mesh.tensor, config.model.scan = 2, 2, True
    return config


@pytest.fixture(scope="module")
def compiled(config):
    """(what is said of the config's step, the program's text)."""
    texts, operations = [], hlo.operations
    with mock.patch.object(hlo, "operations", lambda text: texts.append(text) or operations(text)):
        return compile_step(config, jax.devices()), texts[0]


def test_arguments_are_what_a_device_holds_of_the_state_and_the_batch(config, compiled):
    run = Run.create(config, make_mesh(config))
    state = jax.eval_shape(lambda: init_state(run))
    places = jax.tree.leaves(state_formats(run))  # shardings, or formats with one
    held = sum(
        leaf.dtype.itemsize * math.prod(getattr(place, "sharding", place).shard_shape(leaf.shape))
        for leaf, place in zip(jax.tree.leaves(state), places, strict=True)
    )
    batch = run.kind.batch_shapes(config).values()
    held += sum(leaf.size * leaf.dtype.itemsize for leaf in batch) // 4  # data 2 × fsdp 2
    report, _ = compiled
    assert report["arguments"] == pytest.approx(held, rel=0.01)  # XLA aligns them
    assert report["peak"] >= report["arguments"] + report["temporaries"] > report["arguments"]
    assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2} and report["devices"] == 8
    gathered = report["collectives"]["all-gather"]
    assert gathered[0] > config.model.depth and gathered[1] > 0  # in a loop: as often as there are blocks


def test_planned_memory_counts_what_is_donated_once():
    sizes = {"argument": 100, "output": 70, "alias": 60, "temp": 5, "generated_code": 2}
    analysis = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in sizes.items()})
    found = planned_memory(SimpleNamespace(memory_analysis=lambda: analysis))
    assert found == {"arguments": 100, "temporaries": 5, "peak": 117}


def test_one_device_needs_no_collectives(config):
    alone = config.copy_and_resolve_references()
    alone.mesh.fsdp = alone.mesh.tensor = 1
    alone.parameterization = "native"
    assert compile_step(alone, jax.devices()[:1])["collectives"] == {}


def test_no_device_holds_a_whole_gradient_or_batch_where_layouts_are_asked_for(config, monkeypatch):
    """As on TPUs. XLA's partitioner made whole arrays of what such a constraint was put on."""
    monkeypatch.setattr("prenorm_jax.models.placement.computing_platform", lambda: "tpu")
    run = Run.create(config, make_mesh(config))
    lowered = make_train_step(run).lower(jax.eval_shape(lambda: init_state(run)), run.kind.batch_shapes(config))
    assert "LayoutConstraint" in lowered.as_text()
    shapes = set(re.findall(r"f32(\[[\d,]+\])", lowered.compile().as_text()))
    assert "[2,8,16]" in shapes and "[2,32,16]" not in shapes  # (blocks, MLP width, d): the width by 4 devices
    assert "[4,8,15]" in shapes and "[16,8,15]" not in shapes  # (B, T, D): the batch by 4 devices


def test_every_part_of_a_step_is_found(compiled):
    """By the names in the program: if one is changed, its operations would silently count as another part's."""
    found = {}
    for operation in hlo.operations(compiled[1]):
        found.setdefault(part_of(operation), []).append(operation)
    assert {"conversion h", "optimizer", "norms", "attention", "MLP", "embedding, head and loss"} <= set(found)
    assert all("mlp/" in operation.scope for operation in found["MLP"])
    assert not any(re.search("attention/|mlp/", operation.scope) for operation in found["norms"])


def test_the_report_says_what_fits(compiled):
    text = report_text(compiled[0] | {"cycles": {"norms": 3_000_000, "MLP": 1_000_000}}, hbm_gib=95)
    assert "GiB of the chip's 95, so it fits" in text and "norms 3.0 M (75.0%)" in text and "all-gather" in text
    assert "data 2 × fsdp 2 × tensor 2" in text


def test_how_parameters_are_split_is_said_without_libtpu():
    flags = ["--config=configs/gpt_stdlib.py", "--parameters", "--config.mesh.fsdp=2", "--config.mesh.tensor=4"]
    rows = here("-m", "prenorm_jax.aot", *flags).stdout.splitlines()
    up = next(row for row in rows if "block_0/mlp/up/kernel" in row)
    assert "128×512" in up and "-, tensor+fsdp" in up and up.endswith("8,192")


@pytest.mark.wide
def test_rematerialisation_keeps_less(config):
    kept = {}
    for remat in ("none", "dots", "full"):
        changed = config.copy_and_resolve_references()
        changed.model.remat, changed.batch_size, changed.model.depth = remat, 256, 8
        kept[remat] = compile_step(changed, jax.devices())["temporaries"]
    assert kept["full"] < 0.9 * kept["dots"] < 0.9 * 0.95 * kept["none"]


def test_bad_flags_are_refused(tmp_path):
    abacus = ["--config=configs/gpt_stdlib.py", "--topology=abacus:2x2"]
    lines = command("-m", "prenorm_jax.aot", *abacus, status=2).stderr.strip().splitlines()  # here it would load libtpu
    assert lines[-1].startswith("error: --topology=abacus:2x2 is not to be had")
    for flags, line in (
        (["--topology=v5e:2x2"], "--config is missing"),
        (["--config=configs/gpt_stdlib.py", f"--out={tmp_path}"], "is a folder: name a file in it"),
        (["--config=configs/gpt_stdlib.py", "--out=/proc/figures/aot.json"], "cannot write into /proc/figures"),
    ):
        assert line in error_of("-m", "prenorm_jax.aot", *flags)
