"""Loss over every token of the held-out split, and the body of `eval.py`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from prenorm_jax.checkpoint import Checkpoints
from prenorm_jax.conversion import convert_config, convert_params
from prenorm_jax.data.batches import eval_batches
from prenorm_jax.data.text import TextData, load_text
from prenorm_jax.sharding import make_mesh, replicated, split_batch
from prenorm_jax.step import make_eval_step
from prenorm_jax.workdir import configure_jax, load_config


def evaluate(
    eval_step: Callable[..., Any], params: Any, data: TextData, config: ConfigDict, sharding: jax.sharding.Sharding
) -> dict[str, float]:
    """{eval_loss (nats per token), eval_perplexity, eval_bits_per_byte (of the text), eval_tokens}.

    Every token of the split counts once, whatever the batch size.
    """
    sums = []
    for batch in eval_batches(data.eval, config.batch_size, config.data.seq_len):
        sums.append(eval_step(params, jax.device_put(batch, sharding)))
    nats, tokens = np.asarray(jax.device_get(sums), np.float64).sum(0)
    return {
        "eval_loss": nats / tokens,
        "eval_perplexity": float(np.exp(nats / tokens)),
        "eval_bits_per_byte": nats / math.log(2) / data.eval_bytes,
        "eval_tokens": int(tokens),
    }


def main() -> None:
    """Parses the command line of `eval.py`, evaluates, prints. Raises PrenormError."""
    parser = argparse.ArgumentParser(description="Loss of a checkpoint on the whole held-out split.")
    parser.add_argument("--workdir", required=True, help="folder of a run, or of a converted checkpoint")
    parser.add_argument("--norm", help="layernorm, rmsnorm or crmsnorm: convert first (default: the run's own)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the latest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()

    config = load_config(args.workdir)
    configure_jax(config)
    mesh = make_mesh(config.batch_size)
    with Checkpoints(args.workdir, read_only=True) as checkpoints:
        step = checkpoints.resolve(args.step)
        model, params = checkpoints.params(step)
    norm = args.norm or config.model.norm
    if norm != model.norm:
        params = convert_params(params, model, to=norm)
        model = convert_config(model, to=norm)
    data = load_text(config.data)
    params = jax.device_put(params, replicated(mesh))
    result = evaluate(make_eval_step(model, mesh), params, data, config, split_batch(mesh))

    if args.json:
        print(json.dumps({"workdir": args.workdir, "step": step, "norm": norm, **result}))
        return
    print(f"{args.workdir} at step {step} as {norm}: {result['eval_tokens']:,} tokens of the held-out split")
    print(
        f"loss {result['eval_loss']:.7f} nats per token   perplexity {result['eval_perplexity']:.5f}   "
        f"bits per byte {result['eval_bits_per_byte']:.6f}"
    )
