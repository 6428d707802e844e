"""Many processes that train as one: who they are, how they meet, and what they tell each other.

Each process drives its own devices and runs the same program; every array that lives longer than a line is a global
one. The first process alone logs and writes, but for the checkpoints, in which all have their part. Asking which
process this is needs no JAX.
"""

import contextlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash

from prenorm_jax.base.errors import PrenormError, SharedError, check_range, first_line
from prenorm_jax.base.meeting import meet

HEARTBEAT_SECONDS = 30  # after so long without a sign of life from one process JAX ends the others, with status 134

_process, _processes = 0, 1


def is_first() -> bool:
    """Whether this is the process that logs and writes: the only one, or number 0."""
    return _process == 0


def count_processes() -> int:
    """How many processes train as one."""
    return _processes


def initialize(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300
) -> None:
    """Joins the other processes. To be called before any device is touched.

    `coordinator` is HOST:PORT of the process number 0, which all can reach, `process` the number of this one, from 0.
    Without the three what SLURM, Open MPI or a Cloud TPU pod says is taken, as JAX understands it; where none says that
    there are several processes, nothing is done. Raises PrenormError if some are given without the others or do not
    fit, if a launcher is not understood, or if the others do not come within `timeout` seconds.
    """
    global _process, _processes
    given = (coordinator, processes, process)
    if None not in given:
        _check_address(coordinator)
        check_range("--processes", processes, at_least=1)
        check_range("--process", process, at_least=0, below=processes)
        count, where = processes, coordinator
    elif given == (None, None, None):
        launcher, count = _launcher()
        where = os.environ.get("JAX_COORDINATOR_ADDRESS", f"the first host that {launcher} names")
        if count > 1 and "JAX_COORDINATOR_ADDRESS" in os.environ:
            _check_address(where, "JAX_COORDINATOR_ADDRESS")
    else:
        raise PrenormError("--coordinator, --processes and --process go together: give all three, or none")
    if count == 1:
        return
    _processes = count  # from here on one that ends does so at once (`end`)
    print(f"waiting for {count} processes at {where}, for at most {timeout} s", file=sys.stderr, flush=True)
    if coordinator:
        host, port = coordinator.rsplit(":", 1)
        meet((host.strip("[]"), int(port)), process, count, timeout)
    _set_stdout_apart()
    try:
        # In a thread: it waits in C++, which hears no Ctrl-C and, when its own time is up, aborts with a stack trace.
        _process = ThreadPoolExecutor(1).submit(_join, given, 2 * timeout).result(timeout)
    except Exception as error:  # of many kinds: whatever JAX stumbles over in what a launcher says, a port in use, ...
        raise PrenormError(
            f"{count} processes did not meet at {where} ({first_line(error)}): start all within {timeout} s, with a "
            f"free port of the first one's host as --coordinator, --processes={count} and --process=0 to {count - 1}"
        ) from error


def _join(given: tuple[str | None, int | None, int | None], timeout: int) -> int:
    """Joins the others, as `initialize` is told; the number of this process."""
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is for `StopSignals`
    jax.distributed.initialize(
        *given,
        # What a launcher says is JAX's to read; it also says which devices are ours.
        cluster_detection_method="deactivate" if given[0] else None,
        initialization_timeout=timeout,
        heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
    )
    return jax.process_index()


def _check_address(coordinator: str, name: str = "--coordinator") -> None:
    match = re.fullmatch(r"([^\s:]+|\[[0-9a-fA-F:]+\]):(\d{1,5})", coordinator)
    if not match or not 0 < int(match[2]) < 2**16:
        raise PrenormError(f"{name}={coordinator} is not HOST:PORT, such as 10.0.0.1:1234")
    try:
        socket.getaddrinfo(match[1].strip("[]"), None)
    except (OSError, UnicodeError) as error:
        raise PrenormError(f"{name}={coordinator}: no such host ({first_line(error)})") from error


def _launcher() -> tuple[str, int]:
    """Who started several processes, and how many, by the variables that it documents; ("", 1) if none did."""
    told = os.environ.get
    tpu_hosts = told("TPU_PROCESS_ADDRESSES") or told("TPU_WORKER_HOSTNAMES") or ""
    counts = {
        # In a batch script, outside srun, SLURM_NTASKS is set too, but there is one process.
        "SLURM": _count_in("SLURM_NTASKS") if told("SLURM_STEP_NODELIST") else 1,
        "Open MPI": _count_in("OMPI_COMM_WORLD_SIZE"),
        "the Cloud TPU pod": len(tpu_hosts.split(",")) * _count_in("MEGASCALE_NUM_SLICES"),
    }
    return next(((name, count) for name, count in counts.items() if count > 1), ("", 1))


def _count_in(variable: str) -> int:
    text = os.environ.get(variable) or "1"
    if not text.isdecimal():
        raise PrenormError(f"{variable}={text} is no number of processes: unset it, or give --processes and the others")
    return int(text)


def _set_stdout_apart() -> None:
    """Leaves stdout to Python: gloo, which is C++, announces there how many it is connected to, each time."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def check_joined() -> None:
    """Raises PrenormError if JAX sees other processes than this one was told of. Touches the devices."""
    import jax

    if (found := jax.process_count()) != _processes:
        raise PrenormError(
            f"the devices here are part of a machine of {found} processes, and this one was told of {_processes}: give "
            "all the same --coordinator and --processes, and each its --process"
        )


def gather(value: np.ndarray) -> np.ndarray:
    """The values of all processes, stacked: (processes, ...). Waits for all of them."""
    if _processes == 1:
        return np.asarray(value)[None]
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value)


def of_first(value: bool) -> bool:
    """What the first process says, for all. Waits for all of them."""
    return bool(gather(np.bool_(value))[0])


def first_said(text: str) -> str:
    """The text of the first process that has one, cut to 1,000 bytes; "" if none has. Waits for all processes."""
    texts = gather(np.frombuffer(text.encode()[:1000].ljust(1000, b"\0"), np.uint8))
    said = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in texts)
    return next(filter(None, said), "")


def _all_equal(text: str) -> bool:
    digest = np.frombuffer(xxhash.xxh3_128(text.encode()).digest(), np.uint8)
    return bool((gather(digest) == digest).all())


def check_same(what: str, value: Any) -> None:
    """Raises PrenormError in all processes unless they call this with values that print alike."""
    if not _all_equal(repr(value)):
        raise SharedError(
            f"the processes differ in {what}: start all with the same command, in the same environment, on a workdir "
            "that all share"
        )


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    check_same("what they wait for", what)


@contextlib.contextmanager
def refused_alike() -> Iterator[None]:
    """What is refused in it (PrenormError) is refused by all processes, mostly in the same words: then one says it.

    It is for what one process alone may refuse. Nothing in it may wait for the others: the one that refused is here.
    """
    try:
        yield
    except PrenormError as error:
        error.shared = _all_equal(str(error))
        raise
    if not _all_equal(""):
        raise PrenormError("another process refused to start and says why")


# What XLA, gloo, NCCL and the coordination service, all C++, say of a process that is gone: a status, and why.
_LOST = re.compile(
    r"(?!RESOURCE_EXHAUSTED|(?i:.*out of memory))(UNAVAILABLE|DEADLINE_EXCEEDED|[A-Z_]{5,}: (?i:.*("
    r"\bgloo\b|\bcoordination (service|agent)\b|\b(barrier|heartbeat)|\bconnection (closed|reset|refused)\b"
    r"|\bsocket closed\b|\bnccl.*\b(remote|network|system error|timeout|aborted)\b)))",
    re.DOTALL,
)


def lost_process(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, is an error of JAX's runtime that says that another process is gone."""
    if _processes == 1 or error is None:
        return False
    of_runtime = isinstance(error, RuntimeError | ValueError)  # a JaxRuntimeError is one of the first
    return bool(of_runtime and _LOST.match(str(error))) or lost_process(error.__cause__)
