"""Runs that are killed, moved, switched, damaged, or run out of room: what they leave, and how they go on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from common import tiny
from jax.experimental.layout import Format, Layout
from ml_collections import ConfigDict
from test_commands import ROOT, SMALL, clean_environment, command, error_of, evaluate, lines_of, make_text

import prenorm_jax.train.sharding as sharding_module
import prenorm_jax.train.step as step_module
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.config import base_config, load_data
from prenorm_jax.equivalence.convert import convert_config, convert_params
from prenorm_jax.equivalence.fit import fit_params
from prenorm_jax.models.abstract import abstract_params
from prenorm_jax.models.config import NORMS
from prenorm_jax.models.registry import model_config
from prenorm_jax.train import loop
from prenorm_jax.train.checkpoint import Checkpoints
from prenorm_jax.train.checksum import digest
from prenorm_jax.train.evaluation import load_as, mesh_for
from prenorm_jax.train.loop import train, worst_leaf
from prenorm_jax.train.sharding import batch_sharding
from prenorm_jax.train.step import init_state, make_eval_step, run_models
from prenorm_jax.train.workdir import MAY_CHANGE, config_differences, flat_config, literal_config


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


def losses_of(workdir: Path) -> dict[int, float]:
    lines = [line for line in lines_of(workdir) if "loss" in line]
    assert len({line["step"] for line in lines}) == len(lines), "a step is written twice"
    return {line["step"]: line["loss"] for line in lines}


def what_is_deterministic(workdir: Path) -> list[dict]:
    timed = ("tokens_per_s", "model_flops_per_s")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines_of(workdir)]


def digests(workdir: Path, step: int) -> dict[str, str]:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.metadata(step)["digests"]


def start(*flags: object, **options: object) -> subprocess.Popen:
    """train.py in the background."""
    arguments = [sys.executable, "train.py", *map(str, flags)]
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=clean_environment() | {"JAX_ENABLE_COMPILATION_CACHE": "0"},  # no half-written entry for the next
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def steps_written(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def is_evaluating(workdir: Path) -> bool:
    """The last line is that of a step to be evaluated, and it is not yet."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        last = json.loads(lines[-1]) if lines else {"step": 1}
    except ValueError:
        return False
    return last["step"] % 50 == 0 and "eval_loss" not in last


@pytest.mark.slow
def test_killed_at_five_moments_a_run_is_bit_for_bit_the_same(text, tmp_path):
    config = [*SMALL, f"--config.data.path={text}", "--config.steps=200", "--config.model.dropout=0.1"]
    config += [
        "--config.eval_every=50",
        "--config.checkpoint_every=20",
        "--config.log_every=3",
        "--config.batch_size=2",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command("train.py", *config, f"--workdir={whole}")

    def writing() -> bool:
        return any(killed.glob("checkpoints/*tmp*"))

    rng = np.random.default_rng(0)
    moments = ["steps", "writing", "steps", "evaluating", "steps"]
    seen = []
    for moment in moments:
        process = start(*config, f"--workdir={killed}")
        before = steps_written(killed)
        if moment == "writing":
            wait_until(writing, process)
        elif moment == "evaluating":
            wait_until(lambda: is_evaluating(killed), process)
        else:
            wait_until(lambda before=before: steps_written(killed) >= before + 5, process)
            time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen.append({"writing": writing(), "evaluating": is_evaluating(killed), "steps": steps_written(killed)}[moment])
    assert all(seen), f"the kills did not fall where they should: {dict(zip(moments, seen, strict=True))}"
    command("train.py", *config, f"--workdir={killed}")
    assert digests(killed, 200) == digests(whole, 200)
    assert set(digests(whole, 200)) == {"params", "optimizer"}
    assert what_is_deterministic(killed) == what_is_deterministic(whole)


@pytest.mark.slow
def test_devices_may_change_between_saves(text, tmp_path):
    flags = [
        *SMALL,
        f"--config.data.path={text}",
        "--config.batch_size=8",
        "--config.steps=12",
        "--config.checkpoint_every=4",
    ]
    alone = tmp_path / "alone"
    command("train.py", *flags, f"--workdir={alone}")
    for counts in ((8, 1, 4), (1, 4, 8)):
        workdir = tmp_path / "-".join(map(str, counts))
        for stop, devices in zip((4, 8, 12), counts, strict=True):
            command("train.py", *flags, f"--workdir={workdir}", f"--config.stop_at={stop}", devices=devices)
        moved, expected = losses_of(workdir), losses_of(alone)
        assert moved.keys() == expected.keys()
        np.testing.assert_allclose(list(moved.values()), list(expected.values()), rtol=1e-5)


def small_run(text: Path, **changes: object):
    """A configuration for `train` in this process, which has 8 devices and 64-bit mode."""
    config = base_config()
    config.update({"steps": 100, "batch_size": 8, "eval_every": 0, "checkpoint_every": 0, "tensorboard": False})
    config.data.update({"path": str(text), "seq_len": 7})
    # ε well above rounding: a parameter without a gradient (a key's bias) is moved by the sign of its rounding else.
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 10, "eps": 1e-6})
    config.model.update(
        {"depth": 1, "d_model": 12, "heads": 2, "max_len": 7, "dtype": "float64", "param_dtype": "float64"}
    )
    for key, value in changes.items():
        config[key] = value
    return config


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.1])
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_mesh_layout_of_the_blocks_and_accumulation_may_change_between_saves(text, tmp_path, name):
    """With moments that are carried along: had they started anew, the curve would be another."""
    whole, changed = (small_run(text, steps=20, batch_size=16) for _ in range(2))
    for config in (whole, changed):
        config.optimizer.name, config.model.depth = name, 2
    train(whole, tmp_path / "whole")
    for stop, scan, fsdp, tensor, accumulate, norm in (
        (5, True, 2, 2, 1, "rmsnorm"),
        (10, False, 4, 1, 2, "crmsnorm"),
        (15, True, 1, 2, 2, "layernorm"),
        (20, False, 1, 1, 1, "crmsnorm"),
    ):
        changed.stop_at, changed.accumulate = stop, accumulate
        changed.mesh.update({"fsdp": fsdp, "tensor": tensor})
        changed.model.update({"scan": scan, "norm": norm, "remat": "full" if scan else "none"})
        train(changed, tmp_path / "changed")
    expected, actual = losses_of(tmp_path / "whole"), losses_of(tmp_path / "changed")
    assert list(actual) == list(range(1, 21))
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_arrays_may_lie_in_another_order_than_their_axes(text, tmp_path, monkeypatch, scan):
    """As they do by default on TPUs. Here it is the state that does, so that all that meets it has to take it."""
    config, expected = small_run(text, steps=6, checkpoint_every=2), small_run(text, steps=6)
    config.mesh.fsdp = config.mesh.tensor = 2
    config.model.norm, config.eval_every = "crmsnorm", 2
    train(expected, tmp_path / "expected")

    def reversed_axes(shardings, tree):
        return jax.tree.map(lambda s, leaf: Format(Layout(tuple(reversed(range(leaf.ndim)))), s), shardings, tree)

    for module in (sharding_module, step_module):
        monkeypatch.setattr(module, "row_major", reversed_axes)
    config.stop_at = 4
    train(config, tmp_path / "run")
    config.stop_at, config.model.scan = 6, scan
    train(config, tmp_path / "run")
    losses = list(losses_of(tmp_path / "run").values())
    np.testing.assert_allclose(losses, list(losses_of(tmp_path / "expected").values()), rtol=0, atol=1e-10)
    evaluated = [line["eval_loss"] for line in lines_of(tmp_path / "run") if "eval_loss" in line]
    for norm in NORMS:
        mesh = mesh_for(config)
        _, model, params = load_as(tmp_path / "run", norm, None, mesh)
        result = loop.evaluate(
            make_eval_step(config, model, mesh), params, load_data(config), config, batch_sharding(mesh)
        )
        assert result["eval_loss"] == pytest.approx(evaluated[-1], abs=1e-9)
    more = small_run(text, steps=1, init_from=str(tmp_path / "run"))
    train(more, tmp_path / "more")


def test_a_native_run_does_not_switch(text, tmp_path):
    config = small_run(text, steps=2, parameterization="native")
    config.model.norm = "crmsnorm"
    train(config, tmp_path / "run")
    config.steps, config.model.norm = 3, "rmsnorm"
    with pytest.raises(PrenormError, match=r"model\.norm: 'crmsnorm' -> 'rmsnorm'"):
        train(config, tmp_path / "run")


# --- Checkpoints that are damaged. ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run of 6 steps with checkpoints at 2, 4 and 6."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    train(small_run(text, steps=6, checkpoint_every=2), workdir)
    return workdir


def damage(path: Path, how: str) -> None:
    if how == "flip":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 0x10
        path.write_bytes(content)
    elif how == "truncate":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
def test_damage_to_any_file_is_found_or_harmless(saved, tmp_path, how):
    run = small_run(saved)
    config, models = model_config(run.model), run_models(run)
    abstract = jax.eval_shape(lambda: init_state(run, models).opt_state)
    files = [path.relative_to(saved) for path in (saved / "checkpoints" / "6").rglob("*") if path.is_file()]
    files = [path for path in files if (saved / path).stat().st_size]
    found = []
    with Checkpoints(saved, read_only=True) as checkpoints:
        expected = checkpoints.params(6)[1], checkpoints.optimizer(6, abstract)
    for i, file in enumerate(files):
        copy = tmp_path / str(i)
        shutil.copytree(saved, copy)
        damage(copy / file, how)
        with Checkpoints(copy, read_only=True) as checkpoints:
            try:
                model, params = checkpoints.params(6)
                opt_state = checkpoints.optimizer(6, abstract)
            except PrenormError as error:
                assert "checkpoints/6" in str(error)
                assert "--step=2 or 4 names another" in str(error)
                assert "\n" not in str(error) and len(str(error)) < 600
                found.append(str(file))
            else:
                assert model == config
                assert digest((params, opt_state)) == digest(expected)
        shutil.rmtree(copy)
    assert all(any(f"/{item}/" in file for file in found) for item in ("params", "optimizer", "metadata"))


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(saved, text, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    largest = max((p for p in (copy / "checkpoints" / "6").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damage(largest, "truncate")
    content = largest.read_bytes()
    train(small_run(text, steps=8, checkpoint_every=2), copy)
    errors = capsys.readouterr().err
    assert "checkpoints/6 is damaged" in errors
    assert "falling back to step 4" in errors
    aside = copy / "damaged" / largest.relative_to(copy / "checkpoints")
    assert aside.read_bytes() == content
    whole = tmp_path / "whole"
    train(small_run(text, steps=8, checkpoint_every=2), whole)
    # The schedule of the first run spanned 6 steps: from the seventh on the losses differ, not the six before.
    assert {k: v for k, v in losses_of(copy).items() if k <= 4}.keys() == {1, 2, 3, 4}
    assert list(losses_of(copy)) == list(range(1, 9))


@pytest.mark.parametrize("content", ["null", "[]", "5", "{}", "edited"])
def test_metadata_that_say_something_else_are_damage(saved, tmp_path, content):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    path = copy / "checkpoints" / "6" / "metadata" / "metadata"
    edited = path.read_text().replace('"epsilon": 1e-05', '"epsilon": 1e-06')
    assert edited != path.read_text()
    path.write_text(edited if content == "edited" else content)
    with (
        Checkpoints(copy, read_only=True) as checkpoints,
        pytest.raises(PrenormError, match="checkpoints/6 is damaged"),
    ):
        checkpoints.params(6)


def test_a_checkpoint_under_the_name_of_another_step_is_damage(saved, text, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    shutil.copytree(copy / "checkpoints" / "4", copy / "checkpoints" / "6")
    train(small_run(text, steps=7, checkpoint_every=2), copy)
    assert "it is that of step 4 under another name" in capsys.readouterr().err
    assert (copy / "damaged" / "6").is_dir()


def test_a_checkpoint_of_another_model_is_no_damage(saved, text, tmp_path):
    config = small_run(text, steps=8)
    config.model.d_model = 14
    train(config, tmp_path / "other")
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    shutil.copytree(tmp_path / "other" / "checkpoints" / "8", copy / "checkpoints" / "8")
    with pytest.raises(PrenormError, match=r"/8 is of another model .*model\.d_model: 12 -> 14.*move it away"):
        train(small_run(text, steps=9), copy)
    assert not (copy / "damaged").exists()
    assert (copy / "checkpoints" / "8").is_dir()


def test_checkpoints_that_are_gone_are_missed(saved, text, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    shutil.rmtree(copy / "checkpoints" / "6")
    train(small_run(text, steps=6, stop_at=5), copy)
    assert "was saved at step 6, but its last checkpoint is of step 4" in capsys.readouterr().err
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(PrenormError, match="was saved at step 5, but there is no checkpoint in it any more"):
        train(small_run(text, steps=6), copy)
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_damage_to_the_other_files_stops_nothing_unsaid(saved, text, tmp_path, capsys):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = b"5\n"
    lines[2] = lines[2].replace(b'"step"', b'"stap"')
    (copy / "metrics.jsonl").write_bytes(b"".join(lines) + b"\xff\xff")
    (copy / "run.json").write_text("[]")
    train(small_run(text, steps=7), copy)
    errors = capsys.readouterr().err
    assert "had 2 damaged lines" in errors
    assert "run.json is damaged" in errors
    assert list(losses_of(copy)) == [1, 4, 5, 6, 7]
    (copy / "metrics.jsonl").unlink()
    train(small_run(text, steps=8), copy)
    assert "lacks" not in errors  # a history that starts anew, at 6, has nothing before it
    assert "lacks 1 of the 1 steps before this one" in capsys.readouterr().err
    (copy / "config.json").write_text("")
    with pytest.raises(PrenormError, match=r"config\.json is damaged: .*restore it from a copy"):
        train(small_run(text, steps=9), copy)


def test_with_no_readable_checkpoint_left_it_stops_and_changes_nothing(saved, text, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(saved, copy)
    for folder in (copy / "checkpoints").iterdir():
        shutil.rmtree(folder / "params" / "d", ignore_errors=True)
        shutil.rmtree(folder / "params" / "ocdbt.process_0", ignore_errors=True)
    before = sorted((p, p.stat().st_size) for p in copy.rglob("*"))
    with pytest.raises(PrenormError, match=r"no checkpoint in .* can be read: .*/6 is damaged.*/2 is damaged"):
        train(small_run(text, steps=8), copy)
    assert sorted((p, p.stat().st_size) for p in copy.rglob("*")) == before


FULL_DISK = """
set -e
mount -t tmpfs -o size=900k tmpfs "$1"
shift
train() { "$PYTHON" train.py "$@" --workdir="$DISK/run"; }
train "$@" --config.stop_at=3 2>/dev/null
dd if=/dev/zero of="$DISK/filler" bs=4k 2>/dev/null || true
truncate --size=-64k "$DISK/filler"  # room for the small files, too little for a checkpoint
status=0; train "$@" || status=$?
echo "status $status"
"$PYTHON" eval.py --workdir="$DISK/run" --json
rm "$DISK/filler"
train "$@" 2>/dev/null
cat "$DISK/run/metrics.jsonl"
"""


def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(text, tmp_path):
    """A real one, of 900 kB, in a mount namespace of its own."""
    unshare = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    flags = [*SMALL, f"--config.data.path={text}", "--config.tensorboard=False"]
    environment = clean_environment() | {"PYTHON": sys.executable, "DISK": str(tmp_path)}
    script = ["bash", "-c", FULL_DISK, "full_disk", str(tmp_path), *flags]
    done = subprocess.run([*unshare, *script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "could not be written" in last
    assert "the last complete one is at step 3" in last
    lines = done.stdout.splitlines()
    assert lines[0] == "status 2"
    assert json.loads(lines[1])["step"] == 3
    assert [entry["step"] for entry in map(json.loads, lines[2:]) if "loss" in entry] == [1, 2, 3, 4, 5, 6]


FILLING_DISK = """
set -e
mount -t tmpfs -o size=3000k tmpfs "$DISK"
timeout 100 "$PYTHON" train.py "$@" --workdir="$DISK/run" & pid=$!
while [ "$(cat "$DISK/run/metrics.jsonl" 2>/dev/null | wc -l)" -lt 20 ]; do sleep 0.05; done
dd if=/dev/zero of="$DISK/filler" bs=1k 2>/dev/null || true
status=0; wait $pid || status=$?
echo "status $status"
"""


@pytest.mark.parametrize("tensorboard", [True, False])
def test_a_disk_that_fills_up_between_two_saves_stops_the_run(text, tmp_path, tensorboard):
    unshare = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    flags = [*SMALL, f"--config.data.path={text}", "--config.steps=100000", "--config.log_every=1"]
    flags += ["--config.eval_every=0", "--config.checkpoint_every=0", f"--config.tensorboard={tensorboard}"]
    environment = clean_environment() | {"PYTHON": sys.executable, "DISK": str(tmp_path)}
    script = ["bash", "-c", FILLING_DISK, "filling_disk", *flags]
    done = subprocess.run([*unshare, *script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "status 2", done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "metrics.jsonl cannot be written (No space left on device)" in last
    assert tensorboard or "TensorBoard" not in done.stderr


# --- Which changes make it another run. ---


def test_only_what_the_readme_lists_may_change(text):
    """Of every key of a configuration: another value is another run, or one of these."""
    allowed = {"steps", "stop_at", "eval_every", "checkpoint_every", "keep_checkpoints", "log_every", "tensorboard"}
    allowed |= {"on_nonfinite", "grace_seconds", "profile", "data.cache", "accumulate", "model.attention_kernel"}
    allowed |= {"mesh.fsdp", "mesh.tensor", "mesh.largest_replicated", "model.scan", "model.remat"}
    places = {"data.path", "data.eval_path", "data.tokenizer"}  # the content is compared instead
    assert set(MAY_CHANGE) == allowed | places
    config = literal_config(small_run(text))
    for key in flat_config(config):
        changed = ConfigDict(config.to_dict(), type_safe=False)
        *groups, name = key.split(".")
        group = changed
        for part in groups:
            group = group[part]
        group[name] = "something else"
        expected = [] if key in allowed | places | {"model.norm"} else [key]
        assert [line.split(":")[0] for line in config_differences(config, changed)] == expected


def test_data_may_move_but_not_change(text, tmp_path):
    here, there, run = tmp_path / "here", tmp_path / "there", tmp_path / "run"
    shutil.copytree(text, here)
    train(small_run(here, steps=3), run)
    shutil.move(here, there)
    train(small_run(there, steps=4), run)
    assert list(losses_of(run)) == [1, 2, 3, 4]
    file = next(path for path in there.rglob("*") if path.is_file())
    file.write_text(file.read_text()[::-1])
    with pytest.raises(PrenormError, match=r"the data are not those that .* was trained on.*init_from"):
        train(small_run(there, steps=5), run)
    assert list(losses_of(run)) == [1, 2, 3, 4]


def test_a_second_process_is_kept_out(text, tmp_path):
    flags = [*SMALL, f"--config.data.path={text}", f"--workdir={tmp_path / 'run'}", "--config.steps=100000"]
    process = start(*flags)
    wait_until(lambda: steps_written(tmp_path / "run") >= 3, process)
    message = error_of("train.py", *flags)
    assert f"process {process.pid} on" in message and "is training in" in message
    process.send_signal(signal.SIGKILL)
    process.communicate()
    config_of_it = [*flags[:-1], "--config.steps=100000", "--config.stop_at=9"]
    command("train.py", *config_of_it)  # the lock went with its process


# --- Being asked to stop. ---


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_it_saves_when_it_is_asked_to_stop(text, tmp_path, number):
    flags = [*SMALL, f"--config.data.path={text}", f"--workdir={tmp_path / 'run'}", "--config.steps=100000"]
    process = start(*flags, "--config.checkpoint_every=0", "--config.eval_every=0")
    wait_until(lambda: steps_written(tmp_path / "run") >= 20, process)
    process.send_signal(number)
    errors = process.communicate()[1]
    assert process.returncode == 75, errors
    last = errors.strip().splitlines()[-1]
    assert f"{number.name} at step" in last and "saved" in last
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        saved_at = checkpoints.resolve(None)
    assert saved_at == max(losses_of(tmp_path / "run"))
    command("train.py", *flags, "--config.checkpoint_every=0", f"--config.stop_at={saved_at + 2}")
    assert list(losses_of(tmp_path / "run")) == list(range(1, saved_at + 3))


# --- Losses that are not finite. ---


def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_anything(text, tmp_path, monkeypatch):
    config = small_run(text, steps=50, log_every=7)
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
        assert checkpoints.metadata(50)["nonfinite"] == 50 - good
    assert losses_of(tmp_path / "run")[good + 1] is None or np.isfinite(losses_of(tmp_path / "run")[good + 1])


@pytest.mark.parametrize("checkpoint_every", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_an_update_that_overflows_is_not_kept(text, tmp_path, checkpoint_every):
    """Loss and gradient are finite, the new parameters are not."""
    config = small_run(text, steps=6, checkpoint_every=checkpoint_every)
    config.model.update({"dtype": "float32", "param_dtype": "float32"})
    config.optimizer.update({"learning_rate": 3e38, "warmup_steps": 0, "weight_decay": 10.0})
    with pytest.raises(PrenormError, match=r"step 1 is not finite .*param_norm inf.*step 0, is saved"):
        train(config, tmp_path / "run")
    config.on_nonfinite, config.stop_at = "skip", 4
    train(config, tmp_path / "run")
    config.stop_at = None
    train(config, tmp_path / "run")
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.metadata(6)["nonfinite"] == 6, "a resumed run counts on"
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


# --- Starting from another run. ---


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_a_run_starts_from_a_checkpoint_of_any_norm(text, tmp_path, norm):
    source = tmp_path / "source"
    config = small_run(text, steps=3, parameterization="native")
    config.model.norm = "crmsnorm"
    train(config, source)
    fine_tuned = small_run(text, steps=5, init_from=str(source), parameterization="pre_ln")
    fine_tuned.model.norm = norm
    train(fine_tuned, tmp_path / "tuned")
    expected = evaluate(source, x64=True)["eval_loss"]
    start_again = small_run(text, steps=5, init_from=str(source), stop_at=1)
    start_again.optimizer.learning_rate = 0.0
    train(start_again, tmp_path / "still")
    assert evaluate(tmp_path / "still", x64=True)["eval_loss"] == pytest.approx(expected, rel=1e-12)
    # Killed before its first checkpoint it still starts from there, not from the seed.
    shutil.rmtree(tmp_path / "still" / "checkpoints" / "1")
    (tmp_path / "still" / "run.json").unlink()  # which knows that there was one
    train(start_again, tmp_path / "still")
    assert evaluate(tmp_path / "still", x64=True)["eval_loss"] == pytest.approx(expected, rel=1e-12)
    fine_tuned.model.d_model = 14
    with pytest.raises(PrenormError, match=r"model\.d_model: 12 -> 14"):
        train(fine_tuned, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_fit_params_keeps_the_function_or_refuses():
    pre_ln = tiny(use_bias=False, norm_bias=False)
    from common import logits, random_inputs, random_params, relative

    params, tokens = random_params(pre_ln, 0), random_inputs(pre_ln)
    crms = convert_config(pre_ln, "crmsnorm")
    fitted = fit_params(convert_params(params, pre_ln, "crmsnorm"), crms, pre_ln)
    assert relative(logits(pre_ln, fitted, tokens), logits(pre_ln, params, tokens)) < 1e-10
    with_bias = tiny(use_bias=True)
    biased = random_params(with_bias, 0)
    fitted = fit_params(params, pre_ln, with_bias)
    assert relative(logits(with_bias, fitted, tokens), logits(pre_ln, params, tokens)) < 1e-10
    with pytest.raises(PrenormError, match="the config has no place for"):
        fit_params(biased, with_bias, pre_ln)
    with pytest.raises(PrenormError, match=r"model\.epsilon"):
        fit_params(params, pre_ln, tiny(use_bias=False, norm_bias=False, epsilon=1e-3))


@pytest.mark.parametrize("tie_embeddings", [True, False])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm", "crmsnorm"])
@pytest.mark.parametrize("to", ["layernorm", "rmsnorm", "crmsnorm"])
def test_fit_params_keeps_the_function_when_dropout_comes_or_goes(norm, to, tie_embeddings):
    """Dropout decides whether weights are stored centred (or compressed) or raw."""
    from common import logits, random_inputs, random_params, relative

    for rates in (0.1, 0.0), (0.0, 0.1):
        given, wanted = (tiny(tie_embeddings=tie_embeddings, head_bias=True, dropout=rate) for rate in rates)
        params, tokens = random_params(given, 0), random_inputs(given)
        expected = logits(given, params, tokens)
        if norm != "layernorm":
            params, given = convert_params(params, given, norm), convert_config(given, norm)
        wanted = convert_config(wanted, to) if to != "layernorm" else wanted
        fitted = fit_params(params, given, wanted)
        assert relative(logits(wanted, fitted, tokens), expected) < 1e-10


@pytest.mark.slow
def test_saving_costs_the_loop_little(tmp_path):
    """Measured in a process of its own, compiled as for use; it prints the share."""
    done = command("tests/measure_saving.py", tmp_path, PYTHONPATH=ROOT)
    print(done.stdout)
    result = json.loads(done.stdout)
    assert result["share"] < 0.05
    assert result["was_complete_on_return"] is False, "the save was not asynchronous"


def test_errors_of_stop_at_and_on_nonfinite(text, tmp_path):
    flags = [*SMALL, f"--config.data.path={text}", f"--workdir={tmp_path / 'run'}"]
    assert "stop_at=0 must be at least 1" in error_of("train.py", *flags, "--config.stop_at=0")
    assert "on_nonfinite='ignore' is not one of stop, skip" in error_of(
        "train.py", *flags, "--config.on_nonfinite=ignore"
    )
    assert "no such" in error_of("train.py", *flags, f"--config.init_from={tmp_path / 'missing'}")
    assert not (tmp_path / "run").exists()
