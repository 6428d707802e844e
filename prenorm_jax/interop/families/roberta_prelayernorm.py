"""RoBERTa-PreLayerNorm (transformers' `roberta-prelayernorm`): a masked language model, or its tokens without the head.

Positions count the tokens that are not padding, from the row behind padding's own on. A LayerNorm ends the embedding.
"""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    given.only("is_decoder", False)
    given.only("add_cross_attention", False)
    given.only("position_embedding_type", "absolute")
    head = given.masked_language_model("lm_head.dense.weight")
    if head["transform"]:
        given.only("hidden_act", "gelu", "gelu_python", why="its head's activation is gelu, and one serves both here")
    pad, dropout = given("pad_token_id", default=1), float(given("hidden_dropout_prob", default=0.1))
    return head | {
        "vocab_size": given("vocab_size", default=50265),
        "max_len": given("max_position_embeddings", default=512) - pad - 1,
        "pad_token": pad,
        "token_types": given("type_vocab_size", default=2),
        "embed_norm": True,
        "d_model": given("hidden_size", default=768),
        "depth": given("num_hidden_layers", default=12),
        "heads": given("num_attention_heads", default=12),
        "mlp_dim": given("intermediate_size", default=3072),
        "activation": given.activation("hidden_act", default="gelu"),
        "epsilon": given("layer_norm_eps", default=1e-12),
        "embed_dropout": dropout,
        "branch_dropout": dropout,
        "attention_dropout": float(given("attention_probs_dropout_prob", default=0.1)),
    }


# What BERT's descendants have in common, ESM-2 among them.
EMBEDDING = """
embeddings.word_embeddings.weight                          v d      token_embedding
embeddings.position_embeddings.weight                      n@pad d  position_embedding
"""
BLOCK = """
encoder.layer.{i}.attention.LayerNorm.{weight,bias}        d        block_{i}/attention_norm/{scale,bias}
encoder.layer.{i}.attention.self.query.weight              (h k) d  block_{i}/attention/query/kernel   d (h k)
encoder.layer.{i}.attention.self.key.weight                (h k) d  block_{i}/attention/key/kernel     d (h k)
encoder.layer.{i}.attention.self.value.weight              (h k) d  block_{i}/attention/value/kernel   d (h k)
encoder.layer.{i}.attention.self.{query,key,value}.bias    (h k)    block_{i}/attention/{query,key,value}/bias
encoder.layer.{i}.attention.output.dense.weight            d (h k)  block_{i}/attention/out/kernel     (h k) d
encoder.layer.{i}.attention.output.dense.bias              d        block_{i}/attention/out/bias
encoder.layer.{i}.intermediate.dense.weight                f d      block_{i}/mlp/up/kernel            d f
encoder.layer.{i}.intermediate.dense.bias                  f        block_{i}/mlp/up/bias
encoder.layer.{i}.output.dense.weight                      d f      block_{i}/mlp/down/kernel          f d
encoder.layer.{i}.output.dense.bias                        d        block_{i}/mlp/down/bias
"""
HEAD = """
lm_head.dense.weight                                       e d      transform/kernel                   d e
lm_head.dense.bias                                         d        transform/bias
lm_head.layer_norm.{weight,bias}                           d        transform_norm/{scale,bias}
lm_head.bias                                               v        head_bias                            # tied
lm_head.decoder.weight                                     v d      head/kernel                        d v
"""
_TABLE = f"""
{EMBEDDING}
embeddings.token_type_embeddings.weight                    s d      token_type_embedding
embeddings.LayerNorm.{{weight,bias}}                       d        embedding_norm/{{scale,bias}}
{BLOCK}
encoder.layer.{{i}}.intermediate.LayerNorm.{{weight,bias}}  d        block_{{i}}/mlp_norm/{{scale,bias}}
{HEAD}
=lm_head.decoder.bias                                      v        head_bias
lm_head.decoder.bias                                       o        head/bias                            # untied
LayerNorm.{{weight,bias}}                                  d        head_norm/{{scale,bias}}             # if read
LayerNorm.{{weight,bias}}                                  d        head_affine/{{scale,bias}}           # if not
"""


def at_padding(table: str, given: Given) -> str:
    """The table, where the rows of positions before padding's own are none."""
    return table.replace("n@pad", f"n@{given('pad_token_id', default=1)}")


FAMILY = Family(
    "roberta-prelayernorm",
    _config,
    table=lambda given: at_padding(_TABLE, given),
    prefixes=("roberta_prelayernorm.",),
    ignored=(r"embeddings\.(position|token_type)_ids",),
    along=(r"pooler\.dense\..*", r"lm_head\.bias"),  # which the library does not use where the head is not tied
    sizes=lambda model: {"e": model.d_model},
)
