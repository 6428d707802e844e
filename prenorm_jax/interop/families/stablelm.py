"""StableLM (transformers' `stablelm`), in turn or parallel; of 2 12B each head has norms of its own, a module each."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    width, heads = given("hidden_size", default=2560), given("num_attention_heads", default=32)
    parallel, normed = given("use_parallel_residual", default=False), given("qk_layernorm", default=False)
    return given.rotary(width, heads, 0.25, share_key="partial_rotary_factor") | {
        "vocab_size": given("vocab_size", default=50304),
        "max_len": given("max_position_embeddings", default=4096),
        "d_model": width,
        "depth": given("num_hidden_layers", default=32),
        "heads": heads,
        "kv_heads": given("num_key_value_heads", default=32),
        "mlp_dim": given("intermediate_size", default=6912),
        "gated_mlp": True,
        "activation": given.activation("hidden_act", default="silu"),
        "parallel": parallel,
        "shared_norm": parallel,
        "qk_norm": normed,
        "qk_norm_by_head": normed,
        "use_bias": False,
        "qkv_bias": given("use_qkv_bias", default=False),
        "epsilon": given("layer_norm_eps", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=False),
        "embed_dropout": 0.0,
        "branch_dropout": float(given("hidden_dropout", default=0.0)),
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


FAMILY = Family(
    "stablelm",
    _config,
    table="""
    embed_tokens.weight                                v d      token_embedding
    layers.{i}.input_layernorm.{weight,bias}           d        block_{i}/norm/{scale,bias}             # parallel
    layers.{i}.input_layernorm.{weight,bias}           d        block_{i}/attention_norm/{scale,bias}   # or in turn
    layers.{i}.post_attention_layernorm.{weight,bias}  d        block_{i}/mlp_norm/{scale,bias}
    layers.{i}.self_attn.q_proj.weight                 (h k) d  block_{i}/attention/query/kernel        d (h k)
    layers.{i}.self_attn.q_proj.bias                   (h k)    block_{i}/attention/query/bias
    layers.{i}.self_attn.{k,v}_proj.weight             (g k) d  block_{i}/attention/{key,value}/kernel  d (g k)
    layers.{i}.self_attn.{k,v}_proj.bias               (g k)    block_{i}/attention/{key,value}/bias
    layers.{i}.self_attn.q_layernorm.norms.{h}.weight  k        block_{i}/attention/query_norm/scale    h k
    layers.{i}.self_attn.k_layernorm.norms.{g}.weight  k        block_{i}/attention/key_norm/scale      g k
    -                                                  h k      block_{i}/attention/query_norm/bias
    -                                                  g k      block_{i}/attention/key_norm/bias
    layers.{i}.self_attn.o_proj.weight                 d (h k)  block_{i}/attention/out/kernel          (h k) d
    layers.{i}.mlp.{gate,up}_proj.weight               f d      block_{i}/mlp/{gate,up}/kernel          d f
    layers.{i}.mlp.down_proj.weight                    d f      block_{i}/mlp/down/kernel               f d
    norm.{weight,bias}                                 d        head_norm/{scale,bias}                  # and:
    lm_head.weight                                     v d      head/kernel                             d v
    norm.{weight,bias}                                 d        head_affine/{scale,bias}                # if tied
    """,
    prefixes=("model.",),
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
