"""Text to token ids and back."""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash
from ml_collections import ConfigDict
from tokenizers import Tokenizer

from prenorm_jax.base.errors import PrenormError, first_line

NONE = "none"  # the name of no tokenizer
EOT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "[SEP]", "<eos>")


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """Text to ids without special tokens: `encode` gives each text a 1-D array of unsigned integers.

    `framed` is the same with the special tokens that the tokenizer itself puts around a text. `decode` is the way back.
    Bytes that are no UTF-8 become U+FFFD, so the last one may stand for a character whose end is still to come; special
    and unknown ids become nothing.
    """

    encode: Callable[[list[str]], list[np.ndarray]]
    framed: Callable[[list[str]], list[np.ndarray]]
    decode: Callable[[Sequence[int]], str]
    vocab_size: int
    eot: int
    digest: str  # of all that decides the ids, so that other tokenizers have others
    vocabulary: str  # a digest of which id is which token: unlike the other, the same by any release of `tokenizers`


def check_vocab_size(needed: int, config: ConfigDict) -> None:
    """Raises PrenormError, naming the key to change, if the model of a run has fewer ids than its tokenizer.

    It may have more: a vocabulary that is padded, to divide over devices, has rows that no text asks for.
    """
    if needed > config.model.vocab_size:
        raise PrenormError(
            f"model.vocab_size={config.model.vocab_size} is too small for the tokenizer {config.data.tokenizer!r}: "
            f"it needs {needed}"
        )


@contextlib.contextmanager
def _refusing(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # `tokenizers` raises plain Exception, and where its Rust panics not even that
        raise PrenormError(f"{what}: {first_line(error)}; {remedy}") from error


def load_tokenizer(name: str, eot_token: str | None = None) -> TextTokenizer:
    """The tokenizer `name`: "bytes" (end-of-text is 256), a `tokenizers` .json file, or a name on the hub.

    Raises PrenormError if it is "none", cannot be loaded or does not know `eot_token` (None: any of EOT_TOKENS); so do
    its functions where it fails, as where its unknown token is none of its tokens.
    """
    if name == "bytes":
        if eot_token:
            raise PrenormError("data.eot_token has no use with data.tokenizer='bytes': unset it")

        def utf8(texts: list[str]) -> list[np.ndarray]:
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]

        return TextTokenizer(
            encode=utf8,
            framed=utf8,
            decode=lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace"),
            vocab_size=257,
            eot=256,
            digest="bytes",
            vocabulary="bytes",
        )
    if name == NONE:
        raise PrenormError("the run came without a tokenizer: name one with --config.data.tokenizer=FILE")
    path = Path(os.path.expanduser(name))
    local = path.is_file() or path.suffix == ".json" or name[:1] in (".", "/", "~")
    remedy = "give a valid" if local else "it needs network access, or give a local"
    remedy += " tokenizers .json file (--config.data.tokenizer=FILE)"
    with _refusing(f"data.tokenizer={name!r} cannot be loaded", remedy):
        tokenizer = Tokenizer.from_file(str(path)) if local else Tokenizer.from_pretrained(name)
    # Files made for short contexts may ask for both, which would silently drop or add tokens.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    candidates = [eot_token] if eot_token else EOT_TOKENS
    eots = [i for token in candidates if (i := tokenizer.token_to_id(token)) is not None]
    if not eots:
        raise PrenormError(
            f"data.tokenizer={name!r} knows no {' or '.join(candidates)}: "
            "set data.eot_token to the token that ends its texts"
        )
    ids = tokenizer.get_vocab()
    vocab_size = max(ids.values()) + 1  # not their count: ids may have gaps
    dtype = np.min_scalar_type(vocab_size - 1)

    def encode(texts: list[str], special: bool = False) -> list[np.ndarray]:
        with _refusing(f"data.tokenizer={name!r} cannot encode a text", "mend its file or give another"):
            return [np.array(e.ids, dtype) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

    def decode(ids: Sequence[int]) -> str:
        with _refusing(f"data.tokenizer={name!r} cannot decode tokens", "mend its file or give another"):
            return tokenizer.decode([int(i) for i in ids])

    digest = xxhash.xxh3_128_hexdigest(f"{eots[0]} {tokenizer.to_str()}".encode())
    vocabulary = xxhash.xxh3_128_hexdigest(json.dumps([eots[0], ids], sort_keys=True).encode())
    framed = functools.partial(encode, special=True)
    return TextTokenizer(encode, framed, decode, vocab_size, eots[0], digest, vocabulary)
