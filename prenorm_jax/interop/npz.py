"""NumPy's .npz as JAX code writes checkpoints: a zip of arrays, whose names are paths in a tree. Nothing is unpickled.

Arrays that the zip does not compress are mapped, not read.
"""

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.interop.safetensors import NAMES, Entry, Header

_LOCAL = struct.Struct("<4s22xHH")  # of a member's own header: the signature, the lengths of name and extra field
_BFLOAT16 = np.dtype("V2")  # as NumPy, which does not know it, writes it


def map_file(path: Path) -> tuple[Header, dict[str, np.ndarray]]:
    """The header of a file and its arrays. Raises PrenormError for one that is not whole, or holds Python objects."""
    try:
        with zipfile.ZipFile(path) as archive:
            content = np.memmap(path, np.uint8, "r")
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(members) < len(archive.infolist()) or set(members) & set(archive.namelist()):
                raise ValueError("a name is there twice, or is none of an array")
            tensors = {name: _array(archive, info, content) for name, info in members.items()}
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        RuntimeError,
        struct.error,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise PrenormError(
            f"{path} is damaged, or no .npz of arrays ({first_line(error)}): copy or download it again"
        ) from error
    if wrong := [f"{name} ({array.dtype})" for name, array in tensors.items() if array.dtype not in NAMES]:
        raise PrenormError(f"{path} holds numbers of a dtype that is not read, {', '.join(wrong[:3])}: convert them")
    return Header({name: Entry(NAMES[array.dtype], array.shape) for name, array in tensors.items()}, {}), tensors


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, content: np.ndarray) -> np.ndarray:
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{info.filename} is of an unknown version")
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns_first, dtype = read(member)
        if dtype.hasobject:
            raise ValueError(f"{info.filename} holds Python objects, which are not read")
        begin = member.tell()
        if info.compress_type != zipfile.ZIP_STORED:
            member.seek(0)
            array = np.lib.format.read_array(member, allow_pickle=False)
            return array.view(ml_dtypes.bfloat16) if dtype == _BFLOAT16 else array
    if begin + math.prod(shape) * dtype.itemsize != info.file_size:
        raise ValueError(f"{info.filename} has another size than its shape and dtype say")
    signature, name, extra = _LOCAL.unpack_from(content, info.header_offset)
    if signature != b"PK\x03\x04":
        raise ValueError(f"{info.filename} is not where the file says")
    begin += info.header_offset + _LOCAL.size + name + extra
    order = "F" if columns_first else "C"
    return np.ndarray(shape, ml_dtypes.bfloat16 if dtype == _BFLOAT16 else dtype, content, begin, order=order)


def write_file(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a file of these arrays, not compressed; they may be mapped."""
    narrow = ml_dtypes.bfloat16
    np.savez(path, **{name: x.view(_BFLOAT16) if x.dtype == narrow else x for name, x in tensors.items()})
