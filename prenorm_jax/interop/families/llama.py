"""LLaMA, to be written alone: what a recentred OLMo is, and so what any program that runs LLaMAs computes.

Mistral without its window is the same network, whose width need be no multiple of its heads.
"""

from typing import Any

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.interop.family import Family, Given
from prenorm_jax.models.config import ModelConfig


def config(model: ModelConfig, source: dict[str, Any], family: Family) -> dict[str, Any]:
    """The config.json, of one of the two families, of an rmsnorm network, with what its source's says of tokens.

    Raises PrenormError for a network that is none of these.
    """
    wanted = {"positions": "rotary", "rotary_dim": None, "rotary_interleaved": False, "window": None, "clip_qkv": None}
    wanted |= {"global_rotary_base": None, "score_scale": None, "embed_scale": 1.0, "logit_scale": 1.0}
    wanted |= {"gated_mlp": True, "activation": "silu", "parallel": False, "use_bias": False, "reader_bias": False}
    wanted |= {"qkv_bias": False, "head_bias": False, "qk_norm": False, "embed_norm": False, "norm_affine": False}
    if other := [
        f"model.{key}={getattr(model, key)!r}" for key, value in wanted.items() if getattr(model, key) != value
    ]:
        raise PrenormError(f"a {family.model_type} has no {', '.join(other)}: give --format=source")
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache")
    return {key: source[key] for key in keys if key in source} | {
        "architectures": [f"{family.model_type.title()}ForCausalLM"],
        "model_type": family.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.mlp_dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_len,
        "rms_norm_eps": model.epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": None,
        "sliding_window": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": model.param_dtype,
    }


def _config(given: Given) -> dict[str, Any]:
    raise PrenormError("a llama is not read: its RMSNorms keep the stream's mean")


_TABLE = """
    model.embed_tokens.weight                         v d      token_embedding
    model.layers.{i}.input_layernorm.weight           d        block_{i}/attention_norm/scale
    model.layers.{i}.self_attn.q_proj.weight          (h k) d  block_{i}/attention/query/kernel   d (h k)
    model.layers.{i}.self_attn.{k,v}_proj.weight      (g k) d  block_{i}/attention/{key,value}/kernel   d (g k)
    model.layers.{i}.self_attn.o_proj.weight          d (h k)  block_{i}/attention/out/kernel     (h k) d
    model.layers.{i}.post_attention_layernorm.weight  d        block_{i}/mlp_norm/scale
    model.layers.{i}.mlp.{gate,up}_proj.weight        f d      block_{i}/mlp/{gate,up}/kernel     d f
    model.layers.{i}.mlp.down_proj.weight             d f      block_{i}/mlp/down/kernel          f d
    model.norm.weight                                 d        head_affine/scale                  # under a tied head
    model.norm.weight                                 d        head_norm/scale                    # else, and:
    lm_head.weight                                    v d      head/kernel                        d v
"""
FAMILY, MISTRAL = Family("llama", _config, _TABLE), Family("mistral", _config, _TABLE)
