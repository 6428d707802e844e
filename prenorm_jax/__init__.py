"""Pre-LN, Pre-RMSNorm and Pre-CRMSNorm Transformers: one function, three parameterisations, conversion both ways."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prenorm_jax.base.errors import PrenormError
    from prenorm_jax.equivalence.choice import choose_coordinates
    from prenorm_jax.equivalence.convert import convert_config, convert_params
    from prenorm_jax.folding.fold import fold
    from prenorm_jax.interop.certify import certify_checkpoint
    from prenorm_jax.interop.checkpoint import load
    from prenorm_jax.interop.encoder import TextEncoder
    from prenorm_jax.interop.foreign import convert_foreign
    from prenorm_jax.models.registry import build_model

__all__ = ["PrenormError", "TextEncoder", "build_model", "certify_checkpoint", "choose_coordinates", "convert_config"]
__all__ += ["convert_foreign", "convert_params", "fold", "load"]

_HOMES = {
    "build_model": "models.registry",
    "certify_checkpoint": "interop.certify",
    "choose_coordinates": "equivalence.choice",
    "convert_config": "equivalence.convert",
    "convert_foreign": "interop.foreign",
    "convert_params": "equivalence.convert",
    "fold": "folding.fold",
    "load": "interop.checkpoint",
    "PrenormError": "base.errors",
    "TextEncoder": "interop.encoder",
}


def __getattr__(name: str) -> Any:
    # On first use: JAX and Flax take seconds to import, and `compare` does without them.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
