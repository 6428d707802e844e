"""SigLIP's text tower (transformers' `siglip_text_model`): a linear map of the last token, be it padding or not.

Its texts are padded to the full length, and no token is masked.
"""

from typing import Any

from prenorm_jax.interop.families.clip import LAYERS, TEXT_EMBEDDING, text_tower
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    width = given("hidden_size", default=768)
    return text_tower(given, width=768, heads=12, mlp_dim=3072) | {
        "vocab_size": given("vocab_size", default=32000),
        "max_len": given("max_position_embeddings", default=64),
        "pooling": "last",
        "outputs": given("projection_size", default=width),
        "activation": given.activation("hidden_act", default="gelu_pytorch_tanh"),
        "epsilon": given("layer_norm_eps", default=1e-6),
    }


FAMILY = Family(
    "siglip_text_model",
    _config,
    table=TEXT_EMBEDDING
    + LAYERS
    + """
    final_layer_norm.{weight,bias}                     d        head_norm/{scale,bias}
    head.weight                                        o d      head/kernel                       d o
    head.bias                                          o        head/bias
    """,
    prefixes=("text_model.",),
    ignored=(r"embeddings\.position_ids",),
    along=(r"vision_model\..*", "logit_(scale|bias)"),
)
