"""Memory and time of an import: a GPT-NeoX of 2 GB, in two files, whose heads' queries, keys and values lie in turn.

    PYTHONPATH=.:tests python tests/measure_import.py FOLDER --to=crmsnorm [--coordinates=drop]

Makes the files in FOLDER, imports them there in this process and prints JSON: source_mb, seconds of wall clock and of
CPU, and this process's anonymous memory (RssAnon: mapped files do not count) before and at its largest. "Before" is
after the import of a tiny model: what the libraries take at their first use is no part of what a checkpoint takes.
"""

import argparse
import contextlib
import json
import multiprocessing
import re
import sys
import threading
import time
from pathlib import Path

import numpy as np

from prenorm_jax.interop.importing import import_checkpoint
from prenorm_jax.train import convert_run


def anonymous_mb() -> float:
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3


class Watched:
    """The largest anonymous memory while it is entered, looked at a hundred times a second."""

    def __enter__(self):
        self.before = self.peak = anonymous_mb()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._end.set()
        self._thread.join()

    def _watch(self):
        while not self._end.wait(0.01):
            self.peak = max(self.peak, anonymous_mb())


def neox_shapes(depth: int, d: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    norm, linear = {"weight": (d,), "bias": (d,)}, lambda n, m: {"weight": (m, n), "bias": (m,)}
    block = {"input_layernorm": norm, "post_attention_layernorm": norm}
    block |= {"attention.query_key_value": linear(d, 3 * d), "attention.dense": linear(d, d)}
    block |= {"mlp.dense_h_to_4h": linear(d, 4 * d), "mlp.dense_4h_to_h": linear(4 * d, d)}
    shapes = {"embed_in.weight": (vocabulary, d), "final_layer_norm.weight": (d,), "final_layer_norm.bias": (d,)}
    for i in range(depth):
        leaves = ((f"{name}.{leaf}", shape) for name, leaves in block.items() for leaf, shape in leaves.items())
        shapes |= {f"layers.{i}.{name}": shape for name, shape in leaves}
    return {f"gpt_neox.{name}": shape for name, shape in shapes.items()} | {"embed_out.weight": (vocabulary, d)}


def make(folder: Path, depth: int, d: int, vocabulary: int) -> float:
    """MB of the files."""
    from foreign import write_sharded

    config = {"model_type": "gpt_neox", "hidden_size": d, "num_hidden_layers": depth, "num_attention_heads": d // 64}
    config |= {"intermediate_size": 4 * d, "vocab_size": vocabulary, "max_position_embeddings": 128}
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, np.float32) for name, shape in neox_shapes(depth, d, vocabulary).items()
    }
    write_sharded(folder, tensors, config)
    return sum(x.nbytes for x in tensors.values()) / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", required=True)
    parser.add_argument("--coordinates")
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--d_model", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=25000)
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(make, (args.folder / "tiny", 1, 64, 100))
        size = pool.apply(make, (args.folder / "source", args.depth, args.d_model, args.vocab))
    convert_run.COMPARED_BYTES = 0
    with contextlib.redirect_stdout(sys.stderr):
        import_checkpoint(args.folder / "tiny", args.folder / "tiny_run", args.to, coordinates=args.coordinates)
        begin, cpu = time.perf_counter(), time.process_time()
        with Watched() as memory:
            import_checkpoint(args.folder / "source", args.folder / "run", args.to, coordinates=args.coordinates)
    result = {"source_mb": size, "seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
    print(json.dumps(result | {"before_mb": memory.before, "peak_mb": memory.peak}))
