"""OPT (transformers' `opt`). Its positions begin at the third row of their table; ε is 1e-5, fixed."""

from typing import Any

from prenorm_jax.interop.family import Family, Given

_POST_LN = (
    "such an OPT is Post-LN, as OPT-350m is: each norm's γ and β put a mean back into the stream, and nothing would be "
    "gained; its norms would have to begin the branches, as those of the other sizes do"
)


def _config(given: Given) -> dict[str, Any]:
    given.only("do_layer_norm_before", True, why=_POST_LN)
    given.only("_remove_final_layer_norm", False, why="its head reads the raw stream, mean and all")
    width = given("hidden_size", default=768)
    given.only("word_embed_proj_dim", width, why="its embedding goes through a matrix, which no model here has")
    return {
        "vocab_size": given("vocab_size", default=50272),
        "max_len": given("max_position_embeddings", default=2048),
        "d_model": width,
        "depth": given("num_hidden_layers", default=12),
        "heads": given("num_attention_heads", default=12),
        "mlp_dim": given("ffn_dim", default=3072),
        "activation": given.activation("activation_function", default="relu"),
        "norm_affine": given("layer_norm_elementwise_affine", default=True),
        "use_bias": given("enable_bias", default=True),
        "epsilon": 1e-5,
        "tie_embeddings": given("tie_word_embeddings", default=True),
        "embed_dropout": 0.0,
        "branch_dropout": given("dropout", default=0.1),
        "attention_dropout": given("attention_dropout", default=0.0),
    }


FAMILY = Family(
    "opt",
    _config,
    table="""
    embed_tokens.weight                            v d      token_embedding
    embed_positions.weight                         n@2 d    position_embedding
    layers.{i}.self_attn_layer_norm.{weight,bias}  d        block_{i}/attention_norm/{scale,bias}
    layers.{i}.self_attn.{q,k,v}_proj.weight       (h k) d  block_{i}/attention/{query,key,value}/kernel  d (h k)
    layers.{i}.self_attn.{q,k,v}_proj.bias         (h k)    block_{i}/attention/{query,key,value}/bias
    layers.{i}.self_attn.out_proj.weight           d (h k)  block_{i}/attention/out/kernel         (h k) d
    layers.{i}.self_attn.out_proj.bias             d        block_{i}/attention/out/bias
    layers.{i}.final_layer_norm.{weight,bias}      d        block_{i}/mlp_norm/{scale,bias}
    layers.{i}.fc1.weight                          f d      block_{i}/mlp/up/kernel                d f
    layers.{i}.fc1.bias                            f        block_{i}/mlp/up/bias
    layers.{i}.fc2.weight                          d f      block_{i}/mlp/down/kernel              f d
    layers.{i}.fc2.bias                            d        block_{i}/mlp/down/bias
    final_layer_norm.{weight,bias}                 d        head_affine/{scale,bias}               # under a tied head
    final_layer_norm.{weight,bias}                 d        head_norm/{scale,bias}                 # else, and:
    lm_head.weight                                 v d      head/kernel                            d v
    """,
    prefixes=("model.decoder.", "decoder."),
)
