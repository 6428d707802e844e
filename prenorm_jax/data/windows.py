"""Batches cut from a token stream: training ones a pure function of (seed, step), evaluation ones in order.

A stream is 1-D. Its first token is context only (`TextData` puts end-of-text there), so that every other one,
the first of the text included, is predicted from something.
"""

import functools
from collections.abc import Iterator

import numpy as np

from prenorm_jax.base.errors import PrenormError, check_range


def window_count(stream: np.ndarray, seq_len: int) -> int:
    """Training windows in `stream`: whole ones only, so up to seq_len-1 tokens at its end go unused.

    Raises PrenormError if there is none.
    """
    check_range("data.seq_len", seq_len, at_least=1)
    tokens = len(stream) - 1
    if tokens < seq_len:
        raise PrenormError(
            f"the training data hold {tokens} tokens, too few for one window of data.seq_len={seq_len}: "
            "lower data.seq_len or give more text"
        )
    return tokens // seq_len


def example_rows(seed: int, step: int, batch_size: int, count: int, rows: slice | None = None) -> np.ndarray:
    """The numbers, of `count` training examples, that make the batch of a step: (batch,).

    The examples form one endless sequence, epoch after epoch, each a permutation of them all drawn from
    (seed, epoch); step s takes batch_size of them from number s*batch_size on. So a run resumes from its step
    alone, and another batch size sees the same examples in the same order. `rows` gives only these rows of the
    batch, for a process that feeds only its own devices.
    """
    example_B = step * batch_size + np.arange(batch_size)[rows or slice(None)]
    epoch_B, place_B = np.divmod(example_B, count)
    row_B = np.empty_like(place_B)
    for epoch in np.unique(epoch_B):
        chosen_B = epoch_B == epoch
        row_B[chosen_B] = _permutation(seed, int(epoch), count)[place_B[chosen_B]]
    return row_B


def train_batch(
    stream: np.ndarray, seed: int, step: int, batch_size: int, seq_len: int, rows: slice | None = None
) -> dict[str, np.ndarray]:
    """The batch of a step, from 0: `tokens` int32 (batch, seq_len+1) and `weights` float32 (batch, seq_len).

    Inputs are tokens[:, :-1], targets tokens[:, 1:]; the weights are all 1. Which windows they are, and `rows`:
    see `example_rows`. Raises PrenormError if no window fits.
    """
    window_B = example_rows(seed, step, batch_size, window_count(stream, seq_len), rows)
    position_BxT = window_B[:, None] * seq_len + np.arange(seq_len + 1)
    weights_BxT = np.ones((len(window_B), seq_len), np.float32)
    return {"tokens": stream[position_BxT].astype(np.int32), "weights": weights_BxT}


def eval_batches(
    stream: np.ndarray, batch_size: int, seq_len: int, rows: slice | None = None
) -> Iterator[dict[str, np.ndarray]]:
    """Batches that predict every token of `stream` but the first exactly once; keys as in `train_batch`.

    All have the same shape: positions past the end repeat the last token and have weight 0, so the weights of
    all batches sum to len(stream) - 1. `rows` builds only these rows of each batch.
    """
    last = len(stream) - 1
    row_B = np.arange(batch_size)[rows or slice(None)]
    for start in range(0, last, batch_size * seq_len):
        position_BxT = start + row_B[:, None] * seq_len + np.arange(seq_len + 1)
        tokens_BxT = stream[np.minimum(position_BxT, last)].astype(np.int32)
        yield {"tokens": tokens_BxT, "weights": (position_BxT[:, 1:] <= last).astype(np.float32)}


@functools.lru_cache(maxsize=2)  # a batch touches two epochs at most, unless an epoch is shorter than a batch
def _permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    # Philox takes the pair as its key: no mixing into one number that two pairs might share.
    key = np.array([seed % 2**64, epoch], np.uint64)
    order = np.random.Generator(np.random.Philox(key=key)).permutation(count)
    order.setflags(write=False)  # every caller gets this array
    return order
