"""What a model is: the checked, frozen form of `config.model` that the modules and the converter work on.

One dataclass per family of models on one with the fields of all. It also answers the questions that several keys decide
together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from ml_collections import ConfigDict, config_dict

from prenorm_jax.base.errors import PrenormError, check_choice, check_range

NORMS = ("layernorm", "rmsnorm", "crmsnorm")


EXECUTION = ("scan", "remat", "attention_kernel")  # keys of `model` that do not change what is computed


ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")


DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Transformer, described literally: the fields say exactly which parameters the tree holds.

    These are the fields of every family; the subclasses add their own. `d_model` is the width d of the Pre-LN network
    for all three norms; under crmsnorm the stream has d-1 numbers. A default of None means "as the field named in the
    comment" and is resolved by `create`.
    """

    family: str = "gpt"  # gpt | vit
    norm: str = "layernorm"  # layernorm | rmsnorm | crmsnorm
    depth: int = 4
    d_model: int = 128
    heads: int = 4
    kv_heads: int | None = None  # heads; fewer is grouped-query attention
    head_dim: int | None = None  # d_model // heads
    mlp_dim: int | None = None  # 4 * d_model
    gated_mlp: bool = False  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    activation: str = "gelu_tanh"  # gelu | gelu_tanh | relu | silu | tanh
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)) instead of one branch after the other
    shared_norm: bool = False  # with `parallel`: one norm feeds both branches
    post_norm: bool = False  # norm(x + f(x)) instead of x + f(norm(x))
    final_norm: bool = True  # the norm between the last block and the head
    embed_norm: bool = False  # a LayerNorm on the embedding, before it enters the stream (BLOOM, CLIP's ViT)
    qk_norm: bool = False  # a LayerNorm on each query and key, over head_dim (ViT-22B); an RMSNorm in the variants
    layer_scale: float | None = None  # initial value of a learned scale of each branch's output; None: no such scale
    use_bias: bool = True  # in every linear layer of a block
    reader_bias: bool | None = None  # use_bias; up and gate alone, and what qkv_bias leaves out. Folding sets it
    qkv_bias: bool | None = None  # reader_bias; query, key and value alone. Folding a norm's bias sets it
    head_bias: bool = False
    norm_affine: bool = True  # norms have a scale, and a bias unless norm_bias is false
    norm_bias: bool = True
    final_norm_affine: bool | None = None  # norm_affine; a tied head keeps it where the others are folded away
    kept_norm_affine: bool | None = None  # norm_affine; of embed_norm, qk_norm and in a ViT's attention pooling
    epsilon: float = 1e-5
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
    param_dtype: str = "float32"

    causal: ClassVar[bool] = False
    rotary: ClassVar[bool] = False
    tie_embeddings: ClassVar[bool] = False
    choices: ClassVar[dict[str, tuple[str, ...]]] = {
        "norm": NORMS,
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
        "epsilon": 0,
    }

    @staticmethod
    def create(config: ModelConfig | Mapping[str, Any] | ConfigDict) -> ModelConfig:
        """The checked, resolved form of `config.model`. Raises PrenormError naming the first key that is wrong."""
        config = dict(vars(config) if isinstance(config, ModelConfig) else config.items())
        family = config.get("family") or "gpt"
        check_choice("model.family", family, tuple(FAMILIES))
        cls = FAMILIES[family]
        fields = {field.name: field for field in dataclasses.fields(cls)}
        given = {key: value for key, value in config.items() if value is not None}
        for key in config:
            if key not in fields:
                raise PrenormError(f"unknown key model.{key}; the keys are {', '.join(fields)}")
        for key, value in given.items():
            given[key] = _typed(f"model.{key}", value, str(fields[key].type).split(" |")[0])
        raw = cls(**given)
        for key, choices in cls.choices.items():
            check_choice(f"model.{key}", getattr(raw, key), choices)
        for key, minimum in cls.at_least.items():
            check_range(f"model.{key}", getattr(raw, key), at_least=minimum)
        for key in ("dtype", "param_dtype"):
            if getattr(raw, key) == "float64" and not jax.config.jax_enable_x64:
                raise PrenormError(f"model.{key}='float64' needs JAX's 64-bit mode: set JAX_ENABLE_X64=1")
        for key in ("dropout", "attention_dropout", "branch_dropout", "embed_dropout", "stochastic_depth"):
            check_range(f"model.{key}", getattr(raw, key), at_least=0, below=1)
        if raw.head_dim is None and raw.d_model % raw.heads:
            raise PrenormError(
                f"model.heads={raw.heads} does not divide model.d_model={raw.d_model}: change one or set model.head_dim"
            )
        if raw.kv_heads is not None and raw.heads % raw.kv_heads:
            raise PrenormError(f"model.kv_heads={raw.kv_heads} does not divide model.heads={raw.heads}")
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
            attention_dropout=_default(raw.attention_dropout, raw.dropout),
            branch_dropout=_default(raw.branch_dropout, raw.dropout),
            embed_dropout=_default(raw.embed_dropout, raw.dropout),
        )
        if resolved.shared_norm and not resolved.parallel:
            raise PrenormError(
                "model.shared_norm=True needs model.parallel=True: one norm cannot feed two steps in turn"
            )
        if resolved.post_norm and resolved.parallel:
            raise PrenormError("model.post_norm=True and model.parallel=True exclude each other: set one to False")
        if resolved.scan and resolved.stochastic_depth and resolved.stochastic_depth_schedule == "linear":
            raise PrenormError(
                "model.scan=True makes all blocks one, but model.stochastic_depth differs by block: set "
                "model.stochastic_depth_schedule='constant', or model.scan=False"
            )
        resolved.check()
        return resolved

    def check(self) -> None:
        """Raises PrenormError for what no single key of the family shows to be wrong."""

    @property
    def stream_width(self) -> int:
        """Numbers a position of the residual stream holds: d, or d-1 under crmsnorm."""
        return self.d_model - 1 if self.norm == "crmsnorm" else self.d_model

    @property
    def raw_embedding(self) -> bool:
        """Whether the embedding tables stay d wide and uncentred, and their output is centred at run time.

        So it must be where they are read as well (tied head), or where what follows them does not keep a zero mean
        (dropout, a norm with an affine of its own).
        """
        return self.tie_embeddings or self.embed_norm or self.embed_dropout > 0

    @property
    def raw_branches(self) -> bool:
        """Whether branch outputs stay d wide and uncentred, because dropout comes between them and the stream."""
        return self.branch_dropout > 0


@dataclasses.dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """A decoder-only language model (`models/gpt.py`)."""

    vocab_size: int = 257
    max_len: int = 1024  # longest sequence; the length of a learned position table
    positions: str = "learned"  # learned | sinusoidal | rotary | none
    rotary_base: float = 10000.0
    tie_embeddings: bool = True

    causal: ClassVar[bool] = True
    choices = ModelConfig.choices | {"positions": ("learned", "sinusoidal", "rotary", "none")}
    at_least = ModelConfig.at_least | {"vocab_size": 1, "max_len": 1}

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are turned by their position."""
        return self.positions == "rotary"

    def check(self) -> None:
        """Raises PrenormError for an odd head_dim under rotary positions."""
        if self.rotary and self.head_dim % 2:
            raise PrenormError(f"model.positions='rotary' needs an even model.head_dim, not {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class ViTConfig(ModelConfig):
    """A Vision Transformer that classifies square images (`models/vit.py`)."""

    family: str = "vit"
    activation: str = "gelu"
    head_bias: bool = True
    epsilon: float = 1e-6
    init: str = "xavier"

    image_size: int = 224  # pixels, both ways
    patch_size: int = 16  # divides image_size
    channels: int = 3
    classes: int = 1000
    patch_bias: bool = True  # of the patch embedding
    positions: str = "learned"  # learned | sincos2d | none
    class_token: bool = True
    class_position: bool = True  # a learned position table has a row for the class token too
    registers: int = 0  # further tokens without position or output (arXiv 2309.16588)
    pooling: str = "class"  # class token | mean of the patches | class_mean: both, side by side | attention
    norm_after_pooling: bool = False  # the final norm takes what the pooling gives, not what it is given

    choices = ModelConfig.choices | {
        "positions": ("learned", "sincos2d", "none"),
        "pooling": ("class", "mean", "class_mean", "attention"),
    }
    at_least = ModelConfig.at_least | {
        **dict.fromkeys(("image_size", "patch_size", "channels", "classes"), 1),
        "registers": 0,
    }

    @property
    def patches(self) -> int:
        """Patches in an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return self.class_token + self.registers

    def check(self) -> None:
        """Raises PrenormError for sizes that do not divide, and for a class token that is read but not there."""
        if self.image_size % self.patch_size:
            raise PrenormError(
                f"model.patch_size={self.patch_size} does not divide model.image_size={self.image_size}: change one"
            )
        if self.positions == "sincos2d" and self.d_model % 4:
            raise PrenormError(f"model.positions='sincos2d' needs a model.d_model divisible by 4, not {self.d_model}")
        if self.pooling.startswith("class") and not self.class_token:
            raise PrenormError(f"model.pooling={self.pooling!r} needs model.class_token=True")


FAMILIES: dict[str, type[ModelConfig]] = {"gpt": GPTConfig, "vit": ViTConfig}


def model_defaults(family: str) -> ConfigDict:
    """`config.model` with the defaults of the family's dataclass."""
    placeholders = {"int | None": int, "float | None": float, "bool | None": bool}
    return ConfigDict(
        {
            field.name: config_dict.placeholder(placeholders[str(field.type)])
            if field.default is None
            else field.default
            for field in dataclasses.fields(FAMILIES[family])
        }
    )


def _default(value: Any, default: Any) -> Any:
    return default if value is None else value


def _typed(key: str, value: Any, type_name: str) -> Any:
    if type_name == "float" and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value).__name__ != type_name:
        raise PrenormError(f"{key}={value!r} must be of type {type_name}, not {type(value).__name__}")
    return value
