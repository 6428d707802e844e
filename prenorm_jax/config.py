"""Run and model configuration: every key with its default, and what is checked about the values.

`base_config()` is what the files in `configs/` start from. `ModelConfig` is the checked, frozen form of `config.model`
that modules and the converter work on; it also answers the questions that several keys decide together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict, config_dict

from prenorm_jax.errors import PrenormError

NORMS = ("layernorm", "rmsnorm", "crmsnorm")
POSITIONS = ("learned", "sinusoidal", "rotary", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer, described literally: the fields say exactly which parameters the tree holds.

    `d_model` is the width d of the Pre-LN network for all three norms; under crmsnorm the stream has d-1 numbers.
    `None` means "as the field named in the comment".
    """

    norm: str = "layernorm"  # layernorm | rmsnorm | crmsnorm
    vocab_size: int = 257
    max_len: int = 1024  # longest sequence; the length of a learned position table
    depth: int = 4
    d_model: int = 128
    heads: int = 4
    kv_heads: int | None = None  # heads
    head_dim: int | None = None  # d_model // heads
    mlp_dim: int | None = None  # 4 * d_model
    gated_mlp: bool = False  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    activation: str = "gelu_tanh"
    positions: str = "learned"  # learned | sinusoidal | rotary | none
    rotary_base: float = 10000.0
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)) instead of one after the other
    shared_norm: bool = False  # with `parallel`: one norm for both branches
    post_norm: bool = False  # norm(x + f(x)) instead of x + f(norm(x)); see math in README for what converts
    final_norm: bool = True  # the norm between the last block and the head
    embed_norm: bool = False  # a LayerNorm right after the embedding (BLOOM)
    tie_embeddings: bool = True
    use_bias: bool = True  # in every linear layer of a block
    reader_bias: bool | None = None  # use_bias; in q, k, v, up and gate. Folding β makes it true
    head_bias: bool = False
    norm_affine: bool = True  # scale and bias in every norm
    norm_bias: bool | None = None  # norm_affine; False leaves the scale alone
    final_norm_affine: bool | None = None  # norm_affine; a tied head keeps it when the others are folded
    epsilon: float = 1e-5
    dropout: float = 0.0  # rate for all three of:
    attention_dropout: float | None = None  # dropout; on attention probabilities
    branch_dropout: float | None = None  # dropout; on branch outputs, before they are added to the stream
    embed_dropout: float | None = None  # dropout; on the sum of token and position embeddings
    dtype: str = "float32"  # of the computation; statistics and softmax use float32 at least
    param_dtype: str = "float32"

    @classmethod
    def create(cls, config: ModelConfig | Mapping[str, Any] | ConfigDict) -> ModelConfig:
        """The checked, resolved form of `config.model`. Raises PrenormError naming the first key that is wrong."""
        if isinstance(config, cls):
            return config
        given = dict(config.items())
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(given) - set(fields))
        if unknown:
            raise PrenormError(f"unknown key model.{unknown[0]}; known keys: {', '.join(fields)}")
        for name, value in given.items():
            _check_type(f"model.{name}", fields[name].type, value)
        raw = cls(**given)
        _check_choice("model.norm", raw.norm, NORMS)
        _check_choice("model.positions", raw.positions, POSITIONS)
        _check_choice("model.activation", raw.activation, ACTIVATIONS)
        for name in ("dtype", "param_dtype"):
            _check_choice(f"model.{name}", getattr(raw, name), DTYPES)
            if getattr(raw, name) == "float64" and not jax.config.jax_enable_x64:
                raise PrenormError(f"model.{name}='float64' needs 64-bit mode: set JAX_ENABLE_X64=1")
        for name in ("vocab_size", "max_len", "depth", "d_model", "heads", "kv_heads", "head_dim", "mlp_dim"):
            value = getattr(raw, name)
            if value is not None and value < 1:
                raise PrenormError(f"model.{name}={value} must be at least 1")
        if raw.d_model < 2:
            raise PrenormError("model.d_model=1: a normalised stream needs at least 2 numbers")
        if raw.head_dim is None and raw.d_model % raw.heads:
            raise PrenormError(
                f"model.heads={raw.heads} does not divide model.d_model={raw.d_model}; change one or set model.head_dim"
            )
        kv_heads = _default(raw.kv_heads, raw.heads)
        if raw.heads % kv_heads:
            raise PrenormError(f"model.kv_heads={kv_heads} does not divide model.heads={raw.heads}")
        if not raw.epsilon >= 0:
            raise PrenormError(f"model.epsilon={raw.epsilon} must not be negative")
        resolved = dataclasses.replace(
            raw,
            kv_heads=kv_heads,
            head_dim=_default(raw.head_dim, raw.d_model // raw.heads),
            mlp_dim=_default(raw.mlp_dim, 4 * raw.d_model),
            reader_bias=_default(raw.reader_bias, raw.use_bias),
            norm_bias=_default(raw.norm_bias, True) and raw.norm_affine,
            final_norm_affine=_default(raw.final_norm_affine, raw.norm_affine),
            attention_dropout=_default(raw.attention_dropout, raw.dropout),
            branch_dropout=_default(raw.branch_dropout, raw.dropout),
            embed_dropout=_default(raw.embed_dropout, raw.dropout),
        )
        return resolved


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value
