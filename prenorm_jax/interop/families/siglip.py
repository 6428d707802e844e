"""SigLIP's image tower (transformers' `siglip_vision_model`), by itself or within a whole `siglip`.

It gives the pooled output, by attention of one query: of that attention's projections only key and value read the
stream. With a classifier, which reads the mean of all tokens, it gives logits; without either all tokens
(`last_hidden_state`). A pooling beside a classifier, the text tower and the scales go along into an export as they are.
"""

from typing import Any

from prenorm_jax.interop.families.clip import TOWER
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    classes, pools = given.labels(), given("vision_use_head", default=True)
    return {
        "family": "vit",
        "image_size": given.side("image_size", default=224),
        "patch_size": given.side("patch_size", default=16),
        "channels": given("num_channels", default=3),
        "class_token": False,
        "classes": classes,
        "pooling": "mean" if classes else "attention" if pools else "none",
        "d_model": given("hidden_size", default=768),
        "depth": given("num_hidden_layers", default=12),
        "heads": given("num_attention_heads", default=12),
        "mlp_dim": given("intermediate_size", default=3072),
        "activation": given.activation("hidden_act", default="gelu_pytorch_tanh"),
        "epsilon": given("layer_norm_eps", default=1e-6),
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


_TABLE = (
    TOWER
    + """
    embeddings.patch_embedding.bias                    d          patch_embedding/bias
    post_layernorm.{weight,bias}                       d          pool_norm/{scale,bias}
    post_layernorm.{weight,bias}                       d          head_norm/{scale,bias}
    head.probe                                         1 1 d      pool/probe                      1 d
    head.attention.in_proj_weight                      (p h k) d  pool/{query,key,value}/kernel   d (h k)
    head.attention.in_proj_bias                        (p h k)    pool/{query,key,value}/bias     (h k)
    head.attention.out_proj.weight                     d (h k)    pool/out/kernel                 (h k) d
    head.attention.out_proj.bias                       d          pool/out/bias
    head.layernorm.{weight,bias}                       d          pool/mlp_norm/{scale,bias}
    head.mlp.fc1.weight                                f d        pool/up/kernel                  d f
    head.mlp.fc1.bias                                  f          pool/up/bias
    head.mlp.fc2.weight                                d f        pool/down/kernel                f d
    head.mlp.fc2.bias                                  d          pool/down/bias
    classifier.weight                                  v d        head/kernel                     d v
    classifier.bias                                    v          head/bias
"""
)


def _family(model_type: str, config: Any) -> Family:
    return Family(
        model_type,
        config,
        _TABLE,
        prefixes=("vision_model.",),
        ignored=(r"embeddings\.position_ids",),
        along=(r"head\..*", r"text_model\..*", "logit_scale", "logit_bias"),
    )


VISION = _family("siglip_vision_model", _config)
FAMILY = _family("siglip", lambda given: _config(given.within("vision_config")))
