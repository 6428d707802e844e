"""Phi-1, 1.5 and 2 (transformers' `phi`): one norm feeds attention and MLP, and the head has a bias."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    width, heads = given("hidden_size", default=2048), given("num_attention_heads", default=32)
    return given.rotary(width, heads, 0.5, share_key="partial_rotary_factor") | {
        "vocab_size": given("vocab_size", default=51200),
        "max_len": given("max_position_embeddings", default=2048),
        "d_model": width,
        "depth": given("num_hidden_layers", default=24),
        "heads": heads,
        "kv_heads": given("num_key_value_heads", default=heads),
        "mlp_dim": given("intermediate_size", default=8192),
        "activation": given.activation("hidden_act", default="gelu_new"),
        "qk_norm": given("qk_layernorm", default=False),
        "parallel": True,
        "shared_norm": True,
        "head_bias": True,
        "epsilon": given("layer_norm_eps", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=False),
        "embed_dropout": float(given("embd_pdrop", default=0.0)),
        "branch_dropout": float(given("resid_pdrop", default=0.0)),
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


FAMILY = Family(
    "phi",
    _config,
    table="""
    embed_tokens.weight                            v d      token_embedding
    layers.{i}.input_layernorm.{weight,bias}       d        block_{i}/norm/{scale,bias}
    layers.{i}.self_attn.q_proj.weight             (h k) d  block_{i}/attention/query/kernel        d (h k)
    layers.{i}.self_attn.q_proj.bias               (h k)    block_{i}/attention/query/bias
    layers.{i}.self_attn.{k,v}_proj.weight         (g k) d  block_{i}/attention/{key,value}/kernel  d (g k)
    layers.{i}.self_attn.{k,v}_proj.bias           (g k)    block_{i}/attention/{key,value}/bias
    layers.{i}.self_attn.q_layernorm.{weight,bias}  k       block_{i}/attention/query_norm/{scale,bias}
    layers.{i}.self_attn.k_layernorm.{weight,bias}  k       block_{i}/attention/key_norm/{scale,bias}
    layers.{i}.self_attn.dense.weight              d (h k)  block_{i}/attention/out/kernel          (h k) d
    layers.{i}.self_attn.dense.bias                d        block_{i}/attention/out/bias
    layers.{i}.mlp.fc1.weight                      f d      block_{i}/mlp/up/kernel                 d f
    layers.{i}.mlp.fc1.bias                        f        block_{i}/mlp/up/bias
    layers.{i}.mlp.fc2.weight                      d f      block_{i}/mlp/down/kernel               f d
    layers.{i}.mlp.fc2.bias                        d        block_{i}/mlp/down/bias
    final_layernorm.{weight,bias}                  d        head_norm/{scale,bias}                  # and:
    lm_head.weight                                 v d      head/kernel                             d v
    lm_head.bias                                   v        head/bias
    final_layernorm.{weight,bias}                  d        head_affine/{scale,bias}                # if tied, and:
    lm_head.bias                                   v        head_bias
    """,
    prefixes=("model.",),
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
