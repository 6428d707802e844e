"""The kinds of data that models take, text and images: what reading, checking and using them takes of each.

A family of models names its kind as `ModelConfig.inputs`; a further kind is a class here and its keys in `config.py`.
"""

from typing import Protocol

import jax
import numpy as np
from jax import ShapeDtypeStruct
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

    def batch_shapes(self, config: ConfigDict) -> dict[str, ShapeDtypeStruct]:
        """Shapes and dtypes of a training batch."""

    def sample(self, config: ConfigDict) -> HostBatch:
        """A training batch of real data that need no download, of whatever sizes `config` has."""

    def length(self, config: ConfigDict) -> int:
        """Tokens of a sequence; 0 where the model has its own number."""


class Text(Kind):
    """Token sequences. Batches: tokens (B, T+1) int32; weights (B, T) float32, of the predictions of tokens[:, 1:]."""

    unit = "token"
    top = ()

    def check(self, config: ConfigDict) -> None:
        check_range("data.seq_len", config.data.seq_len, at_least=1, below=2**31)

    def load(self, config: ConfigDict) -> Data:
        from prenorm_jax.data.text import load_text  # its libraries take half a second to import

        return load_text(config.data)

    def examples(self, config: ConfigDict, batch: Batch, key: jax.Array | None = None) -> Examples:
        return Examples(batch["tokens"][:, :-1], batch["tokens"][:, 1:], batch["weights"])

    def batch_shapes(self, config: ConfigDict) -> dict[str, ShapeDtypeStruct]:
        B, T = config.batch_size, config.data.seq_len
        return {"tokens": ShapeDtypeStruct((B, T + 1), np.int32), "weights": ShapeDtypeStruct((B, T), np.float32)}

    def sample(self, config: ConfigDict) -> HostBatch:
        return self.load(config).train_batch(config, 0)

    def length(self, config: ConfigDict) -> int:
        return config.data.seq_len


class Images(Kind):
    """Labelled images. Batches: images (B, H, W, C) uint8; labels (B,) int32; weights (B,) float32."""

    unit = "image"
    top = (1, 5)

    def check(self, config: ConfigDict) -> None:
        augment, width = config.augment, config.model.get("image_width")
        if width not in (None, config.model.image_size):
            raise PrenormError(
                f"model.image_width={width}: images of data are squares, and spectrograms none: unset it"
            )
        for key in augment:
            below = config.model.image_size if key == "shift" else float("inf")
            check_range(f"augment.{key}", augment[key], at_least=0, below=below)
        check_choice("loss", config.loss, ("softmax", "sigmoid"))
        if config.loss == "sigmoid" and augment.label_smoothing:
            raise PrenormError("loss=sigmoid takes no augment.label_smoothing: set it to 0")
        if augment.shift and augment.min_area < 1:
            raise PrenormError("augment.shift and augment.min_area<1 exclude each other: set one crop alone")
        check_range("augment.label_smoothing", augment.label_smoothing, at_least=0, below=1)
        if not 0 < augment.min_area <= 1:
            raise PrenormError(f"augment.min_area={augment.min_area} must be above 0 and at most 1")

    def load(self, config: ConfigDict) -> Data:
        from prenorm_jax.data.images import load_images

        return load_images(config)

    def examples(self, config: ConfigDict, batch: Batch, key: jax.Array | None = None) -> Examples:
        return image_examples(config, batch, key)

    def batch_shapes(self, config: ConfigDict) -> dict[str, ShapeDtypeStruct]:
        side, channels = config.model.image_size, config.model.channels
        each = {"images": ((side, side, channels), np.uint8), "labels": ((), np.int32), "weights": ((), np.float32)}
        return {name: ShapeDtypeStruct((config.batch_size, *shape), dtype) for name, (shape, dtype) in each.items()}

    def sample(self, config: ConfigDict) -> HostBatch:
        from sklearn.datasets import load_sample_images  # two photographs: the batch is crops, of random labels

        rng, side, images = np.random.default_rng(0), config.model.image_size, []
        for photo in load_sample_images().images * -(-config.batch_size // 2):
            top, left = (rng.integers(1 + size - side) for size in photo.shape[:2])
            images.append(photo[top : top + side, left : left + side])
        labels = rng.integers(config.model.classes, size=config.batch_size).astype(np.int32)
        weights = np.ones(config.batch_size, np.float32)
        return {"images": np.stack(images[: config.batch_size]), "labels": labels, "weights": weights}

    def length(self, config: ConfigDict) -> int:
        return 0


KINDS: dict[str, Kind] = {"text": Text(), "images": Images()}
