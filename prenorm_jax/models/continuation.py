"""Texts that go on from prompts, piece by piece, as their tokens come."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.models.decoding import NO_TOKEN, generate
from prenorm_jax.models.gpt import GPT
from prenorm_jax.models.sampling import Sampling


class Tokenizer(Protocol):
    """What is asked of a tokenizer (`data/tokenizer.py`): ids of texts, the text of ids, the end-of-text token."""

    encode: Callable[[list[str]], list[Any]]
    decode: Callable[[Sequence[int]], str]
    eot: int


class TextStream:
    """The text after a prompt, piece by piece, as its tokens come: a character is held back until it is complete."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]):
        """`decode`: of a `TextTokenizer`."""
        self._decode = decode
        self._ids = list(prompt)
        # A token's text may depend on its neighbours: each piece is decoded together with the one before.
        self._last, self._given = 0, len(self._ids)

    def push(self, token: int) -> str:
        """The text that this token completes; maybe none."""
        self._ids.append(token)
        text = self.rest()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._last, self._given = self._given, len(self._ids)
        return text

    def rest(self) -> str:
        """The text of all tokens that were held back."""
        before = self._decode(self._ids[self._last : self._given])
        return self._decode(self._ids[self._last :])[len(before) :]


@dataclasses.dataclass
class Continuation:
    """A prompt and what became of it, as the command prints it."""

    prompt: str
    text: str = ""
    tokens: int = 0
    end: str = "tokens"  # why it ends: that many tokens were asked for | end-of-text | max_len


def write_texts(
    model: GPT,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    tokens: int,
    sampling: Sampling,
    seed: int,
    show: Callable[[str], None] = lambda text: None,
) -> list[Continuation]:
    """Continues each prompt by at most `tokens` tokens; calls `show` with the first prompt and each piece that follows.

    A prompt stands where a document does in training: after an end-of-text token. Raises PrenormError.
    """
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python passes on other bytes
            raise PrenormError("a prompt is not valid UTF-8: give it in that encoding")
    encoded = [ids.tolist() for ids in tokenizer.encode(list(prompts))]
    streams = [TextStream(tokenizer.decode, ids) for ids in encoded]
    results = [Continuation(prompt) for prompt in prompts]

    def add(i: int, text: str) -> None:
        results[i].text += text
        if i == 0 and text:
            show(text)

    starts = [[tokenizer.eot, *ids] for ids in encoded]
    steps = generate(model, params, starts, tokens, sampling, seed, tokenizer.eot)
    show(prompts[0])
    for next_B in steps:
        for i, token in enumerate(next_B.tolist()):
            if token == tokenizer.eot:
                results[i].end = "end-of-text"
            elif token != NO_TOKEN:
                results[i].tokens += 1
                add(i, streams[i].push(token))
    for i, result in enumerate(results):
        add(i, streams[i].rest())
        if result.end != "end-of-text" and result.tokens < tokens:
            result.end = "max_len"
    return results
