"""Run and model configuration: every key with its default, and what is checked about the values.

`base_config()` is what the files in `configs/` start from. `ModelConfig` is the checked, frozen form of `config.model`
that the modules and the converter work on; it also answers the questions that several keys decide together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict, config_dict

from prenorm_jax.errors import PrenormError

NORMS = ("layernorm", "rmsnorm", "crmsnorm")
POSITIONS = ("learned", "sinusoidal", "rotary", "none")
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu", "tanh")
DTYPES = ("float64", "float32", "bfloat16", "float16")
PARAMETERIZATIONS = ("pre_ln", "native")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only Transformer, described literally: the fields say exactly which parameters the tree holds.

    `d_model` is the width d of the Pre-LN network for all three norms; under crmsnorm the stream has d-1 numbers.
    A default of None means "as the field named in the comment" and is resolved by `create`.
    """

    norm: str = "layernorm"  # layernorm | rmsnorm | crmsnorm
    vocab_size: int = 257
    max_len: int = 1024  # longest sequence; the length of a learned position table
    depth: int = 4
    d_model: int = 128
    heads: int = 4
    kv_heads: int | None = None  # heads; fewer is grouped-query attention
    head_dim: int | None = None  # d_model // heads
    mlp_dim: int | None = None  # 4 * d_model
    gated_mlp: bool = False  # down(act(gate(x)) * up(x)) instead of down(act(up(x)))
    activation: str = "gelu_tanh"  # gelu | gelu_tanh | relu | silu | tanh
    positions: str = "learned"  # learned | sinusoidal | rotary | none
    rotary_base: float = 10000.0
    parallel: bool = False  # x + attention(norm(x)) + mlp(norm(x)) instead of one branch after the other
    shared_norm: bool = False  # with `parallel`: one norm feeds both branches
    post_norm: bool = False  # norm(x + f(x)) instead of x + f(norm(x))
    final_norm: bool = True  # the norm between the last block and the head
    embed_norm: bool = False  # a LayerNorm on the embedding, before it enters the stream (BLOOM)
    tie_embeddings: bool = True
    use_bias: bool = True  # in every linear layer of a block
    reader_bias: bool | None = None  # use_bias; q, k, v, up and gate alone. Folding a norm's bias sets it
    head_bias: bool = False
    norm_affine: bool = True  # norms have a scale, and a bias unless norm_bias is false
    norm_bias: bool = True
    final_norm_affine: bool | None = None  # norm_affine; a tied head keeps it where the others are folded away
    embed_norm_affine: bool | None = None  # norm_affine; kept as well, since nothing can fold it
    epsilon: float = 1e-5
    dropout: float = 0.0  # rate of the three below
    attention_dropout: float | None = None  # dropout; on attention probabilities
    branch_dropout: float | None = None  # dropout; on branch outputs, before they are added to the stream
    embed_dropout: float | None = None  # dropout; on the embedding, before it enters the stream
    dtype: str = "float32"  # of the computation; statistics and softmax are in float32 at least
    param_dtype: str = "float32"

    @classmethod
    def create(cls, config: ModelConfig | Mapping[str, Any] | ConfigDict) -> ModelConfig:
        """The checked, resolved form of `config.model`. Raises PrenormError naming the first key that is wrong."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        config = dict(vars(config) if isinstance(config, cls) else config.items())
        given = {key: value for key, value in config.items() if value is not None}
        for key in config:
            if key not in fields:
                raise PrenormError(f"unknown key model.{key}; the keys are {', '.join(fields)}")
        for key, value in given.items():
            given[key] = _typed(f"model.{key}", value, str(fields[key].type).split(" |")[0])
        raw = cls(**given)
        _check_choice("model.norm", raw.norm, NORMS)
        _check_choice("model.positions", raw.positions, POSITIONS)
        _check_choice("model.activation", raw.activation, ACTIVATIONS)
        for key in ("dtype", "param_dtype"):
            _check_choice(f"model.{key}", getattr(raw, key), DTYPES)
            if getattr(raw, key) == "float64" and not jax.config.jax_enable_x64:
                raise PrenormError(f"model.{key}='float64' needs JAX's 64-bit mode: set JAX_ENABLE_X64=1")
        for key in ("vocab_size", "max_len", "depth", "heads", "kv_heads", "head_dim", "mlp_dim"):
            check_range(f"model.{key}", getattr(raw, key), at_least=1)
        check_range("model.d_model", raw.d_model, at_least=2)
        check_range("model.epsilon", raw.epsilon, at_least=0)
        for key in ("dropout", "attention_dropout", "branch_dropout", "embed_dropout"):
            check_range(f"model.{key}", getattr(raw, key), at_least=0, below=1)
        if raw.head_dim is None and raw.d_model % raw.heads:
            raise PrenormError(
                f"model.heads={raw.heads} does not divide model.d_model={raw.d_model}: change one or set model.head_dim"
            )
        if raw.kv_heads is not None and raw.heads % raw.kv_heads:
            raise PrenormError(f"model.kv_heads={raw.kv_heads} does not divide model.heads={raw.heads}")
        resolved = dataclasses.replace(
            raw,
            kv_heads=_default(raw.kv_heads, raw.heads),
            head_dim=_default(raw.head_dim, raw.d_model // raw.heads),
            mlp_dim=_default(raw.mlp_dim, 4 * raw.d_model),
            reader_bias=_default(raw.reader_bias, raw.use_bias),
            final_norm_affine=_default(raw.final_norm_affine, raw.norm_affine),
            embed_norm_affine=_default(raw.embed_norm_affine, raw.norm_affine),
            attention_dropout=_default(raw.attention_dropout, raw.dropout),
            branch_dropout=_default(raw.branch_dropout, raw.dropout),
            embed_dropout=_default(raw.embed_dropout, raw.dropout),
        )
        if resolved.positions == "rotary" and resolved.head_dim % 2:
            raise PrenormError(f"model.positions='rotary' needs an even model.head_dim, not {resolved.head_dim}")
        if resolved.shared_norm and not resolved.parallel:
            raise PrenormError(
                "model.shared_norm=True needs model.parallel=True: one norm cannot feed two steps in turn"
            )
        if resolved.post_norm and resolved.parallel:
            raise PrenormError("model.post_norm=True and model.parallel=True exclude each other: set one to False")
        return resolved

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


def base_config() -> ConfigDict:
    """A run's configuration with every key at its default; files in `configs/` change what they need.

    Keys that are None and typed (`data.path`, `model.kv_heads`, ...) may be set on the command line.
    """
    config = ConfigDict()
    config.seed = 0
    config.steps = 1000  # the schedule spans them
    config.stop_at = config_dict.placeholder(int)  # stop on purpose after this step; go on later without it
    config.init_from = config_dict.placeholder(str)  # start from the parameters of this workdir's last checkpoint
    config.on_nonfinite = "stop"  # stop | skip: what a loss or gradient that is not finite does
    config.grace_seconds = 60  # SIGTERM and Ctrl-C: time to save before the process ends regardless
    config.batch_size = 16  # sequences in one optimizer step, over all devices
    config.parameterization = "pre_ln"  # pre_ln | native: which parameters are trained (README, "Training")
    config.eval_every = 200  # steps; 0: only at the end
    config.checkpoint_every = 200  # steps; 0: only at the end
    config.keep_checkpoints = 3
    config.log_every = 10  # steps between two flushes of metrics to disk; each step gets its line all the same
    config.tensorboard = True

    config.data = ConfigDict()
    config.data.path = config_dict.placeholder(str)  # file, folder or glob: .txt .md .py .jsonl .json .parquet
    config.data.hub = config_dict.placeholder(str)  # a hub data set's name; give path or hub, or neither: stdlib
    config.data.hub_config = config_dict.placeholder(str)  # its configuration, e.g. wikitext-103-raw-v1
    config.data.text_column = "text"  # of jsonl, parquet and hub data
    config.data.train_split = "train"  # of hub data
    config.data.eval_split = config_dict.placeholder(str)  # of hub data; None: hold documents out
    config.data.eval_path = config_dict.placeholder(str)  # like path; None: hold documents out
    config.data.holdout = 0.02  # fraction of documents held out where no evaluation data are named
    config.data.separate_documents = True  # end each document with the tokenizer's end-of-text token
    config.data.tokenizer = "bytes"  # bytes, a tokenizers .json file, or a hub name such as gpt2
    config.data.eot_token = config_dict.placeholder(str)  # None: the first usual one that the tokenizer knows
    config.data.seq_len = 128  # tokens a training example predicts

    config.optimizer = ConfigDict()
    config.optimizer.name = "adamw"  # adamw | sgd | adafactor | lamb | muon
    config.optimizer.learning_rate = 1e-3  # peak
    config.optimizer.warmup_steps = 100
    config.optimizer.final_learning_rate = 0.1  # at the end of the cosine, as a fraction of the peak
    config.optimizer.weight_decay = 0.1  # of matrices; never of biases and norms
    config.optimizer.clip = 1.0  # global gradient norm; 0: none
    config.optimizer.b1 = 0.9  # sgd and muon: the momentum
    config.optimizer.b2 = 0.95
    config.optimizer.eps = 1e-8

    config.model = model_defaults()
    return config


def model_defaults() -> ConfigDict:
    """`config.model` with the defaults of `ModelConfig`."""
    placeholders = {"int | None": int, "float | None": float, "bool | None": bool}
    return ConfigDict(
        {
            field.name: config_dict.placeholder(placeholders[str(field.type)])
            if field.default is None
            else field.default
            for field in dataclasses.fields(ModelConfig)
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


def _check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise PrenormError(f"{key}={value!r} is not one of {', '.join(choices)}")


def check_range(key: str, value: float | None, at_least: float, below: float = float("inf")) -> None:
    """Raises PrenormError naming `key` unless at_least <= value < below (or value is None)."""
    if value is not None and not at_least <= value < below:
        bound = f"at least {at_least}" + ("" if below == float("inf") else f" and below {below}")
        raise PrenormError(f"{key}={value} must be {bound}")
