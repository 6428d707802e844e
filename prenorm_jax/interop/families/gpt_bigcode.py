"""GPTBigCode (transformers' `gpt_bigcode`): StarCoder 1. Its heads of queries share one key, or have one each."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    given.only("add_cross_attention", False)
    given.only("scale_attn_weights", True)
    heads = given("n_head", "num_attention_heads", default=12)
    kv_heads = 1 if given("multi_query", default=True) else heads
    given.only("num_key_value_heads", kv_heads, why="it is not what multi_query says")
    return {
        "vocab_size": given("vocab_size", default=50257),
        "max_len": given("n_positions", "max_position_embeddings", default=1024),
        "d_model": given("n_embd", "hidden_size", default=768),
        "depth": given("n_layer", "num_hidden_layers", default=12),
        "heads": heads,
        "kv_heads": kv_heads,
        "mlp_dim": given("n_inner", default=None),
        "activation": given.activation("activation_function", default="gelu_pytorch_tanh"),
        "epsilon": given("layer_norm_epsilon", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=True),
        "embed_dropout": given("embd_pdrop", default=0.1),
        "branch_dropout": given("resid_pdrop", default=0.1),
        "attention_dropout": given("attn_pdrop", default=0.1),
    }


FAMILY = Family(
    "gpt_bigcode",
    _config,
    table="""
    wte.weight                  v d              token_embedding
    wpe.weight                  n d              position_embedding
    h.{i}.ln_1.{weight,bias}    d                block_{i}/attention_norm/{scale,bias}
    h.{i}.attn.c_attn.weight    (g p=r,1,1 k) d  block_{i}/attention/{query,key,value}/kernel  d (g p k)
    h.{i}.attn.c_attn.bias      (g p=r,1,1 k)    block_{i}/attention/{query,key,value}/bias    (g p k)
    h.{i}.attn.c_proj.weight    d (h k)          block_{i}/attention/out/kernel                (h k) d
    h.{i}.attn.c_proj.bias      d                block_{i}/attention/out/bias
    h.{i}.ln_2.{weight,bias}    d                block_{i}/mlp_norm/{scale,bias}
    h.{i}.mlp.c_fc.weight       f d              block_{i}/mlp/up/kernel                       d f
    h.{i}.mlp.c_fc.bias         f                block_{i}/mlp/up/bias
    h.{i}.mlp.c_proj.weight     d f              block_{i}/mlp/down/kernel                     f d
    h.{i}.mlp.c_proj.bias       d                block_{i}/mlp/down/bias
    ln_f.{weight,bias}          d                head_affine/{scale,bias}                      # under a tied head
    ln_f.{weight,bias}          d                head_norm/{scale,bias}                        # else, and:
    lm_head.weight              v d              head/kernel                                   d v
    """,
    prefixes=("transformer.",),
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
)
