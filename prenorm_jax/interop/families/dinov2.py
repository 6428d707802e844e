"""DINOv2 (transformers' `dinov2` and `dinov2_with_registers`).

With a classifier, of the class token and the patches' mean, it gives logits; without one all tokens
(`last_hidden_state`, of which the first is the pooled output).
"""

from typing import Any

from prenorm_jax.interop.families.vit import ATTENTION, EMBEDDING
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    classes, gated = given.labels(), given("use_swiglu_ffn", default=False)
    with_registers = given.values.get("model_type") == "dinov2_with_registers"
    width = given("hidden_size", default=768)
    mlp_dim = width * given("mlp_ratio", default=4)
    return {
        "family": "vit",
        "image_size": given.side("image_size", default=224),
        "patch_size": given.side("patch_size", default=16 if with_registers else 14),
        "channels": given("num_channels", default=3),
        "classes": classes,
        "pooling": "class_mean" if classes else "none",
        "registers": given("num_register_tokens", default=4) if with_registers else 0,
        "d_model": width,
        "depth": given("num_hidden_layers", default=12),
        "heads": given("num_attention_heads", default=12),
        "mlp_dim": (mlp_dim * 2 // 3 + 7) // 8 * 8 if gated else mlp_dim,
        "gated_mlp": gated,
        "activation": "silu" if gated else given.activation("hidden_act", default="gelu"),
        "qkv_bias": given("qkv_bias", default=True),
        "layer_scale": float(given("layerscale_value", default=1.0)),
        "epsilon": given("layer_norm_eps", default=1e-6),
        "embed_dropout": given("hidden_dropout_prob", default=0.0),
        "branch_dropout": 0.0,
        "attention_dropout": given("attention_probs_dropout_prob", default=0.0),
        "stochastic_depth": float(given("drop_path_rate", default=0.0)),
        "stochastic_depth_schedule": "constant",
    }


_TABLE = (
    EMBEDDING
    + ATTENTION
    + """
    embeddings.register_tokens                          1 t d    registers                            t d
    encoder.layer.{i}.norm1.{weight,bias}               d        block_{i}/attention_norm/{scale,bias}
    encoder.layer.{i}.norm2.{weight,bias}               d        block_{i}/mlp_norm/{scale,bias}
    encoder.layer.{i}.layer_scale1.lambda1              d        block_{i}/attention/out_scale
    encoder.layer.{i}.layer_scale2.lambda1              d        block_{i}/mlp/down_scale
    layernorm.{weight,bias}                             d        head_norm/{scale,bias}               # with, and:
    classifier.weight                                   v (p d)  head/{class,mean}/kernel             d v
    classifier.bias                                     v        head/class/bias
    +classifier.bias                                    v        head/mean/bias
    layernorm.{weight,bias}                             d        head_affine/{scale,bias}             # without
"""
)
_MLP = """
    encoder.layer.{i}.mlp.fc1.weight                    f d      block_{i}/mlp/up/kernel              d f
    encoder.layer.{i}.mlp.fc1.bias                      f        block_{i}/mlp/up/bias
    encoder.layer.{i}.mlp.fc2.weight                    d f      block_{i}/mlp/down/kernel            f d
    encoder.layer.{i}.mlp.fc2.bias                      d        block_{i}/mlp/down/bias
"""
_SWIGLU = """
    encoder.layer.{i}.mlp.weights_in.weight             (p f) d  block_{i}/mlp/{gate,up}/kernel       d f
    encoder.layer.{i}.mlp.weights_in.bias               (p f)    block_{i}/mlp/{gate,up}/bias
    encoder.layer.{i}.mlp.weights_out.weight            d f      block_{i}/mlp/down/kernel            f d
    encoder.layer.{i}.mlp.weights_out.bias              d        block_{i}/mlp/down/bias
"""


def _family(model_type: str) -> Family:
    return Family(
        model_type,
        _config,
        table=lambda given: _TABLE + (_SWIGLU if given("use_swiglu_ffn", default=False) else _MLP),
        prefixes=(f"{model_type}.",),
        along=(r"embeddings\.mask_token",),
    )


FAMILY, WITH_REGISTERS = _family("dinov2"), _family("dinov2_with_registers")
