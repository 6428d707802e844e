"""How far each variant of one network is from float64, on given inputs: what `numerics` measures of a run.

The truth is Pre-LN's function in float64 of the checkpoint's parameters as they are. Every variant's parameters are
converted from them in float64 and rounded once. Then two things are measured apart:

    computed   in a dtype, from parameters in float32, as training and inference do
    stored     parameters rounded to the dtype, and all else in float64: what that rounding alone costs

Gradients are those of the loss by Pre-LN's parameters: a variant's go through the derivative of h, as `pre_ln` trains.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError
from prenorm_jax.base.trees import Path
from prenorm_jax.bench.contenders import CONTENDERS
from prenorm_jax.config import data_kind
from prenorm_jax.data import Data
from prenorm_jax.data.augment import Examples
from prenorm_jax.equivalence.choice import Choice, coordinate_choices, with_choice
from prenorm_jax.equivalence.convert import convert_config, convert_params
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.norms import Norm
from prenorm_jax.models.registry import build_model, model_config
from prenorm_jax.models.stacking import stack_blocks, unstack_blocks
from prenorm_jax.train.loss import cross_entropy

DTYPES = ("float32", "bfloat16", "float16")
TOKENS = 2048  # of the stream, that are measured on by default
PAPERS, CHOSEN = "the paper's", "chosen"  # roles of coordinates
LARGEST = 3  # channels that are named at each norm

Params = dict[str, Any]
Report = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One form of a network.

    Attributes:
      name: in tables.
      norm: of the model.
      pre_ln: the Pre-LN network, with the coordinates that its crmsnorm is to have.
      norms: entered while the model is traced.
    """

    name: str
    norm: str
    pre_ln: ModelConfig
    norms: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    def config(self, dtype: str, param_dtype: str) -> ModelConfig:
        """Its model, in these dtypes."""
        own = self.pre_ln if self.norm == "layernorm" else convert_config(self.pre_ln, self.norm)
        return dataclasses.replace(own, dtype=dtype, param_dtype=param_dtype)

    def params(self, theta: Params) -> Params:
        """h: its parameters from Pre-LN's."""
        return theta if self.norm == "layernorm" else convert_params(theta, self.pre_ln, self.norm)


class Found(NamedTuple):
    """Loss, a scalar; logits (..., V); the loss's gradient by Pre-LN's parameters."""

    loss: jax.Array
    logits: jax.Array
    gradients: Params


def first_examples(config: ConfigDict, data: Data, rows: int | None = None) -> tuple[Examples, str]:
    """The first so many of the held-out split (None: some TOKENS tokens), on the host, and what they are in words.

    Raises PrenormError if none of them can be read.
    """
    kind, config = data_kind(config), config.copy_and_resolve_references()
    length = kind.length(config)
    config.batch_size = rows or -(-TOKENS // model_config(config.model).tokens(length))
    with jax.enable_x64(False):  # the very numbers that training and evaluation are given
        examples = jax.device_get(kind.examples(config, next(iter(data.eval_batches(config)))))
    there = np.asarray(examples.weights).reshape(config.batch_size, -1).any(1)  # what a last batch lacks weighs nothing
    if not there.any():
        raise PrenormError(f"none of the first {config.batch_size} held-out examples can be read: take more --rows")
    what = f"sequences of {length} tokens" if length else f"{kind.unit}s"
    return Examples(*(array[there] for array in examples)), f"the first {there.sum():,} {what} of the held-out split"


def measure(
    params: Params,
    config: ModelConfig,
    examples: Examples,
    dtypes: Iterable[str] = DTYPES,
    own: tuple[str, int | None] | None = None,
) -> Report:
    """Streams, choices of coordinates, and the errors of all variants.

    Args:
      params: the tree that `config` describes, of any norm.
      config: the model's. Dropout is off.
      examples: the model's inputs and targets. Those of weight 0 count in no error.
      dtypes: of the computation and of storage.
      own: coordinates that are measured too, kind and entry: the run's.

    Returns:
      {sites, sizes, variants, coordinates, errors}, as docs/numerics.md says. None stands for what is not finite.

    Raises PrenormError for a network without an equivalent of each norm, and for one that is not finite itself.
    """
    with jax.enable_x64(True):
        theta, pre_ln = pre_ln_form(params, config)
        convert_config(pre_ln, "crmsnorm")  # refuses a network without it before anything is computed
        say("the stream at each norm")
        sites, sizes = streams(theta, pre_ln, examples.inputs)
        if not np.isfinite(sizes).all():
            raise PrenormError(
                "Pre-LN itself is not finite in float64 on these inputs: nothing can be compared with it"
            )
        if len(sites) != 2 * pre_ln.depth + 1:  # one norm for two branches, or none before the head
            sizes = np.sqrt((sizes**2).mean(0))
        roles = places(coordinate_choices(theta, pre_ln, sizes), pre_ln.d_model - 1, own)
        variants = list_variants(pre_ln, roles)
        return {
            "sites": sites,
            "sizes": sizes.tolist(),
            "variants": [variant.name for variant in variants],
            "coordinates": [
                {"variant": choice_name(choice), "roles": names, **choice._asdict()} for choice, names in roles.items()
            ],
            "errors": errors(variants, theta, examples, dtypes),
        }


def pre_ln_form(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """The float64 parameters of the equivalent Pre-LN network, and its config. In 64-bit mode. Raises PrenormError.

    Blocks are stacked: there are some twenty programs to compile, and so they take no longer for more blocks.
    """
    pre_ln = config
    if config.norm != "layernorm":
        pre_ln = convert_config(config, "layernorm")
        convert_params(params, config, "layernorm")  # refuses what has none, by the spacing of the stored dtype
    theta = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    if config.norm != "layernorm":
        theta = jax.jit(lambda tree: convert_params(tree, config, "layernorm"))(theta)
    theta = jax.device_get(theta if config.scan else stack_blocks(theta))
    stacked = {"scan": True, "stochastic_depth": 0.0}  # which differs by block, and is of training alone
    return theta, dataclasses.replace(pre_ln, **stacked, dtype="float64", param_dtype="float64")


def places(choices: list[Choice], last: int, own: tuple[str, int | None] | None = None) -> dict[Choice, list[str]]:
    """The choices of coordinates that are spoken of -> what each of them is. `last`: the last entry."""
    by_place = {choice[:2]: choice for choice in choices}
    wanted = {
        PAPERS: ("drop", last),
        "the best to drop": next(choice for choice in choices if choice.kind == "drop")[:2],
        "the last reflected": ("reflect", last),
        CHOSEN: choices[0][:2],
    }
    if own is not None:
        wanted["the run's own"] = own[0], last if own[1] is None else own[1]
    roles: dict[Choice, list[str]] = {}
    for role, place in wanted.items():
        roles.setdefault(by_place.get(place, Choice(*place, None)), []).append(role)
    return roles


def list_variants(pre_ln: ModelConfig, roles: Mapping[Choice, list[str]]) -> list[Variant]:
    """All that are measured, Pre-LN first; of coordinates those of any role but of the best to drop alone."""
    one_pass = CONTENDERS["flax-one-pass"].norms
    found = [
        Variant("layernorm", "layernorm", pre_ln),
        Variant("layernorm one-pass", "layernorm", pre_ln, norms=one_pass),
        Variant("rmsnorm", "rmsnorm", pre_ln),
    ]
    for choice, names in roles.items():
        if names != ["the best to drop"]:
            found.append(Variant(choice_name(choice), "crmsnorm", with_choice(pre_ln, choice)))
    return found


def choice_name(choice: Choice) -> str:
    """Of the variant with these coordinates."""
    return f"crmsnorm {choice.kind} {choice.entry}"


# --- The stream. ---


def streams(theta: Params, pre_ln: ModelConfig, inputs: Any) -> tuple[list[Report], np.ndarray]:
    """What each norm is given, in the order of the computation, and (norms, d) sizes of the entries.

    Sizes are root mean squares of the normalised entries without affine, over tokens: it is they that are multiplied
    with the readers' weights.
    """
    params, order = unstack_blocks(theta), []
    found = jax.device_get(jax.jit(lambda params: _at_norms(pre_ln, params, inputs, order))(params))
    flat, sites = flatten_dict(params), []
    for path in dict.fromkeys(order):
        scale = flat.get((*path, "scale"), flat.get(("head_affine", "scale")) if path == ("head_norm",) else None)
        sites.append({"site": "/".join(path)} | _describe(found["/".join(path)], scale))
    squares = np.stack([found["/".join(path)]["normed_squares"] for path in dict.fromkeys(order)])
    return sites, np.sqrt(squares)


def _describe(values: Mapping[str, np.ndarray], scale: np.ndarray | None) -> Report:
    sizes, ratios = np.sqrt(values["squares"]), values["mean_over_std"]
    typical = float(np.median(sizes)) or 1.0
    largest = np.argsort(sizes)[::-1][:LARGEST]
    return {
        "mean_over_std": {"median": float(np.median(ratios)), "largest": float(ratios.max())},
        "channels": [
            {"entry": int(k), "over_median": float(sizes[k] / typical)}
            | ({} if scale is None else {"scale": float(scale[k])})
            for k in largest
        ],
        "scale": None if scale is None else {"least": float(scale.min()), "largest": float(scale.max())},
    }


def _at_norms(pre_ln: ModelConfig, params: Params, inputs: Any, order: list[Path]) -> dict[str, dict[str, jax.Array]]:
    """Of each norm on the stream: |mean|/std of each token, mean squares of the centred entries and the normalised.

    Blocks are unrolled, so that each norm is one of its own. `order` gets the norms' paths as they are computed.
    """
    found: dict[str, dict[str, jax.Array]] = {}

    def record(call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        # Norms of other values, such as queries and keys, have their affine on another axis.
        if isinstance(module, Norm) and module.axis == "norm" and context.method_name in ("__call__", "for_readers"):
            order.append(module.path)
            found["/".join(module.path)] = _statistics(args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(record):
        build_model(dataclasses.replace(pre_ln, scan=False)).apply({"params": params}, inputs)
    return found


def _statistics(x: jax.Array) -> dict[str, jax.Array]:
    x_NxD = x.reshape(-1, x.shape[-1])
    mean_Nx1 = x_NxD.mean(-1, keepdims=True)
    z_NxD = x_NxD - mean_Nx1
    std_Nx1 = jnp.maximum(jnp.sqrt((z_NxD**2).mean(-1, keepdims=True)), jnp.finfo(x.dtype).tiny)
    squares = {"squares": (z_NxD**2).mean(0), "normed_squares": ((z_NxD / std_Nx1) ** 2).mean(0)}
    return squares | {"mean_over_std": (jnp.abs(mean_Nx1) / std_Nx1)[:, 0]}


# --- Errors. ---


def errors(variants: list[Variant], theta: Params, examples: Examples, dtypes: Iterable[str]) -> list[Report]:
    """A row for each variant and dtype, computed and stored: see `_error`."""
    dtypes, rows = list(dtypes), []
    truth = None
    for variant in variants:
        say(f"{variant.name}: {', '.join(dtypes)}")
        params = jax.device_get(variant.params(theta))
        for how, dtype, found in _runs(variant, theta, params, examples, dtypes):
            if truth is None:
                truth = found
            else:
                rows.append({"variant": variant.name, "how": how, "dtype": dtype} | _error(found, truth, examples))
    return rows


def _runs(
    variant: Variant, theta: Params, params: Params, examples: Examples, dtypes: list[str]
) -> Iterable[tuple[str, str, Found]]:
    """(how, dtype, what is found) of each. Of Pre-LN first the truth."""
    exact = None
    if variant.norms is contextlib.nullcontext:  # others have the parameters of one of these
        exact = program(variant, "float64", "float64")
        if variant.norm == "layernorm":
            yield "truth", "float64", exact(theta, params, examples)
    for dtype in dtypes:
        if exact is not None:
            yield "stored", dtype, exact(theta, _rounded(params, dtype), examples)
    for dtype in dtypes:
        narrow = (jax.tree.map(lambda x: np.asarray(x, np.float32), tree) for tree in (theta, params))
        yield "computed", dtype, program(variant, dtype, "float32")(*narrow, examples)


def _rounded(params: Params, dtype: str) -> Params:
    with np.errstate(over="ignore"):  # what is above the dtype's largest number is inf, and the errors say so
        return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)).astype(np.float64), params)


def program(variant: Variant, dtype: str, param_dtype: str) -> Callable[[Params, Params, Examples], Found]:
    """(Pre-LN's parameters, the variant's, examples) -> what is found. Parameters in `param_dtype`; on the host."""
    model = build_model(variant.config(dtype, param_dtype))
    # In float64 there is room for rounding: there a program need not be quick.
    options = {"xla_backend_optimization_level": 0} if dtype == "float64" else None

    @functools.partial(jax.jit, compiler_options=options)
    def find(theta: Params, params: Params, examples: Examples) -> Found:
        def loss(params: Params) -> tuple[jax.Array, jax.Array]:
            logits = model.apply({"params": params}, examples.inputs)
            return (cross_entropy(logits, examples.targets) * examples.weights).sum() / examples.weights.sum(), logits

        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return Found(value, logits, jax.vjp(variant.params, theta)[1](gradients)[0])

    def call(*arguments: Any) -> Found:
        with variant.norms():
            return jax.device_get(find(*arguments))

    return call


def _error(found: Found, truth: Found, examples: Examples) -> Report:
    """Relative errors of logits and gradients, ‖a - b‖/‖b‖ over all of them, and |a - b| of the loss, in nats.

    And how many logits, and entries of the gradient, are not finite: then there is no error.
    """
    counted = np.asarray(examples.weights) > 0
    pairs = {"logits": [(found.logits[counted], truth.logits[counted])]}
    gradients = flatten_dict(found.gradients)
    pairs["gradients"] = [(gradients[path], leaf) for path, leaf in flatten_dict(truth.gradients).items()]
    row: Report = {name: _relative(both) for name, both in pairs.items()}
    loss = abs(float(found.loss) - float(truth.loss))
    row["loss"] = loss if np.isfinite(loss) else None
    for name, both in pairs.items():
        row[f"{name}_not_finite"] = sum(int((~np.isfinite(_wide(actual))).sum()) for actual, _ in both)
        row[f"{name}_count"] = sum(expected.size for _, expected in both)
    return row


def _relative(pairs: list[tuple[np.ndarray, np.ndarray]]) -> float | None:
    with np.errstate(invalid="ignore"):
        off = sum(((_wide(actual) - expected) ** 2).sum() for actual, expected in pairs)
        error = np.sqrt(off / sum((expected**2).sum() for _, expected in pairs))
    return float(error) if np.isfinite(error) else None


def _wide(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)
