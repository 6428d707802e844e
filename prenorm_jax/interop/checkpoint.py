"""A foreign checkpoint as a model of ours and its leaves; and `load`, which takes a workdir as well."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from prenorm_jax.base.errors import check_choice
from prenorm_jax.interop.families import family_of
from prenorm_jax.interop.family import Family
from prenorm_jax.interop.files import Source, is_workdir, open_source
from prenorm_jax.interop.leaves import ForeignLeaves
from prenorm_jax.models.abstract import param_shapes
from prenorm_jax.models.config import DTYPES, ModelConfig
from prenorm_jax.train.checkpoint import Checkpoints

NARROW = ("bfloat16", "float16")


@dataclass(frozen=True)
class ForeignCheckpoint:
    """A source, its family, the Pre-LN model that it is of, and that model's leaves as they lie in it.

    Attributes:
      dtype: of the source, its widest.
      dropout: the rates of its config.json that are not zero, by our keys.
    """

    source: Source
    family: Family
    model: ModelConfig
    leaves: ForeignLeaves
    dtype: str
    dropout: dict[str, float]


def foreign(source: Source, dtype: str | None = None, keep_dropout: bool = False) -> ForeignCheckpoint:
    """The source as a model of ours. Nothing of its tensors is read. Arguments as of `load`. Raises PrenormError."""
    family, wanted = family_of(source.config), dtype_of(source, dtype)
    dtypes = {"dtype": wanted, "param_dtype": wanted}
    model = family.model(source.config, source.shapes, **dtypes)
    dropout = {rate: value for rate in model.rates if (value := getattr(model, rate))}
    if not keep_dropout:
        model = family.model(source.config, source.shapes, **dtypes, **dict.fromkeys(model.rates, 0.0))
    leaves = ForeignLeaves(family, source.config, model, source.tensors)
    return ForeignCheckpoint(source, family, model, leaves, dtype_of(source, "keep"), dropout)


def dtype_of(source: Source, asked: str | None) -> str:
    """The dtype of its leaves: what is asked for, or by its own widest. Raises PrenormError."""
    check_choice("dtype", asked or "keep", ("keep", *DTYPES))
    family = family_of(source.config)
    found = {tensor.dtype.name for name, tensor in source.tensors.items() if not family.ignores(family.name(name))}
    widest = next((dtype for dtype in DTYPES if dtype in found), "float32")
    if asked is None:  # a narrower one would round what is converted once more
        return "float32" if widest in NARROW else widest
    return widest if asked == "keep" else asked


def load(name: str | Path, dtype: str | None = None, keep_dropout: bool = False) -> tuple[ModelConfig, dict[str, Any]]:
    """The model config and parameters of a workdir (its last checkpoint), or of another library's model.

    `build_model(config).apply({"params": params}, inputs)` are then the logits that the source computes. `name`: a
    folder, one of its files, or a name on the Hugging Face hub; for a workdir the other arguments have no meaning.

    Args:
      dtype: float64, float32, bfloat16, float16 or keep, the source's; None: the source's, float32 for a narrower one.
      keep_dropout: whether the config has the dropout that the source was trained with.

    Returns:
      The frozen config, and a nested dict of JAX arrays.

    Raises:
      PrenormError: for what is no such thing, is not whole, or cannot be computed by a model of ours.
    """
    if is_workdir(name):
        with Checkpoints(name, read_only=True) as checkpoints:
            return checkpoints.of(None, checkpoints.params)
    found = foreign(open_source(name), dtype, keep_dropout)
    params = {path: jnp.asarray(found.leaves.read(path)) for path in param_shapes(found.model)}
    return found.model, unflatten_dict(params)
