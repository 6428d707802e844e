"""OLMo-1 (transformers' `olmo`). Its norms have no parameters, and ε is 1e-5, fixed."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    width, heads = given("hidden_size", default=4096), given("num_attention_heads", default=32)
    biased = given("attention_bias", default=False)
    return given.rotary(width, heads) | {
        "vocab_size": given("vocab_size", default=50304),
        "max_len": given("max_position_embeddings", default=2048),
        "d_model": width,
        "depth": given("num_hidden_layers", default=32),
        "heads": heads,
        "kv_heads": given("num_key_value_heads", default=heads),
        "mlp_dim": given("intermediate_size", default=11008),
        "gated_mlp": True,
        "activation": given.activation("hidden_act", default="silu"),
        "clip_qkv": given("clip_qkv", default=None),
        "use_bias": biased,
        "reader_bias": False,
        "qkv_bias": biased,
        "norm_affine": False,
        "epsilon": 1e-5,
        "tie_embeddings": given("tie_word_embeddings", default=False),
        "embed_dropout": 0.0,
        "branch_dropout": 0.0,
        "attention_dropout": given("attention_dropout", default=0.0),
    }


FAMILY = Family(
    "olmo",
    _config,
    table="""
    embed_tokens.weight                       v d      token_embedding
    layers.{i}.self_attn.q_proj.weight        (h k) d  block_{i}/attention/query/kernel        d (h k)
    layers.{i}.self_attn.{k,v}_proj.weight    (g k) d  block_{i}/attention/{key,value}/kernel  d (g k)
    layers.{i}.self_attn.o_proj.weight        d (h k)  block_{i}/attention/out/kernel          (h k) d
    layers.{i}.mlp.{gate,up}_proj.weight      f d      block_{i}/mlp/{gate,up}/kernel          d f
    layers.{i}.mlp.down_proj.weight           d f      block_{i}/mlp/down/kernel               f d
    lm_head.weight                            v d      head/kernel                             d v
    # With attention_bias, which the MLP has none of:
    layers.{i}.self_attn.q_proj.bias          (h k)    block_{i}/attention/query/bias
    layers.{i}.self_attn.{k,v}_proj.bias      (g k)    block_{i}/attention/{key,value}/bias
    layers.{i}.self_attn.o_proj.bias          d        block_{i}/attention/out/bias
    -                                         d        block_{i}/mlp/down/bias
    """,
    prefixes=("model.",),
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
