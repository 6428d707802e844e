"""Text from a GPT: `python -m prenorm_jax.generate runs/ln --prompt="def main"`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.errors import PrenormError, check_integer, check_range, run_command, say
from prenorm_jax.evaluate import load_as
from prenorm_jax.model_config import ModelConfig
from prenorm_jax.models import build_model
from prenorm_jax.models.gpt import GPT
from prenorm_jax.sampling import Sampling, choose
from prenorm_jax.workdir import configure_jax, load_config

if TYPE_CHECKING:
    from prenorm_jax.data.text import TextTokenizer

NO_TOKEN = -1


def as_read(params: Any, config: ModelConfig) -> Any:
    """The parameters with kernels and tables in config.dtype, as the model reads them: else each token casts them anew.

    The rest, which is small, stays as it is: the affine maps of norms are read in float32. So nothing is rounded twice.
    """

    def cast(path: tuple, leaf: Any) -> Any:
        name = path[-1].key
        return leaf.astype(config.dtype) if name == "kernel" or name.endswith("_embedding") else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


@functools.partial(jax.jit, static_argnames=("model", "cache_size"))
def prefill(model: GPT, params: Any, tokens_BxT: jax.Array, cache_size: int) -> tuple[jax.Array, Any]:
    """The logits (B, V) for what comes after the tokens, and a cache of them that has room for `cache_size`."""
    B, T = tokens_BxT.shape
    options = {"cache_size": cache_size, "at_B": jnp.full(B, T - 1), "mutable": ["cache"]}
    logits_Bx1xV, state = model.apply({"params": params}, tokens_BxT, **options)
    return logits_Bx1xV[:, 0], state["cache"]


@functools.partial(jax.jit, static_argnames=("model", "sampling"), donate_argnames="cache")
def decode_step(
    model: GPT,
    params: Any,
    cache: Any,
    tokens_B: jax.Array,
    position: jax.Array | int,
    keys_B: jax.Array,
    sampling: Sampling = Sampling(),  # noqa: B008 (it is frozen)
) -> tuple[jax.Array, Any]:
    """The tokens (B,) chosen to follow those at `position`, and the cache that holds those; the one given is donated.

    `position` must be below the cache's size. `keys_B` are random keys, one an example.
    """
    variables = {"params": params, "cache": cache}
    logits_Bx1xV, state = model.apply(variables, tokens_B[:, None], position=position, mutable=["cache"])
    return choose(logits_Bx1xV[:, 0], sampling, keys_B, position + 1), state["cache"]


def generate(
    model: GPT,
    params: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
    end: int | None = None,
) -> Iterator[np.ndarray]:
    """Continues all prompts as one batch: an iterator of the next token of each, (B,) int32.

    NO_TOKEN stands where a longer prompt is not yet used up, or where an example has ended: with token `end`, which is
    given, after `tokens` new ones, or when what the model has read fills its max_len. A token is a function of the
    prompt, its place in the batch and the seed, up to rounding; the other prompts do not matter. It is the quicker if
    `params` are `as_read` already.

    Raises PrenormError, before the iterator is made, if a prompt is empty, too long or holds other tokens than the
    model's, or if `tokens` or `seed` make no sense.
    """
    for key, value in (("tokens", tokens), ("seed", seed), ("end", end)):
        check_integer(key, value)
    check_range("tokens", tokens, at_least=1)
    check_range("seed", seed, at_least=0, below=2**32)
    max_len, lengths_B = model.config.max_len, np.array([len(prompt) for prompt in prompts])
    if not len(lengths_B) or not lengths_B.min():
        raise PrenormError("a prompt holds no token: start it with the end-of-text token, as documents do in training")
    if (longest := int(lengths_B.max())) > max_len:
        raise PrenormError(f"a prompt of {longest} tokens, the first one included, exceeds model.max_len={max_len}")
    prompts_BxT = np.zeros((len(prompts), longest), np.int32)
    for row_T, prompt in zip(prompts_BxT, map(np.asarray, prompts), strict=True):
        # Checked before int32 takes it: what that cannot hold is cut off, or another error.
        if prompt.dtype.kind not in "iu" or prompt.min() < 0 or prompt.max() >= model.config.vocab_size:
            raise PrenormError(f"a prompt holds tokens that are not integers from 0 to {model.config.vocab_size - 1}")
        row_T[: len(prompt)] = prompt
    ends_B = np.minimum(lengths_B + min(tokens, max_len), max_len + 1)  # the last token is never read
    keys_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(len(prompts)))
    return _generate(model, params, prompts_BxT, lengths_B, ends_B, sampling, keys_B, end)


def _generate(
    model: GPT,
    params: Any,
    prompts_BxT: np.ndarray,
    lengths_B: np.ndarray,
    ends_B: np.ndarray,
    sampling: Sampling,
    keys_B: jax.Array,
    end: int | None,
) -> Iterator[np.ndarray]:
    """The loop of `generate`, for prompts of `lengths_B` tokens; with what was chosen, at most `ends_B`."""
    # What all prompts have, at once; then token by token, where a longer prompt gets its own. So none is padded.
    common, longest, last = int(lengths_B.min()), int(lengths_B.max()), int(ends_B.max())
    logits_BxV, cache = prefill(model, params, jnp.asarray(prompts_BxT[:, :common]), last - 1)
    chosen_B = jax.jit(choose, static_argnums=1)(logits_BxV, sampling, keys_B, common)
    going_B = np.ones(len(prompts_BxT), bool)
    for position in range(common, last):
        given_B = position < lengths_B
        next_B = np.where(given_B, prompts_BxT[:, min(position, longest - 1)], chosen_B).astype(np.int32)
        yield np.where(going_B & ~given_B, next_B, NO_TOKEN)
        going_B &= (given_B | (next_B != end)) & (position + 1 < ends_B)
        if not going_B.any():
            return
        chosen_B, cache = decode_step(model, params, cache, next_B, position, keys_B, sampling)


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
    tokenizer: TextTokenizer,
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


def main() -> None:
    """Parses the command line, generates, prints. Raises PrenormError."""
    parser = argparse.ArgumentParser(prog="python -m prenorm_jax.generate", description=__doc__)
    parser.add_argument("workdir", help="folder of a run, or of a converted checkpoint")
    parser.add_argument(
        "--prompt", action="append", help="what the text begins with (default: nothing); may be repeated"
    )
    parser.add_argument("--tokens", type=int, default=100, help="how many new ones, at most (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens of probability p together")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling")
    parser.add_argument("--norm", help="layernorm, rmsnorm or crmsnorm: convert first (default: the run's own)")
    parser.add_argument("--step", type=int, help="which checkpoint (default: the latest)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    args = parser.parse_args()

    # Imported here: it takes half a second, for which the commands that build on this module do not wait.
    from prenorm_jax.data.text import check_vocab_size, load_tokenizer

    prompts = args.prompt or [""]
    sys.stdout.reconfigure(encoding="utf-8")

    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    config = load_config(args.workdir)
    if config.model.family != "gpt":
        raise PrenormError(f"{args.workdir} is the run of a {config.model.family}: only a gpt writes text")
    configure_jax(config)
    norm = args.norm or config.model.norm
    step, model, params = load_as(args.workdir, norm, args.step)
    params = as_read(params, model)
    tokenizer = load_tokenizer(config.data.tokenizer, config.data.eot_token)
    check_vocab_size(tokenizer.vocab_size, config)

    streamed = len(prompts) == 1 and not args.json
    show = functools.partial(print, end="", flush=True) if streamed else lambda text: None
    results = write_texts(build_model(model), params, tokenizer, prompts, args.tokens, sampling, args.seed, show)
    if streamed:
        print()
    elif args.json:
        texts = [dataclasses.asdict(result) for result in results]
        print(json.dumps({"workdir": args.workdir, "step": step, "norm": norm, "texts": texts}))
    else:
        for i, result in enumerate(results, 1):
            print(f"--- {i} of {len(results)}, {result.tokens} tokens\n{result.prompt}{result.text}")
    full = [str(i) for i, result in enumerate(results, 1) if result.end == "max_len"]
    if full:
        which = f" (prompt {', '.join(full)})" if len(prompts) > 1 else ""
        say(f"stopped where model.max_len={model.max_len} is full{which}")


if __name__ == "__main__":
    run_command(main)
