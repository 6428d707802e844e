"""The families of checkpoints that are known. A further one is a file beside `gpt2.py`, and a line in FAMILIES."""

from collections.abc import Mapping
from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.families import (
    clip,
    dinov2,
    falcon,
    gpt2,
    gpt_bigcode,
    gpt_neox,
    olmo,
    opt,
    starcoder2,
    timm,
    vit,
    vit_npz,
)
from prenorm_jax.interop.families.refused import REFUSED
from prenorm_jax.interop.family import Family

_TEXT = (gpt2.FAMILY, gpt_bigcode.FAMILY, opt.FAMILY, gpt_neox.FAMILY, olmo.FAMILY, starcoder2.FAMILY, falcon.FAMILY)
_IMAGES = (vit.FAMILY, dinov2.FAMILY, dinov2.WITH_REGISTERS, clip.VISION, clip.FAMILY, timm.FAMILY, vit_npz.FAMILY)
FAMILIES: dict[str, Family] = {family.model_type: family for family in (*_TEXT, *_IMAGES)}


def model_type(config: Mapping[str, Any]) -> str | None:
    """What a config.json says that its network is, if it is one of a network: timm's name an architecture alone."""
    return config.get("model_type", timm.FAMILY.model_type if "architecture" in config else None)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises PrenormError for one that is unknown, or cannot be converted."""
    name = model_type(config)
    if name in REFUSED:
        raise PrenormError(f"config.json: model_type={name!r}: {REFUSED[name]}")
    if name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise PrenormError(
            f"config.json: model_type={name!r} is no family that has a table here; those are {known}. Tensors of any "
            "Pre-LN network convert by a table of your own (prenorm_jax.convert_foreign)"
        )
    if "quantization_config" in config:
        raise PrenormError(
            "config.json: quantization_config: quantised weights are not read: save the model dequantised"
        )
    return FAMILIES[name]
