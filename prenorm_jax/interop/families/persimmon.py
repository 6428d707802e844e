"""Persimmon (transformers' `persimmon`): squared ReLU, half of each head turned, norms on queries and keys."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    width, heads = given("hidden_size", default=4096), given("num_attention_heads", default=64)
    return given.rotary(width, heads, 0.5, share_key="partial_rotary_factor") | {
        "vocab_size": given("vocab_size", default=262144),
        "max_len": given("max_position_embeddings", default=16384),
        "d_model": width,
        "depth": given("num_hidden_layers", default=36),
        "heads": heads,
        "mlp_dim": given("intermediate_size", default=16384),
        "activation": given.activation("hidden_act", default="relu2"),
        "qk_norm": given("qk_layernorm", default=True),
        "epsilon": given("layer_norm_eps", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=False),
        "embed_dropout": 0.0,
        "branch_dropout": float(given("hidden_dropout", default=0.0)),
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


FAMILY = Family(
    "persimmon",
    _config,
    table="""
    embed_tokens.weight                                v d        token_embedding
    layers.{i}.input_layernorm.{weight,bias}           d          block_{i}/attention_norm/{scale,bias}
    layers.{i}.self_attn.query_key_value.weight        (h p k) d  block_{i}/attention/{query,key,value}/kernel  d (h k)
    layers.{i}.self_attn.query_key_value.bias          (h p k)    block_{i}/attention/{query,key,value}/bias    (h k)
    layers.{i}.self_attn.q_layernorm.{weight,bias}     k          block_{i}/attention/query_norm/{scale,bias}
    layers.{i}.self_attn.k_layernorm.{weight,bias}     k          block_{i}/attention/key_norm/{scale,bias}
    layers.{i}.self_attn.dense.weight                  d (h k)    block_{i}/attention/out/kernel          (h k) d
    layers.{i}.self_attn.dense.bias                    d          block_{i}/attention/out/bias
    layers.{i}.post_attention_layernorm.{weight,bias}  d          block_{i}/mlp_norm/{scale,bias}
    layers.{i}.mlp.dense_h_to_4h.weight                f d        block_{i}/mlp/up/kernel                 d f
    layers.{i}.mlp.dense_h_to_4h.bias                  f          block_{i}/mlp/up/bias
    layers.{i}.mlp.dense_4h_to_h.weight                d f        block_{i}/mlp/down/kernel               f d
    layers.{i}.mlp.dense_4h_to_h.bias                  d          block_{i}/mlp/down/bias
    final_layernorm.{weight,bias}                      d          head_norm/{scale,bias}                  # and:
    lm_head.weight                                     v d        head/kernel                             d v
    final_layernorm.{weight,bias}                      d          head_affine/{scale,bias}                # if tied
    """,
    prefixes=("model.",),
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
