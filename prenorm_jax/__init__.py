"""Pre-LN, Pre-RMSNorm and Pre-CRMSNorm Transformers: one function, three parameterisations, conversion both ways."""

from prenorm_jax.conversion import convert_config, convert_params
from prenorm_jax.errors import PrenormError
from prenorm_jax.models import build_model

__all__ = ["PrenormError", "build_model", "convert_config", "convert_params"]
