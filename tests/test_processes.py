"""Runs over many processes: real ones, with two devices each, that meet on this machine."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from test_commands import ROOT, SMALL, clean_environment, command, error_of, evaluate, lines_of, make_text
from test_resume import damage, losses_of, steps_written, wait_until

from prenorm_jax.base import processes as distributed
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.processes import count_processes, initialize, lost_process
from prenorm_jax.config import base_config
from prenorm_jax.train import stop as signals
from prenorm_jax.train.arrays import global_batch, local_rows, put_everywhere
from prenorm_jax.train.checkpoint import complete_steps
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.stop import StopSignals

DEVICES = 2  # of each process
FLOAT64 = ["--config.model.dtype=float64", "--config.model.param_dtype=float64", "--config.batch_size=8"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text(tmp_path_factory.mktemp("text"))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(commands: list[list[object]], variables: list[dict[str, str]] | None = None) -> list[subprocess.Popen]:
    """One process for each command, with these environment variables."""
    return [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            cwd=ROOT,
            env=clean_environment(DEVICES) | {"JAX_ENABLE_COMPILATION_CACHE": "0"} | more,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arguments, more in zip(commands, variables or [{}] * len(commands), strict=True)
    ]


def together(count: int, *arguments: object) -> list[list[object]]:
    """One command for many processes, with the flags by which they find each other."""
    port = free_port()
    return [
        [*arguments, f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={i}"] for i in range(count)
    ]


def finish(processes: list[subprocess.Popen], status: int = 0, seconds: float = 240) -> list[tuple[str, str]]:
    """What each printed, to stdout and stderr. None is left behind."""
    limit = time.monotonic() + seconds
    try:
        printed = [process.communicate(timeout=max(1, limit - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
    statuses = [process.returncode for process in processes]
    assert statuses == [status] * len(processes), (statuses, printed)
    return printed


def lines(printed: str) -> list[str]:
    """Without what the progress bar drew."""
    return [
        line for line in re.split(r"[\r\n]", printed) if line.strip() and "step/s" not in line and "it/s" not in line
    ]


def compare_losses(actual: Path, expected: Path, rtol: float = 1e-10) -> None:
    actual, expected = losses_of(actual), losses_of(expected)
    assert list(actual) == list(expected)
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=rtol)


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does_and_the_first_alone_writes(text, tmp_path):
    flags = [*SMALL, *FLOAT64, f"--config.data.path={text}"]
    alone, run = tmp_path / "alone", tmp_path / "run"
    command("train.py", *flags, f"--workdir={alone}", devices=2 * DEVICES)
    (_, first), (_, second) = finish(start(together(2, "train.py", *flags, f"--workdir={run}")))
    compare_losses(run, alone)
    assert [line["step"] for line in lines_of(run) if "eval_loss" in line] == [3, 6]
    assert "done: 6 of 6 steps" in first
    assert f"on {2 * DEVICES} × cpu" in first
    assert second == ""
    assert len(list((run / "tensorboard").glob("events*"))) == 1
    names = {path.name for path in run.iterdir()}
    assert names == {"config.json", "run.json", "lock", "metrics.jsonl", "tensorboard", "checkpoints"}
    (first, _), (second, errors) = finish(start(together(2, "eval.py", f"--workdir={run}", "--json", "--norm=rmsnorm")))
    assert json.loads(first)["eval_loss"] == pytest.approx(evaluate(alone)["eval_loss"], rel=1e-10)
    assert second == errors == ""


@pytest.mark.slow
@pytest.mark.parametrize(("count", "victim", "next_count"), [(4, 2, 2), (2, 0, 4)])
def test_when_one_is_killed_the_others_end_and_another_number_goes_on(text, tmp_path, count, victim, next_count):
    flags = [*SMALL, *FLOAT64, f"--config.data.path={text}", "--config.steps=100000", "--config.eval_every=0"]
    flags += ["--config.checkpoint_every=5", "--config.tensorboard=False"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    processes = start(together(count, "train.py", *flags, f"--workdir={run}"))
    wait_until(lambda: steps_written(run) >= 12 and complete_steps(run / "checkpoints"), processes[0])
    killed = processes.pop(victim)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    for _, errors in finish(processes, status=76, seconds=60):
        last = lines(errors)[-1]
        assert last.startswith("error: another process of this run ended or cannot be reached"), errors
        assert "goes on from the last complete checkpoint" in last
        assert errors.count("goes on") == 1
        assert "Traceback" not in errors and "*** " not in errors
    saved = max(complete_steps(run / "checkpoints"))
    finish(start(together(next_count, "train.py", *flags, f"--workdir={run}", f"--config.stop_at={saved + 4}")))
    command("train.py", *flags, f"--workdir={run}", f"--config.stop_at={saved + 8}", devices=DEVICES)
    command("train.py", *flags, f"--workdir={whole}", f"--config.stop_at={saved + 8}")
    compare_losses(run, whole)


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


@pytest.mark.slow
def test_a_signal_to_one_stops_all_at_the_same_step(text, tmp_path):
    flags = [*SMALL, f"--config.data.path={text}", f"--workdir={tmp_path}", "--config.steps=100000"]
    flags += ["--config.eval_every=0", "--config.checkpoint_every=0", "--config.log_every=5"]
    processes = start(together(2, "train.py", *flags))
    wait_until(lambda: steps_written(tmp_path) >= 12, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    (_, first), (_, second) = finish(processes, status=75, seconds=90)
    saved = max(losses_of(tmp_path))
    assert complete_steps(tmp_path / "checkpoints") == [saved]
    assert lines(first)[-1].startswith(f"error: SIGTERM at step {saved}: saved in")
    assert second == ""


@pytest.mark.slow
def test_damage_to_the_part_of_one_is_damage_for_all(text, tmp_path):
    flags = ["train.py", *SMALL, f"--config.data.path={text}", f"--workdir={tmp_path}", "--config.eval_every=0"]
    flags += ["--config.model.d_model=16", "--config.model.vocab_size=512", f"--config.mesh.fsdp={2 * DEVICES}"]
    finish(start(together(2, *flags)))
    parts = tmp_path / "checkpoints" / "6" / "params" / "ocdbt.process_1" / "d"
    damage(max(parts.iterdir(), key=lambda path: path.stat().st_size), "truncate")
    (_, first), (_, second) = finish(start(together(2, *flags)))
    assert f"the checkpoint {tmp_path / 'checkpoints' / '6'} is damaged" in first
    assert "falling back to step 3" in first and "done: 6 of 6 steps" in first
    # Nothing of ours; the reader may leave a remark on a read that it gave up, when Python collects it.
    assert not [line for line in lines(second) if line.startswith(("error", "warning", "done"))]
    assert complete_steps(tmp_path / "damaged") == [6]


@pytest.mark.slow
def test_what_all_refuse_one_says(tmp_path):
    flags = [*SMALL, f"--workdir={tmp_path / 'run'}", "--config.data.path=/nowhere/at/all.txt"]
    (_, first), (_, second) = finish(start(together(2, "train.py", *flags)), status=2)
    assert len(lines(first)) == 1 and "data.path='/nowhere/at/all.txt' does not exist" in first
    assert second == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_different_commands_are_no_run(text, tmp_path):
    flags = ["train.py", *SMALL, f"--config.data.path={text}", f"--workdir={tmp_path / 'run'}"]
    commands = [[*command, f"--config.seed={i}"] for i, command in enumerate(together(2, *flags))]
    (_, first), (_, second) = finish(start(commands), status=2)
    assert "the processes differ in their configuration" in first and len(lines(first)) == 1
    assert second == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator=127.0.0.1:1"], "--processes and --process missing: give"),
        (["--processes=2", "--process=1"], "--coordinator missing: give"),
        (["--coordinator=127.0.0.1:1", "--processes=2", "--process=2"], "--process=2 must be at least 0 and below 2"),
        (["--coordinator=127.0.0.1:1", "--processes=0", "--process=0"], "--processes=0 must be at least 1"),
        (["--coordinator=somewhere", "--processes=2", "--process=1"], "--coordinator=somewhere is not HOST:PORT"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, flags, message):
    assert message in error_of("train.py", *SMALL, f"--workdir={tmp_path / 'run'}", *flags)
    assert not (tmp_path / "run").exists()


JOIN = """
import sys
from prenorm_jax.distributed import initialize
from prenorm_jax.errors import run_command
run_command(lambda: initialize(sys.argv[1], 2, int(sys.argv[2]), timeout=5))
"""


@pytest.mark.parametrize(("process", "message"), [(0, "the other processes did not come"), (1, "it cannot be reached")])
def test_processes_that_do_not_come_are_not_waited_for_in_vain(process, message):
    address = f"127.0.0.1:{free_port()}"
    done = subprocess.run(
        [sys.executable, "-c", JOIN, address, str(process)],
        cwd=ROOT,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert f"--coordinator={address}: {message}" in done.stderr


TPU_VARIABLES = ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES", "TPU_SKIP_MDS_QUERY")


def test_a_launcher_counts_only_if_it_started_several_processes(monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    from prenorm_jax.base.processes import _launcher

    told = {"worker-network-endpoints": "a", "agent-worker-number": "0", "tpu-env": ""}  # by the machine's server
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (told[key], 200))
    for name in ("SLURM_NTASKS", "SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE", *TPU_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert _launcher() == ""
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    assert _launcher() == ""
    with monkeypatch.context() as changed:
        changed.setitem(told, "worker-network-endpoints", "a,b,c,d")
        assert _launcher() == "Cloud TPU"
        told.clear()
        assert _launcher() == ""
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "1")
    for several, one, name in (
        ({"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a[1-2]"}, {"SLURM_NTASKS": "1"}, "SLURM"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, {"OMPI_COMM_WORLD_SIZE": "1"}, "Open MPI"),
        *(({name: "a,b"}, {name: "a"}, "Cloud TPU") for name in TPU_VARIABLES[:2]),
    ):
        with monkeypatch.context() as changed:
            for variables, expected in ((several, name), (one, "")):
                for variable, value in variables.items():
                    changed.setenv(variable, value)
                assert _launcher() == expected


@pytest.mark.parametrize("said", [{}, {"OMPI_MCA_orte_hnp_uri": "of another form"}])
def test_a_launcher_that_is_not_understood_is_said(monkeypatch, said):
    for name, value in {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", **said}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PrenormError, match=r"Open MPI .* not understood.*: give --coordinator, --processes and --pro"):
        initialize()
    assert count_processes() == 1


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
        (JaxRuntimeError("INVALID_ARGUMENT: peer_norm has shape (3,)"), False),
        (RuntimeError("NCCL ran out of memory"), False),
        (OSError("HTTPSConnectionPool(host='huggingface.co', port=443): Max retries: connection reset by peer"), False),
        (ValueError("peer_norm has shape (3,): no barrier"), False),
    ],
)
def test_a_process_is_lost_only_if_the_runtime_says_so(monkeypatch, error, lost):
    assert not lost_process(error)  # of one process, none is lost
    monkeypatch.setattr(distributed, "_processes", 2)
    assert lost_process(error) == lost
    wrapped = TimeoutError("a save")
    wrapped.__cause__ = error
    assert lost_process(wrapped) == lost


def test_the_error_that_tells_of_a_lost_process_is_said_in_full(monkeypatch, capsys):
    monkeypatch.setattr(distributed, "end", lambda line, status: print(line))
    distributed.end_for_lost_process(JaxRuntimeError(GLOO + "x" * 500 + "\nmore"))
    said = capsys.readouterr().out
    assert f"({GLOO}{'x' * 500}): the same command" in said and said.count("\n") == 1


def test_processes_that_nothing_told_of_are_found_out(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(PrenormError, match=r"a machine of 4 processes, .*: give --coordinator, --processes and --pro"):
        make_mesh(base_config())


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["slurm", "ompi"])
def test_launchers_need_no_flags(text, tmp_path, launcher):
    """With the variables that they set, as `jax.distributed` reads them."""
    variables = [{"JAX_COORDINATOR_PORT": str(free_port())}] * 2
    for i in range(2):
        if launcher == "slurm":
            said = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
            said |= {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NUM_NODES": "1"}
        else:
            said = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}
            said |= {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)}
        variables[i] = variables[i] | said
    flags = ["train.py", *SMALL, f"--config.data.path={text}", f"--workdir={tmp_path}"]
    (_, first), (_, second) = finish(start([flags] * 2, variables))
    assert f"on {2 * DEVICES} × cpu" in first
    assert second == ""
    assert list(losses_of(tmp_path)) == [1, 2, 3, 4, 5, 6]


# --- Rows, in one process that has all devices. ---


@pytest.mark.parametrize("axes", ["data", ("data", "fsdp")])
def test_a_global_batch_is_what_its_rows_were(axes):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    assert local_rows(sharding, 8) == slice(0, 8)
    rows = {"tokens": np.arange(24).reshape(8, 3), "labels": np.arange(8)}
    batch = global_batch(rows, sharding, 8)
    for name, array in batch.items():
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
        np.testing.assert_array_equal(array, rows[name])


def test_rows_are_those_of_the_devices_of_the_process():
    class Elsewhere:
        """A sharding of which this process has two of eight devices."""

        def addressable_devices_indices_map(self, shape):
            width = shape[0] // 8
            return {i: (slice(i * width, (i + 1) * width),) for i in (4, 5)}

    assert local_rows(Elsewhere(), 16) == slice(8, 12)


def test_placed_arrays_are_whole_everywhere():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tree = {"a": np.arange(16.0), "b": np.int32(3)}
    placed = put_everywhere(tree, {name: NamedSharding(mesh, PartitionSpec()) for name in tree})
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert placed["b"].dtype == np.int32 and placed["b"].shape == ()
