"""ViTs in JAX's own files: the .npz of google-research/vision_transformer and of google-research/big_vision.

There is no config.json; the arrays' shapes say what the network is, heads included. The two differ in the numbers in
their modules' names. big_vision may stack the blocks, and hold a text tower beside.
"""

import math
import re
from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.family import Family, Given

_BLOCK, _STACK = "Transformer/encoderblock_0/", "Transformer/encoderblock/"
_ATTENTION, _UP = "MultiHeadDotProductAttention_0/query/kernel", "MlpBlock_0/Dense_0/kernel"


def _config(given: Given) -> dict[str, Any]:
    there = given.shapes
    if "pre_logits/kernel" in there:
        raise PrenormError("the head reads tanh of one layer more (pre_logits), which no model here has")
    patch, _, channels, width = given.shape("embedding/kernel")
    block = _STACK if _STACK + _ATTENTION in there else _BLOCK
    *stacked, _, heads, head_dim = given.shape(block + _ATTENTION)
    numbers = [int(found[1]) for found in map(re.compile(r"Transformer/encoderblock_(\d+)/").match, there) if found]
    attends = "MAPHead_0/probe" in there
    return _positions(given, patch) | {
        "family": "vit",
        "patch_size": patch,
        "channels": channels,
        "classes": given.shape("head/kernel")[1] if "head/kernel" in there else 0,
        "class_token": "cls" in there,
        "pooling": "attention" if attends else "class" if "cls" in there else "mean",
        "d_model": width,
        "depth": stacked[0] if stacked else 1 + max(numbers),
        "heads": heads,
        "head_dim": head_dim,
        "mlp_dim": given.shape(block + _UP)[-1],
        "activation": "gelu_tanh",
        "epsilon": 1e-6,
    }


def _positions(given: Given, patch: int) -> dict[str, Any]:
    """The keys of positions, and the size of images that follows from their number."""
    if "pos_embedding" not in given.shapes:
        if not (image := given("image_size", default=0)):
            raise PrenormError(
                "the file has no pos_embedding, whose length says how large images are: give that in a file beside, of "
                'the same name with .json in place of .npz: {"image_size": 224}'
            )
        return {"positions": "sincos2d", "image_size": image}
    rows = given.shape("pos_embedding")[1]
    side, on_class = math.isqrt(rows), False
    if side**2 != rows and "cls" in given.shapes:
        side, on_class = math.isqrt(rows - 1), True
    if side**2 + on_class != rows:
        raise PrenormError(f"pos_embedding has {rows} rows, which is no square, and the models here take squares alone")
    return {"image_size": side * patch, "class_position": on_class}


_TABLE = """
    cls                                        1 1 d    class_token                        1 d
    pos_embedding                              1 n d    position_embedding                 n d
    embedding/kernel                           y x c d  patch_embedding/kernel
    embedding/bias                             d        patch_embedding/bias
    BLOCK/LayerNorm_0/{scale,bias}             d        block_{i}/attention_norm/{scale,bias}             d
    BLOCK/ATTENTION/{query,key,value}/kernel   d h k    block_{i}/attention/{query,key,value}/kernel      d (h k)
    BLOCK/ATTENTION/{query,key,value}/bias     h k      block_{i}/attention/{query,key,value}/bias        (h k)
    BLOCK/ATTENTION/out/kernel                 h k d    block_{i}/attention/out/kernel                    (h k) d
    BLOCK/ATTENTION/out/bias                   d        block_{i}/attention/out/bias                      d
    BLOCK/LayerNorm_1/{scale,bias}             d        block_{i}/mlp_norm/{scale,bias}                   d
    BLOCK/MlpBlock_0/Dense_0/kernel            d f      block_{i}/mlp/up/kernel                           d f
    BLOCK/MlpBlock_0/Dense_0/bias              f        block_{i}/mlp/up/bias                             f
    BLOCK/MlpBlock_0/Dense_1/kernel            f d      block_{i}/mlp/down/kernel                         f d
    BLOCK/MlpBlock_0/Dense_1/bias              d        block_{i}/mlp/down/bias                           d
    MAPHead_0/probe                            1 1 d    pool/probe                         1 d
    MAPHead_0/ATTENTION/{query,key,value}/kernel  d h k  pool/{query,key,value}/kernel     d (h k)
    MAPHead_0/ATTENTION/{query,key,value}/bias    h k    pool/{query,key,value}/bias       (h k)
    MAPHead_0/ATTENTION/out/kernel             h k d    pool/out/kernel                    (h k) d
    MAPHead_0/ATTENTION/out/bias               d        pool/out/bias
    MAPHead_0/LayerNorm_0/{scale,bias}         d        pool/mlp_norm/{scale,bias}
    MAPHead_0/MlpBlock_0/Dense_0/kernel        d f      pool/up/kernel
    MAPHead_0/MlpBlock_0/Dense_0/bias          f        pool/up/bias
    MAPHead_0/MlpBlock_0/Dense_1/kernel        f d      pool/down/kernel
    MAPHead_0/MlpBlock_0/Dense_1/bias          d        pool/down/bias
    Transformer/encoder_norm/{scale,bias}      d        head_norm/{scale,bias}             # which a head reads,
    Transformer/encoder_norm/{scale,bias}      d        pool_norm/{scale,bias}             # a pooling by attention,
    Transformer/encoder_norm/{scale,bias}      d        head_affine/{scale,bias}           # or nothing
    head/kernel                                d v      head/kernel
    head/bias                                  v        head/bias
"""


def _table(given: Given) -> str:
    lines = _TABLE.replace("ATTENTION", "MultiHeadDotProductAttention_0")
    if _STACK + _ATTENTION not in given.shapes:
        return lines.replace("BLOCK/", "Transformer/encoderblock_{i}/")
    return re.sub(r"BLOCK/(\S+\s+)", rf"{_STACK}\1l ", lines)  # the blocks, one behind the other, on a first axis


FAMILY = Family(
    "vit_npz",
    _config,
    _table,
    prefixes=("opt/target/", "params/img/", "params/", "img/"),
    along=(r"txt/.*", "t", "b"),
    aliases=(
        (r"^Transformer/posembed_input/", ""),
        (r"^(Transformer/encoderblock_\d+)/LayerNorm_2/", r"\1/LayerNorm_1/"),
        (r"^(Transformer/encoderblock_\d+)/MultiHeadDotProductAttention_1/", r"\1/MultiHeadDotProductAttention_0/"),
        (r"^(Transformer/encoderblock_\d+)/MlpBlock_3/", r"\1/MlpBlock_0/"),
    ),
)
