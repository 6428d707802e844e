"""XGLM and BioGPT (transformers' `xglm`, `biogpt`): fairseq's decoders, whose tokens are scaled by √d; ε is 1e-5."""

import math
from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    given.only("add_cross_attention", False)
    if (pad := given("pad_token_id", default=1)) >= 2:
        raise PrenormError(
            f"config.json: pad_token_id={pad} takes position {pad - 2} from the table: no model here does"
        )
    width, dropout = given("d_model", "hidden_size", default=1024), float(given("dropout", default=0.1))
    return _shared(given, width) | {
        "vocab_size": given("vocab_size", default=256008),
        "max_len": given("max_position_embeddings", default=2048),
        "positions": "fairseq",
        "depth": given("num_layers", "num_hidden_layers", default=24),
        "heads": given("attention_heads", "num_attention_heads", default=16),
        "mlp_dim": given("ffn_dim", default=4096),
        "activation": given.activation("activation_function", default="gelu"),
        "embed_dropout": dropout,
        "branch_dropout": dropout,
        "attention_dropout": float(given("attention_dropout", default=0.1)),
    }


def _biogpt_config(given: Given) -> dict[str, Any]:
    given("layer_norm_eps", default=1e-12)  # which nothing reads
    dropout = float(given("hidden_dropout_prob", default=0.1))
    return _shared(given, given("hidden_size", default=1024)) | {
        "vocab_size": given("vocab_size", default=42384),
        "max_len": given("max_position_embeddings", default=1024),
        "depth": given("num_hidden_layers", default=24),
        "heads": given("num_attention_heads", default=16),
        "mlp_dim": given("intermediate_size", default=4096),
        "activation": given.activation("hidden_act", default="gelu"),
        "embed_dropout": dropout,
        "branch_dropout": dropout,
        "attention_dropout": float(given("attention_probs_dropout_prob", default=0.1)),
    }


def _shared(given: Given, width: int) -> dict[str, Any]:
    return {
        "d_model": width,
        "embed_scale": math.sqrt(width) if given("scale_embedding", default=True) else 1.0,
        "epsilon": 1e-5,
        "tie_embeddings": given("tie_word_embeddings", default=True),
    }


_TABLE = """
    embed_tokens.weight                            v d      token_embedding
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
    layer_norm.{weight,bias}                       d        head_affine/{scale,bias}               # under a tied head
    layer_norm.{weight,bias}                       d        head_norm/{scale,bias}                 # else, and:
    lm_head.weight                                 v d      head/kernel                            d v
"""

FAMILY = Family("xglm", _config, _TABLE, prefixes=("model.",), ignored=(r"embed_positions\.weights",))
BIOGPT = Family(
    "biogpt",
    _biogpt_config,
    _TABLE
    + """
    embed_positions.weight                         n@2 d    position_embedding
    """,
    prefixes=("biogpt.",),
    aliases=((r"^output_projection\.weight$", "lm_head.weight"),),
)
