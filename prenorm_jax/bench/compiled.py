"""Programs compiled for TPUs that are not there, and what the TPU compiler says of them.

The figures are the compiler's own model of the chip, not measurements. It needs libtpu, of the version that belongs to
the installed jax: `pip install "jax[tpu]"`.
"""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any, NamedTuple

import jax
import numpy as np

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.bench import hlo
from prenorm_jax.bench.contenders import CONTENDERS, Setting, baseline_of
from prenorm_jax.bench.tasks import SPLIT, make_task
from prenorm_jax.train.sharding import make_mesh

_NO_TPU = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
_NO_TPU |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4"}


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


def abstract_batch(config: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a training batch."""
    B = config.batch_size
    if config.model.family == "gpt":
        T = config.data.seq_len
        shapes = {"tokens": ((B, T + 1), np.int32), "weights": ((B, T), np.float32)}
    else:
        side, channels = config.model.image_size, config.model.channels
        shapes = {"images": ((B, side, side, channels), np.uint8), "labels": ((B,), np.int32)}
        shapes["weights"] = ((B,), np.float32)
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}


class Memory(NamedTuple):
    """Bytes that the compiler plans for on each device. The peak is at most that: not all temporaries live at once."""

    arguments: int
    temporaries: int
    peak: int


def planned_memory(program: jax.stages.Compiled) -> Memory:
    """Of one run of the program."""
    found = program.memory_analysis()
    arguments, temporaries = found.argument_size_in_bytes, found.temp_size_in_bytes
    results = found.output_size_in_bytes - found.alias_size_in_bytes
    return Memory(arguments, temporaries, arguments + temporaries + results + found.generated_code_size_in_bytes)


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
        program = make_task(task, CONTENDERS[contender], config, make_mesh(config, devices)).compile(
            abstract_batch(config)
        )
        rows[contender] = {
            "about": CONTENDERS[contender].about,
            "cycles": sum(operation.all_cycles for operation in hlo.operations(program.as_text())),
            "temporaries_mib": planned_memory(program).temporaries / 2**20,
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
    return setting.header(task) | {
        "topology": name,
        "devices": len(devices),
        "baseline": baseline,
        "contenders": rows,
    }
