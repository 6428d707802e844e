"""Runs over many processes: real ones, with two devices each, that meet on this machine."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import ROOT, SMALL, clean_environment, error_of, evaluate, few_devices, here, lines_of, make_text
from jax.errors import JaxRuntimeError
from many_processes import DEVICES, run_config
from test_resume import losses_of, steps_written, wait_until

from prenorm_jax.base import console, processes
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.processes import initialize, lost_process
from prenorm_jax.config import base_config
from prenorm_jax.train import stop as signals
from prenorm_jax.train.checkpoint import complete_steps
from prenorm_jax.train.loop import train
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.stop import StopSignals


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(*arguments: object, **variables: object) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=clean_environment(DEVICES) | {name: str(value) for name, value in variables.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen], seconds: float = 240) -> tuple[list[int], list[str], list[str]]:
    """The statuses, and what each printed to stdout and to stderr. None is left behind."""
    limit = time.monotonic() + seconds
    try:
        printed = [process.communicate(timeout=max(1, limit - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], *map(list, zip(*printed, strict=True))


def lines(printed: str) -> list[str]:
    """Without the lines of progress, and the line that every process says when it starts to wait."""
    first, *rest = re.sub("^importing the libraries.*\n", "", printed).splitlines()
    assert re.fullmatch(r"waiting for \d processes at .*, for at most \d+ s", first), printed
    return [line for line in rest if line.strip() and not re.match(r"step \d+ of", line)]


def check_lost(status: int, errors: str) -> None:
    """It ended because another process is gone: by an exception of a collective or, without one, by JAX."""
    assert "Traceback" not in errors
    if status == -signal.SIGABRT:
        assert "most likely indicates that another task died" in errors
        return
    assert status == 76, errors
    assert lines(errors)[-1].startswith("error: another process of this run ended or cannot be reached"), errors
    assert errors.count("goes on from the last complete checkpoint") == 1


def compare_runs(actual: Path, expected: Path) -> None:
    numbers = [
        [(line["step"], line[name]) for line in lines_of(run) for name in ("loss", "eval_loss") if name in line]
        for run in (actual, expected)
    ]
    np.testing.assert_allclose(*numbers, rtol=1e-10)


# --- Real processes. ---


@pytest.mark.slow
def test_two_processes_refuse_train_stop_fall_back_and_are_lost_as_one(text, tmp_path):
    """The stages of many_processes.py; one process trains before and after them, and another one the whole way."""
    alone, run = tmp_path / "alone", tmp_path / "run"
    with few_devices(1):
        train(run_config(text, stop_at=3), alone)
    shutil.copytree(alone, run)
    arguments = ["tests/many_processes.py", f"127.0.0.1:{free_port()}"]
    pair = [start(*arguments, i, text, tmp_path, JAX_ENABLE_X64=1, PYTHONPATH=ROOT) for i in range(2)]
    statuses, outputs, errors = finish(pair)
    stages = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    assert [len(stage) for stage in stages] == [7, 7], (outputs, errors)

    # What is refused by all, in the same words, one says, and nothing is written.
    for (first, second), error, shared in zip(
        zip(*(stage[:6] for stage in stages), strict=True),
        [
            "/nowhere/at/all.txt' does not exist",
            "another process refused",
            "another process refused",
            "processes differ in their configuration",
            "another process refused",
            "no such workdir",
        ],
        [True, False, False, True, False, True],
        strict=True,
    ):
        assert error in first["error"] and first["shared"] == second["shared"] == shared
        assert (first["error"] == second["error"]) == shared
        assert not first["there"]
    assert all("/nowhere/at/all.txt' does not exist" in stages[1][i]["error"] for i in (1, 2))
    assert "no such workdir" in stages[1][4]["error"]

    # A signal to one stops all at the same step.
    stopped = stages[0][6]
    assert stopped == stages[1][6]
    assert stopped["saved"][-1] == stopped["steps"] >= 12
    assert stopped["interrupted"].startswith(f"SIGTERM at step {stopped['steps']}: saved in")

    # A checkpoint that is damaged for one is for all.
    assert f"the checkpoint {run / 'checkpoints' / str(stopped['steps'])} is damaged" in errors[0]
    assert f"falling back to step {stopped['saved'][-2]}" in errors[0]
    assert complete_steps(run / "damaged") == [stopped["steps"]]

    # The first alone says and writes. (The reader may leave a remark on a read that it gave up.)
    assert f"on {2 * DEVICES} × cpu" in errors[0]
    assert not [line for line in lines(errors[1]) if line.startswith(("error", "warning", "done", "data", "model"))]
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "run.json", "lock", "metrics.jsonl", "tensorboard", "checkpoints", "damaged"}

    # When one is killed the other ends, another number of processes goes on, and all is as if one had done it.
    assert statuses[1] == -signal.SIGKILL
    check_lost(statuses[0], errors[0])
    end = max(complete_steps(run / "checkpoints")) + 4
    assert end > stopped["steps"]
    with few_devices(1):
        for workdir in (run, alone):
            train(run_config(text, stop_at=end), workdir)
    compare_runs(run, alone)


JOIN = """
import json, os, signal, sys
from prenorm_jax.base.console import run_command
from prenorm_jax.base.processes import check_joined, check_same, initialize

def main():
    timeout, *given = starts[name][0]
    initialize(*given, timeout=timeout)
    check_joined()
    check_same("their numbers", str(given[-1]))

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it
starts, names = json.loads(sys.argv[1]), {}
for name, (_, variables) in starts.items():
    if not (pid := os.fork()):  # each imports nothing any more
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), 2)
        os.environ.update(variables)
        run_command(main)
        sys.exit()
    names[pid] = name
print(json.dumps(names), flush=True)
print(json.dumps({names[pid]: os.waitstatus_to_exitcode(status) for pid, status in (os.wait() for _ in names)}))
"""


@pytest.mark.slow
def test_processes_that_do_not_fit_or_do_not_come_say_so_in_one_line(tmp_path):
    """Nobody is waited for in vain, and what is waited for is said before; in order, the first says what all refuse."""
    nobody, other, pair, fewer, more, twice, taken = (f"127.0.0.1:{free_port()}" for _ in range(7))
    launched = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_MCA_orte_hnp_uri": "of another form"}
    listener = socket.create_server(("", int(taken.split(":")[1])))
    starts = {
        "the first": (5, other, 3, 0),
        "another": (5, nobody, 2, 1),
        "interrupted": (300, nobody, 2, 1),
        "launched": (300,),
        "told of 2, first": (120, more, 2, 0),
        "told of 3": (120, more, 3, 1),
        "told of 3, first": (120, fewer, 3, 0),
        "told of 2": (120, fewer, 2, 1),
        "0 of twice": (120, twice, 3, 0),
        "1 of twice": (120, twice, 3, 1),
        "1 again": (120, twice, 3, 1),
        "taken": (120, taken, 2, 0),
        "pair 0": (120, pair, 2, 0),
        "pair 1": (120, pair, 2, 1),
    }
    given = {name: (values, launched if name == "launched" else {}) for name, values in starts.items()}
    script = f"import os, sys; os.chdir({str(tmp_path)!r})\n{JOIN}"
    parent = start("-c", script, json.dumps(given), PYTHONPATH=ROOT)
    pids = {name: int(pid) for pid, name in json.loads(parent.stdout.readline()).items()}
    printed = {name: tmp_path / name for name in starts}
    try:
        wait_until(
            lambda: printed["interrupted"].exists() and printed["interrupted"].read_text().endswith("\n"), parent
        )
        assert printed["interrupted"].read_text() == f"waiting for 2 processes at {nobody}, for at most 300 s\n"
        os.kill(pids["interrupted"], signal.SIGINT)
        statuses = json.loads(parent.communicate(timeout=90)[0])
    finally:
        for pid in pids.values() if parent.poll() is None else ():
            os.kill(pid, signal.SIGKILL)
        listener.close()
    errors = {name: path.read_text() for name, path in printed.items()}
    assert lines(errors.pop("interrupted"))[-1].startswith("error: interrupted") and statuses.pop("interrupted") == 130
    said = {name: "\n".join(lines(error)) for name, error in errors.items()}
    assert said.pop("pair 1") == "", "the first says it for both"
    assert "processes differ in their numbers" in said["pair 0"]
    assert f"of 3 processes these did not come to {other} within 5 s: 1, 2; start all" in said["the first"]
    assert f"process 0 does not answer at {nobody} within 5 s: start all" in said["another"]
    for name in ("told of 2, first", "told of 3"):
        assert "process 1 was told of --processes=3, process 0 of 2: tell all the same" in said[name]
    for name in ("told of 3, first", "told of 2"):
        assert "process 1 was told of --processes=2, process 0 of 3: tell all the same" in said[name]
    for name in ("0 of twice", "1 of twice", "1 again"):
        assert "two processes were started with --process=1: give each its own" in said[name]
    assert f"{taken}: cannot listen there (Address already in use): name a free port" in said["taken"]
    assert "4 processes did not meet at the first host that Open MPI names (" in said["launched"]
    assert all("\n" not in line for line in said.values())
    assert set(statuses.values()) == {2}


def slurm(number: int, count: int) -> dict[str, object]:
    told = {"SLURM_JOB_ID": 1, "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": count, "SLURM_STEP_NUM_NODES": 1}
    return told | {"SLURM_PROCID": number, "SLURM_LOCALID": number}


def open_mpi(number: int, count: int) -> dict[str, object]:
    told = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": count}
    return told | {"OMPI_COMM_WORLD_RANK": number, "OMPI_COMM_WORLD_LOCAL_RANK": number}


@pytest.mark.slow
def test_the_commands_over_many_processes(text, tmp_path):
    """Started by launchers, with the variables that they set, as JAX reads them, and by flags."""
    flags = ["train.py", *SMALL, f"--config.data.path={text}", "--config.steps=100000", "--config.batch_size=12"]
    flags += ["--config.model.dtype=float64", "--config.model.param_dtype=float64", "--config.checkpoint_every=5"]
    flags += ["--config.eval_every=0", "--config.log_every=1", "--config.tensorboard=False"]
    run, alone = tmp_path / "run", tmp_path / "alone"

    def launch(launcher, count: int) -> list[subprocess.Popen]:
        port = free_port()
        told = [{"JAX_COORDINATOR_PORT": port} | launcher(i, count) for i in range(count)]
        started = [start(*flags, f"--workdir={run}", **variables) for variables in told]
        wanted = steps_written(run) + 12
        wait_until(lambda: steps_written(run) >= wanted and complete_steps(run / "checkpoints"), started[0])
        return started

    coordinator, other = launch(slurm, 2)
    coordinator.kill()
    coordinator.communicate()
    (status,), _, (errors,) = finish([other], seconds=90)
    check_lost(status, errors)

    two = launch(open_mpi, 2)
    two[1].send_signal(signal.SIGTERM)
    statuses, _, (first, second) = finish(two, seconds=90)
    saved = max(losses_of(run))
    assert statuses == [75, 75] and max(complete_steps(run / "checkpoints")) == saved
    assert lines(first)[-1].startswith(f"error: SIGTERM at step {saved}: saved in") and lines(second) == []

    here(*flags, f"--workdir={alone}", f"--config.stop_at={saved}", x64=True)
    compare_runs(run, alone)
    port = free_port()
    evaluations = [
        start("eval.py", f"--workdir={run}", "--json", "--norm=rmsnorm", f"--coordinator=127.0.0.1:{port}", *which)
        for which in (["--processes=2", f"--process={i}"] for i in range(2))
    ]
    statuses, (first, second), errors = finish(evaluations)
    assert statuses == [0, 0] and second == "" and [lines(printed) for printed in errors] == [[], []]
    assert json.loads(first)["eval_loss"] == pytest.approx(evaluate(alone, x64=True)["eval_loss"], rel=1e-10)


# --- How they are found. ---


def test_train_takes_the_flags_and_refuses_them_in_one_line(tmp_path):
    flags = [f"--workdir={tmp_path / 'run'}", "--coordinator=127.0.0.1:0", "--processes=2", "--process=1"]
    assert "--coordinator=127.0.0.1:0 is not HOST:PORT" in error_of("train.py", *SMALL, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("127.0.0.1:1", None, None), "--coordinator, --processes and --process go together: give all three, or none"),
        ((None, 2, 1), "go together"),
        (("127.0.0.1:1", 2, 2), "--process=2 must be at least 0 and below 2"),
        (("127.0.0.1:1", 2, -1), "--process=-1 must be at least 0 and below 2"),
        (("127.0.0.1:1", 0, 0), "--processes=0 must be at least 1"),
        (("somewhere", 2, 1), "--coordinator=somewhere is not HOST:PORT, such as"),
        (("127.0.0.1:65536", 2, 1), "--coordinator=127.0.0.1:65536 is not HOST:PORT"),
        (("nowhere:1", 2, 1), "--coordinator=nowhere:1: no such host"),
        (("a..b:1", 2, 1), "--coordinator=a..b:1: no such host"),
    ],
)
def test_flags_that_do_not_fit_are_refused_at_once(monkeypatch, given, message):
    def look_up(host: str, port: object) -> None:
        host.encode("idna")
        if host == "nowhere":
            raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(processes.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(processes, "_join", None)
    with pytest.raises(PrenormError, match=re.escape(message)):
        initialize(*given)


@pytest.mark.parametrize(
    ("told", "launcher", "count"),
    [
        ({}, "", 1),
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a[1-2]"}, "SLURM", 2),
        ({"SLURM_NTASKS": "2"}, "", 1),  # a batch script
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "a1"}, "", 1),
        ({"OMPI_COMM_WORLD_SIZE": "3"}, "Open MPI", 3),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, "", 1),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, "the Cloud TPU pod", 4),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1"}, "the Cloud TPU pod", 2),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, "", 1),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "the Cloud TPU pod", 2),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": ""}, "", 1),
    ],
)
def test_a_launcher_counts_only_if_it_started_several_processes(monkeypatch, told, launcher, count):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "MEGASCALE_", "TPU_")):
            monkeypatch.delenv(name)
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert processes._launcher() == (launcher, count)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE=two is no number of processes: unset it"),
        ({"SLURM_NTASKS": "2(x3)", "SLURM_STEP_NODELIST": "a"}, "SLURM_NTASKS=2(x3) is no number of processes"),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "JAX_COORDINATOR_ADDRESS": "a:70000"},
            "JAX_COORDINATOR_ADDRESS=a:70000 is not HOST:PORT",
        ),
    ],
)
def test_what_a_launcher_says_wrongly_is_refused_at_once(monkeypatch, told, message):
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "_join", None)
    with pytest.raises(PrenormError, match=re.escape(message)):
        initialize()


def test_processes_that_nothing_told_of_are_found_out(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(PrenormError, match=r"of 4 processes, and this one was told of 1: give all the same --coord"):
        make_mesh(base_config())


# --- How they are stopped, and lost. ---


@pytest.mark.parametrize(("seconds", "agreed"), [(110, 12), (4, 5), (0.1, 4)])
def test_processes_agree_on_stopping_well_within_the_grace(monkeypatch, seconds, agreed):
    """Every step if it is long; where it is short, after the first two and where the numbers are fetched."""
    times, now, asked = [], [100.0], []

    def gather(mine: np.ndarray) -> np.ndarray:
        now[0] += seconds / 10  # waiting
        times.append(now[0])
        return np.array([mine, [signal.SIGTERM if asked else 0, 1]])

    monkeypatch.setattr(signals, "count_processes", lambda: 2)
    monkeypatch.setattr(signals, "gather", gather)
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    stop = StopSignals(grace=60)
    for step in range(9001, 9013):
        now[0] += seconds
        assert stop.agreed(due=step % 6 == 4) == ""
    assert len(times) == agreed
    assert max(np.diff(times)) <= max(1.2 * seconds, 60 / 3)
    asked.append(True)
    assert stop.agreed(due=True) == "SIGTERM"


GLOO = "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]"
NCCL = "INTERNAL: NCCL operation ncclGroupEnd() failed: "


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (JaxRuntimeError(GLOO), True),
        (ValueError(GLOO), True),
        (JaxRuntimeError(NCCL + "remote process exited or there was a network error."), True),
        (JaxRuntimeError(NCCL + "unhandled cuda error. Last NCCL warning: 'out of memory'"), False),
        (JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes; barrier"), False),
        (
            JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out. Id: a. This usually happens if a task died."),
            True,
        ),
        (JaxRuntimeError("UNKNOWN: Gloo AllGather failed: Application timeout caused pair closure"), True),
        (JaxRuntimeError("INTERNAL: Polled an error from coordination service"), True),
        (JaxRuntimeError("INTERNAL: the last heartbeat of task 1 is 30 s old"), True),
        (JaxRuntimeError("INTERNAL: Connection refused"), True),
        (JaxRuntimeError("UNKNOWN: Socket closed"), True),
        (JaxRuntimeError("UNAVAILABLE: The following tasks are unhealthy: 2"), True),
        (JaxRuntimeError("INVALID_ARGUMENT: peer_norm has shape (3,)"), False),
        (RuntimeError("NCCL ran out of memory"), False),
        (OSError("HTTPSConnectionPool(host='huggingface.co', port=443): Max retries: connection reset by peer"), False),
        (ValueError("peer_norm has shape (3,): no barrier"), False),
    ],
)
def test_a_process_is_lost_only_if_the_runtime_says_so(monkeypatch, error, lost):
    assert not lost_process(error)  # of one process, none is lost
    monkeypatch.setattr(processes, "_processes", 2)
    assert lost_process(error) == lost
    wrapped = TimeoutError("a save")
    wrapped.__cause__ = error
    assert lost_process(wrapped) == lost


def test_the_error_that_tells_of_a_lost_process_is_said_in_full(monkeypatch, capsys):
    monkeypatch.setattr(console, "end", lambda line, status: print(line))
    console.end_for_lost_process(JaxRuntimeError(GLOO + "x" * 500 + "\nmore"))
    said = capsys.readouterr().out
    assert f"({GLOO}{'x' * 500}): the same command" in said and said.count("\n") == 1
