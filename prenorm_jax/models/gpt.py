"""GPT: token and position embeddings before the stream, the final norm and the language-model head behind it."""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.attention import CacheUse
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.linear import matmul, reader
from prenorm_jax.models.norms import Normed
from prenorm_jax.models.parameters import annotated, spread
from prenorm_jax.models.placement import fusion_barrier
from prenorm_jax.models.positions import POSITION_TABLES
from prenorm_jax.models.transformer import (
    StreamModel,
    blocks,
    constant_table,
    end_embedding,
    enter_stream,
    leave_stream,
    make_norm,
    table,
)


@dataclasses.dataclass(frozen=True)
class GPTConfig(ModelConfig):
    """A decoder-only language model."""

    vocab_size: int = 257  # at least the tokenizer's ids; more are padding
    max_len: int = 1024  # longest sequence; the length of a learned position table
    positions: str = "learned"  # learned | sinusoidal | fairseq, such tables | rotary | alibi, slopes of scores | none
    rotary_base: float = 10000.0  # of rotary positions
    rotary_dim: int | None = None  # numbers of each head that are turned, the first; None: all
    rotary_interleaved: bool = False  # in pairs (0, 1), (2, 3), ... (GPT-J), not of one half and the other
    alibi_rounded: bool = False  # slope · position is of bfloat16, and divided by √head_dim as the scores are (Falcon)
    window: int | None = None  # positions that a query sees, the last its own; None: all up to its own
    attention_pattern: str = "l"  # of the blocks, repeated: l, local: as the keys above say; g, global: without window
    global_rotary_base: float | None = None  # rotary_base in global blocks; 0: these have no positions; None: the same
    embed_scale: float = 1.0  # of what the token embedding gives, before positions are added
    logit_scale: float = 1.0  # of the logits
    tie_embeddings: bool = True  # the head's kernel is the token embedding

    causal: ClassVar[bool] = True
    decodes: ClassVar[bool] = True
    token_outputs: ClassVar[bool] = True
    inputs: ClassVar[str] = "text"
    choices = ModelConfig.choices | {"positions": ("learned", "sinusoidal", "fairseq", "rotary", "alibi", "none")}
    at_least = ModelConfig.at_least | {
        **dict.fromkeys(("vocab_size", "max_len", "rotary_base", "window"), 1),
        **dict.fromkeys(("global_rotary_base", "embed_scale", "logit_scale"), 0),
        "rotary_dim": 2,
    }

    @property
    def rotary(self) -> bool:
        """Whether queries and keys are turned by their position."""
        return self.positions == "rotary"

    @property
    def alibi(self) -> bool:
        """Whether scores fall with the distance."""
        return self.positions == "alibi"

    def check(self) -> None:
        """Raises PrenormError for keys that contradict each other."""
        super().check()
        if self.alibi_rounded and not self.alibi:
            raise PrenormError(f"model.alibi_rounded needs model.positions='alibi', not {self.positions!r}")
        if not self.rotary:
            for key in ("rotary_dim", "rotary_interleaved"):
                if getattr(self, key):
                    raise PrenormError(f"model.{key} needs model.positions='rotary', not {self.positions!r}")
        elif self.rotary_dim is None and self.head_dim % 2:
            raise PrenormError(f"model.positions='rotary' needs an even model.head_dim, not {self.head_dim}")
        elif self.rotary_dim is not None and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise PrenormError(
                f"model.rotary_dim={self.rotary_dim} must be even and at most model.head_dim={self.head_dim}"
            )

    def tokens(self, length: int) -> int:
        """Tokens in the stream of an example of so many."""
        return length

    def flops_outside_blocks(self, length: int, logits: int | None) -> int:
        """FLOPs of the head's product, for logits at so many tokens (None: all)."""
        return 2 * (length if logits is None else logits) * self.d_model * self.vocab_size


def _scaled(x: jax.Array, scale: float) -> jax.Array:
    return x if scale == 1 else x * scale


@jax.custom_jvp
def embed_tokens(table_VxW: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """The rows of the tokens: (B, T, W)."""
    return jnp.take(table_VxW, tokens_BxT, axis=0)


# In float32 at least, so that its transpose, a scatter-add, sums in it: over the thousands of times that a frequent
# token comes, bfloat16 sums stop growing, and GPUs add bfloat16 numbers one after the other.
@embed_tokens.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (table, tokens), (dtable, _) = primals, tangents
    wide = dtable.astype(jnp.promote_types(table.dtype, jnp.float32))
    return embed_tokens(table, tokens), jnp.take(wide, tokens, axis=0).astype(table.dtype)


def logits_by_table(module: nn.Module, config: GPTConfig, x_BxTxW: jax.Array, table_VxW: jax.Array) -> jax.Array:
    """(B, T, V), of a raw tied table, with the `head_bias` of `module`."""
    logits_BxTxV = matmul(x_BxTxW, table_VxW.T)
    if config.head_bias:
        init = annotated(nn.initializers.zeros_init(), "vocab")
        bias_V = module.param("head_bias", init, (config.vocab_size,), config.param_dtype)
        logits_BxTxV += spread(bias_V, logits_BxTxV.shape, logits_BxTxV.dtype)
    return logits_BxTxV


def example_tokens(config: GPTConfig, batch: int, seed: int | None) -> np.ndarray:
    """(batch, 1) zeros, or of a seed (batch, up to 128) random tokens."""
    if seed is None:
        return np.zeros((batch, 1), np.int32)
    shape = (batch, min(config.max_len, 128))
    return np.random.default_rng(seed).integers(config.vocab_size, size=shape, dtype=np.int32)


class GPT(StreamModel):
    """A causal language model: (B, T) int tokens -> (B, T, V) logits in `config.dtype`.

    With `at_B`, (B,) int, the logits are (B, 1, V): of each sequence those at that one of the tokens given, from 0.

    Dropout is active with `train=True` and needs `rngs={"dropout": key}`; one key gives the three norms the same masks.

    With `mutable=["cache"]`, `cache_size=S` also makes the collection "cache": keys and values of the tokens, and room
    for S positions. Given back with `position=t` (a scalar, maybe traced), it stands for the t tokens before those of
    that call, and takes them up. Nothing checks that t + T <= S. `generate.py` is built on this.
    """

    config: GPTConfig
    config_class: ClassVar[type[ModelConfig]] = GPTConfig

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        train: bool = False,
        cache_size: int | None = None,
        position: jax.Array | int | None = None,
        at_B: jax.Array | None = None,
    ) -> jax.Array:
        config = self.config
        self._check(tokens_BxT.shape[1], cache_size, position)
        cache = None
        if cache_size is not None or position is not None:
            cache = CacheUse(cache_size, 0 if position is None else position)
        table_VxW = table(self, config, "token_embedding", config.vocab_size, "vocab").astype(config.dtype)
        x_BxTxW = self._add_positions(_scaled(embed_tokens(table_VxW, tokens_BxT), config.embed_scale), position)
        x_BxTxD = blocks(config, enter_stream(config, end_embedding(config, x_BxTxW, train)), train, cache)
        if at_B is not None:
            x_BxTxD = jnp.take_along_axis(x_BxTxD, at_B[:, None, None], axis=1)
        if config.tie_embeddings:
            logits_BxTxV = self._tied_head(x_BxTxD, table_VxW, train)
        else:
            norm = make_norm(config, "head_norm", config.final_norm_affine).for_readers if config.final_norm else Normed
            head = reader(config, "head", config.vocab_size, "vocab", config.head_bias)
            logits_BxTxV = head(norm(x_BxTxD))
        return _scaled(logits_BxTxV, config.logit_scale)

    def _check(self, T: int, cache_size: int | None, position: jax.Array | int | None) -> None:
        max_len = self.config.max_len
        if max_len < T:
            raise PrenormError(f"a sequence of {T} tokens is longer than model.max_len={max_len}")
        if cache_size is not None and not (position is None and T <= cache_size <= max_len):
            raise PrenormError(
                f"cache_size={cache_size} must be from {T}, the tokens given, to model.max_len={max_len}, "
                "and excludes position"
            )

    def _add_positions(self, x_BxTxW: jax.Array, position: jax.Array | int | None) -> jax.Array:
        """With the rows of the tokens' positions, where there is a table of them."""
        config, T = self.config, x_BxTxW.shape[1]

        def rows(table_NxW: jax.Array) -> jax.Array:
            return table_NxW[:T] if position is None else jax.lax.dynamic_slice_in_dim(table_NxW, position, T)

        if config.positions == "learned":
            table_TxW = rows(table(self, config, "position_embedding", config.max_len, "position"))
            return x_BxTxW + spread(table_TxW, x_BxTxW.shape, x_BxTxW.dtype)
        if config.positions in POSITION_TABLES:
            length = T if position is None else config.max_len
            return x_BxTxW + rows(constant_table(config, POSITION_TABLES[config.positions](length, config.d_model)))
        return x_BxTxW

    def _tied_head(self, x_BxTxD: jax.Array, table_VxW: jax.Array, train: bool) -> jax.Array:
        """Logits by the raw table."""
        config, x_BxTxW = self.config, leave_stream(self.config, x_BxTxD)
        # For the transpose: the table's cotangent comes before those of the blocks, and frees the logits'.
        if train:
            x_BxTxW, table_VxW = fusion_barrier((x_BxTxW, table_VxW))
        return logits_by_table(self, config, x_BxTxW, table_VxW)

    @nn.nowrap
    def example(self, batch: int = 1, seed: int | None = None) -> np.ndarray:
        """An input: (batch, 1) zeros, or of a seed (batch, up to 128) random tokens."""
        return example_tokens(self.config, batch, seed)
