"""Checkpoints as other libraries write them, made by NumPy: what needs no such library is tested with these."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prenorm_jax.interop.safetensors import NAMES, Entry, Header, create_file

GPT2 = {"model_type": "gpt2", "vocab_size": 11, "n_positions": 7, "n_embd": 12, "n_layer": 1, "n_head": 3}


def gpt2_shapes(d: int = 12, vocabulary: int = 11, positions: int = 7, depth: int = 1) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor of a GPT-2, as transformers names it; with the mask that old files have."""
    shapes: dict[str, tuple[int, ...]] = {"wte.weight": (vocabulary, d), "wpe.weight": (positions, d)}
    norm, linear = {"weight": (d,), "bias": (d,)}, lambda n, m: {"weight": (n, m), "bias": (m,)}
    block = {"ln_1": norm, "attn.c_attn": linear(d, 3 * d), "attn.c_proj": linear(d, d), "ln_2": norm}
    block |= {"mlp.c_fc": linear(d, 4 * d), "mlp.c_proj": linear(4 * d, d)}
    for i in range(depth):
        shapes |= {f"h.{i}.{name}.{leaf}": shape for name, leaves in block.items() for leaf, shape in leaves.items()}
        shapes[f"h.{i}.attn.bias"] = (1, 1, positions, positions)
    shapes |= {f"ln_f.{leaf}": shape for leaf, shape in norm.items()}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def random_tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """float32, of activations of size 1; masks are of bytes, as they are."""
    rng = np.random.default_rng(seed)
    return {
        name: np.tril(np.ones(shape, np.uint8))
        if len(shape) == 4 and name.endswith("attn.bias")
        else rng.normal(size=shape).astype(np.float32) / np.float32(shape[0] ** 0.5 if len(shape) == 2 else 1)
        for name, shape in shapes.items()
    }


def write(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Path:
    """A folder with config.json and model.safetensors; the path of the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    header = Header({name: Entry(NAMES[array.dtype], array.shape) for name, array in tensors.items()}, {"format": "pt"})
    for name, place in create_file(folder / "model.safetensors", header).items():
        place[...] = tensors[name]
    return folder / "model.safetensors"


def write_sharded(folder: Path, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> None:
    """The same in two files with an index."""
    weight_map = {}
    for i, names in enumerate((list(tensors)[::2], list(tensors)[1::2]), 1):
        path = write(folder, {name: tensors[name] for name in names}, config)
        path.rename(folder / f"model-0000{i}-of-00002.safetensors")
        weight_map |= dict.fromkeys(names, f"model-0000{i}-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
