"""CodeGen (transformers' `codegen`): GPT-J, but queries, values and keys, in this order, lie in four parts of heads."""

from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.families import gptj
from prenorm_jax.interop.family import Family, Given

PARTS = 4


def _config(given: Given) -> dict[str, Any]:
    found = gptj.config(given)
    if found["heads"] % PARTS:
        raise PrenormError(
            f"config.json: n_head={found['heads']} is not supported: a codegen's heads are a multiple of {PARTS}"
        )
    return found


FAMILY = Family(
    "codegen",
    _config,
    table=gptj.TABLE
    + """
h.{i}.attn.qkv_proj.weight    (m p o k) d  block_{i}/attention/{query,value,key}/kernel  d (m o k)
""",
    prefixes=("transformer.",),
    ignored=gptj.MASKS,
    sizes=lambda model: {"m": PARTS, "o": model.heads // PARTS},
)
