"""CLIP's image tower (transformers' `clip_vision_model`), by itself or within a whole `clip`.

It gives the pooled output, which the projection reads. Text tower and projections are no part of the network and go
along into an export as they are. `last_hidden_state` is the raw stream: a conversion removes its mean.
"""

from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    if given.labels():
        raise PrenormError(
            "a CLIP's classifier reads the raw stream, whose mean conversion removes: it has no equivalent; it would "
            "have to read what post_layernorm gives, as the projection does"
        )
    return {
        "family": "vit",
        "image_size": given.side("image_size", default=224),
        "patch_size": given.side("patch_size", default=32),
        "patch_bias": False,
        "channels": given("num_channels", default=3),
        "classes": 0,
        "pooling": "class",
        "embed_norm": True,
        "d_model": given("hidden_size", default=768),
        "depth": given("num_hidden_layers", default=12),
        "heads": given("num_attention_heads", default=12),
        "mlp_dim": given("intermediate_size", default=3072),
        "activation": given.activation("hidden_act", default="quick_gelu"),
        "epsilon": given("layer_norm_eps", default=1e-5),
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


def _within(given: Given) -> dict[str, Any]:
    """Of a whole CLIP. The older `vision_config_dict`, where it is, counts alone, its defaults included."""
    return _config(given.within("vision_config", "vision_config_dict"))


TOWER = """
    embeddings.position_embedding.weight               n d      position_embedding
    embeddings.patch_embedding.weight                  d c y x  patch_embedding/kernel            y x c d
    encoder.layers.{i}.layer_norm1.{weight,bias}       d        block_{i}/attention_norm/{scale,bias}
    encoder.layers.{i}.self_attn.{q,k,v}_proj.weight   (h k) d  block_{i}/attention/{query,key,value}/kernel  d (h k)
    encoder.layers.{i}.self_attn.{q,k,v}_proj.bias     (h k)    block_{i}/attention/{query,key,value}/bias
    encoder.layers.{i}.self_attn.out_proj.weight       d (h k)  block_{i}/attention/out/kernel    (h k) d
    encoder.layers.{i}.self_attn.out_proj.bias         d        block_{i}/attention/out/bias
    encoder.layers.{i}.layer_norm2.{weight,bias}       d        block_{i}/mlp_norm/{scale,bias}
    encoder.layers.{i}.mlp.fc1.weight                  f d      block_{i}/mlp/up/kernel           d f
    encoder.layers.{i}.mlp.fc1.bias                    f        block_{i}/mlp/up/bias
    encoder.layers.{i}.mlp.fc2.weight                  d f      block_{i}/mlp/down/kernel         f d
    encoder.layers.{i}.mlp.fc2.bias                    d        block_{i}/mlp/down/bias
    post_layernorm.{weight,bias}                       d        head_affine/{scale,bias}
"""
_TABLE = (
    TOWER
    + """
    embeddings.class_embedding                         d        class_token                       1 d
    pre_layrnorm.{weight,bias}                         d        embedding_norm/{scale,bias}
"""
)
_ALONG = (r"visual_projection\.weight", r"text_projection\.weight", r"text_model\..*", "logit_scale")
_MASKS = (r"embeddings\.position_ids",)

VISION = Family("clip_vision_model", _config, _TABLE, prefixes=("vision_model.",), ignored=_MASKS, along=_ALONG)
FAMILY = Family("clip", _within, _TABLE, prefixes=("vision_model.",), ignored=_MASKS, along=_ALONG)
