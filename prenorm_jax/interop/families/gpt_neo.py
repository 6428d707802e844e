"""GPT-Neo (transformers' `gpt_neo`): every second block sees a window alone, and scores are not scaled."""

from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    depth = given("num_layers", "num_hidden_layers", default=24)
    return {
        "vocab_size": given("vocab_size", default=50257),
        "max_len": given("max_position_embeddings", default=2048),
        "d_model": given("hidden_size", default=2048),
        "depth": depth,
        "heads": given("num_heads", "num_attention_heads", default=16),
        "mlp_dim": given("intermediate_size", default=None),
        "activation": given.activation("activation_function", default="gelu_new"),
        "score_scale": 1.0,
        "window": given("window_size", default=256),
        "attention_pattern": _pattern(given, depth),
        "qkv_bias": False,
        "epsilon": given("layer_norm_epsilon", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=True),
        "embed_dropout": float(given("embed_dropout", default=0.0)),
        "branch_dropout": float(given("resid_dropout", default=0.0)),
        "attention_dropout": float(given("attention_dropout", default=0.0)),
    }


def _pattern(given: Given, depth: int) -> str:
    """Our letters for the blocks. Raises PrenormError for kinds that are not known, or are not of all blocks."""
    types = given("attention_types", default=[[["global", "local"], 12]])
    try:
        kinds = [kind for group, times in types for _ in range(times) for kind in group]
    except (TypeError, ValueError):
        kinds = []
    given.only("attention_layers", kinds, why="it is not what attention_types says")
    if len(kinds) != depth or not all(kind in ("global", "local") for kind in kinds):
        raise PrenormError(
            f"config.json: attention_types={types!r} does not say of each of {depth} blocks whether it is global or "
            "local"
        )
    return "".join(kind[0] for kind in kinds)


FAMILY = Family(
    "gpt_neo",
    _config,
    table="""
    wte.weight                                v d      token_embedding
    wpe.weight                                n d      position_embedding
    h.{i}.ln_1.{weight,bias}                  d        block_{i}/attention_norm/{scale,bias}
    h.{i}.attn.attention.{q,k,v}_proj.weight  (h k) d  block_{i}/attention/{query,key,value}/kernel  d (h k)
    h.{i}.attn.attention.out_proj.weight      d (h k)  block_{i}/attention/out/kernel                (h k) d
    h.{i}.attn.attention.out_proj.bias        d        block_{i}/attention/out/bias
    h.{i}.ln_2.{weight,bias}                  d        block_{i}/mlp_norm/{scale,bias}
    h.{i}.mlp.c_fc.weight                     f d      block_{i}/mlp/up/kernel                       d f
    h.{i}.mlp.c_fc.bias                       f        block_{i}/mlp/up/bias
    h.{i}.mlp.c_proj.weight                   d f      block_{i}/mlp/down/kernel                     f d
    h.{i}.mlp.c_proj.bias                     d        block_{i}/mlp/down/bias
    ln_f.{weight,bias}                        d        head_affine/{scale,bias}                      # if tied
    ln_f.{weight,bias}                        d        head_norm/{scale,bias}                        # if not, and:
    lm_head.weight                            v d      head/kernel                                   d v
    """,
    prefixes=("transformer.",),
    ignored=(r"h\.\d+\.attn\.attention\.(masked_)?bias",),
)
