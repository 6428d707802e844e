"""A text encoder with its tokenizer: texts in, likely tokens or vectors out."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from prenorm_jax.base.errors import PrenormError, check_choice
from prenorm_jax.base.files import read_json
from prenorm_jax.interop.checkpoint import load
from prenorm_jax.interop.files import is_workdir, open_config
from prenorm_jax.interop.tokens import ABOUT, TOKENIZER, source_tokenizer
from prenorm_jax.models.coordinates import coordinates
from prenorm_jax.models.encoder import EncoderConfig
from prenorm_jax.models.registry import build_model
from prenorm_jax.train.workdir import SOURCE

_MASKS = ("[MASK]", "<mask>")
_MULTIPLE = 32  # of tokens, that texts are padded to: a program is compiled for each length

Text = str | Sequence[int]


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """An imported encoder, of whatever norm.

    Attributes:
      config, params: as of `load`.
      tokenizer: that it came with; None: there is none that `tokenizers` alone can make, and texts are lists of ids.
      padding: the id that stands behind shorter texts.
    """

    config: EncoderConfig
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    padding: int = 1

    @classmethod
    def load(cls, name: str | Path, dtype: str | None = None) -> TextEncoder:
        """Of a workdir, or another library's folder, file or name on the hub. Arguments as of `prenorm_jax.load`.

        Raises PrenormError for what is no text encoder, and what `load` raises.
        """
        config, params = load(name, dtype)
        if not isinstance(config, EncoderConfig):
            raise PrenormError(f"{name} is a {config.family}: text encoders alone fill masks and give embeddings")
        if is_workdir(name):
            said, file = read_json(Path(name) / SOURCE / ABOUT)["config"], Path(name) / TOKENIZER
            tokenizer = Tokenizer.from_file(str(file)) if file.is_file() else None
        else:
            folder, _, said = open_config(name)
            tokenizer = source_tokenizer(folder, said, config.vocab_size)
        if tokenizer is not None:  # else padding would count as text
            tokenizer.no_padding()
            tokenizer.no_truncation()
        said = said | (said.get("text_config") or {})  # of a whole CLIP or SigLIP
        padding = said.get("pad_token_id") if config.pad_token is None else config.pad_token
        return cls(config, params, tokenizer, 1 if padding is None else padding)

    def fill_mask(self, text: Text, top: int = 5) -> list[list[tuple[str | int, float]]]:
        """For each mask token in a text (`[MASK]` or `<mask>`, as its tokenizer has it) the likeliest tokens.

        Returns:
          For each, `top` of (token, or of ids its id, probability), the likeliest first.

        Raises:
          PrenormError: for a model without the vocabulary's logits, and a text without a mask or too long.
        """
        if self.config.outputs != self.config.vocab_size and not self.config.tie_embeddings:
            raise PrenormError("it has no masked language model's head: it gives embeddings alone")
        [ids] = self._ids([text])
        mask = self.config.mask_token if self.config.mask_token is not None else self._mask_token()
        places = [i for i, token in enumerate(ids) if token == mask]
        if not places:
            raise PrenormError(f"the text has no mask token ({' or '.join(_MASKS)}): put one where a token is missing")
        logits = self._run(self.config, self.params, [ids])[0, places]
        chances, found = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32))), []
        for chance in chances:
            best = np.argsort(-chance)[:top]
            words = [self.tokenizer.id_to_token(int(i)) if self.tokenizer else int(i) for i in best]
            found.append(list(zip(words, chance[best].tolist(), strict=True)))
        return found

    def embed(self, texts: Sequence[Text], pooling: str | None = None) -> np.ndarray:
        """A vector of each text: (texts, d) in the model's dtype, what its final norm gives.

        Args:
          texts: strings, which the tokenizer reads, or lists of ids.
          pooling: first, last, eos (`EncoderConfig.eos_token`) or mean; None: the model's own, or else the mean. A
            model whose own is the last (SigLIP) takes that of `max_len` tokens, padding and all; others the text's.

        Raises:
          PrenormError: where a head has the final norm's scale in its weights; for a text that is too long.
        """
        check_choice("pooling", pooling or "mean", ("first", "last", "eos", "mean"))
        config, params = self.config, self.params
        own = config.pooling != "none" and not config.transform and pooling in (None, config.pooling)
        if pooling == "last" and config.pooling != "last":
            texts = self._ids(texts)
            outputs = self._run(*without_head(config, params), texts)
            return outputs[np.arange(len(texts)), [len(ids) - 1 for ids in texts]]
        if not own:
            default = "mean" if config.pooling == "none" else config.pooling
            config, params = without_head(config, params, pooling or default)
        return self._run(config, params, self._ids(texts))

    def _ids(self, texts: Sequence[Text]) -> list[list[int]]:
        if self.tokenizer is None and any(isinstance(text, str) for text in texts):
            raise PrenormError("it came without a tokenizer that can be read: give lists of ids")
        return [self.tokenizer.encode(text).ids if isinstance(text, str) else list(text) for text in texts]

    def _mask_token(self) -> int | None:
        return next(
            (i for mask in _MASKS if self.tokenizer and (i := self.tokenizer.token_to_id(mask)) is not None), None
        )

    def _run(self, config: EncoderConfig, params: dict[str, Any], texts: list[list[int]]) -> np.ndarray:
        """The outputs of texts that are padded at their ends, to all of `max_len` where the last token is pooled.

        There, as in SigLIP's training, padding is seen as other tokens are.
        """
        if not texts or not all(texts):
            raise PrenormError("there is no text, or one of no token: give texts of one token at least")
        if wrong := next((i for ids in texts for i in ids if not 0 <= i < config.vocab_size), None):
            raise PrenormError(f"there is no token {wrong}: ids are below model.vocab_size={config.vocab_size}")
        longest = max(map(len, texts))
        last = config.pooling == "last"
        size = config.max_len if last else max(longest, min(-(-longest // _MULTIPLE) * _MULTIPLE, config.max_len))
        tokens = np.full((len(texts), size), self.padding, np.int32)
        mask = np.zeros((len(texts), size), np.int32)
        if size < longest:
            raise PrenormError(f"a text of {longest} tokens is longer than model.max_len={config.max_len}")
        for i, ids in enumerate(texts):
            tokens[i, : len(ids)], mask[i, : len(ids)] = ids, 1
        return np.asarray(_program(config)(params, tokens, None if last else mask))


@functools.lru_cache(maxsize=8)
def _program(config: EncoderConfig) -> Callable[..., jax.Array]:
    return jax.jit(lambda params, tokens, mask: build_model(config).apply({"params": params}, tokens, mask_BxT=mask))


def without_head(
    config: EncoderConfig, params: dict[str, Any], pooling: str = "none"
) -> tuple[EncoderConfig, dict[str, Any]]:
    """The same encoder, whose outputs are what its head would read, pooled.

    Raises PrenormError for one of folded norms, since the final norm's scale is then in the head's weights.
    """
    new = dataclasses.replace(config, tie_embeddings=False, transform=False, outputs=0, pooling=pooling)
    if not config.has_head:
        return new, params
    if config.norm_affine is False and config.norm != "layernorm":
        raise PrenormError(
            "the final norm was folded into the head, so that what it gave is known no more: import the source with "
            "--keep-affine, --to=layernorm or rmsnorm"
        )
    params = {key: leaf for key, leaf in params.items() if not key.startswith(("head", "transform"))} | (
        {"head_affine": params["head_norm"]} if "head_norm" in params else {}
    )
    if config.raw_embedding and not new.raw_embedding:  # the table was raw since it was the head
        for table in ("token_embedding", "position_embedding", "token_type_embedding"):
            if table in params:
                params[table] = coordinates(config).enter(params[table])
    return new, params
