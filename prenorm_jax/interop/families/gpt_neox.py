"""GPT-NeoX (transformers' `gpt_neox`): Pythia and others. A quarter of each head is turned by default."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    width, heads = given("hidden_size", default=6144), given("num_attention_heads", default=64)
    dropout = given("hidden_dropout", default=0.0)
    return given.rotary(width, heads, 0.25, "rotary_emb_base", "rotary_pct") | {
        "vocab_size": given("vocab_size", default=50432),
        "max_len": given("max_position_embeddings", default=2048),
        "d_model": width,
        "depth": given("num_hidden_layers", default=44),
        "heads": heads,
        "mlp_dim": given("intermediate_size", default=24576),
        "activation": given.activation("hidden_act", default="gelu"),
        "parallel": given("use_parallel_residual", default=True),
        "qkv_bias": given("attention_bias", default=True),
        "epsilon": given("layer_norm_eps", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=False),
        "embed_dropout": dropout,
        "branch_dropout": dropout,
        "attention_dropout": given("attention_dropout", default=0.0),
    }


_TABLE = """
embed_in.weight                                   v d        token_embedding
layers.{i}.input_layernorm.{weight,bias}          d          block_{i}/attention_norm/{scale,bias}
layers.{i}.attention.query_key_value.weight       (h p k) d  block_{i}/attention/{query,key,value}/kernel  d (h k)
layers.{i}.attention.query_key_value.bias         (h p k)    block_{i}/attention/{query,key,value}/bias    (h k)
layers.{i}.attention.dense.weight                 d (h k)    block_{i}/attention/out/kernel                (h k) d
layers.{i}.post_attention_layernorm.{weight,bias}  d         block_{i}/mlp_norm/{scale,bias}
layers.{i}.mlp.dense_h_to_4h.weight               f d        block_{i}/mlp/up/kernel                       d f
layers.{i}.mlp.dense_h_to_4h.bias                 f          block_{i}/mlp/up/bias
layers.{i}.mlp.dense_4h_to_h.weight               d f        block_{i}/mlp/down/kernel                     f d
layers.{i}.mlp.dense_4h_to_h.bias                 d          block_{i}/mlp/down/bias
final_layer_norm.{weight,bias}                    d          head_norm/{scale,bias}                        # and:
embed_out.weight                                  v d        head/kernel                                   d v
final_layer_norm.{weight,bias}                    d          head_affine/{scale,bias}                      # if tied
"""
# The MLP has biases in any case; attention's output has one with the others of attention.
_BIAS = """
layers.{i}.attention.dense.bias                   d          block_{i}/attention/out/bias
"""
_NO_BIAS = """
-                                                 d          block_{i}/attention/out/bias
"""

FAMILY = Family(
    "gpt_neox",
    _config,
    table=lambda given: _TABLE + (_BIAS if given("attention_bias", default=True) else _NO_BIAS),
    prefixes=("gpt_neox.",),
    ignored=(r"layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)", r"rotary_emb\.inv_freq"),
    aliases=((r"lm_head\.weight", "embed_out.weight"),),  # as transformers calls it in memory
)
