"""Memory and time of a conversion (6.5 GB).

    PYTHONPATH=. python tests/measure_streaming.py FOLDER --model=gpt3:XL --to=crmsnorm

Makes a run of random parameters in FOLDER, in another process, converts it there and prints JSON: parameters_mb,
seconds, and the resident memory of this process before the conversion and at its largest. "Before" is after the
conversion of a tiny model: what the libraries take at their first use is no part of what a checkpoint takes.
"""

import argparse
import contextlib
import functools
import json
import multiprocessing
import re
import sys
import time
from pathlib import Path

from prenorm_jax.equivalence import stored as streamed
from prenorm_jax.models.registry import model_config
from prenorm_jax.train import convert_run as convert


def memory_mb(which: str) -> float:
    return int(re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3


def make_run(folder: Path, model: str, vocab: int) -> float:
    """MB of the parameters."""
    import jax
    import numpy as np
    from flax.traverse_util import unflatten_dict

    from prenorm_jax import sizes
    from prenorm_jax.config import base_config
    from prenorm_jax.models.abstract import abstract_params
    from prenorm_jax.train.checkpoint import Checkpoints
    from prenorm_jax.train.workdir import write_config

    config = base_config()
    config.model.update(sizes.model(model) | {"vocab_size": vocab, "tie_embeddings": False})
    source, rng = model_config(config.model), np.random.default_rng(0)
    params = {
        path: jax.numpy.asarray(rng.standard_normal(leaf.value.shape, np.float32))
        for path, leaf in abstract_params(source).items()
    }
    folder.mkdir(parents=True)
    write_config(folder, config)
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, unflatten_dict(params), None, source)
    return sum(leaf.nbytes for leaf in params.values()) / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--to", required=True)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--part-size", type=int, default=streamed.PART)
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(make_run, (args.folder / "tiny", "gpt:2x64", 256))
        size = pool.apply(make_run, (args.folder / "source", args.model, args.vocab))
    convert.convert_stored = functools.partial(streamed.convert_stored, part_size=args.part_size)
    convert.COMPARED_BYTES = 0
    with contextlib.redirect_stdout(sys.stderr):
        convert.convert(args.folder / "tiny", args.folder / "tiny_target", args.to)
        before, begin = memory_mb("VmRSS"), time.perf_counter()
        convert.convert(args.folder / "source", args.folder / "target", args.to)
    seconds = time.perf_counter() - begin
    result = {"parameters_mb": size, "seconds": seconds, "before_mb": before, "peak_mb": memory_mb("VmHWM")}
    print(json.dumps(result))
