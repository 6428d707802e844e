"""DINOv3's ViTs (transformers' `dinov3_vit`): all tokens (`last_hidden_state`), the first being the pooled output.

Queries and keys of patches are turned by their place, those of the class token and of registers are not. Where a
projection has no bias, ours is zero.
"""

import re
from typing import Any

from prenorm_jax.interop.family import Family, Given
from prenorm_jax.interop.views import NOTHING

_BIASES = {"query_bias": True, "key_bias": False, "value_bias": True, "proj_bias": True, "mlp_bias": True}


def _biases(given: Given) -> dict[str, bool]:
    return {key: given(key, default=default) for key, default in _BIASES.items()}


def _config(given: Given) -> dict[str, Any]:
    biases, gated = _biases(given), given("use_gated_mlp", default=False)
    return {
        "family": "vit",
        "image_size": given.side("image_size", default=224),
        "patch_size": given.side("patch_size", default=16),
        "channels": given("num_channels", default=3),
        "classes": 0,
        "pooling": "none",
        "positions": "rotary2d",
        "rotary_base": given("rope_theta", default=100.0),
        "registers": given("num_register_tokens", default=0),
        "d_model": given("hidden_size", default=384),
        "depth": given("num_hidden_layers", default=12),
        "heads": given("num_attention_heads", default=6),
        "mlp_dim": given("intermediate_size", default=1536),
        "gated_mlp": gated,
        "activation": given.activation("hidden_act", default="gelu"),
        "use_bias": biases["proj_bias"] or biases["mlp_bias"],
        "reader_bias": biases["mlp_bias"],
        "qkv_bias": biases["query_bias"] or biases["key_bias"] or biases["value_bias"],
        "layer_scale": float(given("layerscale_value", default=1.0)),
        "epsilon": given("layer_norm_eps", default=1e-5),
        "attention_dropout": float(given("attention_dropout", default=0.0)),
        "stochastic_depth": float(given("drop_path_rate", default=0.0)),
        "stochastic_depth_schedule": "constant",
    }


_TABLE = """
    embeddings.cls_token                      1 1 d    class_token                          1 d
    embeddings.register_tokens                1 t d    registers                            t d
    embeddings.patch_embeddings.weight        d c y x  patch_embedding/kernel               y x c d
    embeddings.patch_embeddings.bias          d        patch_embedding/bias
    layer.{i}.norm1.{weight,bias}             d        block_{i}/attention_norm/{scale,bias}
    layer.{i}.attention.q_proj.weight         (h k) d  block_{i}/attention/query/kernel     d (h k)
    query_bias:layer.{i}.attention.q_proj.bias  (h k)  block_{i}/attention/query/bias
    layer.{i}.attention.k_proj.weight         (h k) d  block_{i}/attention/key/kernel       d (h k)
    key_bias:layer.{i}.attention.k_proj.bias  (h k)    block_{i}/attention/key/bias
    layer.{i}.attention.v_proj.weight         (h k) d  block_{i}/attention/value/kernel     d (h k)
    value_bias:layer.{i}.attention.v_proj.bias  (h k)  block_{i}/attention/value/bias
    layer.{i}.attention.o_proj.weight         d (h k)  block_{i}/attention/out/kernel       (h k) d
    proj_bias:layer.{i}.attention.o_proj.bias  d       block_{i}/attention/out/bias
    layer.{i}.layer_scale1.lambda1            d        block_{i}/attention/out_scale
    layer.{i}.norm2.{weight,bias}             d        block_{i}/mlp_norm/{scale,bias}
    layer.{i}.mlp.gate_proj.weight            f d      block_{i}/mlp/gate/kernel            d f
    layer.{i}.mlp.gate_proj.bias              f        block_{i}/mlp/gate/bias
    layer.{i}.mlp.up_proj.weight              f d      block_{i}/mlp/up/kernel              d f
    layer.{i}.mlp.up_proj.bias                f        block_{i}/mlp/up/bias
    layer.{i}.mlp.down_proj.weight            d f      block_{i}/mlp/down/kernel            f d
    mlp_bias:layer.{i}.mlp.down_proj.bias     d        block_{i}/mlp/down/bias
    layer.{i}.layer_scale2.lambda1            d        block_{i}/mlp/down_scale
    norm.{weight,bias}                        d        head_affine/{scale,bias}
"""


def _table(given: Given) -> str:
    """A line that begins with a key is that of a tensor which is there if config.json's key is true."""
    table = _TABLE
    for key, there in _biases(given).items():
        table = re.sub(rf"{key}:(\S+)", r"\1" if there else NOTHING, table)
    return table


FAMILY = Family(
    "dinov3_vit",
    _config,
    _table,
    ignored=(r"rope_embeddings\.inv_freq",),
    along=(r"embeddings\.(mask_token|register_tokens)",),
    aliases=((r"^model\.layer\.", "layer."),),
)
