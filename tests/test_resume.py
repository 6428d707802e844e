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
from test_commands import ROOT, SMALL, clean_environment, command, error_of, evaluate, lines_of, make_text

from prenorm_jax.checkpoint import Checkpoints, digest
from prenorm_jax.config import base_config
from prenorm_jax.conversion import convert_config, convert_params, fit_params
from prenorm_jax.errors import PrenormError
from prenorm_jax.loop import train
from prenorm_jax.model_config import ModelConfig
from prenorm_jax.models import build_model
from prenorm_jax.stream import abstract_params


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


def losses_of(workdir: Path) -> dict[int, float]:
    lines = [line for line in lines_of(workdir) if "loss" in line]
    assert len({line["step"] for line in lines}) == len(lines), "a step is written twice"
    return {line["step"]: line["loss"] for line in lines}


def what_is_deterministic(workdir: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "tokens_per_s"} for line in lines_of(workdir)]


def digests(workdir: Path, step: int) -> dict[str, str]:
    with Checkpoints(workdir, read_only=True) as checkpoints:
        return checkpoints.metadata(step)["digests"]


def start(*flags: object, **options: object) -> subprocess.Popen:
    """train.py in the background."""
    arguments = [sys.executable, "train.py", *map(str, flags)]
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env=clean_environment(),
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
    config.optimizer.update({"learning_rate": 3e-3, "warmup_steps": 10})
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
    # Parameters without a gradient (a key's bias, a writer's mean) wander with the rounding; 1e-9 bounds them too.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9), *trees)
    sessions = json.loads((tmp_path / "switched" / "run.json").read_text())["sessions"]
    assert [(s["step"], s["norm"]) for s in sessions] == [
        (0, "layernorm"),
        (25, "rmsnorm"),
        (50, "crmsnorm"),
        (75, "layernorm"),
    ]


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
    config = ModelConfig.create(small_run(saved).model)
    files = [path.relative_to(saved) for path in (saved / "checkpoints" / "6").rglob("*") if path.is_file()]
    files = [path for path in files if (saved / path).stat().st_size]
    found = 0
    with Checkpoints(saved, read_only=True) as checkpoints:
        expected = checkpoints.params(6)[1]
    for i, file in enumerate(files):
        copy = tmp_path / str(i)
        shutil.copytree(saved, copy)
        damage(copy / file, how)
        with Checkpoints(copy, read_only=True) as checkpoints:
            try:
                model, params = checkpoints.params(6)
            except PrenormError as error:
                assert "checkpoints/6" in str(error)
                assert "\n" not in str(error)
                found += 1
            else:
                assert model == config
                assert digest(params) == digest(expected)
        shutil.rmtree(copy)
    assert found >= 3


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


def test_a_loss_that_is_not_finite_stops_the_run_before_it_spoils_anything(text, tmp_path):
    config = small_run(text, steps=50, log_every=7)
    config.optimizer.update({"learning_rate": 1e38, "warmup_steps": 0, "clip": 0.0, "name": "sgd"})
    with pytest.raises(PrenormError) as error:
        train(config, tmp_path / "run")
    message = str(error.value)
    good = max(losses_of(tmp_path / "run"), default=0)
    assert f"step {good + 1} is not finite" in message
    assert f"examples {good * 8} to {good * 8 + 7}" in message
    assert any(f"gradient in {'/'.join(path)}" in message for path in abstract_params(ModelConfig.create(config.model)))
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.steps() == [good]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(checkpoints.params(good)[1]))
    # Again: the same error, and the same checkpoint.
    with pytest.raises(PrenormError, match=f"step {good + 1} is not finite"):
        train(config, tmp_path / "run")
    config.on_nonfinite = "skip"
    train(config, tmp_path / "run")
    with Checkpoints(tmp_path / "run", read_only=True) as checkpoints:
        assert checkpoints.metadata(50)["nonfinite"] == 50 - good
    assert losses_of(tmp_path / "run")[good + 1] is None or np.isfinite(losses_of(tmp_path / "run")[good + 1])


# --- Starting from another run. ---


@pytest.mark.parametrize(
    "norm",
    ["rmsnorm", pytest.param("layernorm", marks=pytest.mark.slow), pytest.param("crmsnorm", marks=pytest.mark.slow)],
)
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
    train(start_again, tmp_path / "still")
    assert evaluate(tmp_path / "still", x64=True)["eval_loss"] == pytest.approx(expected, rel=1e-12)
    fine_tuned.model.d_model = 14
    with pytest.raises(PrenormError, match=r"model\.d_model: 12 -> 14"):
        train(fine_tuned, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_fit_params_keeps_the_function_or_refuses():
    pre_ln = tiny(use_bias=False, norm_bias=False)
    from common import logits, random_params, random_tokens, relative

    params, tokens = random_params(pre_ln, 0), random_tokens(pre_ln)
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
    assert build_model(with_bias) is not None


def test_saving_costs_the_loop_little(text, tmp_path):
    """At the demo's size: what `save` keeps the loop waiting, beside the time of the 100 steps between two saves."""
    from configs.gpt_stdlib import get_config
    from prenorm_jax.sharding import make_mesh
    from prenorm_jax.step import init_state, make_train_step, run_models

    config = get_config()
    models = run_models(config)
    step = make_train_step(config, models, make_mesh(16, jax.devices()[:1]))
    state = jax.jit(lambda: init_state(config, models))()
    batch = {"tokens": np.zeros((16, 129), np.int32), "weights": np.ones((16, 128), np.float32)}
    state, _ = jax.block_until_ready(step(state, batch))
    begin = time.perf_counter()
    for _ in range(3):
        state, _ = jax.block_until_ready(step(state, batch))
    seconds_a_step = (time.perf_counter() - begin) / 3
    waits = []
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for i in range(4):
            begin = time.perf_counter()
            checkpoints.save(i, state.params, state.opt_state, models.trained)
            waits.append(time.perf_counter() - begin)
            checkpoints.wait()
    share = np.median(waits) / (100 * seconds_a_step)
    print(f"a save holds the loop for {np.median(waits):.3f} s: {share:.2%} of 100 steps of {seconds_a_step:.3f} s")
    assert share < 0.05


def test_errors_of_stop_at_and_on_nonfinite(text, tmp_path):
    flags = [*SMALL, f"--config.data.path={text}", f"--workdir={tmp_path / 'run'}"]
    assert "stop_at=0 must be at least 1" in error_of("train.py", *flags, "--config.stop_at=0")
    assert "on_nonfinite='ignore' is not one of stop, skip" in error_of(
        "train.py", *flags, "--config.on_nonfinite=ignore"
    )
    assert "no such" in error_of("train.py", *flags, f"--config.init_from={tmp_path / 'missing'}")
    assert not (tmp_path / "run").exists()
