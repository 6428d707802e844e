"""What a model is: the checked, frozen form of `config.model` that the modules and the converter work on.

Each family has a dataclass of its own on this one, which has the fields of all (`gpt.py`, `vit.py`). It also answers
the questions that several keys decide together.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import jax

from prenorm_jax.base.errors import PrenormError, check_choice, check_range

NORMS = ("layernorm", "rmsnorm", "crmsnorm")
EXECUTION = ("scan", "remat", "attention_kernel")  # keys of `model` that do not change what is computed
OF_CRMSNORM = ("coordinates", "coordinates_entry")  # the fields that say something under crmsnorm alone
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu2", "silu", "tanh")
DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Transformer, described literally: the fields say exactly which parameters the tree holds.

    These are the fields of every family; the subclasses add their own. `d_model` is the width d of the Pre-LN network
    for all three norms; under crmsnorm the stream has d-1 numbers. A default of None means "as the field named in the
    comment" and is resolved by `resolve`.
    """

    family: str = "gpt"  # gpt | encoder | vit: decides the other keys
    norm: str = "layernorm"  # layernorm | rmsnorm | crmsnorm
    coordinates: str = "drop"  # drop | reflect: how crmsnorm's stream is d-1 numbers (models/coordinates.py)
    coordinates_entry: int | None = None  # the entry, from 0, that is dropped or reflected; None: the last
    depth: int = 4  # blocks
    d_model: int = 128  # width d of the stream of the Pre-LN network
    heads: int = 4  # of queries
    kv_heads: int | None = None  # heads; fewer is grouped-query attention
    head_dim: int | None = None  # d_model // heads
    mlp_dim: int | None = None  # 4 * d_model
    gated_mlp: bool = False  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    activation: str = "gelu_tanh"  # gelu | gelu_tanh | quick_gelu | relu | relu2, its square | silu | tanh
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)) instead of one branch after the other
    shared_norm: bool = False  # with `parallel`: one norm feeds both branches
    post_norm: bool = False  # norm(x + f(x)) instead of x + f(norm(x))
    final_norm: bool = True  # the norm between the last block and the head
    embed_norm: bool = False  # a LayerNorm on the embedding, before it enters the stream (BLOOM, CLIP's ViT)
    qk_norm: bool = False  # a LayerNorm on each query and key, over head_dim (ViT-22B); an RMSNorm in the variants
    qk_norm_by_head: bool = False  # with qk_norm: scales, and biases, of each head's own (StableLM 2, Cohere)
    score_scale: float | None = None  # of queries times keys; None: 1/√head_dim
    clip_qkv: float | None = None  # queries, keys, values are clipped to ± this, after qk_norm; None: they are not
    layer_scale: float | None = None  # initial value of a learned scale of each branch's output; None: no such scale
    use_bias: bool = True  # in every linear layer of a block
    reader_bias: bool | None = None  # use_bias; up and gate alone, and what qkv_bias leaves out. Folding sets it
    qkv_bias: bool | None = None  # reader_bias; query, key and value alone. Folding a norm's bias sets it
    head_bias: bool = False  # in the linear layer that gives the logits
    norm_affine: bool = True  # norms have a scale, and a bias unless norm_bias is false
    norm_bias: bool = True  # with norm_affine
    final_norm_affine: bool | None = None  # norm_affine; a tied head keeps it where the others are folded away
    kept_norm_affine: bool | None = None  # norm_affine; of embed_norm, qk_norm and in a ViT's attention pooling
    epsilon: float = 1e-5  # of every norm
    dropout: float = 0.0  # rate of the three below
    attention_dropout: float | None = None  # dropout; on attention probabilities
    branch_dropout: float | None = None  # dropout; on branch outputs, before they are added to the stream
    embed_dropout: float | None = None  # dropout; on the embedding, before it enters the stream
    stochastic_depth: float = 0.0  # rate at which the last block's branches are left out, one draw an example
    stochastic_depth_schedule: str = "linear"  # linear, from 0 in the first block | constant
    init: str = "normal"  # of kernels: normal, of deviation 0.02 (GPT-2) | xavier, uniform by their widths (ViT)
    scan: bool = False  # blocks stacked, and one of them compiled: time to compile does not grow with the depth
    remat: str = "none"  # what of a block its backward pass computes anew: none | dots, all but products | full
    attention_kernel: str = "auto"  # auto: cuDNN's where it serves (see `attention.py`), else as XLA makes it | xla
    dtype: str = "float32"  # of the computation; statistics and softmax are in float32 at least
    param_dtype: str = "float32"  # of the parameters

    causal: ClassVar[bool] = False
    first_norm: ClassVar[bool] = True
    rotary: ClassVar[bool] = False
    rotary2d: ClassVar[bool] = False  # whether queries and keys of an image's patches are turned by their place in it
    alibi: ClassVar[bool] = False
    relative_bias: ClassVar[str] = "none"
    window: ClassVar[int | None] = None
    attention_pattern: ClassVar[str] = "l"
    global_rotary_base: ClassVar[float | None] = None
    tie_embeddings: ClassVar[bool] = False
    decodes: ClassVar[bool] = False  # whether its module takes a cache, and so writes text (`decoding.py`)
    trains: ClassVar[bool] = True  # whether train.py has a loss for it
    token_outputs: ClassVar[bool] = False  # whether its outputs are one for each token
    inputs: ClassVar[str]  # the kind of data that it takes: a key of `data.KINDS`
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "norm": NORMS,
        "coordinates": ("drop", "reflect"),
        "activation": ACTIVATIONS,
        "init": ("normal", "xavier"),
        "stochastic_depth_schedule": ("linear", "constant"),
        "remat": ("none", "dots", "full"),
        "attention_kernel": ("auto", "xla"),
        "dtype": DTYPES,
        "param_dtype": DTYPES,
    }
    at_least: ClassVar[dict[str, float]] = {
        **dict.fromkeys(("depth", "heads", "kv_heads", "head_dim", "mlp_dim"), 1),
        "d_model": 2,
        **dict.fromkeys(("epsilon", "layer_scale", "clip_qkv", "score_scale"), 0),
    }
    rates: ClassVar[tuple[str, ...]] = ("dropout", "attention_dropout", "branch_dropout", "embed_dropout")

    @classmethod
    def resolve(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The checked config of these values, with defaults for None. Raises PrenormError naming the wrong key."""
        types = cls.value_types()
        if unknown := [key for key in values if key not in types]:
            raise PrenormError(f"unknown key model.{unknown[0]}; the keys are {', '.join(types)}")
        given = {key: value for key, value in values.items() if value is not None}
        raw = cls(**{key: _typed(f"model.{key}", value, types[key]) for key, value in given.items()})
        raw._check_values()
        reader_bias = _default(raw.reader_bias, raw.use_bias)
        resolved = dataclasses.replace(
            raw,
            kv_heads=_default(raw.kv_heads, raw.heads),
            head_dim=_default(raw.head_dim, raw.d_model // raw.heads),
            mlp_dim=_default(raw.mlp_dim, 4 * raw.d_model),
            reader_bias=reader_bias,
            qkv_bias=_default(raw.qkv_bias, reader_bias),
            final_norm_affine=_default(raw.final_norm_affine, raw.norm_affine),
            kept_norm_affine=_default(raw.kept_norm_affine, raw.norm_affine),
            **{rate: _default(getattr(raw, rate), raw.dropout) for rate in cls.rates},
        )
        resolved.check()
        return resolved

    @classmethod
    @functools.cache  # reading the hints takes 10 ms
    def value_types(cls) -> dict[str, type]:
        """Field -> the type of its values other than None."""
        hints = typing.get_type_hints(cls)
        return {field.name: (*typing.get_args(hints[field.name]), hints[field.name])[0] for field in fields(cls)}

    def _check_values(self) -> None:
        """Raises PrenormError for a value that is wrong by itself, or for heads."""
        for key, choices in self.choices.items():
            check_choice(f"model.{key}", getattr(self, key), choices)
        for key, minimum in self.at_least.items():
            whole = self.value_types()[key] is int
            below = 2**16 if key == "depth" else 2**31 if whole else math.inf  # blocks are a loop; XLA counts in int32
            check_range(f"model.{key}", getattr(self, key), at_least=minimum, below=below)
        for key in ("dtype", "param_dtype"):
            if getattr(self, key) == "float64" and not jax.config.jax_enable_x64:
                raise PrenormError(f"model.{key}='float64' needs JAX's 64-bit mode: set JAX_ENABLE_X64=1")
        for key in (*self.rates, "stochastic_depth"):
            check_range(f"model.{key}", getattr(self, key), at_least=0, below=1)
        if self.head_dim is None and self.d_model % self.heads:
            raise PrenormError(
                f"model.heads={self.heads} does not divide model.d_model={self.d_model}: change one or set "
                "model.head_dim"
            )
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise PrenormError(f"model.kv_heads={self.kv_heads} does not divide model.heads={self.heads}")

    def check(self) -> None:
        """Raises PrenormError for keys that contradict each other. Families add their own."""
        check_range("model.coordinates_entry", self.coordinates_entry, at_least=0, below=self.d_model)
        if self.shared_norm and not self.parallel:
            raise PrenormError(
                "model.shared_norm=True needs model.parallel=True: one norm cannot feed two steps in turn"
            )
        if self.qk_norm_by_head and not self.qk_norm:
            raise PrenormError("model.qk_norm_by_head=True needs model.qk_norm=True")
        if self.clip_qkv == 0:
            raise PrenormError("model.clip_qkv=0.0 makes queries, keys and values zero: give a larger bound, or none")
        if self.post_norm and self.parallel:
            raise PrenormError("model.post_norm=True and model.parallel=True exclude each other: set one to False")
        self._check_pattern()
        if self.scan and self.stochastic_depth and self.stochastic_depth_schedule == "linear":
            raise PrenormError(
                "model.scan=True makes all blocks one, but model.stochastic_depth differs by block: set "
                "model.stochastic_depth_schedule='constant', or model.scan=False"
            )

    def _check_pattern(self) -> None:
        pattern = self.attention_pattern
        if not pattern or set(pattern) - {"l", "g"}:
            raise PrenormError(f"model.attention_pattern={pattern!r} must be of the letters l and g, one a block")
        if self.scan and len(set(pattern[: self.depth])) > 1:
            raise PrenormError(
                f"model.scan=True makes all blocks one, but by model.attention_pattern={pattern!r} they differ: set "
                "model.scan=False"
            )
        if self.global_rotary_base is not None and not (self.rotary and "g" in pattern):
            raise PrenormError(
                f"model.global_rotary_base={self.global_rotary_base:g} needs model.positions='rotary', and a g in "
                f"model.attention_pattern, not {pattern!r}"
            )

    def of_block(self, number: int) -> ModelConfig:
        """The config as block `number` is built from it: what differs from block to block, settled."""
        if self.attention_pattern[number % len(self.attention_pattern)] == "l":
            return self
        changes: dict[str, Any] = {"attention_pattern": "l", "global_rotary_base": None, "window": None}
        if self.global_rotary_base == 0:
            changes |= {"positions": "none", "rotary_dim": None, "rotary_interleaved": False}
        elif self.global_rotary_base is not None:
            changes["rotary_base"] = self.global_rotary_base
        return dataclasses.replace(self, **changes)

    @property
    def stream_width(self) -> int:
        """Numbers a position of the residual stream holds: d, or d-1 under crmsnorm."""
        return self.d_model - 1 if self.norm == "crmsnorm" else self.d_model

    @property
    def raw_embedding(self) -> bool:
        """Whether the embedding tables stay d wide and uncentred, and their output is centred at run time.

        So it must be where they are read as well (tied head, block 0 without first_norm), or where what follows them
        does not keep a zero mean (dropout, a norm with an affine of its own).
        """
        return self.tie_embeddings or self.embed_norm or self.embed_dropout > 0 or not self.first_norm

    @property
    def raw_branches(self) -> bool:
        """Whether branch outputs stay d wide and uncentred, because dropout comes between them and the stream."""
        return self.branch_dropout > 0

    @property
    def key_bias_counts(self) -> bool:
        """Whether a bias of keys does anything: else it adds one number to all scores of a query, and softmax drops it.

        (A ViT's attention pooling is another matter, in which it never does.)
        """
        return self.rotary or self.rotary2d or self.qk_norm or self.clip_qkv is not None

    # What conversion asks of a family (`equivalence/convert.py`).

    @property
    def final_norm_bias(self) -> str | None:
        """The key of the bias that takes up the final norm's β. None: a tied head, under which the norm keeps it."""
        return None if self.tie_embeddings else "head_bias"

    @property
    def raw_reader(self) -> str | None:
        """What reads the stream with no norm in between, and by which key, if anything does."""
        return None if self.final_norm else "model.final_norm=False: the head reads"

    # What counting FLOPs asks of a family (`flops.py`).

    def tokens(self, length: int) -> int:
        """Tokens in the stream of an example of so many."""
        raise NotImplementedError

    def flops_outside_blocks(self, length: int, logits: int | None) -> int:
        """FLOPs of an example's matrix products outside the blocks, with logits at so many tokens (None: all)."""
        raise NotImplementedError


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _typed(key: str, value: Any, wanted: type) -> Any:
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise PrenormError(f"{key}={value!r} must be of type {wanted.__name__}, not {type(value).__name__}")
    return value
