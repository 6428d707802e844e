"""What `benchmark` compares: one network with each norm, with other people's LayerNorm, and with none.

All of them run the same code but for the norm. Stand-ins take LayerNorm's place in the table of norms while a model
is traced; so no model knows of them.
"""

import contextlib
import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from prenorm_jax import sizes
from prenorm_jax.config import base_config, data_kind
from prenorm_jax.equivalence.convert import convert_config
from prenorm_jax.models.coordinates import COORDINATES
from prenorm_jax.models.norms import Norm, Normed
from prenorm_jax.models.parameters import annotated
from prenorm_jax.models.registry import model_config


class NoNorm(Norm):
    """Leaves its input as it is."""

    normalise = staticmethod(lambda x, epsilon: Normed(x))


class FlaxLayerNorm(Norm):
    """Flax's own LayerNorm. `one_pass`: its variance is E[x²] - E[x]²."""

    one_pass: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = nn.LayerNorm(
            epsilon=self.epsilon,
            dtype=x.dtype,  # by default it gives float32 for a bfloat16 input, and all after it is slower
            param_dtype=self.param_dtype,
            use_bias=self.use_bias,
            use_scale=self.use_scale,
            bias_init=annotated(nn.initializers.zeros_init(), self.axis, norm=self.site),
            scale_init=annotated(nn.initializers.ones_init(), self.axis, norm=self.site),
            use_fast_variance=self.one_pass,
        )
        nn.share_scope(self, norm)
        return norm(x)

    def for_readers(self, x: jax.Array) -> Normed:
        return Normed(self(x), site=self.site)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
      norm: of the model.
      about: what it is, in a few words.
      parameterization: see docs/training.md.
      folded: norms without affine, as in the variants: it is in their readers.
      wider: the LN-equivalent width is d+1, so that the stream of crmsnorm has d numbers.
      stand_in: takes the norm's place.
      coordinates: of crmsnorm's stream.
    """

    norm: str
    about: str
    parameterization: str = "native"
    folded: bool = False
    wider: bool = False
    stand_in: Callable[..., nn.Module] | None = None
    coordinates: str = "drop"

    def config(self, config: ConfigDict) -> ConfigDict:
        """The run's configuration for this contender, from that of the Pre-LN run."""
        changed = ConfigDict(config.to_dict())  # resolved: no shared placeholders
        pre_ln = model_config(config.model)
        changes: dict[str, Any] = {"norm": self.norm, "coordinates": self.coordinates}
        if self.wider:
            changes |= {"d_model": pre_ln.d_model + 1, "head_dim": pre_ln.head_dim, "mlp_dim": pre_ln.mlp_dim}
        if self.folded:
            changes |= vars(convert_config(pre_ln, "rmsnorm")) | {"norm": "layernorm"}
        if self.stand_in is NoNorm:
            changes |= {"final_norm_affine": False}
        changed.model.update(changes)
        changed.parameterization = self.parameterization
        return changed

    @contextlib.contextmanager
    def norms(self) -> Iterator[None]:
        """While a model of this contender is traced."""
        key = self.norm, self.coordinates if self.norm == "crmsnorm" else ""
        own = COORDINATES[key]
        COORDINATES[key] = dataclasses.replace(own, norm=self.stand_in or own.norm)
        try:
            yield
        finally:
            COORDINATES[key] = own


# The fastest is the baseline.
BASELINES = ("layernorm", "layernorm-folded", "flax-one-pass", "flax-one-pass-folded", "flax-two-pass")
BOUND = "none"


def baseline_of(costs: dict[str, float]) -> str:
    """The LayerNorm of the least cost; where there is none, the contender of the least, the bound only if alone."""
    others = [name for name in costs if name != BOUND]
    return min([name for name in BASELINES if name in costs] or others or costs, key=costs.__getitem__)


ONE_PASS, TWO_PASS = (functools.partial(FlaxLayerNorm, one_pass=one_pass) for one_pass in (True, False))
CONTENDERS = {
    "layernorm": Contender("layernorm", "ours"),
    "layernorm-folded": Contender("layernorm", "ours, affine folded into the readers", folded=True),
    "flax-one-pass": Contender("layernorm", "Flax's, E[x²] - E[x]²", stand_in=ONE_PASS),
    "flax-one-pass-folded": Contender("layernorm", "the same, folded into the readers", folded=True, stand_in=ONE_PASS),
    "flax-two-pass": Contender("layernorm", "Flax's, use_fast_variance=False", stand_in=TWO_PASS),
    "rmsnorm": Contender("rmsnorm", "its own parameters"),
    "rmsnorm-pre_ln": Contender("rmsnorm", "from Pre-LN parameters, h in the step", "pre_ln"),
    "crmsnorm": Contender("crmsnorm", "its own parameters, d-1 wide"),
    "crmsnorm-pre_ln": Contender("crmsnorm", "from Pre-LN parameters, h in the step", "pre_ln"),
    "crmsnorm-aligned": Contender("crmsnorm", "d wide, of LN-equivalent width d+1", wider=True),
    "reflected": Contender("crmsnorm", "reflected, d-1 wide", coordinates="reflect"),
    "reflected-aligned": Contender("crmsnorm", "reflected, d wide, of d+1", wider=True, coordinates="reflect"),
    "none": Contender("layernorm", "norms removed: the bound", folded=True, stand_in=NoNorm),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all contenders share: a model's name (`sizes.model`), examples, tokens in each, dtype, blocks (its own)."""

    model: str
    batch: int
    length: int
    dtype: str
    depth: int | None = None

    def run_config(self) -> ConfigDict:
        """The Pre-LN run that the contenders' are made from. Raises PrenormError for an unknown model."""
        keys = sizes.model(self.model)
        config = base_config(keys["family"])
        config.batch_size = self.batch
        config.model.update(keys)
        config.model.dtype = self.dtype
        config.model.depth = self.depth or config.model.depth
        if "seq_len" in config.data:
            config.data.seq_len, config.model.max_len = self.length, max(self.length, keys.get("max_len", 0))
        return config

    def header(self, task: str) -> dict[str, Any]:
        """What the JSON file says of every measurement; the length is None for images, which have their own."""
        config = self.run_config()
        length = data_kind(config).length(config) or None
        when = {"date": datetime.date.today().isoformat(), "jax": jax.__version__}
        return dataclasses.asdict(self) | {"task": task, "length": length} | when
