"""The families of checkpoints that are known. A further one is a file beside `gpt2.py`, and a line in FAMILIES."""

from collections.abc import Mapping
from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.families import (
    audio_spectrogram,
    beit,
    bloom,
    clip,
    codegen,
    cohere,
    deit,
    dinov2,
    dinov3,
    esm,
    falcon,
    gpt2,
    gpt_bigcode,
    gpt_neo,
    gpt_neox,
    gptj,
    modernbert,
    mpt,
    nemotron,
    olmo,
    opt,
    persimmon,
    phi,
    roberta_prelayernorm,
    siglip,
    stablelm,
    starcoder2,
    text_towers,
    timm,
    vit,
    vit_mae,
    vit_npz,
    xglm,
)
from prenorm_jax.interop.families.refused import REFUSED
from prenorm_jax.interop.family import Family

_TEXT = (gpt2.FAMILY, gpt_bigcode.FAMILY, opt.FAMILY, gpt_neox.FAMILY, olmo.FAMILY, starcoder2.FAMILY, falcon.FAMILY)
_TEXT += (gpt_neo.FAMILY, gptj.FAMILY, codegen.FAMILY, phi.FAMILY, stablelm.FAMILY, bloom.FAMILY, mpt.FAMILY)
_TEXT += (cohere.FAMILY, cohere.COHERE2, persimmon.FAMILY, nemotron.FAMILY, xglm.FAMILY, xglm.BIOGPT)
_ENCODERS = (roberta_prelayernorm.FAMILY, esm.FAMILY, modernbert.FAMILY)
_ENCODERS += (text_towers.CLIP, text_towers.IN_CLIP, text_towers.SIGLIP, text_towers.IN_SIGLIP)
_IMAGES = (vit.FAMILY, deit.FAMILY, beit.FAMILY, vit_mae.FAMILY, dinov2.FAMILY, dinov2.WITH_REGISTERS, dinov3.FAMILY)
_IMAGES += (
    clip.VISION,
    clip.FAMILY,
    siglip.VISION,
    siglip.FAMILY,
    audio_spectrogram.FAMILY,
    timm.FAMILY,
    vit_npz.FAMILY,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in (*_TEXT, *_ENCODERS, *_IMAGES)}


TOWER = "_tower"  # in a config.json as it is used here: which tower of a whole model is meant, as in NAME:text


def model_type(config: Mapping[str, Any]) -> str | None:
    """What a config.json says that its network is, if it is one of a network: timm's name an architecture alone."""
    return config.get("model_type", timm.FAMILY.model_type if "architecture" in config else None)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config.json. Raises PrenormError for one that is unknown, or cannot be converted."""
    name = model_type(config)
    if tower := config.get(TOWER):
        name = f"{name}:{tower}"
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
