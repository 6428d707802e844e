"""How `benchmark` times the norms against each other, against Flax's LayerNorm and against no norm at all.

One process runs all contenders in turn, in a new random order each round, each call waited for (`--in-a-row`: that many
at once, as training runs ahead of an accelerator, which would else idle while it is being started). Two ratios are
given: round by round, the median; and undisturbed, that of the fastest tenths of both, since what else a machine does
can only add time. The baseline is the fastest LayerNorm; a contender's share is how much of the way from it to no norm
at all it goes, undisturbed. Where the noise is larger than the way, there is no verdict.
"""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.allocator import release_freed_memory
from prenorm_jax.base.console import say
from prenorm_jax.bench.compiled import planned_memory
from prenorm_jax.bench.contenders import BASELINES, BOUND, CONTENDERS, Setting, baseline_of
from prenorm_jax.bench.report import LEAST_ROUNDS
from prenorm_jax.bench.tasks import Task, make_task
from prenorm_jax.config import data_kind
from prenorm_jax.models.flops import model_flops
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.workdir import configure_jax, device_name

WARM_UP = 2  # rounds
LEAST_CALL = 0.01  # seconds, of products whose speed counts as the peak
QUIET = 0.1  # the quantile of a contender's times that counts as undisturbed


def prepare(task: Task, batch: Any) -> tuple[Callable[[], Any], jax.stages.Compiled]:
    """(a call that does the task once, the compiled program)."""
    program = task.compile(batch)
    arguments = list(jax.device_put(task.make_arguments(), program.input_formats[0][:-1]))

    def call() -> Any:
        result = program(*arguments, batch)
        if task.carried is not None:
            arguments[task.carried] = result[0]
        return result

    return call, program


def measure(calls: dict[str, Callable[[], Any]], rounds: int, in_a_row: int = 1) -> dict[str, list[float]]:
    """Seconds of each call in each round, the mean of so many in a row. Every round is in another order."""
    rng, seconds = np.random.default_rng(0), {name: [] for name in calls}
    for index in range(-WARM_UP, rounds):
        for name in rng.permutation(list(calls)):
            start = time.perf_counter()
            for _ in range(in_a_row):
                result = calls[name]()
            jax.block_until_ready(result)
            if index >= 0:
                seconds[name].append((time.perf_counter() - start) / in_a_row)
    return seconds


def peak_flops(dtype: str, size: int = 2048) -> float:
    """FLOP/s of products of two size × size matrices on all devices of this process: the best of ten calls.

    A call is a chain of as many products as take LEAST_CALL: one alone can take a GPU less time than to be started.
    """
    devices = jax.local_devices()
    # Powers of the matrix whose entries are all 1/size: it itself, in any dtype.
    operands = [jax.device_put(jnp.full((size, size), 1 / size, dtype), device) for device in devices]
    count, best = 1, 0.0
    while best < LEAST_CALL:
        count = math.ceil(count * 1.5 * LEAST_CALL / best) if best else count
        # Of a constant length, so that no device asks the host whether to go on.
        chain = jax.jit(lambda a, count=count: jax.lax.fori_loop(0, count, lambda _, power: a @ power, a, unroll=4))
        jax.block_until_ready([chain(a) for a in operands])
        best = np.inf
        for _ in range(10):
            start = time.perf_counter()
            jax.block_until_ready([chain(a) for a in operands])
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 * count * len(devices) / best


def memory(call: Callable[[], Any], program: Any) -> dict[str, float | None]:
    """MiB: what the compiler plans for, and what the process's peak rises by when it runs (Linux, CPU), if known."""
    planned, risen = planned_memory(program), None
    if jax.default_backend() == "cpu":  # elsewhere what a program uses is not the process's
        with contextlib.suppress(OSError):
            release_freed_memory()
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            before = _status("VmRSS")
            jax.block_until_ready(call())
            risen = (_status("VmHWM") - before) / 1024
    return {
        "temporaries_mib": planned["temporaries"] / 2**20,
        "compiled_mib": planned["peak"] / 2**20,
        "process_mib": risen,
    }


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def ratios(seconds: dict[str, list[float]], baseline: str) -> dict[str, dict[str, Any]]:
    """For each contender: the median ratio to the baseline round by round, the undisturbed ratio, and its share.

    With 95 % intervals, by resampling rounds. The share, of the way to no norm, is None where there is no LayerNorm or
    no bound among the contenders, where the interval of the bound's undisturbed ratio reaches 1, for then there is no
    way to be measured, or where the rounds are too few to tell.
    """
    rounds = len(seconds[baseline])
    samples = np.random.default_rng(0).integers(rounds, size=(4000, rounds))
    times = {name: np.array(values) for name, values in seconds.items()}
    floors = {name: np.quantile(values, QUIET) for name, values in times.items()}
    resampled = {name: np.quantile(values[samples], QUIET, axis=1) for name, values in times.items()}
    quiet = {name: floor / resampled[baseline] for name, floor in resampled.items()}
    enough = rounds >= LEAST_ROUNDS
    a_way = baseline in BASELINES and BOUND in times
    measurable = enough and a_way and np.quantile(quiet[BOUND], 0.975) < 1
    result = {}
    for name in times:
        pairwise = times[name] / times[baseline]
        entry = {
            "ratio": float(np.median(pairwise)),
            "ratio_interval": _interval(np.median(pairwise[samples], axis=1)),
            "quiet_ratio": float(floors[name] / floors[baseline]),
            "quiet_interval": _interval(quiet[name]),
            "share": None,
            "share_interval": None,
        }
        if measurable and name != baseline:
            entry["share"] = float((floors[baseline] - floors[name]) / (floors[baseline] - floors[BOUND]))
            entry["share_interval"] = _interval((1 - quiet[name]) / np.maximum(1 - quiet[BOUND], 1e-9))
        result[name] = entry
    return result


def _interval(values: np.ndarray) -> list[float]:
    return [float(value) for value in np.quantile(values, (0.025, 0.975))]


def benchmark(setting: Setting, task: str, names: list[str], rounds: int, in_a_row: int) -> dict:
    """What the JSON file holds. Raises PrenormError for an unknown model or task."""
    config = setting.run_config()
    configure_jax(config)
    kind = data_kind(config)
    data = kind.sample(config)
    calls, rows = {}, {}
    for name in names:
        start = time.monotonic()
        calls[name], program = prepare(make_task(task, CONTENDERS[name], config, make_mesh(config)), data)
        jax.block_until_ready(calls[name]())
        rows[name] = {"about": CONTENDERS[name].about, **memory(calls[name], program)}
        say(f"{name}: compiled in {time.monotonic() - start:.0f} s")
    seconds = measure(calls, rounds, in_a_row)
    baseline = baseline_of({name: float(np.quantile(times, QUIET)) for name, times in seconds.items()})
    header, logits = setting.header(task), 1 if task == "prefill" else None
    length = header["length"] or 1  # tokens, or an image
    flops = model_flops(model_config(config.model), setting.batch, length, task == "step", logits)
    peak = peak_flops(setting.dtype)
    units = setting.batch * (length if task != "decode" else 1)
    compared = ratios(seconds, baseline)
    for name, row in rows.items():
        quartiles = np.quantile(seconds[name], (0.25, 0.5, 0.75))
        row |= {"seconds": seconds[name], "quartiles_ms": [1e3 * float(q) for q in quartiles], **compared[name]}
        row["units_per_s"] = units / float(quartiles[1])
        of_peak = flops / float(quartiles[1]) / peak
        row["flops_share_of_peak"] = of_peak if task in ("step", "forward", "prefill") else None
    return header | {
        "unit": kind.unit,
        "rounds": rounds,
        "in_a_row": in_a_row,
        "device": device_name(),
        "matmul_peak_gflops": peak / 1e9,
        "model_gflop": flops / 1e9,
        "baseline": baseline,
        "contenders": rows,
    }
