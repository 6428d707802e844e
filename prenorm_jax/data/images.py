"""Labelled images: scikit-learn's digits, IDX files (the MNIST family), folders of classes, hub data sets."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import math
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import xxhash
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError, check_range, first_line
from prenorm_jax.data import Data, HostBatch
from prenorm_jax.data.folders import LeftOut
from prenorm_jax.data.image_files import Decoder, Encoded, find_splits, readable
from prenorm_jax.data.windows import example_rows

if TYPE_CHECKING:
    import datasets

_IN_A_ROW = 100  # images that are tried before a batch is given up
_AS_THEY_WERE = (
    "(the lines above say why): restore them as they were; a run refuses others, which take another workdir "
    "(--config.init_from= takes its parameters along)"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """N square images that are read by row.

    Attributes:
      labels: (N,) int32 classes.
      read: rows (n,) -> (n, side, side, C) uint8, and which of them could be decoded, (n,) bool.
      content: what is hashed to tell these images from others.
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    content: bytes | np.ndarray

    def batch(self, rows: np.ndarray, weights: np.ndarray) -> HostBatch:
        """images uint8 (B, side, side, C), labels int32 (B,), weights float32 (B,): 0 where none could be decoded."""
        images, good = self.read(rows)
        return {"images": images, "labels": self.labels[rows], "weights": (weights * good).astype(np.float32)}

    def full_batch(self, rows: np.ndarray) -> HostBatch:
        """The same, but in the place of an image that cannot be decoded stands the next one that can.

        Raises PrenormError if too many in a row cannot.
        """
        images, good = self.read(rows)
        for _ in range(tries := min(_IN_A_ROW, len(self.labels))):
            if good.all():
                return {"images": images, "labels": self.labels[rows], "weights": np.ones(len(rows), np.float32)}
            rows = np.where(good, rows, (rows + 1) % len(self.labels))
            images[~good], good[~good] = self.read(rows[~good])
        raise PrenormError(f"{tries} images in a row cannot be decoded {_AS_THEY_WERE}")

    def select(self, rows: np.ndarray) -> Images:
        """These rows alone."""
        return Images(self.labels[rows], lambda chosen: self.read(rows[chosen]), self.content)


@dataclasses.dataclass(frozen=True, eq=False)
class ImageData(Data):
    """Splits of images of `side` × `side` pixels."""

    train: Images
    eval: Images
    side: int
    channels: int
    classes: int
    description: str
    digest: str
    unit = "image"

    def check_model(self, config: ConfigDict) -> None:
        model = config.model
        if model.channels != self.channels:
            raise PrenormError(f"model.channels={model.channels}, but the images have {self.channels}: set it to that")
        if model.image_size > self.side:
            raise PrenormError(
                f"model.image_size={model.image_size} is larger than the images ({self.side} × {self.side}): lower it"
            )
        if model.classes < self.classes:
            raise PrenormError(f"model.classes={model.classes} is too small: the images have {self.classes} classes")

    def units_per_batch(self, config: ConfigDict) -> int:
        return config.batch_size

    def train_batch(self, config: ConfigDict, step: int, rows: slice | None = None) -> HostBatch:
        chosen = example_rows(config.seed, step, config.batch_size, len(self.train.labels), rows)
        return self.train.full_batch(chosen)

    def eval_batches(self, config: ConfigDict, rows: slice | None = None) -> Iterator[HostBatch]:
        last = len(self.eval.labels) - 1
        for start in range(0, last + 1, config.batch_size):
            chosen = start + np.arange(config.batch_size)[rows or slice(None)]
            yield self.eval.batch(np.minimum(chosen, last), chosen <= last)

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """{eval_loss (nats per image), eval_top1, eval_top5 (fractions), eval_images}."""
        if not (count := sums["weight"]):
            raise PrenormError(f"no image of the evaluation split can be decoded {_AS_THEY_WERE}")
        top = {f"eval_top{k}": sums[f"top{k}"] / count for k in (1, 5)}
        return {"eval_loss": sums["nats"] / count, **top, "eval_images": int(count)}


def load_images(config: ConfigDict) -> ImageData:
    """Reads what `config.data` names, in the size and channels that `config.model` and `data.image_size` ask for.

    Raises PrenormError, naming the key to change, if keys contradict each other, or files cannot be read or are not
    what they are called.
    """
    data = config.data
    folder = Path(os.path.expanduser(data.path)) if data.path else None
    if data.path and data.hub:
        raise PrenormError("data.path and data.hub exclude each other: unset one")
    check_range("data.holdout", data.holdout, at_least=0, below=1)
    for key in ("mean", "std"):
        if len(data[key]) not in (1, config.model.channels):
            raise PrenormError(f"data.{key}={data[key]} has {len(data[key])} numbers: give 1 or model.channels")
    if not all(isinstance(value, float | int) for value in (*data.mean, *data.std)):
        raise PrenormError(f"data.mean={data.mean} and data.std={data.std} must be numbers")
    if not min(data.std) > 0:
        raise PrenormError(f"data.std={data.std} must be above 0")
    left_out = ""
    if data.hub or (folder and not _idx_files(folder)):
        train, evaluation, classes, source, left_out = _read_folder(config, folder) if folder else _read_hub(config)
        side, channels = data.image_size or config.model.image_size, config.model.channels
    else:
        train, evaluation, source = _read_idx_folder(folder) if folder else (*_read_digits(), "digits")
        side, channels = train.read(np.arange(1))[0].shape[2:]
        classes = 1 + max(split.labels.max() for split in (train, evaluation) if split is not None)
        if data.image_size not in (None, side):
            raise PrenormError(f"data.image_size={data.image_size}: images of {source} are {side} wide; unset it")
    if evaluation is None:
        train, evaluation = hold_out(train, data.holdout)
    sizes = f"train {len(train.labels):,}, eval {len(evaluation.labels):,} images"
    description = f"{source}: {sizes} of {side} × {side} × {channels}, {classes} classes{left_out}"
    digest = xxhash.xxh3_128(f"{side} {channels}".encode())
    for split in (train, evaluation):
        digest.update(split.labels)
        digest.update(split.content)
    return ImageData(train, evaluation, side, channels, int(classes), description, digest.hexdigest())


def hold_out(images: Images, fraction: float) -> tuple[Images, Images]:
    """(training, evaluation): about `fraction` of the images, drawn by their number alone and so whatever the seed."""
    count = len(images.labels)
    held = round(count * fraction)
    if not 0 < held < count:
        raise PrenormError(f"data.holdout={fraction} of {count} images leaves a side empty: change it")
    order = np.random.Generator(np.random.Philox(key=count)).permutation(count)
    return images.select(np.sort(order[held:])), images.select(np.sort(order[:held]))


def _array_images(images: np.ndarray, labels: np.ndarray) -> Images:
    """From (N, side, side) uint8 and (N,)."""

    def read(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return images[rows, :, :, None], np.ones(len(rows), bool)

    return Images(labels.astype(np.int32), read, np.ascontiguousarray(images))


@functools.cache
def _read_digits() -> tuple[Images, None]:
    """1,797 handwritten digits of 8 × 8 pixels, from the wheel of scikit-learn (UCI, Optical Recognition of Digits)."""
    from sklearn.datasets import load_digits  # its import takes a second

    digits = load_digits()
    return _array_images(np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target), None


def _idx_files(folder: Path) -> dict[str, Path]:
    """The folder's {train images, train labels, eval images, eval labels}, as far as there are any."""
    found = {}
    for file in sorted(file for file in folder.glob("*idx[13]*") if file.is_file()):
        split = "train" if "train" in file.name else "eval" if "t10k" in file.name or "test" in file.name else None
        kind = f"{split} {'images' if 'idx3' in file.name else 'labels'}"
        if kind in found:
            raise PrenormError(
                f"data.path={str(folder)!r} has two files of {kind}, {found[kind].name} and {file.name}: put one data "
                "set into a folder of its own"
            )
        if split:
            found[kind] = file
    return found


def _read_idx_folder(folder: Path) -> tuple[Images, Images | None, str]:
    files, source = _idx_files(folder), f"data.path={str(folder)!r}"
    splits, sizes = {}, set()
    for split in dict.fromkeys(("train", *(kind.split()[0] for kind in files))):
        kinds = [f"{split} {kind}" for kind in ("images", "labels")]
        if missing := [kind for kind in kinds if kind not in files]:
            raise PrenormError(f"{source} has no IDX file of {missing[0]}, as in train-images-idx3-ubyte")
        images, labels = (read_idx(files[kind]) for kind in kinds)
        is_square = images.ndim == 3 and images.shape[1] == images.shape[2] and images.size
        if not is_square or labels.shape != images.shape[:1]:
            raise PrenormError(
                f"{files[kinds[0]]} and {files[kinds[1]]} have shapes {images.shape} and {labels.shape}: not as many "
                "labels as square images"
            )
        splits[split] = _array_images(images, labels)
        sizes.add(images.shape[1:])
    if len(sizes) > 1:
        raise PrenormError(f"{source}: images for training and evaluation differ in size, {sizes}")
    return splits["train"], splits.get("eval"), str(folder)


def read_idx(path: Path) -> np.ndarray:
    """An IDX file of unsigned bytes, plain or gzip: 0 0 8 n, n sizes of 4 bytes, the data (http://yann.lecun.com).

    Raises PrenormError, naming the file, if it is anything else.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise PrenormError(f"{path} cannot be read: {first_line(error)}") from error
    start = 4 + 4 * content[3] if len(content) > 3 else 4
    if len(content) < start or content[:3] != b"\0\0\x08" or content[3] > 4:
        raise PrenormError(f"{path} is no IDX file of unsigned bytes")
    shape = tuple(map(int, np.frombuffer(content[4:start], ">u4")))
    if len(content) - start != math.prod(shape) or max(shape, default=0) > len(content):
        raise PrenormError(f"{path} is cut short or too long: {len(content) - start} bytes of data for shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_folder(config: ConfigDict, folder: Path) -> tuple[Images, Images | None, int, str, str]:
    """Of class folders, in folders of the splits or not."""
    data, source = config.data, f"data.path={config.data.path!r}"
    if not folder.is_dir():
        raise PrenormError(f"{source} is no folder: give one of IDX files, or of a folder of images for each class")
    splits, left_out = find_splits(folder, data, source)
    classes = {name: label for label, name in enumerate(sorted(set().union(*splits.values())))}
    images = {split: _of_files(config, found, classes, left_out) for split, found in splits.items()}
    if any(not len(split.labels) for split in images.values()) or len(classes) < 2:
        raise PrenormError(
            f"{source} holds no images of two classes{left_out}: give a folder of a folder of images for each class, "
            "or of IDX files; where these folders lie in those of splits, name those: data.train_split, data.eval_split"
        )
    evaluation = images[data.eval_split] if data.eval_split else None
    return images[data.train_split], evaluation, len(classes), data.path, str(left_out)


def _of_files(config: ConfigDict, found: dict[str, list[str]], classes: dict[str, int], left_out: LeftOut) -> Images:
    labelled = sorted((file, classes[name]) for name, files in found.items() for file in files)
    good, content = readable([file for file, _ in labelled], left_out)
    files = np.array([file for file, _ in labelled], object)[good]

    def fetch(rows: np.ndarray) -> list[Encoded]:
        return [(file, file) for file in files[rows]]

    labels = np.array([label for _, label in labelled], np.int32)[good]
    return Images(labels, _decoder(config, fetch, f"data.path={config.data.path!r}"), content)


def _decoder(config: ConfigDict, fetch: Callable[[np.ndarray], list[Encoded]], source: str) -> Decoder:
    if (channels := config.model.channels) not in (1, 3):
        raise PrenormError(f"model.channels={channels}: image files are read as 1 (grey) or 3 (RGB)")
    return Decoder(fetch, config.data.image_size or config.model.image_size, channels, source)


def _read_hub(config: ConfigDict) -> tuple[Images, Images | None, int, str, str]:
    from prenorm_jax.data.documents import loading_hub
    from prenorm_jax.data.quiet import datasets  # its import takes a second

    data = config.data
    with loading_hub(data.hub, data.hub_config) as source:
        splits = datasets.load_dataset(data.hub, data.hub_config)
    for key in ("train_split", "eval_split"):
        if data[key] is not None and data[key] not in splits:
            raise PrenormError(f"{source} has no data.{key}={data[key]!r}; it has {', '.join(splits)}")
    train, classes = _from_dataset(splits[data.train_split], config, source)
    evaluation = _from_dataset(splits[data.eval_split], config, source)[0] if data.eval_split else None
    return train, evaluation, classes, data.hub, ""


def _from_dataset(dataset: datasets.Dataset, config: ConfigDict, source: str) -> tuple[Images, int]:
    """The images of a split, decoded as they are read, and the number of its classes."""
    from datasets import Image

    data = config.data
    for key in ("image_column", "label_column"):
        if data[key] not in dataset.features:
            raise PrenormError(f"{source} has no column data.{key}={data[key]!r}; it has {', '.join(dataset.features)}")
    if not isinstance(dataset.features[data.image_column], Image):
        raise PrenormError(f"{source}: data.image_column={data.image_column!r} holds no images; name another")
    feature = dataset.features[data.label_column]
    labels = np.asarray(dataset.with_format("numpy")[data.label_column][:])
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels) or labels.min() < 0:
        raise PrenormError(
            f"{source}: data.label_column={data.label_column!r} holds no classes 0, 1, ...: name another"
        )
    encoded = dataset.select_columns([data.image_column]).cast_column(data.image_column, Image(decode=False))

    def fetch(rows: np.ndarray) -> list[Encoded]:
        items = [item or {"path": None, "bytes": None} for item in encoded[rows.tolist()][data.image_column]]
        names = [item["path"] or f"row {row}" for row, item in zip(rows, items, strict=True)]
        return [(name, item["bytes"] or item["path"]) for name, item in zip(names, items, strict=True)]

    classes = getattr(feature, "num_classes", None) or int(labels.max()) + 1
    content = _contents(encoded, data.image_column)
    return Images(labels.astype(np.int32), _decoder(config, fetch, source), content), classes


def _contents(encoded: datasets.Dataset, column: str) -> bytes:
    """A hash of the names and sizes of the encoded images, as in `readable`."""
    from pyarrow.compute import binary_length

    digest = xxhash.xxh3_128()
    for chunk in encoded.data.column(column).chunks:
        sizes = binary_length(chunk.field("bytes")).to_pylist()
        for path, size in zip(chunk.field("path").to_pylist(), sizes, strict=True):
            if size is None:
                size = Path(path).stat().st_size if path else 0
            digest.update(f"{Path(path or '').name} {size}\n".encode())
    return digest.digest()
