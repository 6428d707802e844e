"""Examples to train on: text and images behind one interface, `Data`. What is read is never executed.

It imports `base`. Start with `kinds.py`, which says what a kind of data is, then `text.py` or `images.py`.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

HostBatch = dict[str, np.ndarray]


class Data(Protocol):
    """A training and an evaluation split. `config` is the run's whole configuration, as in `Kind.load`.

    Attributes:
      unit: what the loss is the mean over, and speed counts: token or image.
      description: one line for logs.
      digest: a hash of both splits: the same for the same data, wherever they lie.
      vocabulary: of text, a digest of which id is which token.
    """

    unit: str
    description: str
    digest: str
    vocabulary: str | None = None

    def check_model(self, config: ConfigDict) -> None:
        """Raises PrenormError, naming the key to change, if the model cannot take these data."""

    def units_per_batch(self, config: ConfigDict) -> int:
        """Tokens or images in a training batch."""

    def train_batch(self, config: ConfigDict, step: int, rows: slice | None = None) -> HostBatch:
        """The batch of a training step, from 0: a pure function of (config.seed, step). `rows`: only these of it."""

    def eval_batches(self, config: ConfigDict, rows: slice | None = None) -> Iterator[HostBatch]:
        """Batches of one shape that hold every unit of the evaluation split once, with weight 1; `rows` of each."""

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """{eval_loss, ...} from the sums of an evaluation step over all batches."""


def prefetch(make: Callable[[int], HostBatch], steps: range) -> Iterator[HostBatch]:
    """`make(step)` for each step; while one is used, the next is made in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, steps[0])
        for step in steps[1:]:
            batch, coming = coming.result(), pool.submit(make, step)
            yield batch
        yield coming.result()
