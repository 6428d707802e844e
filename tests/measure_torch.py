"""Our GPT beside PyTorch's, with `pip install torch transformers`.

    PYTHONPATH=. python tests/measure_torch.py --model=gpt:6x384

Training steps (AdamW, clipping) and forward passes with the loss, in one process and in turn, of a GPT-2 of the
`transformers` library and of ours of the same shape, on the same CPU, float32. Both allocate from the same C library,
which keeps freed memory (`allocator.py`).
"""

import argparse
import os

import jax
import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from prenorm_jax.benchmark import measure, prepare, ratios, real_batch
from prenorm_jax.contenders import CONTENDERS, Setting
from prenorm_jax.sharding import make_mesh
from prenorm_jax.tasks import make_task
from prenorm_jax.workdir import configure_jax

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--model", default="gpt:6x384")
parser.add_argument("--rounds", type=int, default=20)
parser.add_argument("--only", default="layernorm-folded,flax-one-pass,rmsnorm,crmsnorm")
args = parser.parse_args()

setting = Setting(args.model, batch=8, length=256, dtype="float32")
config = setting.run_config()
configure_jax(config)
batch = real_batch(config)
m = config.model
torch.set_num_threads(os.cpu_count())
shape = {"n_embd": m.d_model, "n_layer": m.depth, "n_head": m.heads, "n_positions": setting.length}
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=m.vocab_size, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, use_cache=False, **shape)
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
tokens = torch.from_numpy(batch["tokens"][:, :-1].astype(np.int64))


def torch_step():
    optimizer.zero_grad()
    model(tokens, labels=tokens).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def torch_forward():
    with torch.no_grad():
        model(tokens, labels=tokens)


print(f"torch {torch.__version__}, {sum(p.numel() for p in model.parameters()):,} parameters; jax {jax.__version__}")
for task, torch_call in (("step", torch_step), ("forward", torch_forward)):
    calls = {"torch": torch_call}
    for name in args.only.split(","):
        calls[name] = prepare(make_task(task, CONTENDERS[name], config, make_mesh(config)), batch)[0]
    seconds = measure(calls, args.rounds)
    for name, row in ratios(seconds, "torch").items():
        low, high = row["quiet_interval"]
        print(
            f"{task:8s} {name:18s} median {1e3 * np.median(seconds[name]):6.0f} ms, of torch's: {row['ratio']:.3f} "
            f"by rounds, {row['quiet_ratio']:.3f} [{low:.3f}, {high:.3f}] undisturbed"
        )
