"""What kills and damage leave of a run: `PYTHONPATH=. python tests/kill_and_damage.py FOLDER [KILLS]`, half an hour.

Kills: so many times (20) a run of train.py gets a SIGKILL while it starts, takes steps, evaluates or writes, and is
started again. Its metrics and digests must then be, bit for bit, those of a run that nobody touched.

Damage: each file of a checkpoint and of its run in turn is cut, flipped in a bit, deleted, zeroed, filled with junk, or
a folder. What is read must be what was saved, or one line must say what is damaged; and the run must go on from the
checkpoint before, with the losses that it had. test_resume.py and test_damage.py take their part from here.
"""

import contextlib
import io
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from commands import (
    DAMAGES,
    ROOT,
    SMALL,
    clean_environment,
    command,
    damage,
    digests,
    few_devices,
    lines_of,
    losses_of,
    make_text,
    small_run,
    steps_written,
    wait_until,
)

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.checkpoint import Checkpoints
from prenorm_jax.train.checksum import digest
from prenorm_jax.train.loop import train
from prenorm_jax.train.run import Run
from prenorm_jax.train.step import init_state

# --- Kills. ---

MOMENTS = ("starting", "steps", "writing", "evaluating")
STEPS, EVAL_EVERY = 120, 30


def start(*flags: object) -> subprocess.Popen:
    """train.py in the background."""
    no_writing = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1000"}  # which a kill would leave half-done
    return subprocess.Popen(
        [sys.executable, "train.py", *map(str, flags)],
        cwd=ROOT,
        env=clean_environment() | no_writing,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def is_writing(workdir: Path) -> bool:
    """A checkpoint, which Orbax renames when it is complete."""
    return any(workdir.glob("checkpoints/*tmp*"))


def is_evaluating(workdir: Path) -> bool:
    """The last line is that of a step to be evaluated, and it is not yet."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    try:
        last = json.loads(lines[-1]) if lines else {"step": 1}
    except ValueError:
        return False
    return last["step"] % EVAL_EVERY == 0 and "eval_loss" not in last


def kill(moment: str, number: signal.Signals, flags: list[str], workdir: Path, rng: np.random.Generator) -> str:
    """Starts the run, and sends it the signal at that moment; what it printed. Asserts that it fell there."""
    process, before = start(*flags, f"--workdir={workdir}"), steps_written(workdir)
    if moment == "starting":
        time.sleep(rng.uniform(2, 8))
    elif moment == "writing":
        wait_until(lambda: is_writing(workdir), process)
    elif moment == "evaluating":
        wait_until(lambda: is_evaluating(workdir), process)
    else:
        wait_until(lambda: steps_written(workdir) >= before + 5, process)
        time.sleep(rng.uniform(0, 0.1))
    process.send_signal(number)
    errors = process.communicate()[1]
    assert moment != "writing" or is_writing(workdir), f"{number.name} did not fall while a checkpoint was written"
    assert moment != "evaluating" or is_evaluating(workdir), f"{number.name} did not fall into an evaluation"
    return errors


def run_flags(text: Path) -> list[str]:
    """A run that writes and evaluates often, and draws random numbers."""
    flags = [*SMALL, f"--config.data.path={text}", f"--config.steps={STEPS}", "--config.model.dropout=0.1"]
    flags += [f"--config.eval_every={EVAL_EVERY}", "--config.checkpoint_every=20", "--config.log_every=3"]
    return [*flags, "--config.batch_size=2"]


def deterministic(workdir: Path) -> list[dict]:
    """The lines of metrics.jsonl without what is measured in seconds."""
    timed = ("tokens_per_s", "model_flops_per_s")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines_of(workdir)]


def check_same_run(killed: Path, whole: Path) -> None:
    """Bit for bit."""
    assert digests(killed, STEPS) == digests(whole, STEPS)
    assert set(digests(whole, STEPS)) == {"params", "optimizer"}
    assert deterministic(killed) == deterministic(whole)


def kills(text: Path, folder: Path, count: int) -> None:
    """The first part."""
    flags, whole, rng = run_flags(text), folder / "whole", np.random.default_rng(0)
    command("train.py", *flags, f"--workdir={whole}")
    moments = itertools.cycle(MOMENTS)
    killed = 0
    for number in itertools.count():
        workdir = folder / f"killed-{number}"
        while killed < count and steps_written(workdir) < STEPS - 2 * EVAL_EVERY:  # then there is room for each moment
            moment = next(moments)
            kill(moment, signal.SIGKILL, flags, workdir, rng)
            killed += 1
            print(f"kill {killed} of {count}: {moment}, {steps_written(workdir)} steps written", flush=True)
        command("train.py", *flags, f"--workdir={workdir}")
        check_same_run(workdir, whole)
        print(f"after {killed} kills metrics and digests are bit for bit those of the run that nobody touched")
        if killed == count:
            return


# --- Damage. ---


def damages(run: Path, where: Path, kinds: tuple[str, ...]) -> Iterator[tuple[Path, str]]:
    """Every (file below `where`, damage) in turn, done to `run` while the caller has it, and undone."""
    aside = run.with_name(f"{run.name}-whole")
    shutil.copytree(run, aside)
    for file in sorted(path for path in where.rglob("*") if path.is_file() and path.stat().st_size):
        for how in kinds:
            damage(file, how)
            yield file, how
            shutil.rmtree(run)
            shutil.copytree(aside, run)
    shutil.rmtree(aside)


def check_found_or_harmless(run: Path, step: int, kinds: tuple[str, ...] = DAMAGES) -> dict[str, set[str]]:
    """{damage: items of the checkpoint that it was found in}. Asserts that what is read is else what was saved."""
    found: dict[str, set[str]] = {how: set() for how in kinds}
    config = small_run(run, dropout=0.1)
    abstract = jax.eval_shape(lambda: init_state(Run.create(config)).opt_state)

    def read() -> tuple:
        with Checkpoints(run, read_only=True) as checkpoints:
            model, params = checkpoints.params(step)
            return model, digest((params, checkpoints.optimizer(step, abstract)))

    expected = read()
    assert expected[0] == model_config(config.model)
    folder = run / "checkpoints" / str(step)
    for file, how in damages(run, folder, kinds):
        try:
            assert read() == expected, f"{file} {how}: another state was read"
        except PrenormError as error:
            assert f"checkpoints/{step}" in str(error) and "names another" in str(error), error
            assert "\n" not in str(error) and len(str(error)) < 600, error
            found[how].add(file.relative_to(folder).parts[0])
    return found


def check_goes_on(run: Path, text: Path, expected: dict[int, float]) -> int:
    """Trains `run` to the end after each damage to any file of it; the number of damages. No loss may differ."""
    done = 0
    for file, how in damages(run, run, DAMAGES):
        done += 1
        errors = io.StringIO()
        try:
            with contextlib.redirect_stderr(errors):
                train(small_run(text, steps=6, dropout=0.1), run)
        except PrenormError as error:  # such as config.json's, which no checkpoint stands in for
            assert file.name in str(error) or f"checkpoints{file.name}" in str(error) or "lock" in str(error), error
            assert "\n" not in str(error), error
            assert (run / "checkpoints" / "4").is_dir() and (run / "checkpoints" / "2").is_dir()
            print(f"{file.relative_to(run)} {how}: {error}")
            continue
        if file.name == "metrics.jsonl" and file.parent == run:  # of a run at its end, which reads no line of it
            print(f"{file.relative_to(run)} {how}: harmless")
            continue
        losses = losses_of(run)
        assert all(losses[step] == expected[step] for step in losses), f"{file} {how}: other losses"
        assert losses == expected or file.name == "lock", f"{file} {how}: {sorted(losses)}"
        said = [line for line in errors.getvalue().splitlines() if "damaged" in line or "warning" in line]
        print(f"{file.relative_to(run)} {how}: {said[0] if said else 'harmless'}")
    return done


def main() -> None:
    """Both parts."""
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 20
    (folder / "text").mkdir(parents=True)
    text, run = make_text(folder / "text"), folder / "run"
    with few_devices(1):
        train(small_run(text, steps=6, checkpoint_every=2, dropout=0.1), run)
        found = check_found_or_harmless(run, 6)
        print(f"read: {len(DAMAGES)} kinds of damage, found in {found}")
        print(f"trained on after {check_goes_on(run, text, losses_of(run))} damages")
    kills(text, folder, count)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    main()
