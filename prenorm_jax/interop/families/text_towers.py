"""The text towers of CLIP and SigLIP (transformers' `clip_text_model`, `siglip_text_model`), also within a whole model.

Of a folder with a whole one, NAME is the image tower and NAME:text this. CLIP's gives what stands at the first end of
text, which the projection reads; SigLIP's a linear map of the last token, be it padding or not: its texts are padded to
the full length, and no token is masked. Projections and the other tower go along into an export as they are.
"""

from collections.abc import Callable
from typing import Any

from prenorm_jax.interop.families.clip import TOWER
from prenorm_jax.interop.family import Family, Given


def _config(given: Given, width: int, heads: int, mlp_dim: int) -> dict[str, Any]:
    """What both have in common; the sizes are their defaults."""
    return {
        "family": "encoder",
        "tie_embeddings": False,
        "transform": False,
        "d_model": given("hidden_size", default=width),
        "depth": given("num_hidden_layers", default=12),
        "heads": given("num_attention_heads", default=heads),
        "mlp_dim": given("intermediate_size", default=mlp_dim),
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


def _clip(given: Given) -> dict[str, Any]:
    eos = given("eos_token_id", default=49407)
    given("projection_dim", default=None)  # of what reads the output
    return _config(given, width=512, heads=8, mlp_dim=2048) | {
        "vocab_size": given("vocab_size", default=49408),
        "max_len": given("max_position_embeddings", default=77),
        "causal": True,
        "pooling": "eos",
        "eos_token": None if eos == 2 else eos,  # transformers' sign of a file from before it knew
        "activation": given.activation("hidden_act", default="quick_gelu"),
        "epsilon": given("layer_norm_eps", default=1e-5),
    }


def _siglip(given: Given) -> dict[str, Any]:
    return _config(given, width=768, heads=12, mlp_dim=3072) | {
        "vocab_size": given("vocab_size", default=32000),
        "max_len": given("max_position_embeddings", default=64),
        "pooling": "last",
        "outputs": given("projection_size", default=given("hidden_size", default=768)),
        "activation": given.activation("hidden_act", default="gelu_pytorch_tanh"),
        "epsilon": given("layer_norm_eps", default=1e-6),
    }


_TABLE = (
    TOWER.replace("post_layernorm", "final_layer_norm")
    + """
    embeddings.token_embedding.weight                  v d      token_embedding
    final_layer_norm.{weight,bias}                     d        head_norm/{scale,bias}           # SigLIP's
    head.weight                                        o d      head/kernel                      d o
    head.bias                                          o        head/bias
"""
)


def _family(model_type: str, config: Callable[[Given], dict[str, Any]]) -> Family:
    along = (r"(text|visual)_projection\.weight", r"vision_model\..*", "logit_(scale|bias)")
    ignored = (r"embeddings\.position_ids",)
    return Family(model_type, config, _TABLE, prefixes=("text_model.",), ignored=ignored, along=along)


CLIP, SIGLIP = _family("clip_text_model", _clip), _family("siglip_text_model", _siglip)
IN_CLIP = _family("clip:text", lambda given: _clip(given.within("text_config", "text_config_dict")))
IN_SIGLIP = _family("siglip:text", lambda given: _siglip(given.within("text_config")))
