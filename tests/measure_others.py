"""Our models beside other people's, of the same shape, with `pip install torch transformers einops`.

    PYTHONPATH=. python tests/measure_others.py --model=gpt:6x384 --authors=pre-rmsnorm-transformer

Training steps (AdamW, clipping) and forward passes with the loss on the same CPU in float32, in one process and in
turn: PyTorch's GPT-2 in the `transformers` library; and the PyTorch and JAX models of the paper's authors, from a clone
of github.com/ZixuanJiang/pre-rmsnorm-transformer (their JAX GPT is not causal; their heads are not tied). All allocate
from the same C library, which keeps freed memory (`allocator.py`).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from prenorm_jax.bench.contenders import CONTENDERS, Setting
from prenorm_jax.bench.tasks import make_task
from prenorm_jax.bench.timing import measure, prepare, ratios
from prenorm_jax.config import data_kind
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.workdir import configure_jax

RATE, DECAY = 1e-4, 1e-2
Calls = dict[str, Callable[[], Any]]  # task -> does it once


def of_torch(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> Calls:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)

    def loss() -> torch.Tensor:
        result = model(inputs)
        logits = getattr(result, "logits", result)
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return {"step": step, "forward": torch.no_grad()(loss)}


def of_flax(model: Any, inputs: jax.Array, targets: jax.Array) -> Calls:
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, weight_decay=DECAY))

    def loss(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def update(params: Any, opt_state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.jit(model.init)(jax.random.key(0), inputs)["params"]
    state = [params, optimizer.init(params), None]
    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> jax.Array:
        state[:] = jitted(*state[:2])
        return state[2]

    forward = jax.jit(loss)
    return {"step": step, "forward": lambda: forward(state[0])}


def authors_module(repository: Path, kind: str) -> types.ModuleType:
    """`torch/model.py` or `jax/model.py` of the clone. Of NVIDIA's apex, which it imports, a CPU needs nothing."""
    apex = types.ModuleType("apex.normalization")
    apex.FusedLayerNorm, apex.FusedRMSNorm = torch.nn.LayerNorm, torch.nn.RMSNorm
    sys.modules |= {"apex": types.ModuleType("apex"), "apex.normalization": apex}
    sys.path.insert(0, str(repository / kind))
    spec = importlib.util.spec_from_file_location(f"authors_{kind}", repository / kind / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


def authors_model(module: types.ModuleType, m: ModelConfig, length: int, method: str) -> Any:
    if m.family == "vit":
        shape = (m.image_size, m.patch_size, m.classes, m.d_model, m.depth, m.heads, m.mlp_dim)
        return module.ViT(*shape, dim_head=m.head_dim, method=method)
    return module.GPT(m.vocab_size, length, m.d_model, m.depth, m.heads, m.mlp_dim, m.head_dim, method=method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt:6x384")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", default="layernorm-folded,flax-one-pass,rmsnorm,crmsnorm", help="of ours")
    parser.add_argument("--authors", type=Path, help="folder of the clone")
    parser.add_argument("--methods", default="pre-ln,pre-rms,pre-crms", help="of theirs")
    args = parser.parse_args()

    torch.set_num_threads(os.cpu_count())
    setting = Setting(args.model, args.batch, args.length, dtype="float32")
    config = setting.run_config()
    configure_jax(config)
    batch, mesh = data_kind(config).sample(config), make_mesh(config)
    m = model_config(config.model)
    plain = m.heads * m.head_dim == m.d_model and m.mlp_dim == 4 * m.d_model
    if m.parallel or m.qk_norm or (m.family == "gpt" and not plain):
        parser.error(f"--model={args.model}: the others have no such model")
    if m.family == "gpt":
        inputs, targets = batch["tokens"][:, :-1].astype(np.int64), batch["tokens"][:, 1:].astype(np.int64)
        torch_inputs = torch.from_numpy(inputs)
    else:
        inputs, targets = batch["images"].astype(np.float32) / 255, batch["labels"].astype(np.int64)
        torch_inputs = torch.from_numpy(inputs).permute(0, 3, 1, 2).contiguous()

    others: dict[str, Calls] = {}
    if m.family == "gpt":
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_embd": m.d_model, "n_layer": m.depth, "n_head": m.heads, "n_positions": args.length}
        off = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "use_cache": False}
        gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=m.vocab_size, **sizes, **off))
        others["transformers"] = of_torch(gpt2, torch_inputs, torch.from_numpy(targets))
    if args.authors:
        in_torch, in_jax = (authors_module(args.authors, kind) for kind in ("torch", "jax"))
        for method in args.methods.split(","):
            theirs = authors_model(in_torch, m, args.length, method)
            others[f"authors' torch {method}"] = of_torch(theirs, torch_inputs, torch.from_numpy(targets))
            theirs = authors_model(in_jax, m, args.length, method)
            others[f"authors' jax {method}"] = of_flax(theirs, jnp.asarray(inputs), jnp.asarray(targets))

    print(f"{args.model}, {args.batch} × {args.length}; torch {torch.__version__}, jax {jax.__version__}")
    for task in ("step", "forward"):
        calls = {name: call[task] for name, call in others.items()}
        ours = args.only.split(",")
        for name in ours:
            calls[name] = prepare(make_task(task, CONTENDERS[name], config, mesh), batch)[0]
        seconds = measure(calls, args.rounds)
        for base in others:
            rows = ratios({name: seconds[name] for name in (base, *ours)}, base)
            print(f"{task}: {base} {1e3 * np.median(seconds[base]):.0f} ms; of it, undisturbed:", end="")
            for name in ours:
                low, high = rows[name]["quiet_interval"]
                print(f"  {name} {rows[name]['quiet_ratio']:.3f} [{low:.3f}, {high:.3f}]", end="")
            print(flush=True)


if __name__ == "__main__":
    main()
