"""Networks that the tests share: a fixed pool a family, in which nearly every two options' values come together.

The options are those of Pre-LN networks that convert. What is wrong with one option, or with two together, shows in a
pool of this size; the wide search (`make test-wide`) draws from the same options without end.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from prenorm_jax.models.gpt import GPTConfig
from prenorm_jax.models.vit import ViTConfig

FLAG = (False, True)
DROPOUT = (0.0, 0.3)
OR_AS_ANOTHER = (None, True, False)
TRANSFORMER = {
    "depth": (1, 2),
    "heads": (1, 2, 4),
    "kv_heads": (1, 2, 4),
    "score_scale": (0.7,),
    "head_dim": (2, 6),
    "mlp_dim": (1, 9),
    "gated_mlp": FLAG,
    "activation": ("gelu", "gelu_tanh", "silu"),
    "parallel": FLAG,
    "shared_norm": FLAG,
    "embed_norm": FLAG,
    "qk_norm": FLAG,
    "qk_norm_by_head": FLAG,
    "clip_qkv": (None, 0.5),
    "layer_scale": (None, 0.1),
    "use_bias": FLAG,
    "reader_bias": OR_AS_ANOTHER,
    "qkv_bias": OR_AS_ANOTHER,
    "head_bias": FLAG,
    "norm_affine": FLAG,
    "norm_bias": FLAG,
    "final_norm_affine": OR_AS_ANOTHER,
    "kept_norm_affine": OR_AS_ANOTHER,
    "epsilon": (1e-12, 1e-6, 1e-5, 1e-3),
    "attention_dropout": DROPOUT,
    "branch_dropout": DROPOUT,
    "embed_dropout": DROPOUT,
    "stochastic_depth": DROPOUT,
    "stochastic_depth_schedule": ("linear", "constant"),
    "coordinates": ("drop", "reflect"),
    "coordinates_entry": (None, 0, 1),
}
OPTIONS: dict[str, dict[str, tuple]] = {
    "gpt": TRANSFORMER
    | {
        "activation": (*TRANSFORMER["activation"], "relu", "relu2"),
        "d_model": (2, 5, 8, 13, 16),
        "positions": GPTConfig.choices["positions"],
        "rotary_dim": (None, 2, 4),
        "rotary_interleaved": FLAG,
        "alibi_rounded": FLAG,
        "window": (None, 3),
        "attention_pattern": ("l", "gl"),
        "global_rotary_base": (None, 0.0, 50.0),
        "embed_scale": (3.0,),
        "logit_scale": (0.1,),
        "tie_embeddings": FLAG,
    },
    "vit": TRANSFORMER
    | {
        "activation": ("gelu", "gelu_tanh", "quick_gelu", "tanh"),
        "d_model": (2, 4, 5, 8, 13, 16),
        "head_dim": (4, 6),
        "patch_size": (2, 3, 6),
        "patch_bias": FLAG,
        "positions": ViTConfig.choices["positions"],
        "relative_bias": ViTConfig.choices["relative_bias"],
        "class_token": FLAG,
        "distillation_token": FLAG,
        "class_position": FLAG,
        "registers": (0, 2),
        "pooling": tuple(pooling for pooling in ViTConfig.choices["pooling"] if pooling != "none"),
        "norm_after_pooling": FLAG,
        "pooled_norm": FLAG,
    },
}
SIZE, SEED = 14, 1239  # networks a family; of the order in which their options are chosen


def possible(options: Mapping[str, Any]) -> bool:
    """Whether there are networks with these options, which need not be all, that convert."""
    get = options.get
    needs_rotary = get("rotary_dim") or get("rotary_interleaved") or get("global_rotary_base") is not None
    return not (
        get("heads", 4) % get("kv_heads", 1)
        or (get("shared_norm") and get("parallel") is False)
        or (get("positions") == "sincos2d" and get("d_model", 4) % 4)
        or (get("positions") == "rotary2d" and get("head_dim", 4) % 4)
        or (needs_rotary and (get("positions", "rotary") != "rotary" or get("alibi_rounded")))
        or (get("qk_norm_by_head") and get("qk_norm") is False)
        or (get("rotary_dim") or 0) > get("head_dim", 6)
        or (get("positions", "alibi") != "alibi" and get("alibi_rounded"))
        or (get("attention_pattern") == "l" and get("global_rotary_base") is not None)
        or (get("pooling", "mean").startswith("class") and get("class_token") is False)
        or (get("distillation_token") and get("class_token") is False)
        or (get("pooling") in ("distilled", "class_pair") and False in (get("distillation_token"), get("class_token")))
        or (get("pooled_norm") and get("pooling", "class") not in ("class", "mean", "class_pair"))
        or (get("pooling") == "attention" and get("norm_after_pooling"))
    )


Pair = frozenset[tuple[str, Any]]


def pairs_of(options: Mapping[str, Any]) -> set[Pair]:
    """Every two options with their values."""
    return {frozenset(pair) for pair in itertools.combinations(options.items(), 2)}


def all_pairs(family: str) -> set[Pair]:
    """Those that some network has."""
    items = [[(name, value) for value in values] for name, values in OPTIONS[family].items()]
    pairs = itertools.chain.from_iterable(itertools.product(*two) for two in itertools.combinations(items, 2))
    return {frozenset(pair) for pair in pairs if possible(dict(pair))}


@functools.lru_cache
def pool(family: str) -> tuple[dict[str, Any], ...]:
    """SIZE networks' options, built option by option, each with a value that brings the most pairs still missing."""
    rng, missing, networks = np.random.default_rng(SEED), all_pairs(family), []
    for _ in range(SIZE):
        options: dict[str, Any] = {}
        for name in rng.permutation(list(OPTIONS[family])).tolist():
            values = [value for value in OPTIONS[family][name] if possible(options | {name: value})]
            gains = [sum(frozenset({(name, value), item}) in missing for item in options.items()) for value in values]
            options[name] = values[int(rng.choice(np.flatnonzero(np.equal(gains, max(gains)))))]
        missing -= pairs_of(options)
        networks.append(options)
    return tuple(networks)
