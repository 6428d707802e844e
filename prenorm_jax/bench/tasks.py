"""What `benchmark` times, and what it has compiled for TPUs that are not there: one program for each task."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.bench.contenders import CONTENDERS, Contender
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.decoding import as_read, decode_step, prefill
from prenorm_jax.models.placement import computing_on
from prenorm_jax.models.registry import build_model
from prenorm_jax.train.run import Run
from prenorm_jax.train.sharding import replicated
from prenorm_jax.train.step import init_params, init_state, make_eval_step, make_train_step

TASKS = {  # name -> what it is
    "step": "training step",
    "forward": "forward pass",
    "prefill": "reading of a prompt into the cache",
    "decode": "one token after half a sequence of them",
    "h": "the conversion h and its derivative alone",
}
SPLIT = ("step", "forward")  # among the devices of a mesh; of the others each device does all


class Task(NamedTuple):
    """A jitted function of some arguments and then a batch.

    Attributes:
      function: the first of its results takes the place of argument number `carried`, if that is not None.
      arguments: makes all but the batch.
      carried: see function.
      contender: whose norms there are while either is traced.
    """

    function: Callable[..., Any]
    arguments: Callable[[], tuple]
    carried: int | None
    contender: Contender

    def make_arguments(self) -> tuple:
        """The arguments, as arrays."""
        with self.contender.norms():
            return jax.jit(self.arguments)()

    def compile(self, batch: Any) -> jax.stages.Compiled:
        """The program for batches like this one, which may be abstract. No array is made."""
        with self.contender.norms():
            return self.function.lower(*jax.eval_shape(self.arguments), batch).compile()


def contenders_of(task: str, names: list[str]) -> list[str]:
    """Those of the contenders that have the task: without Pre-LN parameters there is no h. Raises PrenormError."""
    having = [name for name in names if task != "h" or CONTENDERS[name].parameterization == "pre_ln"]
    if not having:
        able = ", ".join(name for name, contender in CONTENDERS.items() if contender.parameterization == "pre_ln")
        raise PrenormError(f"--task=h: none of {', '.join(names)} converts anything: name some of {able} in --only")
    return having


def make_task(name: str, contender: Contender, config: ConfigDict, mesh: Mesh) -> Task:
    """The task for one contender. Raises PrenormError for an unknown one, or one of texts for a model of images."""
    check_choice("--task", name, tuple(TASKS))
    run = Run.create(contender.config(config), mesh)
    if name == "step":
        return Task(make_train_step(run), lambda: (init_state(run),), 0, contender)
    if name == "forward":
        function, carried = make_eval_step(run), None
    elif name == "h":
        function, carried = _jit(_conversion(run), mesh), None
    else:
        if not run.computed.causal:
            raise PrenormError(f"--task={name} needs a model of text, such as --model=gpt:6x384")
        function = _generation(name, run.computed, config.data.seq_len, mesh)
        carried = None if name == "prefill" else 1

    def arguments() -> tuple:
        trained = init_params(run)
        params = run.computed_params(trained)
        if name == "h":
            return trained, params
        params = as_read(params, run.computed)
        if carried is None:
            return (params,)
        B, length = config.batch_size, config.data.seq_len
        cache = prefill.__wrapped__(build_model(run.computed), params, jnp.zeros((B, 1), jnp.int32), length)[1]
        return params, cache, jnp.asarray(length // 2), jax.random.split(jax.random.key(0), B)

    return Task(function, arguments, carried, contender)


def _jit(function: Callable[..., Any], mesh: Mesh, **options: Any) -> Callable[..., Any]:
    """The function, all of which every device of the mesh computes."""
    return jax.jit(computing_on(mesh)(function), in_shardings=replicated(mesh), **options)


def _conversion(run: Run) -> Callable[..., Any]:
    def conversion(params: Any, gradients: Any, batch: Any) -> Any:
        computed, pull_back = jax.vjp(run.computed_params, params)
        return computed, pull_back(gradients)

    return conversion


def _generation(name: str, model_config: ModelConfig, length: int, mesh: Mesh) -> Callable[..., Any]:
    # Functions of their own: those of `generate`, being jitted, would remember what they traced with another norm.
    model = build_model(model_config)
    if name == "prefill":
        return _jit(lambda params, batch: prefill.__wrapped__(model, params, batch["tokens"][:, :length], length), mesh)

    def step(params: Any, cache: Any, position: jax.Array, keys_B: jax.Array, batch: Any) -> Any:
        chosen_B, cache = decode_step.__wrapped__(model, params, cache, batch["tokens"][:, 0], position, keys_B)
        return cache, chosen_B

    return _jit(step, mesh, donate_argnums=1)
