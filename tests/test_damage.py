"""Checkpoints and files that are damaged, gone, or another's, and disks that are full: what is said, what goes on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import pytest
from commands import ROOT, clean_environment, damage, digests, losses_of, small_run
from kill_and_damage import check_found_or_harmless

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.checkpoint import Checkpoints, json_digest
from prenorm_jax.train.loop import train
from prenorm_jax.train.run import Run
from prenorm_jax.train.step import init_state
from prenorm_jax.train.workdir import RunRecord, configure_jax, load_config

pytestmark = pytest.mark.usefixtures("one_device")


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    """Of the run of 6 steps with checkpoints at 2, 4 and 6, to be damaged."""
    return shutil.copytree(saved, tmp_path / "run")


@pytest.mark.slow
def test_damage_to_any_file_is_found_or_harmless(copy):
    assert check_found_or_harmless(copy, 6, ("flip",)) == {"flip": {"params", "optimizer", "metadata"}}


def test_a_damaged_checkpoint_is_set_aside_and_the_run_goes_on_from_the_one_before(saved, copy, text, capsys):
    largest = max((p for p in (copy / "checkpoints" / "6").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    damage(largest, "cut")
    content = largest.read_bytes()
    train(small_run(text, steps=6, dropout=0.1), copy)
    errors = capsys.readouterr().err
    assert "checkpoints/6 is damaged" in errors
    assert "falling back to step 4" in errors
    aside = copy / "damaged" / largest.relative_to(copy / "checkpoints")
    assert aside.read_bytes() == content
    assert losses_of(copy) == losses_of(saved)


@pytest.mark.parametrize("content", ["null", "[]", "5", "{}", "edited"])
def test_metadata_that_say_something_else_are_damage(copy, content):
    path = copy / "checkpoints" / "6" / "metadata" / "metadata"
    edited = path.read_text().replace('"epsilon": 1e-05', '"epsilon": 1e-06')
    assert edited != path.read_text()
    path.write_text(edited if content == "edited" else content)
    with (
        Checkpoints(copy, read_only=True) as checkpoints,
        pytest.raises(PrenormError, match="checkpoints/6 is damaged"),
    ):
        checkpoints.params(6)


def test_metadata_of_other_types_are_damage_whatever_their_digest_says(copy):
    path = copy / "checkpoints" / "6" / "metadata" / "metadata"
    stored = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"}
    for key in ("step", "nonfinite", "model", "digests"):
        for value in (None, "6", [6], {"a": 6}, 6.0):
            wrong = stored | {key: value}
            if type(value) is not type(stored[key]):
                path.write_text(json.dumps(wrong | {"digest": json_digest(wrong)}))
                with Checkpoints(copy, read_only=True) as checkpoints, pytest.raises(PrenormError, match="is damaged"):
                    checkpoints.metadata(6)
    path.write_text("[" * 100_000)
    with Checkpoints(copy, read_only=True) as checkpoints, pytest.raises(PrenormError, match="is damaged: maximum rec"):
        checkpoints.metadata(6)


def test_a_tree_that_is_not_the_one_that_was_saved_is_damage(copy):
    """Which no format notices: what lies there was written whole, by another run."""
    path = copy / "checkpoints" / "6" / "metadata" / "metadata"
    stored = {key: value for key, value in json.loads(path.read_text()).items() if key != "digest"}
    stored["digests"] = dict.fromkeys(stored["digests"], "0" * 32)
    path.write_text(json.dumps(stored | {"digest": json_digest(stored)}))
    with (
        Checkpoints(copy, read_only=True) as checkpoints,
        pytest.raises(PrenormError, match="damaged: params differ from what was saved"),
    ):
        checkpoints.params(6)


@pytest.mark.parametrize("name", ["²", "٣", "007", "8_", "+8", "latest"])
def test_folders_that_only_look_like_checkpoints_are_none(copy, name):
    (copy / "checkpoints" / name).mkdir()
    with Checkpoints(copy, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 6]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "content",
    [
        *("5", "null", "[]", "{", DEEP, '{"model": ' + DEEP, "\xff", '{"model": 5}', '{"model": {"family": "bert"}}'),
        *('{"model": {"family": []}}', '{"steps": null}', '{"steps": "many"}', '{"steps": {}}', '{"data": 5}'),
        *('{"data": {"path": 5}}', '{"optimizer": []}', '{"seed": 1e999}', '{"model": {"depth": 1.5}}'),
        *('{"model": {"family": "vit"}, "data": {"mean": ["x"]}}', '{"mesh": {"fsdp": null}}'),
    ],
)
def test_a_config_json_of_other_types_is_damage(copy, content):
    (copy / "config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(PrenormError, match=r"config\.json is damaged: .*restore it from a copy"):
        load_config(copy)


@pytest.mark.parametrize(
    "content",
    [
        *("5", "[]", DEEP, '{"sessions": 5}', '{"sessions": [5]}', '{"sessions": [{}]}', '{"last_saved": "6"}'),
        *('{"sessions": [{"step": "0", "norm": "layernorm"}]}', '{"sessions": [{"step": 0, "norm": 5}]}'),
    ],
)
def test_a_run_json_of_other_types_starts_anew_and_is_said(copy, content, capsys):
    (copy / "run.json").write_text(content)
    record = RunRecord(copy)
    assert record.last_saved == 0
    assert "run.json is damaged" in capsys.readouterr().err


def test_a_platform_that_is_not_there_is_one_line(text, monkeypatch):
    for error in (RuntimeError("Unable to initialize backend 'tpux'"), AssertionError()):  # as JAX says it
        monkeypatch.setattr(jax, "devices", mock.Mock(side_effect=error))
        monkeypatch.setenv("JAX_PLATFORMS", "tpux")
        with pytest.raises(PrenormError, match="JAX_PLATFORMS=tpux: no such device is found"):
            configure_jax(small_run(text))


def test_a_checkpoint_under_the_name_of_another_step_is_damage(copy, text, capsys):
    shutil.rmtree(copy / "checkpoints" / "6")
    shutil.copytree(copy / "checkpoints" / "4", copy / "checkpoints" / "6")
    train(small_run(text, steps=5, dropout=0.1), copy)
    assert "it is that of step 4 under another name" in capsys.readouterr().err
    assert (copy / "damaged" / "6").is_dir()


@pytest.mark.slow
def test_a_checkpoint_of_another_model_is_no_damage(copy, text):
    other = small_run(text, d_model=14)
    state = init_state(Run.create(other))
    with Checkpoints(copy, read_only=True) as checkpoints:
        data = checkpoints.metadata(6)["data"]
    with Checkpoints(copy) as checkpoints:
        checkpoints.save(8, state.params, state.opt_state, model_config(other.model), 0, data)
    with pytest.raises(PrenormError, match=r"/8 is of another model .*model\.d_model: 12 -> 14.*move it away"):
        train(small_run(text, steps=9, dropout=0.1), copy)
    assert not (copy / "damaged").exists()
    assert (copy / "checkpoints" / "8").is_dir()


def test_checkpoints_that_are_gone_are_missed_and_what_goes_on_before_them_is_bit_for_bit_the_same(
    saved, copy, text, capsys
):
    shutil.rmtree(copy / "checkpoints" / "6")
    train(small_run(text, steps=6, dropout=0.1), copy)
    assert "was saved at step 6, but its last checkpoint is of step 4" in capsys.readouterr().err
    assert losses_of(copy) == losses_of(saved)
    assert digests(copy, 6) == digests(saved, 6)
    shutil.rmtree(copy / "checkpoints")
    before = (copy / "metrics.jsonl").read_bytes()
    with pytest.raises(PrenormError, match="was saved at step 6, but there is no checkpoint in it any more"):
        train(small_run(text, steps=6, dropout=0.1), copy)
    assert (copy / "metrics.jsonl").read_bytes() == before


def test_damage_to_the_other_files_stops_nothing_unsaid(copy, text, capsys):
    lines = (copy / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = b"5\n"
    lines[2] = lines[2].replace(b'"step"', b'"stap"')
    (copy / "metrics.jsonl").write_bytes(b"".join(lines) + b"\xff\xff")
    (copy / "run.json").write_text("[]")
    train(small_run(text, steps=7, dropout=0.1), copy)
    errors = capsys.readouterr().err
    assert "had 2 damaged lines" in errors
    assert "run.json is damaged" in errors
    assert list(losses_of(copy)) == [1, 4, 5, 6, 7]
    (copy / "metrics.jsonl").unlink()
    train(small_run(text, steps=8, dropout=0.1), copy)
    assert "lacks" not in errors  # a history that starts anew, at 6, has nothing before it
    assert "lacks 1 of the 1 steps before this one" in capsys.readouterr().err
    (copy / "config.json").write_text("")
    with pytest.raises(PrenormError, match=r"config\.json is damaged: .*restore it from a copy"):
        train(small_run(text, steps=9, dropout=0.1), copy)


def test_with_no_readable_checkpoint_left_it_stops_and_changes_nothing(copy, text):
    for folder in (copy / "checkpoints").iterdir():
        shutil.rmtree(folder / "params" / "d", ignore_errors=True)
        shutil.rmtree(folder / "params" / "ocdbt.process_0", ignore_errors=True)
    before = sorted((p, p.stat().st_size) for p in copy.rglob("*"))
    with pytest.raises(PrenormError, match=r"no checkpoint in .* can be read: .*/6 is damaged.*/2 is damaged"):
        train(small_run(text, steps=8, dropout=0.1), copy)
    assert sorted((p, p.stat().st_size) for p in copy.rglob("*")) == before


# --- Disks that are full. ---

DISKS = """
mkdir "$1/small" "$1/large"
mount -t tmpfs -o size=900k tmpfs "$1/small" && mount -t tmpfs -o size=3000k tmpfs "$1/large" || exit 1
for part in 1 2; do
  "$0" tests/full_disks.py $part "$@" 2>"$1/$part"
  echo "status $?"
done
"""


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_the_last_good_checkpoint_and_one_that_fills_up_stops_the_run(text, tmp_path):
    """Real ones, in a mount namespace of their own. Each part checks what it can, and ends as its last run does."""
    unshare = ["unshare", "--mount"] if os.getuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    arguments = [*unshare, "bash", "-c", DISKS, sys.executable, str(tmp_path), str(text)]
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    first, second = ((tmp_path / part).read_text() for part in "12")
    assert done.stdout.split("\n") == ["status 2", "status 2", ""], done.stdout + done.stderr + first + second
    for errors in (first, second):
        assert "Traceback" not in errors
        assert errors.strip().splitlines()[-1].startswith("error: ")
    last = first.strip().splitlines()[-1]
    assert "could not be written" in last
    assert "the last complete one is at step 3" in last
    assert "metrics.jsonl cannot be written (No space left on device)" in second.strip().splitlines()[-1]
    assert "TensorBoard" not in first
