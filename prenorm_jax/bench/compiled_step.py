"""Compiles the real training step for TPUs that need not be there, and says what it would need and do.

    python -m prenorm_jax.aot --config=configs/gpt3_175b.py --topology=v5p:4x4x8 --norm=rmsnorm

Memory, collectives and cycles are the TPU compiler's figures, not measurements. It needs libtpu, of the version that
belongs to the installed jax: `pip install "jax[tpu]"`.
"""

from __future__ import annotations

import collections
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.base.trees import count
from prenorm_jax.bench import hlo
from prenorm_jax.bench.compiled import abstract_batch
from prenorm_jax.models.flops import model_flops
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import H_SCOPE, OPTIMIZER_SCOPE, init_state, make_train_step, run_models

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


def compile_step(config: ConfigDict, devices: list[Any]) -> dict[str, Any]:
    """Compiles the training step of `config` for the devices; what `report_text` prints. No array is made.

    Raises PrenormError if the mesh, the batch or the model does not fit the devices.
    """
    models, mesh = run_models(config), make_mesh(config, devices)
    state = jax.eval_shape(lambda: init_state(config, models))
    start = time.monotonic()
    lowered = make_train_step(config, models, mesh).lower(state, abstract_batch(config))
    traced = time.monotonic()
    try:
        program = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise PrenormError(
            f"the step of {models.computed.norm} does not fit: {first_line(error)}; take more devices, a larger "
            "mesh.fsdp or accumulate, or model.remat=full"
        ) from error
    memory = program.memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    others = memory.output_size_in_bytes - memory.alias_size_in_bytes + memory.generated_code_size_in_bytes
    parts: dict[str, int] = collections.Counter()
    collectives: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for operation in hlo.operations(program.as_text()):
        if operation.collective:
            collectives[operation.collective][0] += operation.times
            collectives[operation.collective][1] += operation.times * operation.size
        parts[part_of(operation)] += operation.times * operation.cycles
    length = config.data.seq_len if config.model.family == "gpt" else 0
    return {
        "norm": models.computed.norm,
        "parameters": count(state.params),
        "devices": len(devices),
        "mesh": dict(mesh.shape),
        "arguments": arguments,
        "temporaries": temporaries,
        "peak": arguments + temporaries + others,  # at most: not all of the temporaries need live at once
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
