"""Nemotron (transformers' `nemotron`): norms scale by 1 and what is stored; squared ReLU, half of each head turned."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    width, heads = given("hidden_size", default=6144), given("num_attention_heads", default=48)
    head_dim = given("head_dim", default=width // max(heads, 1))
    biased, mlp_biased = given("attention_bias", default=False), given("mlp_bias", default=False)
    return given.rotary(head_dim * heads, heads, 0.5, share_key="partial_rotary_factor") | {
        "vocab_size": given("vocab_size", default=256000),
        "max_len": given("max_position_embeddings", default=4096),
        "d_model": width,
        "depth": given("num_hidden_layers", default=32),
        "heads": heads,
        "kv_heads": given("num_key_value_heads", default=heads),
        "head_dim": head_dim,
        "mlp_dim": given("intermediate_size", default=24576),
        "activation": given.activation("hidden_act", default="relu2"),
        "use_bias": biased or mlp_biased,
        "reader_bias": mlp_biased,
        "qkv_bias": biased,
        "epsilon": given("norm_eps", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=False),
        "embed_dropout": 0.0,
        "branch_dropout": 0.0,
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


_TABLE = """
    embed_tokens.weight                                  v d      token_embedding
    1+layers.{i}.input_layernorm.weight                  d        block_{i}/attention_norm/scale
    layers.{i}.input_layernorm.bias                      d        block_{i}/attention_norm/bias
    layers.{i}.self_attn.q_proj.weight                   (h k) d  block_{i}/attention/query/kernel        d (h k)
    layers.{i}.self_attn.q_proj.bias                     (h k)    block_{i}/attention/query/bias
    layers.{i}.self_attn.{k,v}_proj.weight               (g k) d  block_{i}/attention/{key,value}/kernel  d (g k)
    layers.{i}.self_attn.{k,v}_proj.bias                 (g k)    block_{i}/attention/{key,value}/bias
    layers.{i}.self_attn.o_proj.weight                   d (h k)  block_{i}/attention/out/kernel          (h k) d
    1+layers.{i}.post_attention_layernorm.weight         d        block_{i}/mlp_norm/scale
    layers.{i}.post_attention_layernorm.bias             d        block_{i}/mlp_norm/bias
    layers.{i}.mlp.up_proj.weight                        f d      block_{i}/mlp/up/kernel                 d f
    layers.{i}.mlp.up_proj.bias                          f        block_{i}/mlp/up/bias
    layers.{i}.mlp.down_proj.weight                      d f      block_{i}/mlp/down/kernel               f d
    1+norm.weight                                        d        head_norm/scale                         # and:
    norm.bias                                            d        head_norm/bias
    lm_head.weight                                       v d      head/kernel                             d v
    1+norm.weight                                        d        head_affine/scale                       # if tied
    norm.bias                                            d        head_affine/bias
"""
# Ours have a bias in both branches' outputs or in neither.
_OUTPUTS = (
    ("attention_bias", "layers.{i}.self_attn.o_proj.bias  d  block_{i}/attention/out/bias"),
    ("mlp_bias", "layers.{i}.mlp.down_proj.bias  d  block_{i}/mlp/down/bias"),
)


def _table(given: Given) -> str:
    lines = [line if given(key, default=False) else f"-{line[line.index('  ') :]}" for key, line in _OUTPUTS]
    return _TABLE + "\n".join(lines)


FAMILY = Family(
    "nemotron",
    _config,
    _table,
    prefixes=("model.",),
    ignored=(r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
)
