"""The kinds of data that models take, text and images: what reading, checking and using them takes of each.

A family of models names its kind as `ModelConfig.inputs`; a further kind is a class here and its keys in `config.py`.
"""

from __future__ import annotations

from typing import Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError, check_choice, check_range
from prenorm_jax.data import Data, HostBatch
from prenorm_jax.data.augment import Examples, image_examples

Batch = dict[str, jax.Array]


class Kind(Protocol):
    """A kind of data. `config` is a run's whole configuration.

    Attributes:
      unit: what the loss is the mean over, and speed counts.
      top: evaluation also counts where the label is among the first so many classes.
    """

    unit: str
    top: tuple[int, ...]

    def check(self, config: ConfigDict) -> None:
        """Raises PrenormError for a key of these data that makes no sense."""

    def load(self, config: ConfigDict) -> Data:
        """Reads what `config.data` names, as `config.model` needs it. Raises PrenormError."""

    def examples(self, config: ConfigDict, batch: Batch, key: jax.Array | None = None) -> Examples:
        """The model's inputs and targets, on the device. With a key (in training) they may be augmented by it."""

    def batch_shapes(self, config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of a training batch."""

    def sample(self, config: ConfigDict) -> HostBatch:
        """A training batch of real data that need no download, of whatever sizes `config` has."""

    def length(self, config: ConfigDict) -> int:
        """Tokens of a sequence; 0 where the model has its own number."""


class Text:
    """Token sequences. Batches: tokens (B, T+1) int32; weights (B, T) float32, of the predictions of tokens[:, 1:]."""

    unit = "token"
    top = ()

    def check(self, config: ConfigDict) -> None:
        """Raises PrenormError for a sequence of no token."""
        check_range("data.seq_len", config.data.seq_len, at_least=1)

    def load(self, config: ConfigDict) -> Data:
        """See `text.load_text`."""
        from prenorm_jax.data.text import load_text  # its libraries take half a second to import

        return load_text(config.data)

    def examples(self, config: ConfigDict, batch: Batch, key: jax.Array | None = None) -> Examples:
        """Each token from those before it."""
        return Examples(batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch["weights"])

    def batch_shapes(self, config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
        """Of tokens and weights."""
        B, T = config.batch_size, config.data.seq_len
        return _shapes(tokens=((B, T + 1), np.int32), weights=((B, T), np.float32))

    def sample(self, config: ConfigDict) -> HostBatch:
        """The first batch of what `config.data` names: by default the standard library's text."""
        return self.load(config).train_batch(config, 0)

    def length(self, config: ConfigDict) -> int:
        """Tokens that an example predicts."""
        return config.data.seq_len


class Images:
    """Labelled images. Batches: images (B, H, W, C) uint8; labels (B,) int32; weights (B,) float32."""

    unit = "image"
    top = (1, 5)

    def check(self, config: ConfigDict) -> None:
        """Raises PrenormError for augmentation that makes no sense, or that the loss cannot take."""
        augment = config.augment
        for key in augment:
            check_range(f"augment.{key}", augment[key], at_least=0)
        check_choice("loss", config.loss, ("softmax", "sigmoid"))
        if config.loss == "sigmoid" and augment.label_smoothing:
            raise PrenormError("loss=sigmoid takes no augment.label_smoothing: set it to 0")
        if augment.shift and augment.min_area < 1:
            raise PrenormError("augment.shift and augment.min_area<1 exclude each other: set one crop alone")
        check_range("augment.label_smoothing", augment.label_smoothing, at_least=0, below=1)
        if not 0 < augment.min_area <= 1:
            raise PrenormError(f"augment.min_area={augment.min_area} must be above 0 and at most 1")

    def load(self, config: ConfigDict) -> Data:
        """See `images.load_images`."""
        from prenorm_jax.data.images import load_images

        return load_images(config)

    def examples(self, config: ConfigDict, batch: Batch, key: jax.Array | None = None) -> Examples:
        """See `augment.image_examples`."""
        return image_examples(config, batch, key)

    def batch_shapes(self, config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
        """Of images, labels and weights."""
        B, side = config.batch_size, config.model.image_size
        images = ((B, side, side, config.model.channels), np.uint8)
        return _shapes(images=images, labels=((B,), np.int32), weights=((B,), np.float32))

    def sample(self, config: ConfigDict) -> HostBatch:
        """Crops of scikit-learn's two photographs, their labels random."""
        from sklearn.datasets import load_sample_images

        rng, side, images = np.random.default_rng(0), config.model.image_size, []
        for photo in load_sample_images().images * -(-config.batch_size // 2):
            top, left = (rng.integers(1 + size - side) for size in photo.shape[:2])
            images.append(photo[top : top + side, left : left + side])
        labels = rng.integers(config.model.classes, size=config.batch_size).astype(np.int32)
        weights = np.ones(config.batch_size, np.float32)
        return {"images": np.stack(images[: config.batch_size]), "labels": labels, "weights": weights}

    def length(self, config: ConfigDict) -> int:
        """None of its own."""
        return 0


def _shapes(**specs: tuple) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in specs.items()}


KINDS: dict[str, Kind] = {"text": Text(), "images": Images()}
