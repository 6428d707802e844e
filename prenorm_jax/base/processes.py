"""Many processes that train as one: who they are, which rows of a batch each reads, and how they end.

Each process drives its own devices and runs the same program; every array that lives longer than a line is a global
one. The first process alone logs and writes, but for the checkpoints, in which all have their part. Asking which
process this is needs no JAX.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prenorm_jax.base.errors import PrenormError, SharedError, check_range, first_line

if TYPE_CHECKING:
    import numpy as np


HEARTBEAT_SECONDS = 30  # without a sign of life from a process for so long, it is dead


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

    Without arguments what SLURM, Open MPI or a Cloud TPU pod says is taken, as JAX understands it; where none says that
    there are several processes, nothing is done.

    Args:
      coordinator: HOST:PORT of the process number 0, which all can reach.
      processes: how many there are.
      process: the number of this one, from 0.
      timeout: seconds to wait for the others.

    Raises:
      PrenormError: some arguments are given without the others, they do not fit, a launcher is not understood, or
        the others do not come.
    """
    global _process, _processes
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    launcher = _launcher() if len(missing) == len(given) else ""
    if launcher:
        coordinator, processes, process = _settings_of(launcher, timeout)
    elif len(missing) == len(given):
        return
    elif missing:
        raise PrenormError(f"{' and '.join(missing)} missing: give --coordinator, --processes and --process, or none")
    else:
        if not re.fullmatch(r"([^\s:]+|\[[0-9a-fA-F:]+\]):\d{1,5}", coordinator):
            raise PrenormError(f"--coordinator={coordinator} is not HOST:PORT, such as 10.0.0.1:1234")
        check_range("--processes", processes, at_least=1)
        check_range("--process", process, at_least=0, below=processes)
        if processes == 1:
            return
    _process, _processes = process, processes  # from here on ending is for many (`end`)
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM, which is for signals.py
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process,
            cluster_detection_method=None if launcher else "deactivate",  # it also says which devices are ours
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=2 * HEARTBEAT_SECONDS,
        )
    except (RuntimeError, ValueError, OSError) as error:
        why = f" ({first_line(error)})"
        where = f"{launcher}'s first process at {coordinator}" if launcher else f"--coordinator={coordinator}"
        whom = "the other processes did not come" if process == 0 else "it cannot be reached"
        which = f"all {processes} processes" if launcher else f"--process=0 to --process={processes - 1}"
        raise PrenormError(
            f"{where}: {whom}{why}; start {which} within {timeout} s of each other, with the same free port of a host "
            "that all can reach" + (": JAX_COORDINATOR_PORT sets the port" if launcher else "")
        ) from error
    _set_stdout_apart()
    _process, _processes = jax.process_index(), jax.process_count()


def _set_stdout_apart() -> None:
    """Leaves stdout to Python: gloo, which is C++, announces there how many it is connected to, each time."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)


def _launcher() -> str:
    """Which launcher says that it started several processes; "" if none does."""
    environment = os.environ
    # In a batch script, outside srun, SLURM_NTASKS is set too, but there is one process.
    if _number("SLURM_NTASKS") > 1 and "SLURM_STEP_NODELIST" in environment:
        return "SLURM"
    if _number("OMPI_COMM_WORLD_SIZE") > 1:
        return "Open MPI"
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster

    for cluster in (GkeTpuCluster, GceTpuCluster):  # the second asks the network, but only where there are TPUs
        with contextlib.suppress(Exception):  # no such server: `check_joined` sees if this is a pod all the same
            if cluster.is_env_present() and cluster.get_process_count() > 1:
                return "Cloud TPU"
    return ""


def _number(name: str) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else 0


def _settings_of(launcher: str, timeout: int) -> tuple[str, int, int]:
    """The coordinator, the number of processes and that of this one, as JAX reads them. Raises PrenormError."""
    from jax._src.clusters import ClusterEnv

    coordinator, why = os.environ.get("JAX_COORDINATOR_ADDRESS"), ""
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(coordinator, None, None, None, None, timeout)[:3]
    except Exception as error:  # whatever it stumbles over in what the launcher says
        found, why = (None,), f" ({type(error).__name__}: {first_line(error)})"
    if None in found:
        raise PrenormError(
            f"{launcher} started several processes, but its settings are not understood{why}: "
            "give --coordinator, --processes and --process"
        )
    return found


def check_joined() -> None:
    """Raises PrenormError if JAX sees other processes than `initialize` joined. Touches the devices."""
    import jax

    if jax.process_count() != _processes:
        raise PrenormError(
            f"the devices here are part of a machine of {jax.process_count()} processes, which no launcher told of: "
            "give --coordinator, --processes and --process"
        )


def gather(value: np.ndarray) -> np.ndarray:
    """The values of all processes, stacked: (processes, ...). Waits for all of them."""
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(value)


def of_first(value: bool) -> bool:
    """What the first process says, for all. Waits for all of them."""
    if _processes == 1:
        return value
    import numpy as np

    return bool(gather(np.bool_(value))[0])


def first_said(text: str) -> str:
    """The text of the first process that has one, cut to 1,000 bytes; "" if none has. Waits for all processes."""
    if _processes == 1:
        return text
    import numpy as np

    texts = gather(np.frombuffer(text.encode()[:1000].ljust(1000, b"\0"), np.uint8))
    said = (row.tobytes().rstrip(b"\0").decode(errors="ignore") for row in texts)
    return next(filter(None, said), "")


def wait_for_all(what: str) -> None:
    """Returns when every process has come here."""
    if _processes > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(what)


def _all_equal(text: str) -> bool:
    if _processes == 1:
        return True
    import numpy as np
    import xxhash

    digest = np.frombuffer(xxhash.xxh3_128(text.encode()).digest(), np.uint8)
    return bool((gather(digest) == digest).all())


def check_same(what: str, value: Any) -> None:
    """Raises PrenormError in all processes unless they call this with values that print alike."""
    if not _all_equal(repr(value)):
        raise SharedError(
            f"the processes differ in {what}: start all with the same command, in the same environment, on a workdir "
            "that all share"
        )


@contextlib.contextmanager
def refused_alike() -> Iterator[None]:
    """What is refused in it (PrenormError) is refused by all processes, mostly in the same words: then one says it."""
    error = None
    try:
        yield
    except PrenormError as refused:
        error = refused
    shared = _all_equal(str(error))
    if error is not None:
        error.shared = shared
        raise error
    if not shared:
        raise PrenormError("another process refused to start and says why")


# What XLA, gloo, NCCL and the coordination service, all C++, say of a process that is gone.
_LOST = re.compile(
    r"\bgloo\b|\bcoordination (service|agent)\b|\b(barrier|heartbeat)|^(UNAVAILABLE|DEADLINE_EXCEEDED)\b"
    r"|\bconnection (closed|reset|refused)\b|\bsocket closed\b"
    r"|\bnccl.*\b(remote|network|system error|timeout|aborted)\b",
    re.IGNORECASE | re.DOTALL,
)


def lost_process(error: BaseException | None) -> bool:
    """Whether this, or what it was raised from, is an error of JAX's runtime that says that another process is gone."""
    if _processes == 1 or error is None:
        return False
    import jax

    said = str(error)
    # Some of the runtime's errors come as ValueError: as a status, such as "UNKNOWN: ...".
    of_runtime = isinstance(error, jax.errors.JaxRuntimeError) or (
        isinstance(error, RuntimeError | ValueError) and re.match(r"[A-Z_]{5,}: ", said)
    )
    full = re.search(r"RESOURCE_EXHAUSTED|out of memory", said, re.IGNORECASE)
    return bool(of_runtime and not full and _LOST.search(said)) or lost_process(error.__cause__)
