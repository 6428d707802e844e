"""What each command does with a run of each norm, alone and one after the other; and how it refuses bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, SMALL, clean_environment, command, error_of, evaluate, here, lines_of, make_text
from tokenizers import Tokenizer, models, pre_tokenizers

from configs import vit_digits
from prenorm_jax.base.errors import Unwritable
from prenorm_jax.base.files import flatten
from prenorm_jax.base.flags import Parser
from prenorm_jax.config import base_config
from prenorm_jax.data.tokenizer import load_tokenizer
from prenorm_jax.train import convert_run
from prenorm_jax.train.checkpoint import Checkpoints, json_digest
from prenorm_jax.train.flags import parse

__all__ = ["ROOT", "SMALL", "clean_environment", "command", "error_of", "evaluate", "lines_of", "make_text"]


@pytest.mark.slow
def test_a_vit_goes_through_every_command(tmp_path):
    small = ["--config=configs/vit_digits.py", "--config.steps=8", "--config.eval_every=4", "--config.model.depth=1"]
    small += ["--config.model.d_model=16", "--config.model.layer_scale=0.1", "--config.optimizer.warmup_steps=5"]
    ln, crms, converted = tmp_path / "ln", tmp_path / "crms", tmp_path / "ln-as-crms"
    here("train.py", *small, f"--workdir={ln}")
    here("train.py", *small, f"--workdir={crms}", "--config.model.norm=crmsnorm")
    text, loss = here("eval.py", f"--workdir={ln}").stdout, last_evaluation(ln)
    assert "359 images of the held-out split" in text and "top1" in text and "image of the held-out" not in text
    assert float(re.search(r"loss ([\d.]+)", text)[1]) == pytest.approx(loss, rel=1e-6)
    done = here("-m", "prenorm_jax.convert", ln, converted, "--to=crmsnorm")
    assert "logits on random inputs" in done.stdout
    found = evaluate(converted)
    assert found["eval_images"] == 359
    assert 0 < found["eval_top1"] < found["eval_top5"] <= 1
    assert found["eval_loss"] == pytest.approx(loss, rel=1e-5)
    report = here("-m", "prenorm_jax.compare", ln, crms, f"--out={tmp_path / 'report'}").stdout
    assert "final top-1" in report
    assert "nats per image" in report
    assert "crms follows ln closely" in report


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, text: Path) -> dict[str, Path]:
    """One finished run of each norm, under pre_ln, and a native one. The first was trained as a user would."""
    folder = tmp_path_factory.mktemp("runs")
    flags = [*SMALL, f"--config.data.path={os.path.relpath(text, ROOT)}"]
    command("train.py", *flags, f"--workdir={folder / 'layernorm'}", "--config.model.norm=layernorm")
    for norm in ("rmsnorm", "crmsnorm"):
        here("train.py", *flags, f"--workdir={folder / norm}", f"--config.model.norm={norm}")
    native = ["--config.model.norm=crmsnorm", "--config.parameterization=native"]
    here("train.py", *flags, f"--workdir={folder / 'native'}", *native)
    return {path.name: path for path in folder.iterdir()}


# One worker runs this file, so that the runs are made once.
pytestmark = pytest.mark.xdist_group("commands")


def test_groups_are_kept_by_one_worker(request):
    """Releases of pytest and pytest-xdist that do not fit lose them without a word, and all takes much longer."""
    assert "PYTEST_XDIST_WORKER" not in os.environ or request.node.nodeid.endswith("@commands")


def test_metrics_hold_every_step_and_evaluation_once(runs):
    lines = lines_of(runs["layernorm"])
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert all("loss" in line or "eval_loss" in line for line in lines)
    assert list(runs["layernorm"].glob("tensorboard/events*"))
    counts = json.loads((runs["crmsnorm"] / "run.json").read_text())["parameters"]
    assert counts["computed"] < counts["trained"]


def test_the_variants_follow_one_curve_and_the_native_one_does_not_have_to(runs):
    losses = {
        name: np.array([line["loss"] for line in lines_of(path) if "loss" in line]) for name, path in runs.items()
    }
    for norm in ("rmsnorm", "crmsnorm"):
        np.testing.assert_allclose(losses[norm], losses["layernorm"], rtol=2e-6)
    np.testing.assert_allclose(losses["native"][0], losses["layernorm"][0], rtol=2e-6)


def last_evaluation(workdir: Path) -> float:
    """The loss that training found at its end."""
    return lines_of(workdir)[-1]["eval_loss"]


@pytest.mark.slow
def test_any_checkpoint_evaluates_the_same_as_any_norm(runs):
    expected = last_evaluation(runs["layernorm"])
    (line,) = command("eval.py", f"--workdir={runs['crmsnorm']}", "--json").stdout.splitlines()
    found = json.loads(line)
    assert found["eval_loss"] == pytest.approx(last_evaluation(runs["crmsnorm"]), rel=1e-6)
    assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(np.exp(found["eval_loss"]))
    for run, norm in (("layernorm", "crmsnorm"), ("rmsnorm", "layernorm"), ("crmsnorm", "rmsnorm")):
        assert evaluate(runs[run], f"--norm={norm}")["eval_loss"] == pytest.approx(expected, rel=1e-5)
    native = evaluate(runs["native"], "--norm=layernorm")["eval_loss"]
    assert native == pytest.approx(last_evaluation(runs["native"]), rel=1e-5)


@pytest.mark.parametrize(
    ("source", "to"),
    [
        pytest.param("layernorm", "crmsnorm", marks=pytest.mark.slow),
        ("crmsnorm", "layernorm"),
        pytest.param("native", "rmsnorm", marks=pytest.mark.slow),
    ],
)
def test_a_converted_checkpoint_evaluates_the_same_and_trains_on(runs, tmp_path, source, to):
    target = tmp_path / "converted"
    if source == "native":
        message = error_of("-m", "prenorm_jax.convert", runs[source], target, f"--to={to}")
        assert "add --reset-optimizer to start it anew" in message
    here("-m", "prenorm_jax.convert", runs[source], target, f"--to={to}", "--reset-optimizer")
    before = evaluate(target)
    assert before["norm"] == to
    assert before["eval_loss"] == pytest.approx(last_evaluation(runs[source]), rel=1e-5)
    here("train.py", f"--workdir={target}", "--config.steps=9")
    assert [line["step"] for line in lines_of(target) if "loss" in line] == [7, 8, 9]
    assert np.isfinite(last_evaluation(target))
    # And back.
    back = tmp_path / "back"
    if to != "rmsnorm":  # trained natively, an rmsnorm network has left those that have an equivalent
        other = "layernorm" if to == "crmsnorm" else "crmsnorm"
        here("-m", "prenorm_jax.convert", target, back, f"--to={other}", "--reset-optimizer")
        assert evaluate(back)["eval_loss"] == pytest.approx(last_evaluation(target), rel=1e-5)
    else:
        assert "is not zero-mean along the stream" in error_of(
            "-m", "prenorm_jax.convert", target, back, "--to=layernorm", "--reset-optimizer"
        )
        assert not back.exists()


@pytest.mark.slow
def test_what_many_devices_trained_evaluates_the_same_on_any_number(text, tmp_path):
    flags = [*SMALL, f"--config.data.path={text}", f"--workdir={tmp_path}", "--config.batch_size=8"]
    flags += ["--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.accumulate=2"]
    here("train.py", *flags, devices=8)
    expected = last_evaluation(tmp_path)
    for devices, norm in ((1, "layernorm"), (3, "rmsnorm"), (8, "crmsnorm")):
        found = evaluate(tmp_path, f"--norm={norm}", devices=devices)
        assert found["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_run_goes_on_from_its_last_checkpoint(runs, text, tmp_path):
    run = shutil.copytree(runs["layernorm"], tmp_path / "run")
    (run / "metrics.jsonl").open("a").write('{"step": 7, "loss": 1.0}\n{"step": 8, "lo')
    flags = [*SMALL, f"--config.data.path={text}", f"--workdir={run}", "--config.checkpoint_every=2"]
    assert "already" in here("train.py", *flags).stderr
    here("train.py", *flags, "--config.steps=9")
    steps = [line["step"] for line in lines_of(run) if "loss" in line]
    assert steps == list(range(1, 10))
    # The first six were made with a schedule for six steps: the data are the same ones, the losses need not be.
    assert sorted(int(path.name) for path in (run / "checkpoints").iterdir()) == [6, 8, 9]


def test_compare_writes_a_report_of_them(runs, tmp_path):
    out = tmp_path / "report"
    done = here("-m", "prenorm_jax.compare", *[runs[n] for n in ("layernorm", "rmsnorm", "crmsnorm")], f"--out={out}")
    assert done.stdout.strip().endswith("report.html")
    rows = json.loads((out / "report.json").read_text())["runs"]
    assert [row["norm"] for row in rows] == ["layernorm", "rmsnorm", "crmsnorm"]
    assert all(row["relation"].startswith(("follows", "equals")) for row in rows[1:])


def test_a_refused_process_ends_with_one_line_and_status_2(tmp_path):
    """Whose main it is that the other tests call, and that nothing is printed by what it imports or leaves behind."""
    done = command("train.py", *SMALL, f"--workdir={tmp_path / 'run'}", status=2, JAX_PLATFORMS="nosuch")
    *before, line = done.stderr.splitlines()
    assert before == ["importing the libraries and reading the data"]
    assert "JAX_PLATFORMS=nosuch: no such device is found (Unable" in line and done.stdout == ""
    assert not list(tmp_path.iterdir())


EACH = """
import runpy, sys
for (name, *flags), _ in {calls}:
    sys.argv = [name, *flags]
    try:
        (runpy.run_path if name.endswith(".py") else runpy.run_module)(name, run_name="__main__")
    except SystemExit as end:
        print(end.code, flush=True)
"""


@pytest.mark.slow
def test_each_command_is_its_main_and_ends_with_one_line_and_status_2(tmp_path):
    """One after the other in one process, which spares each the imports of the one before."""
    missing = str(tmp_path / "missing")
    calls = [
        (("train.py", *SMALL, "--config.nosuch=1"), "no such flag: --config.nosuch"),
        (("eval.py", f"--workdir={missing}"), "no such workdir"),
        (("prenorm_jax.evaluate", f"--workdir={missing}"), "no such workdir"),
        (("prenorm_jax.convert", missing, str(tmp_path / "target"), "--to=rmsnorm"), "no such workdir"),
        (("prenorm_jax.generate", missing), "no such workdir"),
        (("prenorm_jax.numerics", missing), "no such workdir"),
        (("prenorm_jax.compare", missing), "missing"),
        (("prenorm_jax.certify", missing, missing), "missing"),
        (("prenorm_jax.explain", missing), "missing"),
        (("prenorm_jax.benchmark", "--nosuch"), "no such flag: --nosuch"),
        (("prenorm_jax.aot", "--nosuch"), "--config is missing"),
        (("prenorm_jax.demo", "--nosuch"), "no such flag: --nosuch"),
    ]
    done = command("-W", "error::RuntimeWarning:runpy", "-c", EACH.format(calls=calls))
    assert done.stdout.split() == ["2"] * len(calls), done
    said = [line for line in done.stderr.splitlines() if not line.startswith("importing the libraries")]
    assert len(said) == len(calls), done.stderr
    for line, (_, message) in zip(said, calls, strict=True):
        assert line.startswith("error: ") and message in line, line
    assert not list(tmp_path.iterdir())


def test_train_refuses_what_is_not_there(tmp_path):
    assert "no such file" in error_of("train.py", "--config=configs/nothing.py", f"--workdir={tmp_path / 'run'}")
    message = error_of("train.py", f"--workdir={tmp_path / 'run'}")
    assert "a new one needs --config=FILE: configs/finetune.py, configs/gpt2_fineweb.py, " in message
    assert "--workdir is missing" in error_of("train.py", "--config=configs/gpt_stdlib.py")
    (tmp_path / "empty").mkdir()
    assert "holds no run" in error_of("train.py", f"--workdir={tmp_path / 'empty'}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def get_config(): return None", "its get_config returns no ConfigDict, but a NoneType"),
        ("def get_config(): return {'steps': 3}", "its get_config returns no ConfigDict, but a dict"),
        ("config = base_config()", "KeyError: 'get_config'"),
        ("def get_config(size): return base_config()", "missing 1 required positional argument: 'size'"),
        ("def get_config(): return base_config('nosuch')", "model.family='nosuch' is not one of gpt, encoder, vit"),
        ("def get_config(): return ConfigDict({'steps': 3})", "it lacks accumulate: begin with base_config()"),
        (
            "config = base_config(); config.stpes = 3\ndef get_config(): return config",
            "is stpes: begin with base_config",
        ),
        ("def get_config(): return ConfigDict({'model': 5})", "'int' object has no attribute 'get'"),
        ("def get_config(): raise OSError('one\\ntwo')", "OSError: one two"),
        ("def get_config(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_config_file_that_gives_no_configuration_is_one_line_that_says_why(tmp_path, content, message):
    imports = "from ml_collections import ConfigDict\nfrom prenorm_jax.config import base_config\n"
    (tmp_path / "mine.py").write_text(imports + content)
    found = error_of("train.py", f"--config={tmp_path / 'mine.py'}", f"--workdir={tmp_path / 'run'}")
    assert message in found and f"--config={tmp_path / 'mine.py'}: " in found
    assert not (tmp_path / "run").exists()


def test_keys_of_a_config_file_that_follow_others_follow_what_the_command_line_makes_of_them(tmp_path):
    lines = ["from prenorm_jax.config import base_config", "def get_config():", "    config = base_config()"]
    lines += ["    config.eval_every = config.get_oneway_ref('steps')", "    return config"]
    (tmp_path / "mine.py").write_text("\n".join(lines))
    parser = Parser("train.py", "", add_help=False)
    _, config = parse(parser, [f"--config={tmp_path / 'mine.py'}", "--config.steps=7"], lambda args: base_config())
    assert config.eval_every == 7


@pytest.mark.parametrize("flags", [[], ["--config=configs/vit_digits.py"]])
@pytest.mark.parametrize("name", ["train.py", "prenorm_jax.aot"])
def test_help_has_a_line_for_every_key_with_its_value_and_what_it_means(name, flags):
    printed = here(name, "--help", *flags).stdout
    config = vit_digits.get_config() if flags else base_config()
    for key, value in flatten(config).items():
        assert re.search(rf"^  --config.{key}={re.escape(str(value))}  +\S", printed, re.MULTILINE), key
    assert "configs/gpt_stdlib.py" in printed and "--config FILE" in printed


# A command's needed arguments, and a flag of it that is nearly given.
HELPED = {
    "evaluate": (["--workdir=x"], "--norm"),
    "generate": (["x"], "--prompt"),
    "convert": (["x", "y", "--to=z"], "--step"),
    "compare": (["x"], "--title"),
    "certify": (["x", "y"], "--length"),
    "explain": (["x"], "--json"),
    "benchmark": ([], "--quick"),
    "numerics": ([], "--dtypes"),
    "demo": ([], "--quick"),
}


@pytest.mark.parametrize("name", HELPED)
def test_help_of_the_other_commands_needs_nothing_and_misspelt_flags_are_named(name):
    assert f"python -m prenorm_jax.{name}" in here(f"prenorm_jax.{name}", "--help").stdout
    needed, flag = HELPED[name]
    message = error_of(f"prenorm_jax.{name}", *needed, f"{flag}s=3")
    if name not in ("evaluate", "generate"):  # which first look into the run
        assert f"no such flag: {flag}s; did you mean {flag}?" in message


def test_a_pipe_that_is_closed_ends_a_command_without_a_word():
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "prenorm_jax.demo", "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (128 + 13, b"")


def test_the_home_folder_is_meant_by_every_path(runs, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run").symlink_to(runs["layernorm"])
    for arguments in (
        ["eval.py", "--workdir=~/missing"],
        ["train.py", "--workdir=~/missing"],
        ["train.py", *SMALL, "--workdir=~/new", f"--config.data.path={text}", "--config.init_from=~/missing"],
        ["-m", "prenorm_jax.generate", "~/missing"],
        ["-m", "prenorm_jax.convert", "~/missing", "target", "--to=rmsnorm"],
        ["-m", "prenorm_jax.convert", runs["layernorm"], "~/run", "--to=rmsnorm"],
        ["-m", "prenorm_jax.compare", "~/missing"],
        ["-m", "prenorm_jax.aot", "--config=configs/gpt_stdlib.py", "--out=~"],
    ):
        assert str(tmp_path) in error_of(*arguments)
    assert "names no file or folder" in error_of("eval.py", "--workdir=~nosuchuser/run")


def test_train_refuses_the_workdir_of_another_run(runs, text):
    before = sorted(path for path in runs["layernorm"].rglob("*"))
    flags = [*SMALL, f"--config.data.path={text}", f"--workdir={runs['layernorm']}"]
    message = error_of("train.py", *flags, "--config.model.d_model=14", "--config.seed=3")
    assert "model.d_model: 12 -> 14" in message
    assert "seed: 0 -> 3" in message
    assert sorted(path for path in runs["layernorm"].rglob("*")) == before


def test_convert_refuses_what_it_cannot_do(runs, tmp_path):
    convert = ["-m", "prenorm_jax.convert"]
    target = tmp_path / "target"
    assert "is layernorm already" in error_of(*convert, runs["layernorm"], target, "--to=layernorm")
    assert "is rmsnorm already" in error_of(*convert, runs["rmsnorm"], target, "--to=rmsnorm")
    assert "is not one of" in error_of(*convert, runs["layernorm"], target, "--to=batchnorm")
    assert "no such workdir" in error_of(*convert, tmp_path / "missing", target, "--to=rmsnorm")
    assert "it has [3, 6]" in error_of(*convert, runs["layernorm"], target, "--to=rmsnorm", "--step=5")
    assert not target.exists()
    assert "exists: name a new folder" in error_of(*convert, runs["layernorm"], runs["native"], "--to=rmsnorm")


def test_convert_leaves_what_is_not_its_own(runs, tmp_path):
    """A folder that has the name of one in the making, the run that it reads, what links of a checkpoint lead to."""
    convert = ["-m", "prenorm_jax.convert"]
    source = shutil.copytree(runs["rmsnorm"], tmp_path / "it's the source")
    inside = source / "checkpoints" / "9"
    assert "lies in" in error_of(*convert, source, inside, "--to=layernorm")
    assert "[ in its name" in error_of(*convert, source, tmp_path / "seed[1]", "--to=layernorm")
    kept = tmp_path / ".mine.tmp" / "kept"
    kept.parent.mkdir()
    kept.write_text("mine")
    printed = here(*convert, source, tmp_path / "mine", "--to=layernorm").stdout
    assert f"python eval.py --workdir={tmp_path / 'mine'}\n" in printed
    printed = here(*convert, source, tmp_path / "it is mine", "--to=layernorm").stdout
    assert f"--workdir='{tmp_path}/it is mine' " in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "it is mine", "it's the source", "mine"]
    assert kept.read_text() == "mine" and not inside.exists()
    (source / "checkpoints" / "6" / "extra").symlink_to(kept)
    assert "extra is a link to what is not of the checkpoint" in error_of(
        *convert, source, tmp_path / "no", "--to=layernorm"
    )
    assert not (tmp_path / "no").exists()


def rotating(monkeypatch, run: Path, method: str) -> None:
    """The run of `saved` has only its first checkpoint; when that is read, the second comes and the first goes."""
    later, read = shutil.move(run / "checkpoints" / "6", run / "later"), getattr(Checkpoints, method)

    def as_it_rotates(self, step, *rest):
        if later.exists():
            later.rename(run / "checkpoints" / "6")
            shutil.rmtree(run / "checkpoints" / "3")
        return read(self, step, *rest)

    monkeypatch.setattr(Checkpoints, method, as_it_rotates)


@pytest.mark.parametrize("command", ["eval.py", "prenorm_jax.generate", "prenorm_jax.convert"])
def test_a_checkpoint_that_its_run_removes_while_it_is_read_is_not_damaged_but_the_latest_is_another(
    runs, tmp_path, monkeypatch, command
):
    run = shutil.copytree(runs["layernorm"], tmp_path / "run")
    method = "leaves" if command.endswith("convert") else "params"
    flags = {"eval.py": [f"--workdir={run}"], "prenorm_jax.generate": [run, "--tokens=1", "--json"]}
    flags = flags.get(command, [run, tmp_path / "target", "--to=rmsnorm"])
    rotating(monkeypatch, run, method)
    assert re.search(r"at step 6|\"step\": 6", here(command, *flags).stdout)
    shutil.copytree(runs["layernorm"] / "checkpoints" / "3", run / "checkpoints" / "3")
    rotating(monkeypatch, run, method)
    if command.endswith("convert"):
        shutil.rmtree(tmp_path / "target")
    message = error_of(command, *flags, "--step=3")
    assert "checkpoints/3 is gone: its run keeps its latest; --step=6 names another" in message


def test_where_the_data_lie_is_kept_so_that_it_is_right_from_anywhere_and_can_be_said(runs, text, tmp_path):
    run, moved = runs["layernorm"], shutil.copytree(text, tmp_path / "moved")
    data = json.loads((run / "config.json").read_text())["data"]
    assert data["path"] == str(ROOT / os.path.relpath(text, ROOT))
    assert (data["eval_path"], data["tokenizer"]) == (None, "bytes")
    expected = evaluate(run)
    assert evaluate(run, f"--config.data.path={moved}") == expected

    for file in moved.iterdir():
        file.write_text(file.read_text()[::-1])
    evaluated = ["eval.py", f"--workdir={run}", f"--config.data.path={moved}"]
    message = error_of(*evaluated)
    assert "the data are not those that" in message and "--other-data evaluates on these" in message
    assert "on other data than it was trained on: " in here(*evaluated, "--other-data").stdout
    found = evaluate(run, f"--config.data.path={moved}", "--other-data")
    assert found["other_data"] and found["eval_loss"] != expected["eval_loss"]

    message = error_of(*evaluated, "--config.steps=5")
    assert "--config.steps cannot be changed here: only data.cache, data.eval_path, data.path, " in message
    assert "did you mean --config.data.path or" in error_of(*evaluated, "--config.data.paht=x")
    assert "did you mean --other-data?" in error_of(*evaluated, "--other-date")


def words(path: Path, **ids: int) -> Path:
    """A tokenizer of whole words."""
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def test_a_conversion_that_fails_leaves_nothing_though_its_writers_are_late(runs, tmp_path, monkeypatch):
    late = []

    def fail(source, checkpoints, step, folder, *of_models):
        late.append(threading.Timer(0.3, lambda: (folder / "checkpoints").mkdir(parents=True)))
        late[0].start()
        raise Unwritable("there is no room")

    monkeypatch.setattr(convert_run, "_write", fail)
    assert "no room" in error_of("prenorm_jax.convert", runs["layernorm"], tmp_path / "rms", "--to=rmsnorm")
    late[0].join()
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_is_not_the_runs_is_refused_wherever_it_is_read(runs, tmp_path):
    mine = words(tmp_path / "mine.json", **{"</s>": 0, "def": 1, "norm": 2})
    other = words(tmp_path / "other.json", **{"</s>": 0, "norm": 1, "def": 2})
    digests = [load_tokenizer(str(path)).vocabulary for path in (mine, shutil.copy(mine, tmp_path / "2.json"), other)]
    assert digests[0] == digests[1] != digests[2] and None not in digests
    here("-m", "prenorm_jax.convert", runs["layernorm"], tmp_path / "rms", "--to=rmsnorm")
    flag, message = f"--config.data.tokenizer={mine}", "the tokenizer is not that of"
    for run in (runs["layernorm"], tmp_path / "rms"):
        assert message in error_of("prenorm_jax.generate", run, "--prompt=def norm", flag)
    assert message in error_of("eval.py", f"--workdir={run}", "--other-data", flag)
    message = error_of("prenorm_jax.generate", run, f"{flag}.missing.json")
    assert "cannot be loaded" in message and "--config.data.tokenizer=FILE" in message


@pytest.mark.slow
def test_materialize_writes_the_parameters_that_a_pre_ln_run_computes(runs, tmp_path):
    done = command("-m", "prenorm_jax.convert", runs["rmsnorm"], tmp_path / "rms", "--to=rmsnorm", "--materialize")
    assert "logits on random inputs" in done.stdout and done.stderr == "importing the libraries\n"
    assert evaluate(tmp_path / "rms")["eval_loss"] == pytest.approx(last_evaluation(runs["rmsnorm"]), rel=1e-5)


def test_eval_refuses_what_it_cannot_do(runs, tmp_path):
    assert "unknown norm 'batchnorm'" in error_of("eval.py", f"--workdir={runs['layernorm']}", "--norm=batchnorm")
    assert "it has [3, 6]" in error_of("eval.py", f"--workdir={runs['layernorm']}", "--step=4")
    assert "no such workdir" in error_of("eval.py", f"--workdir={tmp_path / 'missing'}")


@pytest.mark.slow
def test_the_installed_library_needs_no_clone(tmp_path):
    """What the README shows of the Python interface, where the package alone is."""
    shown = (ROOT / "README.md").read_text().split("From Python:\n")[1].split("\n## ")[0]
    (tmp_path / "prenorm_jax").symlink_to(ROOT / "prenorm_jax")
    small = 'config.update({"depth": 1, "d_model": 24, "heads": 2, "vocab_size": 50})\ntokens ='
    script = (
        textwrap.dedent(shown).replace("tokens =", small, 1)
        + "\nassert abs(logits - same_logits).max() < 1e-5 * abs(logits).max()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_command_waits_for_jax_before_it_speaks_nor_for_the_datas_libraries_without_data_nor_for_pytorch(tmp_path):
    script = "import sys, train, eval\n"
    for name in ("aot", "benchmark", "compare", "convert", "demo", "evaluate", "generate", "numerics"):
        script += f"import prenorm_jax.{name}; assert 'jax' not in sys.modules, '{name}'\n"
    for name in ("train.convert_run", "train.evaluation", "bench.compiled", "bench.tasks", "bench.timing"):
        script += f"import prenorm_jax.{name}; assert 'datasets' not in sys.modules, '{name}'\n"
    (tmp_path / "torch.py").write_text("raise SystemExit('PyTorch is imported')")
    command("-c", f"{script}import prenorm_jax.train.loop; assert 'torch' not in sys.modules", PYTHONPATH=tmp_path)


def test_a_checkpoint_with_another_tree_than_it_says_is_refused(runs, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(runs["layernorm"], damaged)
    for path in damaged.glob("checkpoints/*/metadata/metadata"):
        metadata = json.loads(path.read_text())
        metadata["model"].update({"head_bias": True, "use_bias": False})
        metadata["digest"] = json_digest({key: value for key, value in metadata.items() if key != "digest"})
        path.write_text(json.dumps(metadata))
    for arguments in (
        ["eval.py", f"--workdir={damaged}"],
        ["-m", "prenorm_jax.convert", damaged, tmp_path / "target", "--to=rmsnorm"],
        ["train.py", f"--workdir={damaged}", "--config.steps=9"],
    ):
        message = here(*arguments, status=2).stderr
        assert "unknown leaf block_0/attention/out/bias" in message
        assert "missing leaf head_bias" in message
    assert not (tmp_path / "target").exists()
