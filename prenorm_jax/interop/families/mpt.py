"""MPT (transformers' `mpt`): ALiBi in place of positions, no biases, norms with scales alone."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    given.only("no_bias", True)
    given.only("norm_type", "low_precision_layernorm", "layernorm")
    given.only("logit_scale", None)
    given("learned_pos_emb", default=True)  # which says nothing beside ALiBi
    given("embedding_fraction", default=1.0)  # of gradients
    attention = Given(given("attn_config", default={}))
    attention.only("alibi", True)
    attention.only("alibi_bias_max", 8, why="transformers reads 8 whatever it says")
    attention.only("attn_type", "multihead_attention")
    attention.only("qk_ln", False)
    attention.only("prefix_lm", False)
    width = given("d_model", "hidden_size", default=2048)
    return {
        "vocab_size": given("vocab_size", default=50368),
        "max_len": given("max_seq_len", default=2048),
        "positions": "alibi",
        "d_model": width,
        "depth": given("n_layers", "num_hidden_layers", default=24),
        "heads": given("n_heads", "num_attention_heads", default=16),
        "mlp_dim": width * given("expansion_ratio", default=4),
        "activation": "gelu",
        "score_scale": attention("softmax_scale", default=None),
        "clip_qkv": attention("clip_qkv", default=None),
        "use_bias": False,
        "norm_bias": False,
        "epsilon": given("layer_norm_epsilon", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=True),
        "embed_dropout": float(given("emb_pdrop", default=0.0)),
        "branch_dropout": float(given("resid_pdrop", default=0.0)),
        "attention_dropout": float(attention("attn_pdrop", default=0.0)),
    }


FAMILY = Family(
    "mpt",
    _config,
    table="""
    wte.weight                       v d        token_embedding
    blocks.{i}.norm_1.weight         d          block_{i}/attention_norm/scale
    blocks.{i}.attn.Wqkv.weight      (p h k) d  block_{i}/attention/{query,key,value}/kernel  d (h k)
    blocks.{i}.attn.out_proj.weight  d (h k)    block_{i}/attention/out/kernel                (h k) d
    blocks.{i}.norm_2.weight         d          block_{i}/mlp_norm/scale
    blocks.{i}.ffn.up_proj.weight    f d        block_{i}/mlp/up/kernel                       d f
    blocks.{i}.ffn.down_proj.weight  d f        block_{i}/mlp/down/kernel                     f d
    norm_f.weight                    d          head_affine/scale                             # under a tied head
    norm_f.weight                    d          head_norm/scale                               # else, and:
    lm_head.weight                   v d        head/kernel                                   d v
    """,
    prefixes=("transformer.",),
)
