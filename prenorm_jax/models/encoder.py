"""Text encoders: a Transformer of tokens that sees both ways, or not, and the head behind it.

What comes out is, by the config, logits of the vocabulary at every token, as a masked language model gives them, the
normalised tokens themselves, or one pooled of them, as it is or through a linear head.
"""

import dataclasses
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.gpt import GPTConfig, embed_tokens, example_tokens, logits_by_table
from prenorm_jax.models.linear import Linear, reader
from prenorm_jax.models.norms import LayerNorm, Normed
from prenorm_jax.models.parameters import spread
from prenorm_jax.models.transformer import (
    StreamModel,
    activate,
    blocks,
    end_embedding,
    enter_stream,
    kept_norm,
    leave_stream,
    make_norm,
    table,
)

MASKED_IN_TRAINING = 0.15 * 0.8  # share of tokens that ESM-2's training put the mask token in place of


@dataclasses.dataclass(frozen=True)
class EncoderConfig(GPTConfig):
    """A text encoder. It has a GPT's keys too."""

    family: str = "encoder"
    activation: str = "gelu"
    head_bias: bool = True

    first_norm: bool = True  # False: block 0's attention reads the embedding, not a norm of the stream (ModernBERT)
    causal: bool = False  # a token sees those before it alone (CLIP's text tower)
    pad_token: int | None = None  # id that positions do not count: it has the first row of their table (RoBERTa)
    mask_token: int | None = None  # id of rows of zeros, for which a text's others are larger (ESM-2)
    token_types: int = 0  # rows of a table of types, added to the tokens; which, the input may say (BERT); 0: none
    pooling: str = "none"  # of what the output is: first | last token | eos | mean of those not masked | none: all
    eos_token: int | None = None  # of pooling eos, where it comes first; None: the token of the highest id (old CLIPs)
    transform: bool = True  # a linear map, the activation and a LayerNorm between the final norm and the head (BERT)
    transform_bias: bool = True  # of that map
    outputs: int = 0  # of a head of its own; 0: the head is the token embedding, or with tie_embeddings=False none

    decodes: ClassVar[bool] = False
    trains: ClassVar[bool] = False
    choices = GPTConfig.choices | {
        "positions": ("learned", "rotary", "none"),
        "pooling": ("none", "first", "last", "eos", "mean"),
    }
    at_least = GPTConfig.at_least | dict.fromkeys(("pad_token", "mask_token", "token_types", "eos_token", "outputs"), 0)

    @property
    def has_head(self) -> bool:
        """Whether something reads the final norm's output."""
        return self.tie_embeddings or self.outputs > 0

    @property
    def token_outputs(self) -> bool:
        """Whether there is an output for each token."""
        return self.pooling == "none"

    @property
    def position_rows(self) -> int:
        """Rows of a learned position table."""
        return self.max_len + (self.pad_token is not None)

    def check(self) -> None:
        """Raises PrenormError for keys that contradict each other."""
        super().check()
        if self.tie_embeddings and (self.outputs or not self.transform or self.pooling != "none"):
            raise PrenormError(
                "model.tie_embeddings=True is an encoder's masked language model: it goes with model.transform=True, "
                "model.outputs=0 and model.pooling='none'"
            )
        for key in ("embed_scale", "logit_scale"):
            if getattr(self, key) != 1.0:
                raise PrenormError(f"model.{key}={getattr(self, key):g} is a GPT's: an encoder has none")
        for key in ("scan", "parallel", "post_norm"):
            if not self.first_norm and getattr(self, key):
                raise PrenormError(f"model.first_norm=False leaves block 0 one norm fewer: set model.{key}=False")
        if self.transform and not self.has_head:
            raise PrenormError("model.transform=True needs a head: set it to False, or model.outputs to more than 0")

    @property
    def final_norm_bias(self) -> str | None:
        """That of what reads the final norm's output; None: nothing does."""
        if self.transform:
            return "transform_bias"
        return "head_bias" if self.outputs else None

    def flops_outside_blocks(self, length: int, logits: int | None) -> int:
        """FLOPs of the head's products, for outputs at so many tokens (None: all)."""
        tokens = (length if logits is None else logits) if self.token_outputs else 1
        transform = self.d_model**2 if self.transform else 0
        return 2 * tokens * (transform + self.d_model * (self.vocab_size if self.tie_embeddings else self.outputs))


class Encoder(StreamModel):
    """A text encoder: (B, T) int tokens -> outputs in `config.dtype`.

    (B, T, V) logits where the token embedding is the head; else (B, T, W), or of a head of its own (B, T, outputs), and
    with a pooling (B, W) or (B, outputs).

    `mask_BxT`, of bool or numbers, is 0 at padding: no token sees it, and the mean leaves it out. Outputs there say
    nothing. `types_BxT`, int: the rows of `token_types`; None: the first.

    Dropout is active with `train=True` and needs `rngs={"dropout": key}`; one key gives the three norms the same masks.
    """

    config: EncoderConfig
    config_class: ClassVar[type[ModelConfig]] = EncoderConfig

    @nn.compact
    def __call__(
        self,
        tokens_BxT: jax.Array,
        train: bool = False,
        mask_BxT: jax.Array | None = None,
        types_BxT: jax.Array | None = None,
    ) -> jax.Array:
        config, T = self.config, tokens_BxT.shape[1]
        if config.max_len < T:
            raise PrenormError(f"a text of {T} tokens is longer than model.max_len={config.max_len}")
        tokens_BxT = jnp.asarray(tokens_BxT)
        table_VxW = table(self, config, "token_embedding", config.vocab_size, "vocab").astype(config.dtype)
        x_BxTxW = self._embed(tokens_BxT, table_VxW, mask_BxT, types_BxT)
        x_BxTxW = end_embedding(config, x_BxTxW, train)
        beside = {"mask_BxT": mask_BxT, "embedding_BxTxW": None if config.first_norm else x_BxTxW}
        x_BxTxD = blocks(config, enter_stream(config, x_BxTxW), train, **beside)
        if config.pooling not in ("none", "mean"):
            x_BxTxD = jnp.take_along_axis(x_BxTxD, self._pooled(tokens_BxT)[:, None, None], axis=1)[:, 0]
        if not config.has_head:
            return self._mean(leave_stream(config, x_BxTxD), mask_BxT)
        normed = Normed(x_BxTxD)
        if config.final_norm:
            normed = make_norm(config, "head_norm", config.final_norm_affine).for_readers(x_BxTxD)
        if config.pooling == "mean":
            normed = Normed(self._mean(normed.product, mask_BxT), site=normed.site)
        return self._head(normed, table_VxW)

    def _embed(
        self, tokens_BxT: jax.Array, table_VxW: jax.Array, mask_BxT: jax.Array | None, types_BxT: jax.Array | None
    ) -> jax.Array:
        """The rows of the tokens, of their positions and types: (B, T, D or W)."""
        config = self.config
        x_BxTxW = embed_tokens(table_VxW, tokens_BxT)
        if config.mask_token is not None:
            x_BxTxW = self._without_masked(x_BxTxW, tokens_BxT, mask_BxT)
        if config.token_types:
            types_TxW = table(self, config, "token_type_embedding", config.token_types, "token").astype(config.dtype)
            x_BxTxW += embed_tokens(types_TxW, jnp.zeros_like(tokens_BxT) if types_BxT is None else types_BxT)
        if config.positions != "learned":
            return x_BxTxW
        positions_NxW = table(self, config, "position_embedding", config.position_rows, "position")
        if config.pad_token is None:
            return x_BxTxW + spread(positions_NxW[: tokens_BxT.shape[1]], x_BxTxW.shape, x_BxTxW.dtype)
        counted = (tokens_BxT != config.pad_token).astype(jnp.int32)
        return x_BxTxW + embed_tokens(positions_NxW.astype(config.dtype), jnp.cumsum(counted, axis=1) * counted)

    def _without_masked(self, x_BxTxW: jax.Array, tokens_BxT: jax.Array, mask_BxT: jax.Array | None) -> jax.Array:
        """With zeros at mask tokens, and what that takes away, compared with training, given to a text's others.

        As dropout of whole tokens would do it (ESM-2, doi 10.1126/science.ade2574; its `token_dropout`).
        """
        masked_BxT = tokens_BxT == self.config.mask_token
        length_B = tokens_BxT.shape[1] if mask_BxT is None else jnp.asarray(mask_BxT).sum(1)
        share_B = masked_BxT.sum(1).astype(jnp.promote_types(x_BxTxW.dtype, jnp.float32)) / length_B
        scale_B = ((1 - MASKED_IN_TRAINING) / (1 - share_B)).astype(x_BxTxW.dtype)
        return jnp.where(masked_BxT[:, :, None], 0, x_BxTxW * scale_B[:, None, None])

    def _pooled(self, tokens_BxT: jax.Array) -> jax.Array:
        """(B,): which token the output is of."""
        config, (B, T) = self.config, tokens_BxT.shape
        if config.pooling == "eos":
            return (tokens_BxT if config.eos_token is None else tokens_BxT == config.eos_token).argmax(1)
        return jnp.full(B, T - 1 if config.pooling == "last" else 0)

    def _mean(self, x: jax.Array, mask_BxT: jax.Array | None) -> jax.Array:
        """(B, T, N) -> (B, N) if that is the pooling, over tokens of no padding; else x."""
        if self.config.pooling != "mean":
            return x
        if mask_BxT is None:
            return x.mean(1)
        weights_BxTx1 = jnp.asarray(mask_BxT)[:, :, None].astype(x.dtype)
        return (x * weights_BxTx1).sum(1) / weights_BxTx1.sum(1)

    def _head(self, normed: Normed, table_VxW: jax.Array) -> jax.Array:
        """Logits: by the raw table, or by a kernel of their own."""
        config = self.config
        if not config.transform:
            return reader(config, "head", config.outputs, "class", config.head_bias)(normed)
        h = activate(config, reader(config, "transform", config.d_model, "raw", config.transform_bias)(normed))
        h = kept_norm(config, "transform_norm", LayerNorm, axis="raw")(h)
        if not config.tie_embeddings:
            return Linear(config, config.outputs, ("raw", "class"), config.head_bias, name="head")(h)
        return logits_by_table(self, config, h, table_VxW)

    @nn.nowrap
    def example(self, batch: int = 1, seed: int | None = None) -> np.ndarray:
        """An input: (batch, 1) zeros, or of a seed (batch, up to 128) random tokens."""
        return example_tokens(self.config, batch, seed)
