"""Greedy and sampled decoding with a cache of keys and values: prefill, the jitted step, ragged batches."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from prenorm_jax.base.errors import PrenormError, check_integer, check_range
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.gpt import GPT
from prenorm_jax.models.sampling import Sampling, choose

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
    end: int | Sequence[int] | None = None,
) -> Iterator[np.ndarray]:
    """Continues all prompts as one batch: an iterator of the next token of each, (B,) int32.

    NO_TOKEN stands where a longer prompt is not yet used up, or where an example has ended: with token `end`, or any of
    several, which is given, after `tokens` new ones, or when what the model has read fills its max_len. A token is a
    function of the prompt, its place in the batch and the seed, up to rounding; the other prompts do not matter. It is
    the quicker if `params` are `as_read` already.

    Raises PrenormError, before the iterator is made, if a prompt is empty, too long or holds other tokens than the
    model's, or if `tokens` or `seed` make no sense.
    """
    ends = tuple(end) if isinstance(end, Sequence) else () if end is None else (end,)
    for key, value in (("tokens", tokens), ("seed", seed), *(("end", each) for each in ends)):
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
    return _generate(model, params, prompts_BxT, lengths_B, ends_B, sampling, keys_B, ends)


def _generate(
    model: GPT,
    params: Any,
    prompts_BxT: np.ndarray,
    lengths_B: np.ndarray,
    ends_B: np.ndarray,
    sampling: Sampling,
    keys_B: jax.Array,
    ends: tuple[int, ...],
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
        going_B &= (given_B | ~np.isin(next_B, ends)) & (position + 1 < ends_B)
        if not going_B.any():
            return
        chosen_B, cache = decode_step(model, params, cache, next_B, position, keys_B, sampling)
