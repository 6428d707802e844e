"""Labelled images: scikit-learn's digits, IDX files (the MNIST family), folders of classes, hub data sets."""

from __future__ import annotations

import dataclasses
import gzip
import io
import math
import os
import tempfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import xxhash
from ml_collections import ConfigDict
from PIL import Image, ImageOps

from prenorm_jax.base.errors import PrenormError, check_range, first_line
from prenorm_jax.data import Data, HostBatch
from prenorm_jax.data.quiet import datasets
from prenorm_jax.data.windows import example_rows


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """N square images that are read by row.

    Attributes:
      labels: (N,) int32 classes.
      read: rows (n,) -> (n, side, side, C) uint8.
      content: what is hashed to tell these images from others.
    """

    labels: np.ndarray
    read: Callable[[np.ndarray], np.ndarray]
    content: bytes | np.ndarray

    def batch(self, rows: np.ndarray, weights: np.ndarray) -> HostBatch:
        """images uint8 (B, side, side, C), labels int32 (B,), weights float32 (B,)."""
        return {"images": self.read(rows), "labels": self.labels[rows], "weights": weights.astype(np.float32)}

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
        return self.train.batch(chosen, np.ones(len(chosen)))

    def eval_batches(self, config: ConfigDict, rows: slice | None = None) -> Iterator[HostBatch]:
        last = len(self.eval.labels) - 1
        for start in range(0, last + 1, config.batch_size):
            chosen = start + np.arange(config.batch_size)[rows or slice(None)]
            yield self.eval.batch(np.minimum(chosen, last), chosen <= last)

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """{eval_loss (nats per image), eval_top1, eval_top5 (fractions), eval_images}."""
        count = sums["weight"]
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
    if data.hub or (folder and not _idx_files(folder)):
        train, evaluation, classes, source = _read_datasets(config, folder)
        side, channels = data.image_size or config.model.image_size, config.model.channels
    else:
        train, evaluation, source = _read_idx_folder(folder) if folder else (*_read_digits(), "digits")
        side, channels = train.read(np.arange(1)).shape[2:]
        classes = 1 + max(split.labels.max() for split in (train, evaluation) if split is not None)
        if data.image_size not in (None, side):
            raise PrenormError(f"data.image_size={data.image_size}: images of {source} are {side} wide; unset it")
    if evaluation is None:
        train, evaluation = hold_out(train, data.holdout)
    sizes = f"train {len(train.labels):,}, eval {len(evaluation.labels):,} images"
    description = f"{source}: {sizes} of {side} × {side} × {channels}, {classes} classes"
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
    return Images(labels.astype(np.int32), lambda rows: images[rows, :, :, None], np.ascontiguousarray(images))


def _read_digits() -> tuple[Images, None]:
    """1,797 handwritten digits of 8 × 8 pixels, from the wheel of scikit-learn (UCI, Optical Recognition of Digits)."""
    from sklearn.datasets import load_digits  # its import takes a second

    digits = load_digits()
    return _array_images(np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target), None


def _idx_files(folder: Path) -> dict[str, Path]:
    """The folder's {train images, train labels, eval images, eval labels}, as far as there are any."""
    found = {}
    for file in sorted(folder.glob("*idx[13]*")):
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
    if content[:3] != b"\0\0\x08" or content[3] > 4 or len(content) < start:
        raise PrenormError(f"{path} is no IDX file of unsigned bytes")
    shape = tuple(map(int, np.frombuffer(content[4:start], ">u4")))
    if len(content) - start != math.prod(shape) or max(shape, default=0) > len(content):
        raise PrenormError(f"{path} is cut short or too long: {len(content) - start} bytes of data for shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _read_datasets(config: ConfigDict, folder: Path | None) -> tuple[Images, Images | None, int, str]:
    """From the hub, or a folder of class folders, with splits as folders around them or not."""
    data = config.data
    source = f"data.hub={data.hub!r}" if data.hub else f"data.path={data.path!r}"
    if folder and not folder.is_dir():
        raise PrenormError(f"{source} is no folder: give one of IDX files, or of a folder of images for each class")
    try:
        if data.hub:
            splits = datasets.load_dataset(data.hub, data.hub_config)
        else:
            with tempfile.TemporaryDirectory() as cache:  # as in documents.read_files
                place = str(folder.resolve())
                splits = datasets.load_dataset("imagefolder", data_dir=place, cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # network, cache, files, unknown name: each has exceptions of its own
        remedy = "it needs network access, or give a folder as data.path" if data.hub else "give a folder of classes"
        raise PrenormError(f"{source} cannot be loaded: {first_line(error.__cause__ or error)}; {remedy}") from error
    for key in ("train_split", "eval_split"):
        if data[key] is not None and data[key] not in splits:
            raise PrenormError(f"{source} has no data.{key}={data[key]!r}; it has {', '.join(splits)}")
    train, classes = _from_dataset(splits[data.train_split], config, source)
    evaluation = _from_dataset(splits[data.eval_split], config, source)[0] if data.eval_split else None
    return train, evaluation, classes, data.hub or data.path


def _from_dataset(dataset: datasets.Dataset, config: ConfigDict, source: str) -> tuple[Images, int]:
    """The images of a split, decoded as they are read, and the number of its classes."""
    data, channels, side = config.data, config.model.channels, config.data.image_size or config.model.image_size
    for key in ("image_column", "label_column"):
        if data[key] not in dataset.features:
            raise PrenormError(f"{source} has no column data.{key}={data[key]!r}; it has {', '.join(dataset.features)}")
    if not isinstance(dataset.features[data.image_column], datasets.Image):
        raise PrenormError(f"{source}: data.image_column={data.image_column!r} holds no images; name another")
    feature = dataset.features[data.label_column]
    labels = np.asarray(dataset.with_format("numpy")[data.label_column][:])
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not len(labels) or labels.min() < 0:
        raise PrenormError(
            f"{source}: data.label_column={data.label_column!r} holds no classes 0, 1, ...: name another"
        )
    if channels not in (1, 3):
        raise PrenormError(f"model.channels={channels}: image files are read as 1 (grey) or 3 (RGB)")
    encoded = dataset.select_columns([data.image_column]).cast_column(data.image_column, datasets.Image(decode=False))
    pool = ThreadPoolExecutor(os.cpu_count())

    def decode(row: int, item: dict[str, Any]) -> np.ndarray:
        try:
            with Image.open(io.BytesIO(item["bytes"]) if item["bytes"] else item["path"]) as image:
                if image.mode.startswith(("I", "F")):  # converting them would cut off all above 255
                    raise ValueError(f"mode {image.mode!r} has more than 8 bits a channel: convert it first")
                return square(ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB"), side)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            where = item["path"] or f"row {row}"
            raise PrenormError(f"{source}: image {where} cannot be decoded: {first_line(error)}") from error

    def read(rows: np.ndarray) -> np.ndarray:
        items = encoded[rows.tolist()][data.image_column]
        return np.stack(list(pool.map(decode, rows, items))).reshape(len(rows), side, side, channels)

    classes = getattr(feature, "num_classes", None) or int(labels.max()) + 1
    return Images(labels.astype(np.int32), read, _contents(encoded, data.image_column)), classes


def _contents(encoded: datasets.Dataset, column: str) -> bytes:
    """A hash of the names and sizes of the encoded images: of a large data set, reading all bytes takes hours."""
    digest = xxhash.xxh3_128()
    for chunk in encoded.data.column(column).chunks:
        sizes = pa.compute.binary_length(chunk.field("bytes")).to_pylist()
        for path, size in zip(chunk.field("path").to_pylist(), sizes, strict=True):
            size = Path(path).stat().st_size if size is None else size
            digest.update(f"{Path(path or '').name} {size}\n".encode())
    return digest.digest()


def square(image: Image.Image, side: int) -> np.ndarray:
    """The central square of an image, resized to side × side: uint8."""
    half = min(image.size) / 2
    x, y = (extent / 2 for extent in image.size)
    box = (x - half, y - half, x + half, y + half)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
