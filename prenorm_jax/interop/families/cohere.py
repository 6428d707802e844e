"""Cohere's Command R (transformers' `cohere`, `cohere2`): norms with scales alone, one for both branches.

Of Cohere2 three blocks of four see a window, and are turned by their positions; the fourth sees all, and has none.
"""

from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    normed = given("use_qk_norm", default=False)
    return _shared(given, 500000.0) | {"qk_norm": normed, "qk_norm_by_head": normed}


def _config2(given: Given) -> dict[str, Any]:
    given.said("sliding_window")
    found = _shared(given, 10000.0)
    given.only("head_dim", found["d_model"] // max(found["heads"], 1))
    pattern = _pattern(given, found["depth"])
    return found | {
        "window": given("sliding_window", default=4096),
        "attention_pattern": pattern,
        "global_rotary_base": 0.0 if "g" in pattern else None,
    }


def _shared(given: Given, base: float) -> dict[str, Any]:
    width, heads = given("hidden_size", default=8192), given("num_attention_heads", default=64)
    biased = given("attention_bias", default=False)
    return given.rotary(width, heads, base=base) | {
        "rotary_interleaved": True,
        "vocab_size": given("vocab_size", default=256000),
        "max_len": given("max_position_embeddings", default=8192),
        "d_model": width,
        "depth": given("num_hidden_layers", default=40),
        "heads": heads,
        "kv_heads": given("num_key_value_heads", default=heads),
        "mlp_dim": given("intermediate_size", default=22528),
        "gated_mlp": True,
        "activation": given.activation("hidden_act", default="silu"),
        "logit_scale": given("logit_scale", default=0.0625),
        "parallel": True,
        "shared_norm": True,
        "norm_bias": False,
        "use_bias": biased,
        "reader_bias": False,
        "qkv_bias": biased,
        "epsilon": given("layer_norm_eps", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=True),
        "embed_dropout": 0.0,
        "branch_dropout": 0.0,
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


def _pattern(given: Given, depth: int) -> str:
    """Our letters for the blocks, which older files say as a number. Raises PrenormError for kinds not known."""
    every = given("sliding_window_pattern", default=4)
    full, sliding = "full_attention", "sliding_attention"
    kinds = given("layer_types", default=[sliding if i % max(every, 1) else full for i in range(1, depth + 1)])
    if len(kinds) != depth or not all(kind in (full, sliding) for kind in kinds):
        raise PrenormError(
            f"config.json: layer_types={kinds!r} does not say of each of {depth} blocks whether its attention is full "
            "or sliding"
        )
    return "".join("g" if kind == full else "l" for kind in kinds)


_TABLE = """
    embed_tokens.weight                       v d      token_embedding
    layers.{i}.input_layernorm.weight         d        block_{i}/norm/scale
    layers.{i}.self_attn.q_proj.weight        (h k) d  block_{i}/attention/query/kernel        d (h k)
    layers.{i}.self_attn.{k,v}_proj.weight    (g k) d  block_{i}/attention/{key,value}/kernel  d (g k)
    layers.{i}.self_attn.q_norm.weight        h k      block_{i}/attention/query_norm/scale
    layers.{i}.self_attn.k_norm.weight        g k      block_{i}/attention/key_norm/scale
    layers.{i}.self_attn.o_proj.weight        d (h k)  block_{i}/attention/out/kernel          (h k) d
    layers.{i}.mlp.{gate,up}_proj.weight      f d      block_{i}/mlp/{gate,up}/kernel          d f
    layers.{i}.mlp.down_proj.weight           d f      block_{i}/mlp/down/kernel               f d
    norm.weight                               d        head_affine/scale                       # under a tied head
    norm.weight                               d        head_norm/scale                         # else, and:
    lm_head.weight                            v d      head/kernel                             d v
    # With attention_bias, which the MLP has none of:
    layers.{i}.self_attn.q_proj.bias          (h k)    block_{i}/attention/query/bias
    layers.{i}.self_attn.{k,v}_proj.bias      (g k)    block_{i}/attention/{key,value}/bias
    layers.{i}.self_attn.o_proj.bias          d        block_{i}/attention/out/bias
    -                                         d        block_{i}/mlp/down/bias
"""
_MASKS = (r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",)

FAMILY = Family("cohere", _config, _TABLE, prefixes=("model.",), ignored=_MASKS)
COHERE2 = Family("cohere2", _config2, _TABLE, prefixes=("model.",), ignored=_MASKS)
