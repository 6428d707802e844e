"""Attention's kernel and what XLA makes of ours, forward and backward: time, error, and whether two calls agree.

    PYTHONPATH=. python tests/measure_attention.py [BATCH LENGTH HEADS HEAD_DIM]

In bfloat16, causal; error: of the result and of the derivatives by queries, keys and values, relative to float32's, by
norms. Only a GPU that cuDNN serves has two kernels to compare.
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.models.attention import attend
from prenorm_jax.train.workdir import device_name

ROUNDS, CALLS = 40, 5  # calls in a round are not waited for one by one: each takes little longer than to be started

B, T, H, K = map(int, sys.argv[1:] or (8, 1024, 12, 64))
inputs = [jax.random.normal(key, (B, T, H, K), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3)]
cotangent = jax.random.normal(jax.random.key(1), (B, T, H * K), jnp.bfloat16)


def derive(kernel: str, *inputs: jax.Array) -> list[jax.Array]:
    value, pull_back = jax.vjp(lambda *qkv: attend(*qkv, True, kernel=kernel), *inputs)
    return [value, *pull_back(cotangent.astype(value.dtype))]


kernels = {kernel: jax.jit(lambda *qkv, kernel=kernel: derive(kernel, *qkv)) for kernel in ("auto", "xla")}
with jax.default_matmul_precision("highest"):
    exact = jax.jit(lambda *qkv: derive("xla", *qkv))(*(x.astype(jnp.float32) for x in inputs))
seconds = {kernel: [] for kernel in kernels}
for index in range(-2, ROUNDS):
    for kernel, call in kernels.items():
        start = time.perf_counter()
        for _ in range(CALLS):
            results = call(*inputs)
        jax.block_until_ready(results)
        if index >= 0:
            seconds[kernel].append((time.perf_counter() - start) / CALLS)

print(f"{device_name()}, jax {jax.__version__}: {B} × {T}, {H} heads of {K}, bfloat16, causal, forward and backward")
for kernel, call in kernels.items():
    first, second = ([np.asarray(x, np.float64) for x in call(*inputs)] for _ in range(2))
    errors = [np.linalg.norm(x - y) / np.linalg.norm(y) for x, y in zip(first, exact, strict=True)]
    low, median = (1e6 * np.quantile(seconds[kernel], share) for share in (0.1, 0.5))
    print(
        f"{kernel}: {median:.0f} us (undisturbed {low:.0f}); errors {', '.join(f'{error:.1e}' for error in errors)}; "
        f"the same twice: {', '.join(str(np.array_equal(x, y)) for x, y in zip(first, second, strict=True))}"
    )
