"""What a checkpoint costs the training loop at the demo's size, as JSON.

    PYTHONPATH=. python tests/measure_saving.py FOLDER [ROUNDS]

share: of the time of 100 steps, what one save adds: the call, which copies the state, and the slower steps while it is
written in the background. Stretches of steps with and without a save take turns.
"""

import json
import statistics
import sys
import time

import jax

from configs.gpt_stdlib import get_config
from prenorm_jax.config import load_data
from prenorm_jax.train.checkpoint import Checkpoints
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import make_mesh
from prenorm_jax.train.step import init_state, make_train_step

STRETCH, ROUNDS = 8, int(sys.argv[2]) if len(sys.argv) > 2 else 6

config = get_config()
run, data = Run.create(config, make_mesh(config, jax.devices()[:1])), load_data(config.copy_and_resolve_references())
train_step = make_train_step(run)
state = jax.jit(lambda: init_state(run))()
state, _ = jax.block_until_ready(train_step(state, data.train_batch(config, 0)))

plain, calls, saving, complete = [], [], [], []
with Checkpoints(sys.argv[1], keep=2) as checkpoints:
    for number in range(2 * ROUNDS):
        begin = time.perf_counter()
        if number % 2:
            checkpoints.save(number, state.params, state.opt_state, run.trained)
            complete.append(number in checkpoints.steps())
            calls.append(time.perf_counter() - begin)
        for step in range(STRETCH):
            state, _ = jax.block_until_ready(train_step(state, data.train_batch(config, step)))
        (saving if number % 2 else plain).append(time.perf_counter() - begin)
        checkpoints.wait()

step_seconds = statistics.median(plain) / STRETCH
differences = [with_save - without for without, with_save in zip(plain, saving, strict=True)]
result = {
    "step_seconds": step_seconds,
    "save_call_seconds": statistics.median(calls),
    "added_seconds": statistics.median(differences),
    "added_seconds_all": sorted(differences),
    "share": statistics.median(differences) / (100 * step_seconds),
    "was_complete_on_return": all(complete),
}
print(json.dumps(result, indent=1))
