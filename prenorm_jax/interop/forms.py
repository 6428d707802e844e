"""One function in several forms and dtypes: each form evaluated on probes, and how far apart two are."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.equivalence.convert import convert_config, convert_params
from prenorm_jax.equivalence.fit import fit_params
from prenorm_jax.equivalence.roles import parameter_roles
from prenorm_jax.equivalence.rules import center_heads
from prenorm_jax.interop.probe_inputs import Probe
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.coordinates import center, coordinates
from prenorm_jax.models.norms import Norm
from prenorm_jax.models.registry import build_model
from prenorm_jax.models.stacking import unstack_blocks


class Form(NamedTuple):
    """A model and its parameters, NumPy arrays, blocks unrolled."""

    config: ModelConfig
    params: Any

    def cast(self, dtype: str) -> "Form":
        """In this dtype, parameters and arithmetic."""
        config = dataclasses.replace(self.config, dtype=dtype, param_dtype=dtype)
        return Form(config, jax.tree.map(lambda x: np.asarray(x).astype(dtype, copy=False), self.params))


def form_of(config: ModelConfig, params: Any) -> Form:
    """Of a tree of JAX or NumPy arrays."""
    if config.scan:
        config, params = dataclasses.replace(config, scan=False), unstack_blocks(params)
    return Form(config, jax.tree.map(np.asarray, params))


class Evaluated(NamedTuple):
    """What a form gives.

    Attributes:
      outputs: (probes, positions, V), float64.
      means: norm on the stream -> the largest |mean| of what it is given, and the root mean square, over all tokens.
    """

    outputs: np.ndarray
    means: dict[str, tuple[float, float]]


def evaluate(form: Form, probes: Sequence[Probe], positions: np.ndarray) -> Evaluated:
    """The form on the probes, one after the other. To be called in JAX's 64-bit mode."""
    run, found = _program(form.config), []
    params, at = jax.tree.map(jnp.asarray, form.params), jnp.asarray(positions)
    for probe in probes:
        found.append(jax.tree.map(lambda x: np.asarray(x).astype(np.float64), run(params, probe.inputs, at)))
    sites = {
        site: (max(float(given[site][0]) for _, given in found), max(float(given[site][1]) for _, given in found))
        for site in found[0][1]
    }
    return Evaluated(np.stack([outputs for outputs, _ in found]), sites)


@functools.lru_cache(maxsize=8)
def _program(config: ModelConfig) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """(parameters, inputs, positions) -> the outputs there, and what each norm on the stream is given, as `means`."""

    @jax.jit
    def run(params: Any, inputs: jax.Array, at: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        given: dict[str, jax.Array] = {}
        with nn.intercept_methods(_watching(config, given)):
            logits = build_model(config).apply({"params": params}, inputs)
        return (logits[0][at] if config.token_outputs else logits), given

    return run


def _watching(config: ModelConfig, given: dict[str, jax.Array]) -> Callable[..., Any]:
    """An interceptor of Flax that notes what each norm on the stream is given: (largest |mean|, root mean square)."""

    def watch(function: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module, name = context.module, context.method_name
        if name == "_normalise":  # of a block: its norm may have been computed with the stream
            _note("/".join((*module.path, args[0])), args[1].x)
        elif isinstance(module, Norm) and module.axis == "norm" and name in ("__call__", "for_readers"):
            _note("/".join(module.path), args[0])
        return function(*args, **kwargs)

    def _note(site: str, x: jax.Array) -> None:
        wide = coordinates(config).leave(x.astype(jnp.float64))
        given[site] = jnp.stack([jnp.abs(wide.mean(-1)).max(), jnp.sqrt(jnp.square(wide).mean())])

    return watch


def difference(actual: np.ndarray, expected: np.ndarray) -> dict[str, float | None]:
    """Of outputs (..., V), in float64: Δ = actual - expected.

    max, mean: of |Δ|. relative, mean_relative: over the largest, and the mean, |expected|. argmax_changed: share of
    positions. All None where not all numbers are finite.
    """
    delta, size = np.abs(actual - expected), np.abs(expected)
    changed = float((actual.argmax(-1) != expected.argmax(-1)).mean())
    found = {"max": delta.max(), "mean": delta.mean(), "relative": delta.max() / size.max()}
    found |= {"mean_relative": delta.mean() / size.mean(), "argmax_changed": changed}
    finite = np.isfinite(delta).all()
    return {key: float(value) if finite else None for key, value in found.items()}


def pre_ln(form: Form) -> Form:
    """The Pre-LN network of a form in float64: itself, or by conversion."""
    config, params = form
    if config.norm == "layernorm":
        return form
    if config.norm == "rmsnorm":  # whose narrower dtype has left means that float64 could see
        roles, flat = parameter_roles(config), flatten_dict(params)
        flat = {path: x if roles[path].writes is None else center(x, roles[path].writes) for path, x in flat.items()}
        params = unflatten_dict(center_heads(flat, roles))
    return form_of(convert_config(config, "layernorm"), convert_params(params, config, "layernorm"))


def converted(source: Form, like: ModelConfig) -> Form:
    """A Pre-LN form as the tree that `like` describes, of whatever norm, with affines folded or not.

    Raises PrenormError for a network of another function.
    """
    config = dataclasses.replace(like, dtype=source.config.dtype, param_dtype=source.config.param_dtype)
    kept = like.norm == "rmsnorm" and like.norm_affine
    if kept or (like.norm == "layernorm" and param_shapes(config) != param_shapes(source.config)):
        source = _by_way_of(source, "rmsnorm", keep_affine=kept)
    if like.norm == "layernorm" != source.config.norm:  # what was converted there and back
        source = _by_way_of(source, "layernorm")
    return form_of(config, fit_params(source.params, source.config, config))


def _by_way_of(form: Form, norm: str, keep_affine: bool = False) -> Form:
    params = convert_params(form.params, form.config, norm, keep_affine)
    return form_of(convert_config(form.config, norm, keep_affine), params)


def swapped(source: Form) -> Form:
    """The negative control: the Pre-LN form's norms called RMSNorms, and nothing recentred."""
    return Form(dataclasses.replace(source.config, norm="rmsnorm"), source.params)


def same_leaves(stored: Form, exact: Form) -> tuple[int, int]:
    """How many of the stored leaves are those of the exact form, rounded to their dtype, bit for bit; of how many."""
    flat, other = flatten_dict(stored.params), flatten_dict(exact.params)
    same = [np.array_equal(x, other[path].astype(x.dtype)) for path, x in flat.items()]
    return sum(same), len(same)


def sha256_of(params: Mapping[str, Any]) -> str:
    """Of every leaf's name, dtype, shape and bytes, by name: the same wherever and however the tree is stored."""
    found = hashlib.sha256()
    for path, x in sorted(flatten_dict(dict(params)).items()):
        found.update(f"{'/'.join(path)} {x.dtype.name} {list(x.shape)}\n".encode())
        found.update(np.ascontiguousarray(x).tobytes())
    return found.hexdigest()


def check_comparable(result: ModelConfig, source: ModelConfig) -> None:
    """Raises PrenormError unless both take the same inputs and give outputs of one shape."""
    keys = ("vocab_size",) if source.inputs == "text" else ("image_size", "channels", "classes")
    for key in ("family", *keys):
        one, two = (getattr(config, key, None) for config in (result, source))
        if one != two:
            raise PrenormError(f"the workdir has model.{key}={one!r}, the source {two!r}: name the source it is of")
