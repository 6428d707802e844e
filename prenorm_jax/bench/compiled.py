"""Programs compiled for TPUs that are not there, and what the TPU compiler says of them.

Memory, collectives and cycles are the compiler's figures, not measurements. It needs libtpu, of the version that
belongs to the installed jax: `pip install "jax[tpu]"`.
"""

import collections
import dataclasses
import os
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.base.trees import count
from prenorm_jax.bench import hlo
from prenorm_jax.bench.contenders import CONTENDERS, Setting, baseline_of
from prenorm_jax.bench.tasks import SPLIT, make_task
from prenorm_jax.config import data_kind
from prenorm_jax.models.flops import model_flops
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.run import H_SCOPE, Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import OPTIMIZER_SCOPE, init_state, make_train_step

_NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
_NO_TPU |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}
GIB = 2**30
HBM_GIB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}  # of a chip: cloud.google.com/tpu/docs/system-architecture-tpu-vm

# Parts of a step, by the name of an operation in the source; the first that is found counts. XLA fuses operations and
# names the fusion after one of them.
_PARTS = {
    "conversion h": H_SCOPE,
    "optimizer": OPTIMIZER_SCOPE,
    "accumulation": "accumulation",
    "norms": r"_norm\b|/norm\b",
    "attention": r"/attention\b",
    "MLP": r"/mlp\b",
    "layers, other": r"(GPT|ViT)\)*/(.*/)?(while/body|block_\d)",  # residual stream, scanning, what it keeps
    "embedding, head and loss": r"GPT|ViT|jvp",
}


def topology_devices(name: str) -> list[Any]:
    """Compile-only devices of a topology such as "v5e:2x2". Raises PrenormError if it or libtpu is missing."""
    # libtpu looks for a machine's metadata and for other users of its TPU: there is neither.
    for key, value in _NO_TPU.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except Exception as error:  # of many types, from the plugin
        raise PrenormError(
            f"--topology={name} is not to be had ({first_line(error)}): name one like v5e:2x2, v5p:2x2x1 or v6e:2x2, "
            'with libtpu installed: pip install "jax[tpu]"'
        ) from error


def planned_memory(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes that the compiler plans for on each device: arguments, temporaries, and the peak, which is at most this.

    (Not all of the temporaries need live at once.)
    """
    found = program.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    others = found.output_size_in_bytes - found.alias_size_in_bytes + found.generated_code_size_in_bytes
    return {"arguments": arguments, "temporaries": temporaries, "peak": arguments + temporaries + others}


def estimate(name: str, setting: Setting, task: str, names: list[str]) -> dict:
    """What the JSON file holds, for the setting's batch on each device. Raises PrenormError.

    Cycles are the sum of the compiler's estimates, one device's, over all operations of the program that state them.
    """
    devices = topology_devices(name)
    devices = devices if task in SPLIT else devices[:1]
    config = dataclasses.replace(setting, batch=setting.batch * len(devices)).run_config()
    config.model.scan = True  # each block is compiled once, and its cycles counted as often as there are blocks
    rows = {}
    for contender in names:
        start = time.monotonic()
        work = make_task(task, CONTENDERS[contender], config, make_mesh(config, devices))
        program = work.compile(data_kind(config).batch_shapes(config))
        rows[contender] = {
            "about": CONTENDERS[contender].about,
            "cycles": sum(operation.all_cycles for operation in hlo.operations(program.as_text())),
            "temporaries_mib": planned_memory(program)["temporaries"] / 2**20,
            "compile_s": time.monotonic() - start,
        }
        say(f"{contender}: compiled in {rows[contender]['compile_s']:.0f} s")
        if not rows[contender]["cycles"]:
            raise PrenormError(
                f"--topology={name} --task={task}: the compiler states no cycles for it: time it instead"
            )
    baseline = baseline_of({name: row["cycles"] for name, row in rows.items()})
    for row in rows.values():
        row["ratio"] = row["cycles"] / rows[baseline]["cycles"]
    found = {"topology": name, "devices": len(devices), "baseline": baseline, "contenders": rows}
    return setting.header(task) | found


def compile_step(config: ConfigDict, devices: list[Any]) -> dict[str, Any]:
    """Compiles the training step of `config` for the devices; what `report_text` prints. No array is made.

    Raises PrenormError if the mesh, the batch or the model does not fit the devices.
    """
    run = Run.create(config, make_mesh(config, devices))
    state = jax.eval_shape(lambda: init_state(run))
    start = time.monotonic()
    lowered = make_train_step(run).lower(state, run.kind.batch_shapes(config))
    traced = time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise PrenormError(
            f"the step of {run.computed.norm} does not fit: {first_line(error)}; take more devices, a larger "
            "mesh.fsdp or accumulate, or model.remat=full"
        ) from error
    parts: dict[str, int] = collections.Counter()
    collectives: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for operation in hlo.operations(program.as_text()):
        parts[part_of(operation)] += operation.all_cycles
        if operation.collective:
            collectives[operation.collective][0] += operation.times
            collectives[operation.collective][1] += operation.times * operation.size
    length = run.kind.length(config)
    return {
        "norm": run.computed.norm,
        "parameters": count(state.params),
        "devices": len(devices),
        "mesh": dict(run.mesh.shape),
        **planned_memory(program),
        "model_flops": model_flops(model_config(config.model), config.batch_size, length, training=True),
        "collectives": {kind: tuple(value) for kind, value in sorted(collectives.items())},
        "cycles": {part: parts[part] for part in [*_PARTS, "other"]},
        "trace_s": traced - start,
        "compile_s": time.monotonic() - traced,
    }


def part_of(operation: hlo.Operation) -> str:
    """Which part of a step an operation belongs to."""
    return next((part for part, pattern in _PARTS.items() if re.search(pattern, operation.scope)), "other")


def report_text(report: dict[str, Any], hbm_gib: float | None) -> str:
    """For people. `hbm_gib`: memory of a chip, if it is known."""
    mesh = " × ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    total = sum(report["cycles"].values())
    of_chip = "" if hbm_gib is None else f" of the chip's {hbm_gib}"
    lines = [
        f"{report['norm']}: {report['parameters']:,} parameters trained on {report['devices']} devices ({mesh})",
        f"  compiled in {report['compile_s']:.0f} s, traced in {report['trace_s']:.0f} s",
        f"  on each device: peak {report['peak'] / GIB:.2f} GiB{of_chip}, so it fits: "
        f"arguments {report['arguments'] / GIB:.2f}, temporaries {report['temporaries'] / GIB:.2f} GiB",
        f"  {report['model_flops'] / 1e12:,.1f} TFLOP of matrix products in a step, "
        f"{report['model_flops'] / report['devices'] / 1e12:,.2f} on each device",
        "  collectives, by their results on each device: "
        + ("; ".join(f"{kind} {n} ({b / GIB:.2f} GiB)" for kind, (n, b) in report["collectives"].items()) or "none"),
        "  estimated cycles: "
        + "; ".join(f"{part} {n / 1e6:,.1f} M ({n / max(total, 1):.1%})" for part, n in report["cycles"].items())
        + f"; all {total / 1e6:,.1f} M",
    ]
    return "\n".join(lines)
