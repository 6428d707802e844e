"""What run.json tells of a run's starts: the changes that are not the norm's, and what `compare` takes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from commands import few_devices, small_run
from ml_collections import ConfigDict

from prenorm_jax.base.files import flatten
from prenorm_jax.config import load_data
from prenorm_jax.models.stacking import stack_blocks
from prenorm_jax.report import runs_figure
from prenorm_jax.report.run import BOOKKEEPING_KEYS, PLACES
from prenorm_jax.report.runs import compare
from prenorm_jax.train.loop import train
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import init_params, make_gradients
from prenorm_jax.train.workdir import MAY_CHANGE, RunRecord, settings, write_config


def changed(config: ConfigDict, key: str, value: object) -> ConfigDict:
    result = config.copy_and_resolve_references()
    *groups, name = key.split(".")
    group = result
    for part in groups:
        group = group[part]
    group[name] = value
    return result


def start(workdir: Path, config: ConfigDict, step: int) -> None:
    """As the loop starts a run at this step."""
    RunRecord(workdir).start(Run.create(config), step, {}, "digest")
    write_config(workdir, config)


@pytest.mark.parametrize(
    ("dropout", "key", "value", "said"),
    [
        (0.0, "steps", 200, "steps 100 -> 200 (the learning rate's schedule)"),
        (0.1, "accumulate", 2, "accumulate 1 -> 2 (dropout's masks)"),
        (0.1, "model.scan", True, "model.scan False -> True (dropout's masks)"),
        (0.0, "accumulate", 2, ""),
        (0.0, "model.scan", True, ""),
        (0.1, "mesh.fsdp", 2, ""),
        (0.1, "log_every", 2, ""),
    ],
)
def test_a_change_of_what_is_computed_is_said_and_recorded(text, tmp_path, capsys, dropout, key, value, said):
    before = small_run(text, dropout=dropout)
    after = changed(before, key, value)
    write_config(tmp_path, before)
    start(tmp_path, before, 0)
    start(tmp_path, before, 4)
    assert "otherwise" not in capsys.readouterr().err
    start(tmp_path, after, 8)
    assert capsys.readouterr().err == (f"computed otherwise after step 8: {said}\n" if said else "")
    start(tmp_path, after, 4)  # from a checkpoint before it: of the steps that stand, these are the first
    assert capsys.readouterr().err == (f"computed otherwise after step 4: {said}\n" if said else "")
    record = json.loads((tmp_path / "run.json").read_text())
    assert [session["step"] for session in record["sessions"]] == [0, 4, 8, 4] and record["data"] == "digest"
    if said:
        assert [session["settings"][key] for session in record["sessions"][1:3]] == [flatten(before)[key], value]


def test_a_constant_learning_rate_has_no_schedule_that_steps_would_change(text):
    config = small_run(text)
    config.optimizer.final_learning_rate = 1.0
    assert settings(config) == {}


@pytest.mark.slow
def test_an_extended_run_of_an_earlier_version_says_so_and_its_report_too(saved, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs_figure, "figure", lambda report, width=0: b"")
    run = shutil.copytree(saved, tmp_path / "run")
    record = json.loads((run / "run.json").read_text())
    for session in record["sessions"]:
        del session["settings"]
    (run / "run.json").write_text(json.dumps(record))
    with few_devices(1):
        train(small_run(text, steps=7, dropout=0.1), run)
    said = capsys.readouterr().err
    assert "computed otherwise after step 6: steps 6 -> 7 (the learning rate's schedule)\n" in said
    assert "warning: the 7 steps end within optimizer.warmup_steps=10" in said
    report = compare([saved, run], tmp_path / "report")
    assert report["runs"][1]["changes"] == [{"step": 6, "key": "steps", "from": 6, "to": 7}]
    assert report["parting_keys"] == [] and "run went on after step 6 with steps=7" in report["warnings"][1]


def test_what_compare_ignores_is_what_may_change(text):
    assert (
        BOOKKEEPING_KEYS | PLACES | {"steps", "init_from"} == MAY_CHANGE
    )  # which part two runs, not the starts of one
    assert set(settings(small_run(text, dropout=0.1))) <= MAY_CHANGE


@pytest.mark.wide
def test_under_dropout_the_loss_depends_on_no_key_that_may_change_but_those_recorded(text):
    config = small_run(text, dropout=0.3)
    config.model.update({"depth": 2, "stochastic_depth": 0.2, "stochastic_depth_schedule": "constant"})

    def loss(config: ConfigDict) -> float:
        run = Run.create(config, make_mesh(config))
        params = init_params(Run.create(changed(config, "model.scan", False)))
        params = stack_blocks(params) if config.model.scan else params
        batch = run.global_batch(load_data(config).train_batch(config, 0, run.local_rows))
        return float(jax.jit(lambda *given: make_gradients(run)(*given)[0])(params, batch, jnp.int32(3)))

    values = {"accumulate": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "mesh.largest_replicated": 2**20}
    values |= {"model.scan": True, "model.remat": "full", "model.attention_kernel": "xla"}
    config.batch_size = 16
    expected = loss(config)
    with few_devices(1):
        assert abs(loss(config) - expected) < 1e-9
    recorded = {key for key in values if abs(loss(changed(config, key, values[key])) - expected) > 1e-9}
    assert recorded == settings(config).keys() - {"steps"}
