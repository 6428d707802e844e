"""Model sizes by the names they have in the papers."""

from typing import Any

from prenorm_jax.base.errors import PrenormError, check_choice

# name -> (d_model, depth, mlp_dim, heads): arXiv 2010.11929, table 1; 2106.04560, table 2; 2302.05442, section 2.
_VIT = {
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
    "G": (1664, 48, 8192, 16),
    "22B": (6144, 48, 24576, 48),
}

# GPT-2's tokenizer has 50,257 ids. That is 29 × 1733: the table is padded to a multiple of 128, so that it divides over
# devices and fills their tiles. No text has the ids beyond, and training soon makes them improbable.
GPT_VOCAB = 50304

# name -> (d_model, depth, heads, head_dim): arXiv 2005.14165, table 2.1.
_GPT3 = {
    "Small": (768, 12, 12, 64),
    "Medium": (1024, 24, 16, 64),
    "Large": (1536, 24, 16, 96),
    "XL": (2048, 24, 24, 128),
    "2.7B": (2560, 32, 32, 80),
    "6.7B": (4096, 32, 32, 128),
    "13B": (5140, 40, 40, 128),
    "175B": (12288, 96, 96, 128),
}


def gpt3(name: str) -> dict[str, Any]:
    """Keys of `config.model` for a GPT-3 such as "Small": 2,048 positions, GPT-2's vocabulary (padded).

    Its sparse attention in every other layer is dense here. Raises PrenormError for an unknown size.
    """
    check_choice("GPT-3 size", name, tuple(_GPT3))
    keys = dict(zip(("d_model", "depth", "heads", "head_dim"), _GPT3[name], strict=True))
    return keys | {"vocab_size": GPT_VOCAB, "max_len": 2048}


def model(name: str) -> dict[str, Any]:
    """Keys of `config.model`, `family` among them, for "gpt3:Small", "vit:S/16" or "gpt:6x384".

    The last is a GPT of that depth and width with heads of 64, over bytes. Raises PrenormError.
    """
    kind, _, size = name.partition(":")
    if kind == "vit":
        return {"family": "vit"} | vit(size)
    if kind == "gpt3":
        return {"family": "gpt"} | gpt3(size)
    depth, _, width = size.partition("x")
    if kind != "gpt" or not (depth.isdecimal() and width.isdecimal()) or int(width) % 64:
        raise PrenormError(
            f"model {name!r} is none of gpt3:SIZE, vit:SIZE/PATCH and gpt:DEPTHxWIDTH (the width a multiple of 64)"
        )
    keys = {"depth": int(depth), "d_model": int(width), "heads": int(width) // 64}
    return {"family": "gpt", **keys, "vocab_size": 257}


def vit(name: str) -> dict[str, Any]:
    """Keys of `config.model` for a ViT such as "S/16": a size and, after the slash, the patch size.

    22B also has its parallel branches, norms on queries and keys, no biases in query, key, value and norms, and the
    attention pooling; its norms are LayerNorms here, as the Pre-LN network that the variants are equivalent to.
    Raises PrenormError for an unknown size or patch.
    """
    size, _, patch = name.partition("/")
    check_choice("ViT size", size, tuple(_VIT))
    if patch and not patch.isdecimal():
        raise PrenormError(f"ViT size {name!r}: {patch!r} is no patch size; give one like S/16")
    keys = dict(zip(("d_model", "depth", "mlp_dim", "heads"), _VIT[size], strict=True))
    keys["patch_size"] = int(patch) if patch else 14 if size in ("H", "g", "G", "22B") else 16
    if size == "22B":
        keys |= {"parallel": True, "shared_norm": True, "qk_norm": True, "qkv_bias": False, "norm_bias": False}
        keys |= {"class_token": False, "pooling": "attention"}
    return keys
