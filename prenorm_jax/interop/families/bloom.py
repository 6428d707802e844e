"""BLOOM (transformers' `bloom`): ALiBi in place of positions, and a norm on the embedding, which stays one."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    given.only(
        "apply_residual_connection_post_layernorm", False, why="the stream would go on from the norms, affine and all"
    )
    if given("slow_but_exact", default=False):
        given.only("pretraining_tp", 1, why="beside slow_but_exact it leaves out biases")
    dropout = float(given("hidden_dropout", default=0.0))
    return {
        "vocab_size": given("vocab_size", default=250880),
        "max_len": given("seq_length", default=2048),  # that it was trained on: scores fall with any distance
        "positions": "alibi",
        "d_model": given("hidden_size", "n_embed", default=64),
        "depth": given("n_layer", "num_hidden_layers", default=2),
        "heads": given("n_head", "num_attention_heads", default=8),
        "activation": "gelu_tanh",
        "embed_norm": True,
        "epsilon": given("layer_norm_epsilon", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=True),
        "embed_dropout": 0.0,
        "branch_dropout": dropout,
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


FAMILY = Family(
    "bloom",
    _config,
    table="""
    word_embeddings.weight                        v d        token_embedding
    word_embeddings_layernorm.{weight,bias}       d          embedding_norm/{scale,bias}
    h.{i}.input_layernorm.{weight,bias}           d          block_{i}/attention_norm/{scale,bias}
    h.{i}.self_attention.query_key_value.weight   (h p k) d  block_{i}/attention/{query,key,value}/kernel  d (h k)
    h.{i}.self_attention.query_key_value.bias     (h p k)    block_{i}/attention/{query,key,value}/bias    (h k)
    h.{i}.self_attention.dense.weight             d (h k)    block_{i}/attention/out/kernel                (h k) d
    h.{i}.self_attention.dense.bias               d          block_{i}/attention/out/bias
    h.{i}.post_attention_layernorm.{weight,bias}  d          block_{i}/mlp_norm/{scale,bias}
    h.{i}.mlp.dense_h_to_4h.weight                f d        block_{i}/mlp/up/kernel                       d f
    h.{i}.mlp.dense_h_to_4h.bias                  f          block_{i}/mlp/up/bias
    h.{i}.mlp.dense_4h_to_h.weight                d f        block_{i}/mlp/down/kernel                     f d
    h.{i}.mlp.dense_4h_to_h.bias                  d          block_{i}/mlp/down/bias
    ln_f.{weight,bias}                            d          head_affine/{scale,bias}                      # if tied
    ln_f.{weight,bias}                            d          head_norm/{scale,bias}                        # else, and:
    lm_head.weight                                v d        head/kernel                                   d v
    """,
    prefixes=("transformer.",),
)
