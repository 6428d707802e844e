"""The safetensors format: a JSON header, then the tensors' bytes, row by row. Files are mapped, not read.

    8 bytes: N, little-endian | N bytes: {"name": {"dtype": "F32", "shape": [..], "data_offsets": [begin, end]}, ..,
    "__metadata__": {..}} | the tensors, each from begin to end, without gaps

Source: https://github.com/huggingface/safetensors#format.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from prenorm_jax.base.errors import PrenormError

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16)  # those that are not quantised
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 10**8  # bytes, as the format's own reader has it
_POINTER = b"version https://git-lfs"


class Entry(NamedTuple):
    """A tensor as a header tells it: its dtype, by the format's name, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize


class Header(NamedTuple):
    """What a file holds: its tensors, in the order in which they lie, and its free text."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def map_file(path: Path) -> tuple[Header, dict[str, np.ndarray]]:
    """The header of a file and its tensors, none of which is read. Raises PrenormError for a file that is not whole."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(_POINTER))
        length = int.from_bytes(start[:8], "little")
        if start == _POINTER:
            raise PrenormError(f"{path} is a pointer of Git LFS, not the file: fetch that with git lfs pull")
        if size < 8 or length > min(size - 8, _LARGEST_HEADER):
            raise PrenormError(f"{path} is cut short, or no safetensors file: copy or download it again")
        file.seek(8)
        text = file.read(length)
    header, begin = _header(path, text, size - 8 - length), 8 + length
    content = np.memmap(path, np.uint8, "r")
    return header, _views(content, begin, header.tensors)


def create_file(path: Path, header: Header) -> dict[str, np.ndarray]:
    """Writes a file of this header, filled with zeros; its tensors, to be assigned to. Raises OSError for no room."""
    place, described = 0, {"__metadata__": header.metadata} if header.metadata else {}
    for name, entry in header.tensors.items():
        end = place + entry.nbytes
        described[name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": (place, end)}
        place = end
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    begin = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.flush()
        if place:  # what is written to a map of a file that has no room ends the process
            os.posix_fallocate(file.fileno(), begin, place)
    return _views(np.memmap(path, np.uint8, "r+"), begin, header.tensors)


def _views(content: np.ndarray, begin: int, tensors: Mapping[str, Entry]) -> dict[str, np.ndarray]:
    views = {}
    for name, entry in tensors.items():
        views[name] = np.ndarray(entry.shape, DTYPES[entry.dtype], content, begin)
        begin += entry.nbytes
    return views


def _header(path: Path, text: bytes, size: int) -> Header:
    """The header of a file with so many bytes of tensors."""

    def damaged(why: str) -> PrenormError:
        return PrenormError(f"{path} is damaged: {why}: copy or download it again")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(values := dict(pairs)) < len(pairs):
            raise ValueError("a name is there twice")
        return values

    try:
        described = json.loads(text, object_pairs_hook=once)
        metadata = described.pop("__metadata__", {})
        found = {
            name: (str(entry["dtype"]), tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in described.items()
        }
        if not isinstance(metadata, dict) or any(len(entry) != 4 for entry in found.values()):
            raise ValueError("its metadata is no object, or a tensor's place is not two numbers")
        wrong = [name for name, entry in found.items() if not all(type(n) is int and n >= 0 for n in _numbers(entry))]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise damaged(f"its header is none of safetensors ({' '.join(str(error).split())})") from error
    if wrong:
        raise damaged(f"{wrong[0]} has a shape or place that is none")
    if unknown := {f"{dtype} ({name})" for name, (dtype, *_) in found.items() if dtype not in DTYPES}:
        raise PrenormError(f"{path} holds numbers of an unknown dtype, {', '.join(sorted(unknown)[:3])}: convert them")
    in_order = dict(sorted(found.items(), key=lambda item: item[1][2:]))
    place = 0
    for name, (dtype, shape, begin, end) in in_order.items():
        if begin != place or end - begin != Entry(dtype, shape).nbytes:
            what = "overlaps another tensor" if begin < place else "does not begin where the one before it ends"
            raise damaged(f"{name} {what if begin != place else 'has another size than its shape and dtype say'}")
        place = end
    if place > size:
        raise PrenormError(f"{path} is cut short: it holds {size:,} bytes of {place:,}: copy or download it again")
    if place < size:
        raise damaged(f"{size - place:,} bytes follow its last tensor")
    return Header({name: Entry(dtype, shape) for name, (dtype, shape, *_) in in_order.items()}, metadata)


def _numbers(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*entry[1], *entry[2:])
