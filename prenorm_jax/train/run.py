"""What a run computes and where: its configuration, its models, its mesh."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from prenorm_jax.base.errors import check_choice
from prenorm_jax.config import PARAMETERIZATIONS, data_kind
from prenorm_jax.data.kinds import Kind
from prenorm_jax.equivalence.convert import convert_config, convert_params
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.registry import model_config
from prenorm_jax.train.arrays import global_batch, local_rows
from prenorm_jax.train.sharding import batch_sharding, params_formats

H_SCOPE = "conversion_h"  # as it is called in profiles

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A run's configuration and what it means.

    Attributes:
      config: every key.
      trained: the model whose parameters θ are trained and stored.
      computed: the model that is computed, of parameters φ. Often the same.
      mesh: of the devices; None: JAX's default device, for what is only traced.
    """

    config: ConfigDict
    trained: ModelConfig
    computed: ModelConfig
    mesh: Mesh | None = None

    @classmethod
    def create(cls, config: ConfigDict, mesh: Mesh | None = None) -> Run:
        """What `config.model` and `config.parameterization` mean. Raises PrenormError."""
        check_choice("parameterization", config.parameterization, PARAMETERIZATIONS)
        requested = model_config(config.model)
        pre_ln = dataclasses.replace(requested, norm="layernorm")
        computed = pre_ln if requested.norm == "layernorm" else convert_config(pre_ln, requested.norm)
        return cls(config, pre_ln if config.parameterization == "pre_ln" else computed, computed, mesh)

    def computing(self, model: ModelConfig) -> Run:
        """The same for the parameters of another model."""
        return dataclasses.replace(self, trained=model, computed=model)

    @property
    def kind(self) -> Kind:
        """The kind of its data."""
        return data_kind(self.config)

    @property
    def converts(self) -> bool:
        """Whether φ = h(θ) is computed in each step."""
        return self.trained != self.computed

    def computed_params(self, params: Params) -> Params:
        """φ from the trained parameters: h(θ), or θ itself. Differentiable."""
        if not self.converts:
            return params
        with jax.named_scope(H_SCOPE):
            return convert_params(params, self.trained, self.computed.norm)

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of an array whose first axis is the batch."""
        return batch_sharding(self.mesh)

    @property
    def computed_formats(self) -> Any:
        """The tree of formats in which programs take φ."""
        return params_formats(self.computed, self.mesh)

    @property
    def local_rows(self) -> slice:
        """The rows of a batch that this process reads."""
        return local_rows(self.batch_sharding, self.config.batch_size)

    def global_batch(self, local: dict[str, Any]) -> dict[str, jax.Array]:
        """The batch over all devices, of which this process has read its rows."""
        return global_batch(local, self.batch_sharding, self.config.batch_size)
