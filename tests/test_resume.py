"""Runs that are killed, stopped, moved, switched, or not finite: what they leave, and how they go on."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from commands import (
    SMALL,
    command,
    damage,
    digests,
    error_of,
    evaluate,
    few_devices,
    here,
    lines_of,
    losses_of,
    small_run,
    steps_written,
    wait_until,
)
from jax.errors import JaxRuntimeError
from jax.experimental.layout import Format, Layout
from kill_and_damage import check_same_run, kill, run_flags, start
from ml_collections import ConfigDict

import prenorm_jax.train.sharding as sharding_module
import prenorm_jax.train.step as step_module
from prenorm_jax.base.console import run_command
from prenorm_jax.base.errors import PrenormError, Unwritable
from prenorm_jax.base.files import flatten
from prenorm_jax.config import load_data
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import NORMS
from prenorm_jax.models.registry import model_config
from prenorm_jax.train import loop
from prenorm_jax.train.checkpoint import Checkpoints
from prenorm_jax.train.evaluation import evaluate as evaluate_params
from prenorm_jax.train.evaluation import load_as, mesh_for
from prenorm_jax.train.failures import Place
from prenorm_jax.train.loop import train
from prenorm_jax.train.nonfinite import worst_leaf
from prenorm_jax.train.run import Run
from prenorm_jax.train.step import make_eval_step
from prenorm_jax.train.workdir import MAY_CHANGE, OF_THE_NORM, config_differences, literal_config, write_config

__all__ = ["damage", "losses_of", "steps_written", "wait_until"]
alone = pytest.mark.usefixtures("one_device")


@pytest.mark.slow
def test_killed_while_it_writes_and_evaluates_and_stopped_between_a_run_is_bit_for_bit_the_same(text, tmp_path):
    flags, whole, killed, rng = run_flags(text), tmp_path / "whole", tmp_path / "killed", np.random.default_rng(0)
    command("train.py", *flags, f"--workdir={whole}")
    kill("writing", signal.SIGKILL, flags, killed, rng)
    process = start(*flags, f"--workdir={killed}")
    wait_until(lambda: steps_written(killed) >= 25, process)
    process.send_signal(signal.SIGINT)
    check_saved(process, process.communicate()[1], killed, "SIGINT")
    kill("evaluating", signal.SIGKILL, flags, killed, rng)
    command("train.py", *flags, f"--workdir={killed}")
    check_same_run(killed, whole)


def check_saved(process: subprocess.Popen, errors: str, workdir: Path, signal_name: str) -> int:
    """The process that was asked to stop said so and saved its last step, which is returned."""
    assert process.returncode == 75, errors
    last = errors.strip().splitlines()[-1]
    assert f"{signal_name} at step" in last and "saved" in last
    with Checkpoints(workdir, read_only=True) as checkpoints:
        saved_at = checkpoints.resolve(None)
    assert saved_at == max(losses_of(workdir))
    return saved_at


@pytest.mark.slow
def test_a_second_process_is_kept_out_and_the_first_saves_when_it_is_asked_to_stop(text, tmp_path):
    flags = [*SMALL, f"--config.data.path={text}", f"--workdir={tmp_path / 'run'}", "--config.steps=100000"]
    flags += ["--config.checkpoint_every=0", "--config.eval_every=0"]
    process = start(*flags)
    wait_until(lambda: steps_written(tmp_path / "run") >= 20, process)
    message = error_of("train.py", *flags)
    assert f"process {process.pid} on" in message and "is training in" in message
    process.send_signal(signal.SIGTERM)
    saved_at = check_saved(process, process.communicate()[1], tmp_path / "run", "SIGTERM")
    here("train.py", *flags, f"--config.stop_at={saved_at + 2}")  # the lock went with its process
    assert list(losses_of(tmp_path / "run")) == list(range(1, saved_at + 3))


@pytest.mark.wide  # as when a mesh's axes change, in a test of this file
def test_devices_may_change_between_saves(text, tmp_path):
    flags = [*SMALL, f"--config.data.path={text}", "--config.batch_size=8", "--config.steps=12"]
    flags += ["--config.checkpoint_every=4"]
    alone = tmp_path / "alone"
    here("train.py", *flags, f"--workdir={alone}")
    for counts in ((8, 1, 4), (1, 4, 8)):
        workdir = tmp_path / "-".join(map(str, counts))
        for stop, devices in zip((4, 8, 12), counts, strict=True):
            here("train.py", *flags, f"--workdir={workdir}", f"--config.stop_at={stop}", devices=devices)
        moved, expected = losses_of(workdir), losses_of(alone)
        assert moved.keys() == expected.keys()
        np.testing.assert_allclose(list(moved.values()), list(expected.values()), rtol=1e-5)


@pytest.mark.slow
@alone
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.wide), 0.1])
def test_switching_the_norm_every_25_steps_changes_nothing_but_rounding(text, tmp_path, dropout):
    whole, switched = small_run(text), small_run(text)
    whole.model.dropout = switched.model.dropout = dropout
    train(whole, tmp_path / "whole")
    for stop, norm in ((25, "layernorm"), (50, "rmsnorm"), (75, "crmsnorm"), (100, "layernorm")):
        switched.stop_at, switched.model.norm = stop, norm
        train(switched, tmp_path / "switched")
    expected, actual = losses_of(tmp_path / "whole"), losses_of(tmp_path / "switched")
    assert list(actual) == list(range(1, 101))
    assert expected[100] < expected[1] - 0.1, "this run learns nothing, so it would show nothing"
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=0, atol=1e-9)
    trees = []
    for run in ("whole", "switched"):
        with Checkpoints(tmp_path / run, read_only=True) as checkpoints:
            trees.append(checkpoints.params(100)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), *trees)
    sessions = json.loads((tmp_path / "switched" / "run.json").read_text())["sessions"]
    assert [(s["step"], s["norm"]) for s in sessions] == [
        (0, "layernorm"),
        (25, "rmsnorm"),
        (50, "crmsnorm"),
        (75, "layernorm"),
    ]


@alone
def test_a_run_that_goes_on_takes_the_batches_that_were_next(saved, text, tmp_path):
    config = small_run(text, steps=6, checkpoint_every=2, dropout=0.1)
    for stop in (3, 6):
        config.stop_at = stop
        train(config, tmp_path / "run")
    assert losses_of(tmp_path / "run") == losses_of(saved)


@pytest.mark.slow
def test_mesh_stacking_and_accumulation_may_change_between_saves(text, tmp_path):
    """With moments that are carried along: had they started anew, the curve would be another."""
    whole, changed = (small_run(text, steps=15, batch_size=16) for _ in range(2))
    for config in (whole, changed):
        config.model.depth = 2  # and adamw, whose state has the parameters' tree twice
    train(whole, tmp_path / "whole")
    for stop, scan, fsdp, tensor, accumulate, norm in (
        (5, True, 2, 2, 1, "rmsnorm"),
        (10, False, 4, 1, 2, "crmsnorm"),
        (15, True, 1, 2, 2, "layernorm"),
    ):
        changed.stop_at, changed.accumulate = stop, accumulate
        changed.mesh.update({"fsdp": fsdp, "tensor": tensor})
        changed.model.update({"scan": scan, "norm": norm, "remat": "full" if scan else "none"})
        train(changed, tmp_path / "changed")
    expected, actual = losses_of(tmp_path / "whole"), losses_of(tmp_path / "changed")
    assert list(actual) == list(range(1, 16))
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=0, atol=1e-10)


@pytest.mark.wide
def test_arrays_may_lie_in_another_order_than_their_axes(text, tmp_path, monkeypatch):
    """As they do by default on TPUs. Here it is the state that does, so that all that meets it has to take it."""
    config, expected = small_run(text, steps=6, checkpoint_every=2), small_run(text, steps=6)
    config.mesh.fsdp = config.mesh.tensor = 2
    config.model.norm, config.eval_every = "crmsnorm", 2
    train(expected, tmp_path / "expected")

    def reversed_axes(shardings, tree):
        return jax.tree.map(lambda s, leaf: Format(Layout(tuple(reversed(range(leaf.ndim)))), s), shardings, tree)

    for module in (sharding_module, step_module):
        monkeypatch.setattr(module, "row_major_formats", reversed_axes)
    config.stop_at = 4
    train(config, tmp_path / "run")
    config.stop_at, config.model.scan = 6, True
    train(config, tmp_path / "run")
    losses = list(losses_of(tmp_path / "run").values())
    np.testing.assert_allclose(losses, list(losses_of(tmp_path / "expected").values()), rtol=0, atol=1e-10)
    evaluated = [line["eval_loss"] for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    for norm in NORMS:
        mesh = mesh_for(config)
        _, model, params = load_as(tmp_path / "run", norm, None, mesh)
        run = Run.create(config, mesh).computing(model)
        result = evaluate_params(run, make_eval_step(run), params, load_data(config))
        assert result["eval_loss"] == pytest.approx(evaluated[-1], abs=1e-9)
    more = small_run(text, steps=1, init_from=str(tmp_path / "run"))
    train(more, tmp_path / "more")


@pytest.mark.slow
@alone
def test_coordinates_may_change_at_a_resume_of_a_pre_ln_run_and_not_of_a_native_one(saved, text, tmp_path):
    config = small_run(text, steps=6, dropout=0.1, norm="crmsnorm")
    for stop, kind, entry in ((3, "drop", None), (6, "reflect", 3)):
        config.stop_at = stop
        config.model.update({"coordinates": kind, "coordinates_entry": entry})
        train(config, tmp_path / "run")
    expected, actual = losses_of(saved), losses_of(tmp_path / "run")
    assert list(actual) == [1, 2, 3, 4, 5, 6] and len(set(expected.values())) == 6
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=0, atol=1e-11)
    config.parameterization = "native"
    write_config(tmp_path, config)
    config.model.coordinates = "drop"
    with pytest.raises(PrenormError, match=r"model\.coordinates: 'reflect' -> 'drop'"):
        train(config, tmp_path)


def test_a_native_run_does_not_switch(text, tmp_path):
    config = small_run(text, steps=2, parameterization="native", norm="crmsnorm")
    write_config(tmp_path, config)
    config.model.norm = "rmsnorm"
    with pytest.raises(PrenormError, match=r"model\.norm: 'crmsnorm' -> 'rmsnorm'"):
        train(config, tmp_path)


# --- Which changes make it another run. ---


def test_only_what_the_readme_lists_may_change(text):
    """Of every key of a configuration: another value is another run, or one of these."""
    allowed = {"steps", "stop_at", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard"}
    allowed |= {
        "on_nonfinite",
        "grace_seconds",
        "profile",
        "init_from",
        "data.cache",
        "accumulate",
        "model.attention_kernel",
    }
    allowed |= {"mesh.fsdp", "mesh.tensor", "mesh.largest_replicated", "model.scan", "model.remat"}
    places = {"data.path", "data.eval_path", "data.tokenizer"}  # the content is compared instead
    assert set(MAY_CHANGE) == allowed | places
    config = literal_config(small_run(text))
    for key in flatten(config):
        changed = ConfigDict(config.to_dict(), type_safe=False)
        *groups, name = key.split(".")
        group = changed
        for part in groups:
            group = group[part]
        group[name] = "something else"
        expected = [] if key in allowed | places | OF_THE_NORM else [key]
        assert [line.split(":")[0] for line in config_differences(config, changed)] == expected


@alone
def test_data_may_move_but_not_change(saved, text, tmp_path):
    run, there = shutil.copytree(saved, tmp_path / "run"), shutil.copytree(text, tmp_path / "there")
    train(small_run(there, steps=7, dropout=0.1), run)
    assert list(losses_of(run)) == [1, 2, 3, 4, 5, 6, 7]
    file = next(path for path in there.rglob("*") if path.is_file())
    file.write_text(file.read_text()[::-1])
    with pytest.raises(PrenormError, match=r"the data are not those that .* was trained on.*init_from"):
        train(small_run(there, steps=8, dropout=0.1), run)
    assert list(losses_of(run)) == [1, 2, 3, 4, 5, 6, 7]


# --- Losses that are not finite. ---


@pytest.mark.slow
@alone
def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_anything(text, tmp_path, monkeypatch):
    config = small_run(text, steps=12, log_every=7)
    config.optimizer.update({"learning_rate": 1e38, "warmup_steps": 0, "clip": 0.0, "name": "sgd"})
    with pytest.raises(PrenormError) as error:
        train(config, tmp_path / "run")
    message = str(error.value)
    good = max(losses_of(tmp_path / "run"), default=0)
    assert f"step {good + 1} is not finite" in message
    assert f"examples {good * 8} to {good * 8 + 7}" in message
    leaves = abstract_params(model_config(config.model))  # the worst gradient's, or where none is finite:
    assert any(f"{what} in {'/'.join(path)}" in message for path in leaves for what in ("gradient", "parameter is"))
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.steps() == [good]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoints.params(good)[1]))
    # Again: the same error, and the same checkpoint, which the first process finds once none is being written.
    happened, wait = [], Checkpoints.wait
    monkeypatch.setattr(Checkpoints, "wait", lambda checkpoints: happened.append("wait") or wait(checkpoints))
    monkeypatch.setattr(loop, "of_first", lambda found: happened.append(found) or found)
    with pytest.raises(PrenormError, match=f"step {good + 1} is not finite"):
        train(config, tmp_path / "run")
    assert happened[:2] == ["wait", True]
    config.on_nonfinite = "skip"
    train(config, tmp_path / "run")
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.metadata(12)["nonfinite"] == 12 - good
    assert losses_of(tmp_path / "run")[good + 1] is None or np.isfinite(losses_of(tmp_path / "run")[good + 1])


@alone
@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_every", [1, pytest.param(0, marks=pytest.mark.wide)])
def test_an_update_that_overflows_is_not_kept(text, tmp_path, checkpoint_every):
    """Loss and gradient are finite, the new parameters are not."""
    config = small_run(text, steps=4, checkpoint_every=checkpoint_every)
    config.model.update({"dtype": "float32", "param_dtype": "float32"})
    config.optimizer.update({"learning_rate": 3e38, "warmup_steps": 0, "weight_decay": 10.0})
    with pytest.raises(PrenormError, match=r"step 1 is not finite .*param_norm inf.*step 0, is saved"):
        train(config, tmp_path / "run")
    config.on_nonfinite, config.stop_at = "skip", 2
    train(config, tmp_path / "run")
    config.stop_at = None
    train(config, tmp_path / "run")
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.metadata(4)["nonfinite"] == 4, "a resumed run counts on"
        for step in checkpoints.steps():
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoints.params(step)[1]))


def test_the_worst_leaf_is_named():
    params = {"a": {"kernel": np.ones(3)}, "b": {"kernel": np.array([1, -7e5, 1])}}
    grads = {"a": {"kernel": np.array([1e9, 1, 1])}, "b": {"kernel": np.array([1, np.nan, np.inf])}}
    assert worst_leaf(grads, params).startswith("worst gradient in b/kernel (67% not finite")
    finite = {"a": {"kernel": np.array([1, -1e9, 1])}, "b": {"kernel": np.ones(3)}}
    assert worst_leaf(finite, params).startswith("worst gradient in a/kernel (0% not finite, up to 1e+09")
    nothing = {"a": {"kernel": np.full(3, np.nan)}, "b": {"kernel": np.full(3, np.nan)}}
    assert "the largest parameter is in b/kernel (7e+05)" in worst_leaf(nothing, params)


# --- Other errors in the loop. ---

EXHAUSTED = JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 68719476736 bytes.\nand 27 lines more")


def before(monkeypatch: pytest.MonkeyPatch, what: str, step: int, hook: Callable[[Any], None]) -> None:
    """In the next run calls `hook`, with the state or None, before the step is taken or its batch is read."""
    compiled, prefetch = loop._Training._compiled, loop.prefetch

    def hooked(training: object, batch: object) -> Callable:
        train_step = compiled(training, batch)

        def call(state: Any, batch: object) -> Any:
            if int(state.step) == step - 1:
                hook(state)
            return train_step(state, batch)

        return call

    def hooked_read(read: Callable[[int], Any], steps: range) -> Any:
        return prefetch(lambda number: (number == step - 1 and hook(None)) or read(number), steps)

    if what == "step":
        monkeypatch.setattr(loop._Training, "_compiled", hooked)
    else:
        monkeypatch.setattr(loop, "prefetch", hooked_read)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.slow
@alone
def test_any_error_in_the_loop_saves_first_and_what_goes_on_is_bit_for_bit_the_same(
    saved, text, tmp_path, monkeypatch, capsys
):
    config, run = small_run(text, steps=6, dropout=0.1, log_every=4), tmp_path / "run"
    for what, at, error, message in (
        ("data", 2, PrenormError("x.png cannot be read: replace it"), r"x\.png cannot be read: replace it; step 1 is"),
        ("step", 5, EXHAUSTED, r"memory is exhausted \(.*bytes.*\): .*--config\.accumulate=2.*fsdp.*; step 4 is"),
        ("step", 6, ZeroDivisionError("a mistake"), "^a mistake$"),
    ):
        with monkeypatch.context() as patch, pytest.raises(type(error) if at == 6 else PrenormError) as caught:
            before(patch, what, at, raising(error))
            train(config, run)
        assert re.search(message, str(caught.value))
        assert at == 6 or str(caught.value).endswith(f"step {at - 1} is saved: the same command goes on from there")
        assert "\n" not in str(caught.value)
        assert list(losses_of(run)) == list(range(1, at)), "lines of steps that were taken are lost"
    assert capsys.readouterr().err.splitlines()[-1] == "step 5 is saved: the same command goes on from there"
    train(config, run)
    assert losses_of(run) == losses_of(saved)
    assert digests(run, 6) == digests(saved, 6)


@pytest.mark.slow
@alone
def test_a_folder_in_which_nothing_was_trained_stays_free_and_a_state_that_is_gone_is_not_saved(
    text, tmp_path, monkeypatch
):
    config, run = small_run(text, steps=6), tmp_path / "run"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "config.json")
    with monkeypatch.context() as patch, pytest.raises(PrenormError, match=r"No space left .*config\.json': mend that"):
        patch.setattr(loop, "write_config", raising(full))
        train(config, run)
    with monkeypatch.context() as patch, pytest.raises(PrenormError, match=r"memory is exhausted .*another workdir$"):
        before(patch, "step", 1, raising(EXHAUSTED))
        train(config, run)

    def fail(state: Any) -> None:
        jax.tree.map(lambda leaf: leaf.delete(), state)  # it was donated
        raise EXHAUSTED

    before(monkeypatch, "step", 3, fail)
    config.data.text_column = "another"
    with pytest.raises(PrenormError, match="nothing is saved yet: the same command starts anew"):
        train(config, run)
    assert list(losses_of(run)) == [1, 2]


@alone
def test_a_workdir_that_is_taken_away_ends_the_run(text, tmp_path, monkeypatch):
    run, away = tmp_path / "run", tmp_path / "away"
    before(monkeypatch, "data", 3, lambda _: run.rename(away) and None)
    with pytest.raises(PrenormError, match="run was removed, renamed or replaced while it was trained in: put it"):
        train(small_run(text, steps=6), run)
    assert not run.exists()
    place = Place(away)
    place.check()
    shutil.rmtree(away)
    for _ in ("removed", "replaced"):
        with pytest.raises(Unwritable):
            place.check()
        tmp_path.joinpath("another").mkdir(exist_ok=True)  # so that the new one is not given its number
        away.mkdir(exist_ok=True)


def test_memory_that_is_exhausted_is_one_line_in_every_command(capsys):
    for error in (EXHAUSTED, MemoryError("std::bad_alloc"), JaxRuntimeError("INTERNAL: CUDA: out of memory")):
        with pytest.raises(SystemExit) as ended:
            run_command(raising(error))
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: memory is exhausted (") and "take less at once" in line and ended.value.code == 2


# --- Starting from another run. ---


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run to start others from."""
    workdir = tmp_path_factory.mktemp("native") / "run"
    with few_devices(1):
        train(small_run(text, steps=3, parameterization="native", norm="crmsnorm"), workdir)
    return workdir


@pytest.mark.slow
@alone
@pytest.mark.parametrize("norm", [pytest.param("layernorm", marks=pytest.mark.wide), *NORMS[1:]])
def test_a_run_starts_from_a_checkpoint_of_any_norm(native, text, tmp_path, norm):
    fine_tuned = small_run(text, steps=5, init_from=str(native), parameterization="pre_ln", norm=norm)
    train(fine_tuned, tmp_path / "tuned")
    fine_tuned.model.d_model = 14
    with pytest.raises(PrenormError, match=r"model\.d_model: 12 -> 14"):
        train(fine_tuned, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@alone
@pytest.mark.slow
def test_a_run_starts_where_the_one_that_it_starts_from_ended(native, text, tmp_path):
    expected = evaluate(native, x64=True)["eval_loss"]
    start_again = small_run(text, steps=5, init_from=str(native), stop_at=1)
    start_again.optimizer.learning_rate = 0.0
    train(start_again, tmp_path / "still")
    assert evaluate(tmp_path / "still", x64=True)["eval_loss"] == pytest.approx(expected, rel=1e-12)
    # Killed before its first checkpoint it still starts from there, not from the seed.
    shutil.rmtree(tmp_path / "still" / "checkpoints" / "1")
    (tmp_path / "still" / "run.json").unlink()  # which knows that there was one
    train(start_again, tmp_path / "still")
    assert evaluate(tmp_path / "still", x64=True)["eval_loss"] == pytest.approx(expected, rel=1e-12)
