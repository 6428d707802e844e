"""StarCoder2 (transformers' `starcoder2`): grouped queries, and a window of the positions that each sees."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    given.only("norm_type", "layer_norm")
    given.only("mlp_type", "default")
    width, heads = given("hidden_size", default=3072), given("num_attention_heads", default=24)
    return given.rotary(width, heads) | {
        "vocab_size": given("vocab_size", default=49152),
        "max_len": given("max_position_embeddings", default=4096),
        "d_model": width,
        "depth": given("num_hidden_layers", default=30),
        "heads": heads,
        "kv_heads": given("num_key_value_heads", default=2),
        "mlp_dim": given("intermediate_size", default=12288),
        "activation": given.activation("hidden_act", default="gelu_pytorch_tanh"),
        "window": given("sliding_window", default=None),
        "use_bias": given("use_bias", default=True),
        "epsilon": given("norm_epsilon", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=True),
        "embed_dropout": given("embedding_dropout", default=0.0),
        "branch_dropout": given("residual_dropout", default=0.0),
        "attention_dropout": given("attention_dropout", default=0.0),
    }


FAMILY = Family(
    "starcoder2",
    _config,
    table="""
    embed_tokens.weight                                v d      token_embedding
    layers.{i}.input_layernorm.{weight,bias}           d        block_{i}/attention_norm/{scale,bias}
    layers.{i}.self_attn.q_proj.weight                 (h k) d  block_{i}/attention/query/kernel        d (h k)
    layers.{i}.self_attn.q_proj.bias                   (h k)    block_{i}/attention/query/bias
    layers.{i}.self_attn.{k,v}_proj.weight             (g k) d  block_{i}/attention/{key,value}/kernel  d (g k)
    layers.{i}.self_attn.{k,v}_proj.bias               (g k)    block_{i}/attention/{key,value}/bias
    layers.{i}.self_attn.o_proj.weight                 d (h k)  block_{i}/attention/out/kernel          (h k) d
    layers.{i}.self_attn.o_proj.bias                   d        block_{i}/attention/out/bias
    layers.{i}.post_attention_layernorm.{weight,bias}  d        block_{i}/mlp_norm/{scale,bias}
    layers.{i}.mlp.c_fc.weight                         f d      block_{i}/mlp/up/kernel                 d f
    layers.{i}.mlp.c_fc.bias                           f        block_{i}/mlp/up/bias
    layers.{i}.mlp.c_proj.weight                       d f      block_{i}/mlp/down/kernel               f d
    layers.{i}.mlp.c_proj.bias                         d        block_{i}/mlp/down/bias
    norm.{weight,bias}                                 d        head_affine/{scale,bias}                # if tied
    norm.{weight,bias}                                 d        head_norm/{scale,bias}                  # if not, and:
    lm_head.weight                                     v d      head/kernel                             d v
    """,
    prefixes=("model.",),
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
