"""Image files: found, in a folder for each class; and decoded as they are asked for, from there or from the hub."""

import io
import os
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import xxhash
from ml_collections import ConfigDict
from PIL import Image, ImageOps, UnidentifiedImageError

from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.data.folders import LeftOut, list_folder, walk

warnings.filterwarnings("ignore", module="PIL")  # what it warns of, in lines that name no file, ends nothing
_OTHER = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}  # PostScript is a program; of the others only headers are read
_TYPES = {end for end, name in Image.registered_extensions().items() if name in Image.OPEN and name not in _OTHER}
_FORMATS = [name for name in Image.ID if name not in _OTHER]  # which is a matter of the content, not of the name
_NAMED = 10  # images that cannot be decoded: of more only the count is said

Encoded = tuple[str, bytes | str | None]  # what to call an image; its file's content or path


def find_splits(folder: Path, data: ConfigDict, source: str) -> tuple[dict[str, dict[str, list[str]]], LeftOut]:
    """{split: {class: paths of its image files}}, and what else lies there; `data` is a run's `config.data`.

    A split is a folder called as `data.train_split` and `data.eval_split` say in which there are folders of images.
    Where the keys are at their defaults and there is no such folder, the folder has one split: that of its own classes.
    Raises PrenormError, naming `source`, if a split that is asked for is not there.
    """
    left_out = LeftOut(folder)
    folders = {path.name: path for path in list_folder(folder, LeftOut(folder))[0]}
    asked = {key: data[key] for key in ("train_split", "eval_split") if data[key] is not None}
    splits = {name: _classes(folders[name], left_out) for name in set(asked.values()) & folders.keys()}
    if asked == {"train_split": "train"} and not any(splits.values()):
        left_out = LeftOut(folder)
        return {"train": _classes(folder, left_out)}, left_out
    for key, name in asked.items():
        if not splits.get(name):
            there = ", ".join(folders) or "no folders"
            raise PrenormError(f"{source} has no data.{key}={name!r} that holds folders of images; it has {there}")
    _, files = list_folder(folder, left_out)
    for file in (*files, *(file for name in folders.keys() - splits.keys() for file in walk(folders[name], left_out))):
        left_out.add("beside the splits", file)
    return splits, left_out


def _classes(folder: Path, left_out: LeftOut) -> dict[str, list[str]]:
    """{class: paths of its image files}: each folder in it is a class if there are any."""
    folders, files = list_folder(folder, left_out)
    classes = {}
    for file in files:
        left_out.add("loose" if _is_image(file) else "of other types", file)
    for place in folders:
        inner, files = list_folder(place, left_out)
        if images := [str(file) for file in files if _is_image(file)]:
            classes[place.name] = images
        elif not inner:
            left_out.add("folders without images", place)
        for file in files:
            if not _is_image(file):
                left_out.add("of other types", file)
        for deeper in inner:
            for file in walk(deeper, left_out):
                left_out.add("nested" if _is_image(file) else "of other types", file)
    return classes


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in _TYPES


def readable(files: list[str], left_out: LeftOut) -> tuple[np.ndarray, bytes]:
    """Which of the files begin as an image does that can be decoded, and a hash of these files' names and sizes.

    (Of a large data set, reading all bytes takes hours.)
    """
    digest, good = xxhash.xxh3_128(), []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, (size, fault) in zip(files, pool.map(_check, files), strict=True):
            good.append(not fault)
            if fault:
                left_out.add("unreadable", Path(file), f": {fault}")
            else:
                digest.update(f"{os.path.basename(file)} {size}\n".encode("utf-8", "surrogateescape"))
    return np.array(good, bool), digest.digest()


def _check(file: str) -> tuple[int, str]:
    try:
        with open_image(file):
            return os.path.getsize(file), ""
    except Exception as error:  # as in Decoder
        return 0, first_line(error)


def open_image(file: str | io.BytesIO) -> Image.Image:
    """Reads an image's header. Raises whatever Pillow does, or ValueError for more than 8 bits a channel."""
    try:
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError as error:  # whose message is the file's name once more
        raise ValueError("it begins as no known type of image does") from error
    if image.mode.startswith(("I", "F")):  # converting them would cut off all above 255
        image.close()
        raise ValueError(f"mode {image.mode!r} has more than 8 bits a channel: convert it first")
    return image


class Decoder:
    """Rows (n,) to images (n, side, side, C) uint8 and to which of them could be decoded: (n,) bool.

    Which cannot is a function of the files alone; their pixels are 0. The first are named, once, on stderr.
    """

    def __init__(self, fetch: Callable[[np.ndarray], list[Encoded]], side: int, channels: int, source: str):
        self._fetch, self._source = fetch, source
        self._side, self._channels = side, channels
        self._pool = ThreadPoolExecutor(os.cpu_count())
        self._bad: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = list(self._pool.map(self._decode, self._fetch(rows)))
        shape = (self._side, self._side, self._channels)
        images = [np.zeros(shape, np.uint8) if image is None else image.reshape(shape) for image in found]
        return np.stack(images), np.array([image is not None for image in found])

    def _decode(self, encoded: Encoded) -> np.ndarray | None:
        name, content = encoded
        try:
            content = Path(content).read_bytes() if isinstance(content, str) else content
        except OSError as error:  # a disk's fault is not the image's: the next time it may be well
            raise PrenormError(
                f"{self._source}: {name} cannot be read any more ({error.strerror}): put it back as it was"
            ) from error
        try:
            with open_image(io.BytesIO(content or b"")) as image:
                return square(ImageOps.exif_transpose(image).convert("L" if self._channels == 1 else "RGB"), self._side)
        except MemoryError:
            raise
        except Exception as error:  # each format has exceptions of its own
            self._warn(name, first_line(error))
            return None

    def _warn(self, name: str, why: str) -> None:
        with self._lock:
            if name in self._bad:
                return
            self._bad.add(name)
            count = len(self._bad)
            if count <= _NAMED:
                line = (
                    f"{name} cannot be decoded ({why}): in training the image after it takes its place, evaluation "
                    "leaves it out; leave it as it is, for a run refuses data in which it is gone or of another size; "
                    f"{count} so far{', more are only counted' * (count == _NAMED)}"
                )
            elif set(str(count)[1:]) == {"0"}:
                line = f"{count:,} images cannot be decoded so far"
            else:
                return
            # Whole, from any thread; not `say`: of many processes each meets others.
            sys.stderr.write(f"warning: {self._source}: {line}\n")


def square(image: Image.Image, side: int) -> np.ndarray:
    """The central square of an image, resized to side × side: uint8."""
    half = min(image.size) / 2
    x, y = (extent / 2 for extent in image.size)
    box = (x - half, y - half, x + half, y + half)
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0))
