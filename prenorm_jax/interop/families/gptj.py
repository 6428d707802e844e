"""GPT-J (transformers' `gptj`): one norm feeds attention and MLP; heads are turned in part, in pairs side by side."""

from typing import Any

from prenorm_jax.interop.family import Family, Given


def config(given: Given) -> dict[str, Any]:
    """The keys of our model; CodeGen's too."""
    given.said("rotary_dim")
    given.only("rotary", True)
    given.only("scale_attn_weights", True)
    width, heads = given("n_embd", "hidden_size", default=4096), given("n_head", "num_attention_heads", default=16)
    turned = given("rotary_dim", default=64)
    return {
        "vocab_size": given("vocab_size", default=50400),
        "max_len": given("n_positions", "max_position_embeddings", default=2048),
        "positions": "rotary",
        "rotary_dim": None if turned * heads == width else turned,
        "rotary_interleaved": True,
        "d_model": width,
        "depth": given("n_layer", "num_hidden_layers", default=28),
        "heads": heads,
        "mlp_dim": given("n_inner", default=None),
        "activation": given.activation("activation_function", default="gelu_new"),
        "parallel": True,
        "shared_norm": True,
        "qkv_bias": False,
        "head_bias": True,
        "epsilon": given("layer_norm_epsilon", default=1e-5),
        "tie_embeddings": given("tie_word_embeddings", default=False),
        "embed_dropout": float(given("embd_pdrop", default=0.0)),
        "branch_dropout": float(given("resid_pdrop", default=0.0)),
        "attention_dropout": float(given("attn_pdrop", default=0.0)),
    }


TABLE = """
wte.weight                    v d      token_embedding
h.{i}.ln_1.{weight,bias}      d        block_{i}/norm/{scale,bias}
h.{i}.attn.out_proj.weight    d (h k)  block_{i}/attention/out/kernel      (h k) d
-                             d        block_{i}/attention/out/bias
h.{i}.mlp.fc_in.weight        f d      block_{i}/mlp/up/kernel             d f
h.{i}.mlp.fc_in.bias          f        block_{i}/mlp/up/bias
h.{i}.mlp.fc_out.weight       d f      block_{i}/mlp/down/kernel           f d
h.{i}.mlp.fc_out.bias         d        block_{i}/mlp/down/bias
ln_f.{weight,bias}            d        head_norm/{scale,bias}              # and:
lm_head.weight                v d      head/kernel                         d v
lm_head.bias                  v        head/bias
ln_f.{weight,bias}            d        head_affine/{scale,bias}            # under a tied head, and:
lm_head.bias                  v        head_bias
"""
MASKS = (r"h\.\d+\.attn\.((masked_)?bias|causal_mask|embed_positions)",)

FAMILY = Family(
    "gptj",
    config,
    table=TABLE
    + """
h.{i}.attn.{q,k,v}_proj.weight  (h k) d  block_{i}/attention/{query,key,value}/kernel  d (h k)
""",
    prefixes=("transformer.",),
    ignored=MASKS,
)
