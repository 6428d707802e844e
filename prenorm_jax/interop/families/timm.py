"""timm's ViTs: `vit_*`, `deit_*`, `deit3_*`.

Their config.json names the architecture, whose sizes are in timm's code. The tensors say most of them. What they do not
say follows from the name: the heads, the activation, ε, and that the blocks are of the usual kind. Other names, and
`model_args` that the tensors do not show, are refused. Without a head they give what the pooling does.
"""

import dataclasses
import re
from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.family import Family, Given
from prenorm_jax.models.config import ModelConfig

_HEADS = {"tiny": 3, "xsmall": 4, "wee": 4, "little": 5, "small": 6, "medium": 8, "mediumd": 8, "betwixt": 10}
_HEADS |= {"base": 12, **dict.fromkeys(("large", "huge", "giant", "gigantic", "so400m", "giantopt"), 16)}
_OTHER_HEADS = {
    r"_base_patch\d+_plus_": 14,
    r"vit_base_patch16_gap_224": 16,
    r"vit_giant_patch14_.*(dinov2|tipsv2)": 24,
}
_KINDS = "plus|clip|quickgelu|siglip|gap|ls|miil|dinov2|tipsv2|reg[1-9]"
_NAME = re.compile(rf"(?:vit|deit|deit3)_({'|'.join(_HEADS)})_patch\d+(?:_(?:{_KINDS}))*(?:_\d+)?")
_TANH = re.compile(r"vit_(base_patch32|so400m_patch16|giantopt_patch16|large_patch16(?=.*_512))_siglip")

# Arguments that the tensors, or config.json elsewhere, show, or that only training has.
_SHOWN = {"img_size", "patch_size", "in_chans", "num_classes", "global_pool", "embed_dim", "depth", "mlp_ratio"}
_SHOWN |= {"num_heads", "qkv_bias", "qk_norm", "init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm"}
_SHOWN |= {"fc_norm", "dynamic_img_size", "weight_init", "fix_init", "drop_rate", "pos_drop_rate", "patch_drop_rate"}
_SHOWN |= {"proj_drop_rate", "attn_drop_rate", "drop_path_rate"}
_POOLING = {"token": "class", "avg": "mean", "map": "attention", "": "none"}


def _config(given: Given) -> dict[str, Any]:
    name, arguments, there = given("architecture", default=""), given("model_args", default={}), given.shapes
    heads = _heads(name, arguments)
    rows, width = given.shape("pos_embed")[1:]
    _, channels, _, patch = given.shape("patch_embed.proj.weight")
    size = Given(
        {"img_size": arguments.get("img_size") or given("pretrained_cfg", default={}).get("input_size", [])[1:]}
    )
    image, mlp_dim = size.side("img_size", default=224), given.shape("blocks.0.mlp.fc2.weight")[1]
    gated = given.shape("blocks.0.mlp.fc1.weight")[0] == 2 * mlp_dim
    values = {
        "family": "vit",
        "image_size": image,
        "patch_size": patch,
        "channels": channels,
        "classes": given.shape("head.weight")[0] if "head.weight" in there else 0,
        "patch_bias": "patch_embed.proj.bias" in there,
        "class_token": "cls_token" in there,
        "class_position": "cls_token" in there and rows != (image // patch) ** 2,
        "registers": given.shape("reg_token")[1] if "reg_token" in there else 0,
        "pooling": _pooling(given, name),
        "norm_after_pooling": "fc_norm.weight" in there,
        "embed_norm": "norm_pre.weight" in there,
        "d_model": width,
        "depth": 1 + max(int(found[1]) for found in map(re.compile(r"blocks\.(\d+)\.").match, there) if found),
        "heads": heads,
        "mlp_dim": mlp_dim,
        "gated_mlp": gated,
        "activation": "silu" if gated else _activation(name),
        "qkv_bias": "blocks.0.attn.qkv.bias" in there,
        "qk_norm": "blocks.0.attn.q_norm.weight" in there,
        "layer_scale": 1.0 if "blocks.0.ls1.gamma" in there else None,
        "epsilon": 1e-5 if "_clip_" in name else 1e-6,
    }
    if values["pooling"] == "attention" and values["class_token"] + values["registers"]:
        raise PrenormError(
            f"config.json: architecture={name!r} pools the patches alone by attention: no model here does"
        )
    return values


def _heads(name: str, arguments: dict[str, Any]) -> int:
    """Of the architecture. Raises PrenormError for an unknown one, and for arguments that may change the function."""
    if not (found := _NAME.fullmatch(name)):
        raise PrenormError(
            f"config.json: architecture={name!r} is none of timm's that are known here: vit_SIZE_patchN, deit_, deit3_ "
            f"of the sizes {', '.join(_HEADS)}, with {_KINDS.replace('|', ', ')}"
        )
    if unknown := [key for key, value in arguments.items() if key not in _SHOWN and value is not None]:
        raise PrenormError(f"config.json: model_args: {unknown[0]}={arguments[unknown[0]]!r} may change the function")
    others = [heads for pattern, heads in _OTHER_HEADS.items() if re.search(pattern, name)]
    return arguments.get("num_heads", (others or [_HEADS[found[1]]])[0])


def _activation(name: str) -> str:
    return "quick_gelu" if "_quickgelu_" in name else "gelu_tanh" if _TANH.match(name) else "gelu"


def _pooling(given: Given, name: str) -> str:
    usual = "map" if "attn_pool.latent" in given.shapes else "avg" if "_gap" in name else "token"
    places = (given.values, given.values.get("model_args") or {}, given.values.get("pretrained_cfg") or {})
    said = [place["global_pool"] for place in places if place.get("global_pool") is not None]
    pool = said[0] if said else usual
    if set(said[:2]) - {pool} and "global_pool" in places[1]:
        raise PrenormError(f"config.json: global_pool is {' and '.join(map(repr, said))}: leave one")
    if pool not in _POOLING:
        raise PrenormError(f"config.json: global_pool={pool!r} changes the function and is not supported")
    return _POOLING[pool]


_TABLE = """
    cls_token                                1 1 d      class_token                               1 d
    reg_token                                1 t d      registers                                 t d
    pos_embed                                1 n d      position_embedding                        n d
    patch_embed.proj.weight                  d c y x    patch_embedding/kernel                    y x c d
    patch_embed.proj.bias                    d          patch_embedding/bias
    norm_pre.{weight,bias}                   d          embedding_norm/{scale,bias}
    blocks.{i}.norm1.{weight,bias}           d          block_{i}/attention_norm/{scale,bias}
    blocks.{i}.attn.qkv.weight               (p h k) d  block_{i}/attention/{query,key,value}/kernel  d (h k)
    blocks.{i}.attn.qkv.bias                 (p h k)    block_{i}/attention/{query,key,value}/bias    (h k)
    blocks.{i}.attn.q_norm.{weight,bias}     k          block_{i}/attention/query_norm/{scale,bias}
    blocks.{i}.attn.k_norm.{weight,bias}     k          block_{i}/attention/key_norm/{scale,bias}
    blocks.{i}.attn.proj.weight              d (h k)    block_{i}/attention/out/kernel            (h k) d
    blocks.{i}.attn.proj.bias                d          block_{i}/attention/out/bias
    blocks.{i}.ls1.gamma                     d          block_{i}/attention/out_scale
    blocks.{i}.norm2.{weight,bias}           d          block_{i}/mlp_norm/{scale,bias}
    blocks.{i}.mlp.fc2.weight                d f        block_{i}/mlp/down/kernel                 f d
    blocks.{i}.mlp.fc2.bias                  d          block_{i}/mlp/down/bias
    blocks.{i}.ls2.gamma                     d          block_{i}/mlp/down_scale
    attn_pool.latent                         1 1 d      pool/probe                                1 d
    attn_pool.q.weight                       (h k) d    pool/query/kernel                         d (h k)
    attn_pool.q.bias                         (h k)      pool/query/bias
    attn_pool.kv.weight                      (p h k) d  pool/{key,value}/kernel                   d (h k)
    attn_pool.kv.bias                        (p h k)    pool/{key,value}/bias                     (h k)
    attn_pool.proj.weight                    d (h k)    pool/out/kernel                           (h k) d
    attn_pool.proj.bias                      d          pool/out/bias
    attn_pool.norm.{weight,bias}             d          pool/mlp_norm/{scale,bias}
    attn_pool.mlp.fc1.weight                 f d        pool/up/kernel                            d f
    attn_pool.mlp.fc1.bias                   f          pool/up/bias
    attn_pool.mlp.fc2.weight                 d f        pool/down/kernel                          f d
    attn_pool.mlp.fc2.bias                   d          pool/down/bias
    head.weight                              v d        head/kernel                               d v
    head.bias                                v          head/bias
"""
_MLP = """
    blocks.{i}.mlp.fc1.weight                f d        block_{i}/mlp/up/kernel                   d f
    blocks.{i}.mlp.fc1.bias                  f          block_{i}/mlp/up/bias
"""
_GATED = """
    blocks.{i}.mlp.fc1.weight                (p f) d    block_{i}/mlp/{gate,up}/kernel            d f
    blocks.{i}.mlp.fc1.bias                  (p f)      block_{i}/mlp/{gate,up}/bias              f
"""


def _table(given: Given) -> str:
    norm = "fc_norm" if "fc_norm.weight" in given.shapes else "norm"
    gated = given.shape("blocks.0.mlp.fc1.weight")[0] == 2 * given.shape("blocks.0.mlp.fc2.weight")[1]
    ends = (f"{norm}.{{weight,bias}}  d  {end}/{{scale,bias}}\n" for end in ("head_norm", "pool_norm", "head_affine"))
    return _TABLE + (_GATED if gated else _MLP) + "".join(ends)


FAMILY = Family("timm", _config, _table)
NORM_BIAS = re.compile(r"(^|\.)(norm[12]?|fc_norm)\.bias$")


def of_rmsnorms(config: dict[str, Any], model: ModelConfig) -> tuple[dict[str, Any], ModelConfig]:
    """The config.json that has timm make such a ViT, a Pre-LN one, with its own RmsNorm, and our model of that.

    Raises PrenormError where timm would put RmsNorms on what is not the stream, or another ε than the ViT's into them.
    """
    if model_type := config.get("model_type"):
        raise PrenormError(
            f"timm-rmsnorm is of timm's ViTs, which config.json, of a {model_type}, is not: see --format"
        )
    wanted = {"embed_norm": False, "qk_norm": False, "epsilon": 1e-6}
    other = [f"model.{key}={getattr(model, key)!r}" for key, value in wanted.items() if getattr(model, key) != value]
    if model.pooling == "attention":
        other.append("model.pooling='attention'")
    if other:
        raise PrenormError(f"timm's norm_layer='rmsnorm' is another function with {', '.join(other)}: --format=source")
    changed = {"norm": "rmsnorm", "norm_affine": True, "norm_bias": False, "final_norm_affine": True}
    arguments = (config.get("model_args") or {}) | {"norm_layer": "rmsnorm"}
    return config | {"model_args": arguments}, dataclasses.replace(model, **changed)
