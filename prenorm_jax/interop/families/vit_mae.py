"""The encoder of a masked autoencoder (transformers' `vit_mae`): all tokens of a whole image (`last_hidden_state`).

The library masks patches at random and shuffles the others, in inference too; here none is masked. The decoder reads
these tokens, is no part of the network and goes along into an export as it is.
"""

from typing import Any

from prenorm_jax.interop.families import vit
from prenorm_jax.interop.family import Family, Given


def _config(given: Given) -> dict[str, Any]:
    return vit.config(given) | {"classes": 0, "pooling": "none"}


FAMILY = Family(
    "vit_mae",
    _config,
    table=vit.EMBEDDING + vit.ATTENTION + vit.REST,
    prefixes=("vit.",),
    along=(r"decoder\..*",),
)
