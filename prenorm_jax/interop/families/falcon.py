"""Falcon (transformers' `falcon`), in its layouts.

7B has one key for all heads and one norm for both branches; 40B a key for each group of heads and a norm for each
branch; 11B groups and one norm. Others (RW) have one branch after the other, and ALiBi, rounded, for positions.
"""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    width, heads = given("hidden_size", "n_embed", default=4544), given("num_attention_heads", default=71)
    for key in ("num_ln_in_parallel_attn", "parallel_attn"):  # of which a layout reads one
        given(key, default=None)
    grouped = given("num_kv_heads", default=heads)
    alone = 1 if given("multi_query", default=True) else heads
    positions = given.rotary(width, heads)
    if given("alibi", default=False):
        positions |= {"positions": "alibi", "alibi_rounded": True, "rotary_dim": None}
    return positions | {
        "vocab_size": given("vocab_size", default=65024),
        "max_len": given("max_position_embeddings", default=2048),
        "d_model": width,
        "depth": given("num_hidden_layers", default=32),
        "heads": heads,
        "kv_heads": grouped if _is_new(given) else alone,
        "mlp_dim": given("ffn_hidden_size", default=4 * width),
        "activation": given.activation("activation", default="gelu"),
        "parallel": _norms(given) is not _IN_TURN,
        "shared_norm": _norms(given) is _ONE,
        "use_bias": given("bias", default=False),
        "epsilon": given("layer_norm_epsilon", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=True),
        "embed_dropout": 0.0,
        "branch_dropout": given("hidden_dropout", default=0.0),
        "attention_dropout": given("attention_dropout", default=0.0),
    }


def _is_new(given: Given) -> bool:
    return given("new_decoder_architecture", default=False)


def _norms(given: Given) -> str:
    """The lines of a block's norms."""
    if _is_new(given):
        return _ONE if given("num_ln_in_parallel_attn", default=2) == 1 else _TWO
    return _ONE if given("parallel_attn", default=True) else _IN_TURN


_TABLE = """
word_embeddings.weight                       v d              token_embedding
h.{i}.self_attention.query_key_value.weight  (g p=r,1,1 k) d  block_{i}/attention/{query,key,value}/kernel  d (g p k)
h.{i}.self_attention.query_key_value.bias    (g p=r,1,1 k)    block_{i}/attention/{query,key,value}/bias   (g p k)
h.{i}.self_attention.dense.weight            d (h k)          block_{i}/attention/out/kernel               (h k) d
h.{i}.self_attention.dense.bias              d                block_{i}/attention/out/bias
h.{i}.mlp.dense_h_to_4h.weight               f d              block_{i}/mlp/up/kernel                      d f
h.{i}.mlp.dense_h_to_4h.bias                 f                block_{i}/mlp/up/bias
h.{i}.mlp.dense_4h_to_h.weight               d f              block_{i}/mlp/down/kernel                    f d
h.{i}.mlp.dense_4h_to_h.bias                 d                block_{i}/mlp/down/bias
ln_f.{weight,bias}                           d                head_affine/{scale,bias}                     # if tied
ln_f.{weight,bias}                           d                head_norm/{scale,bias}                       # if not
lm_head.weight                               v d              head/kernel                                  d v
"""
_ONE = """
h.{i}.input_layernorm.{weight,bias}           d                block_{i}/norm/{scale,bias}
"""
_TWO = """
h.{i}.ln_attn.{weight,bias}                  d                block_{i}/attention_norm/{scale,bias}
h.{i}.ln_mlp.{weight,bias}                   d                block_{i}/mlp_norm/{scale,bias}
"""
_IN_TURN = """
h.{i}.input_layernorm.{weight,bias}           d                block_{i}/attention_norm/{scale,bias}
h.{i}.post_attention_layernorm.{weight,bias}  d                block_{i}/mlp_norm/{scale,bias}
"""

FAMILY = Family(
    "falcon",
    _config,
    table=lambda given: _TABLE + _norms(given),
    prefixes=("transformer.",),
    ignored=(r"h\.\d+\.self_attention\.rotary_emb\.inv_freq",),
)
