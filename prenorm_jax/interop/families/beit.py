"""BEiT (transformers' `beit`): scores gain a learned number for each distance, of each layer or one for all layers.

With a classifier it gives logits; without one the pooled output where that is the patches' mean, normalised, and else
all tokens (`last_hidden_state`). So do the tokens of masked image modelling, whose head goes along into an export as it
is. Keys have no bias: one would add the same to all scores of a query.
"""

from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.families import vit
from prenorm_jax.interop.family import Family, Given
from prenorm_jax.interop.views import NOTHING

_TABLE = "relative_position_bias.relative_position_bias_table"


def _config(given: Given) -> dict[str, Any]:
    classes, averages = given.labels(), given("use_mean_pooling", default=True)
    if given.names("decode_head") or given.is_a("ForSemanticSegmentation"):
        raise PrenormError("a BEiT for segmentation reads the raw stream, whose mean conversion removes")
    if given.names("lm_head") or given.is_a("ForMaskedImageModeling"):
        if not averages:
            raise PrenormError(
                "config.json: use_mean_pooling=False: for masked image modelling a second norm takes what the final "
                "one gives: no model here does that"
            )
        averages = False
    given("vocab_size", default=8192)  # of the head of masked image modelling
    shared, own = (given(f"use_{which}relative_position_bias", default=False) for which in ("shared_", ""))
    if shared and own:
        raise PrenormError(
            "config.json: use_relative_position_bias and use_shared_relative_position_bias: no model here has both"
        )
    return vit.config(given) | {
        "positions": "learned" if given("use_absolute_position_embeddings", default=False) else "none",
        "relative_bias": "shared" if shared else "layer" if own else "none",
        "pooling": "mean" if averages else "class" if classes else "none",
        "norm_after_pooling": averages,
        "layer_scale": float(given("layer_scale_init_value", default=0.1)) or None,
        "stochastic_depth": float(given("drop_path_rate", default=0.1)),
    }


_LINES = (
    vit.EMBEDDING
    + vit.ATTENTION.replace("encoder.layer.{i}.attention.attention.key.bias ", f"{NOTHING} ")
    + vit.BLOCK
    + f"""
    encoder.layer.{{i}}.attention.attention.{_TABLE}    b h      block_{{i}}/attention/relative_bias/table
    encoder.{_TABLE}                                    b h      relative_bias/table
    encoder.layer.{{i}}.lambda_1                        d        block_{{i}}/attention/out_scale
    encoder.layer.{{i}}.lambda_2                        d        block_{{i}}/mlp/down_scale
    classifier.weight                                   v d      head/kernel                          d v
    classifier.bias                                     v        head/bias
"""
)


def _table(given: Given) -> str:
    norm = "pooler.layernorm" if _config(given)["norm_after_pooling"] else "layernorm"
    return _LINES + "".join(
        f"{norm}.{{weight,bias}}  d  {end}/{{scale,bias}}\n" for end in ("head_norm", "head_affine")
    )


FAMILY = Family(
    "beit",
    _config,
    _table,
    prefixes=("beit.",),
    ignored=(r".*\.relative_position_index",),
    along=(r"embeddings\.mask_token", r"lm_head\..*", r"pooler\.layernorm\..*"),
    sizes=lambda model: {"b": model.distances},
)
