"""Examples to train on: one interface, `Data`, for text and for images. What is read is never executed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
from ml_collections import ConfigDict

HostBatch = dict[str, np.ndarray]


class Data(Protocol):
    """A training and an evaluation split. `config` is the run's whole configuration, as in `load_data`.

    Attributes:
      unit: what the loss is the mean over, and speed counts: token or image.
      description: one line for logs.
      digest: a hash of both splits: the same for the same data, wherever they lie.
    """

    unit: str
    description: str
    digest: str

    def check_model(self, config: ConfigDict) -> None:
        """Raises PrenormError, naming the key to change, if the model cannot take these data."""

    def units_per_batch(self, config: ConfigDict) -> int:
        """Tokens or images in a training batch."""

    def train_batch(self, config: ConfigDict, step: int, rows: slice | None = None) -> HostBatch:
        """The batch of a training step, from 0: a pure function of (config.seed, step). `rows`: only these of it."""

    def eval_batches(self, config: ConfigDict, rows: slice | None = None) -> Iterator[HostBatch]:
        """Batches of one shape that hold every unit of the evaluation split once, with weight 1; `rows` of each."""

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """{eval_loss, ...} from the sums of `step.make_eval_step` over all batches."""


def prefetch(make: Callable[[int], HostBatch], steps: range) -> Iterator[HostBatch]:
    """`make(step)` for each step; while one is used, the next is made in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, steps.start)
        for step in steps:
            batch = coming.result()
            if step + 1 in steps:
                coming = pool.submit(make, step + 1)
            yield batch


def load_data(config: ConfigDict) -> Data:
    """Reads what `config.data` names, as `config.model` needs it. Raises PrenormError."""
    # Imported here: the libraries behind them take half a second, for which commands that read no data do not wait.
    if config.model.family == "vit":
        from prenorm_jax.data.images import load_images

        return load_images(config)
    from prenorm_jax.data.text import load_text

    return load_text(config.data)
