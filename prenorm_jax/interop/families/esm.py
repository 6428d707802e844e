"""ESM-2 and ESM-1b (transformers' `esm`), of proteins: a masked language model, or its tokens without the head.

Files say LayerNorm.weight, or LayerNorm.gamma as transformers 5 writes them. The contacts' head, which reads attention
weights, is no part of the network and goes along into an export.
"""

from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.families.roberta_prelayernorm import BLOCK, EMBEDDING, HEAD, at_padding
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    given.only("is_decoder", False)
    given.only("add_cross_attention", False)
    given.only("is_folding_model", False, why="no model here folds proteins")
    given.asked |= {"esmfold_config", "vocab_list"}  # of one that does
    given.only("position_embedding_type", "absolute", "rotary")
    rotary = given("position_embedding_type", default="absolute") == "rotary"
    width, heads, pad = given("hidden_size", default=768), given("num_attention_heads", default=12), None
    length, positions = given("max_position_embeddings", default=1026), {}
    if rotary:
        positions = {"positions": "rotary", "rotary_base": given("rope_theta", default=10000.0)}
        for key in ("rope_parameters", "rope_scaling"):  # which its library does not read
            rope = given(key, default=None) or {}
            if rope.get("rope_theta", positions["rotary_base"]) != positions["rotary_base"] or (
                rope.get("rope_type", rope.get("type", "default")) != "default"
            ):
                raise PrenormError(f"config.json: {key}={rope!r} is not how this family says it: remove it")
    else:
        pad = given("pad_token_id", default=1)
    dropout = given("token_dropout", default=False)
    return (
        given.masked_language_model("lm_head.dense.weight")
        | positions
        | {
            "vocab_size": given("vocab_size", default=33),
            "max_len": length if rotary else length - pad - 1,
            "pad_token": pad,
            "mask_token": given("mask_token_id", default=32) if dropout else None,
            "embed_norm": bool(given("emb_layer_norm_before", default=None)),
            "d_model": width,
            "depth": given("num_hidden_layers", default=12),
            "heads": heads,
            "mlp_dim": given("intermediate_size", default=3072),
            "epsilon": given("layer_norm_eps", default=1e-12),
            "embed_dropout": 0.0,
            "branch_dropout": float(given("hidden_dropout_prob", default=0.1)),
            "attention_dropout": float(given("attention_probs_dropout_prob", default=0.1)),
        }
    )


_TABLE = f"""
{EMBEDDING}
embeddings.layer_norm.{{weight,bias}}                      d        embedding_norm/{{scale,bias}}
{BLOCK}
encoder.layer.{{i}}.LayerNorm.{{weight,bias}}              d        block_{{i}}/mlp_norm/{{scale,bias}}
{HEAD}
lm_head.bias                                               o        head/bias                            # untied
encoder.emb_layer_norm_after.{{weight,bias}}               d        head_norm/{{scale,bias}}             # if read
encoder.emb_layer_norm_after.{{weight,bias}}               d        head_affine/{{scale,bias}}           # if not
"""

FAMILY = Family(
    "esm",
    _config,
    table=lambda given: at_padding(_TABLE, given),
    prefixes=("esm.",),
    ignored=(
        r"embeddings\.position_ids",
        r"(encoder\.layer\.(\d+|\*)\.attention\.self\.)?rotary_embeddings\.inv_freq",
    ),
    # The hub's files still have a table of positions, which rotary networks do not read.
    along=(r"contact_head\.regression\..*", r"pooler\.dense\..*", r"embeddings\.position_embeddings\.weight"),
    aliases=((r"LayerNorm\.gamma", "LayerNorm.weight"), (r"LayerNorm\.beta", "LayerNorm.bias")),
    sizes=lambda model: {"e": model.d_model},
)
