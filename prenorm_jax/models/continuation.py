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
    framed: Callable[[list[str]], list[Any]]
    decode: Callable[[Sequence[int]], str]
    eot: int


@dataclasses.dataclass(frozen=True)
class Convention:
    """How a model reads texts, and ends them.

    Attributes:
      start: the ids that the model is given for prompts, by the prompts.
      decode: the text of ids.
      ends: any of these ids ends a text.
    """

    start: Callable[[list[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    ends: tuple[int, ...]


def of_documents(tokenizer: Tokenizer) -> Convention:
    """A prompt stands where a document does in training: after an end-of-text token."""

    def start(prompts: list[str]) -> list[list[int]]:
        return [[tokenizer.eot, *ids.tolist()] for ids in tokenizer.encode(prompts)]

    return Convention(start, tokenizer.decode, (tokenizer.eot,))


def of_tokenizer(tokenizer: Tokenizer, begin: int | None, ends: tuple[int, ...]) -> Convention:
    """A prompt stands as the tokenizer frames it. `begin`: what the model is given where it then is of no token."""

    def start(prompts: list[str]) -> list[list[int]]:
        framed = [ids.tolist() for ids in tokenizer.framed(prompts)]
        if begin is None and not all(framed):
            raise PrenormError("an empty prompt is of no token for this model: give --prompt with a text")
        return [ids or [begin] for ids in framed]

    return Convention(start, tokenizer.decode, ends)


def of_ids(ends: tuple[int, ...]) -> Convention:
    """A prompt is a list of ids with commas between, and so is the text."""

    def start(prompts: list[str]) -> list[list[int]]:
        try:
            return [[int(each) for each in prompt.split(",")] for prompt in prompts]
        except ValueError as error:
            raise PrenormError("--prompt-ids takes ids with commas between, such as 15496,11,995") from error

    return Convention(start, lambda ids: ",".join(map(str, ids)), ends)


class TextStream:
    """The text after a prompt, piece by piece, as its tokens come: a character is held back until it is complete."""

    def __init__(self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]):
        """`decode`: the text of ids."""
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
    convention: Convention,
    prompts: Sequence[str],
    tokens: int,
    sampling: Sampling,
    seed: int,
    show: Callable[[str], None] = lambda text: None,
) -> list[Continuation]:
    """Continues each prompt by at most `tokens` tokens; calls `show` with the first prompt and each piece that follows.

    Raises PrenormError.
    """
    for prompt in prompts:
        if any("\ud800" <= character <= "\udfff" for character in prompt):  # how Python passes on other bytes
            raise PrenormError("a prompt is not valid UTF-8: give it in that encoding")
    starts = convention.start(list(prompts))
    streams = [TextStream(convention.decode, ids) for ids in starts]
    results = [Continuation(prompt) for prompt in prompts]

    def add(i: int, text: str) -> None:
        results[i].text += text
        if i == 0 and text:
            show(text)

    steps = generate(model, params, starts, tokens, sampling, seed, convention.ends)
    show(prompts[0])
    for next_B in steps:
        for i, token in enumerate(next_B.tolist()):
            if token in convention.ends:
                results[i].end = "end-of-text"
            elif token != NO_TOKEN:
                results[i].tokens += 1
                add(i, streams[i].push(token))
    for i, result in enumerate(results):
        add(i, streams[i].rest())
        if result.end != "end-of-text" and result.tokens < tokens:
            result.end = "max_len"
    return results
