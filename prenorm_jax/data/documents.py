"""Where documents come from: local files, a hub data set, or the running Python's standard library.

Every source gives a `Dataset` with a row per document that is not empty: its "text" and, where a document is
a file, its relative path as "name". Nothing that is read is executed.
"""

import bz2
import contextlib
import errno
import fnmatch
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.data.folders import LeftOut, walk

FILE_FORMATS = {".txt": "text", ".md": "text", ".rst": "text", ".py": "text"}
FILE_FORMATS |= {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSED = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda file, mode: io.BufferedReader(pa.input_stream(str(file), compression="zstd")),
}
_KNOWN = f"{' '.join(FILE_FORMATS)}, all but .parquet also with {' '.join(_COMPRESSED)}"
_JSON = json.JSONDecoder(parse_int=len)  # no number is used, and `int` refuses the longest
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def find_files(path: str, key: str) -> tuple[dict[str, Path], str]:
    """The files that `path` (a file, a folder or a glob) means, as {relative path: path}, sorted.

    A folder is searched recursively, through links too, for the types in FILE_FORMATS, compressed or not. What is left
    out is said in the second result: what is hidden, empty or of an unknown type, and compressed copies of files beside
    them. Raises PrenormError, naming `key`, if there are no files, unknown types, or kinds that are not read alike.
    """
    given, origin = Path(os.path.expanduser(path)), f"{key}={path!r}"
    root = given if given.is_dir() else given.parent
    left_out = LeftOut(root)
    if given.is_file():
        found = [given]
    elif given.is_dir():
        found = []
        for file in walk(given, left_out):
            found.append(file) if _kind(file) else left_out.add("of other types", file)
    elif glob.has_magic(path):
        # A folder may have such a name: a pattern is only what does not exist as it stands.
        root = next(place for place in given.parents if place.is_dir())
        left_out = LeftOut(root)
        found = [file for file in _glob(root, given.relative_to(root)) if file.is_file()]
    else:
        what = "links to nothing" if given.is_symlink() else "does not exist"
        what = "is neither file nor folder" if os.path.exists(given) else what
        raise PrenormError(f"{origin} {what}: give a file, a folder or a glob")
    if not found:
        raise PrenormError(f"{origin} matches no file of a known type{left_out}; the types are {_KNOWN}")
    together, filled = set(found), {}
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in found):
        if not file.stat().st_size:
            left_out.add("empty", file)
        elif file.suffix.lower() in _COMPRESSED and file.with_suffix("") in together:
            left_out.add("compressed copies", file)
        else:
            filled[name] = file
    _check_kinds(filled, origin)
    return filled, str(left_out)


def _glob(root: Path, pattern: Path) -> Iterator[Path]:
    if "**" not in pattern.parts:
        return (root / name for name in glob.glob(str(pattern), root_dir=root))
    # `glob` would follow links in circles, which may never end.
    files = walk(root, LeftOut(root))
    return (file for file in files if _matches(file.relative_to(root).parts, pattern.parts))


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not (parts and pattern):
        return not parts and not pattern
    if pattern[0] == "**":  # any number of folders; at the end also the file
        return any(_matches(parts[i:], pattern[1:] or ["*"]) for i in range(len(parts)))
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _kind(file: Path) -> str | None:
    """text, json or parquet, by how the name ends; None for an unknown type."""
    name = Path(file.name.lower())
    if name.suffix not in _COMPRESSED:
        return FILE_FORMATS.get(name.suffix)
    kind = FILE_FORMATS.get(Path(name.stem).suffix)
    return kind if kind != "parquet" else None  # it is compressed within


def _check_kinds(files: dict[str, Path], origin: str) -> None:
    if not files:
        raise PrenormError(f"{origin} holds no text: every file is empty")
    if unknown := [file.name for file in files.values() if not _kind(file)]:
        raise PrenormError(f"{origin}: {unknown[0]!r} is of an unknown type; the types are {_KNOWN}")
    kinds = {_kind(file): file.name for file in files.values()}
    if len(kinds) > 1:
        mix = " and ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise PrenormError(f"{origin} mixes {mix}: give one kind, with a glob for example")
    for name in files:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise PrenormError(f"{origin}: the file name {name!r} is not UTF-8: rename the file") from error


def warn_of_splits(files: dict[str, Path], origin: str) -> None:
    """Says which of the files to train on, beside others, are called as what is not trained on."""
    data = [name for name in files if not re.search(r"\.(py|md|rst)\b", name.lower())]  # which may be about training
    words = {name: set(re.split(r"[^a-z]+", name.lower())) for name in data}
    other = {"test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation"}
    train = [name for name in data if words[name] & {"train", "training"} or not words[name] & other]
    others = [name for name in data if name not in train]
    if train and others:
        say(
            f"warning: {origin} trains not only on {train[0]} but also on {', '.join(others[:3])}"
            f"{', ...' * (len(others) > 3)}: to evaluate on one, name it in data.eval_path; or leave it out by a glob"
        )


def read_files(files: dict[str, Path], column: str, origin: str) -> Dataset:
    """Documents of files of one kind: a text file is one; JSON and Parquet files have one a row, in `column`.

    Nothing else is read of the rows. Raises PrenormError, naming `origin`, if a file cannot be read or has no such
    column, or if there is no text.
    """
    kind = _kind(next(iter(files.values())))
    read, called = {"text": (_whole, "UTF-8 text"), "json": (_json, "json"), "parquet": (_parquet, "parquet")}[kind]
    documents = {}
    for name, file in files.items():
        where = f"{origin}: {name!r}"
        try:
            documents[name] = read(file, column, where)
        except PrenormError:
            raise
        except Exception as error:  # the disk, the parsers and the compressions have exceptions of their own
            raise PrenormError(
                f"{where} cannot be read as {called} ({first_line(error)}); mend or leave it out"
            ) from error
    if kind == "text":
        return _named(documents, origin)
    chunks = [chunk for rows in documents.values() for chunk in rows.chunks]
    return _without_empty(Dataset(pa.table({"text": pa.chunked_array(chunks, pa.large_string())})), origin)


def _open(file: Path) -> BinaryIO:
    return _COMPRESSED.get(file.suffix.lower(), open)(file, "rb")


def _whole(file: Path, column: str, where: str) -> str:
    with io.TextIOWrapper(_open(file), encoding="utf-8") as content:
        return content.read()


def _parquet(file: Path, column: str, where: str) -> pa.ChunkedArray:
    with pyarrow.parquet.ParquetFile(file) as content:
        schema = content.schema_arrow
        if not content.metadata.num_rows:
            return pa.chunked_array([], pa.large_string())
        if column not in schema.names:
            raise _no_column(column, schema.names, where)
        kind = schema.field(column).type
        of = kind.value_type if pa.types.is_dictionary(kind) else kind
        if of not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise _no_text(column, kind, where)
        texts = content.read(columns=[column])[column].cast(pa.large_string())
        texts.validate(full=True)  # else nobody asks whether it is UTF-8
        return texts


def _json(file: Path, column: str, where: str) -> pa.ChunkedArray:
    texts, columns = [], {}
    with _open(file) as content:
        for line, row in _json_rows(content):
            if isinstance(row, str):  # of a list of strings
                row = {"text": row}
            if not isinstance(row, dict):
                raise ValueError(f"line {line}: {type(row).__name__}, not an object")
            if column not in columns:
                columns |= row
            text = row.get(column)
            if not isinstance(text, str | None):
                raise _no_text(column, type(text).__name__, f"{where}, line {line}")
            try:
                texts.append(text and text.encode())
            except UnicodeEncodeError as error:  # of half a surrogate pair
                raise ValueError(f"line {line}: {first_line(error)}") from error
    if texts and column not in columns:
        raise _no_column(column, columns, where)
    return pa.chunked_array([pa.array(texts, pa.large_string())])


def _json_rows(content: BinaryIO) -> Iterator[tuple[int, Any]]:
    """(number of the line, row) of JSON Lines; or of objects or a list of them, however they are laid out."""
    number, found = 0, False
    try:
        for number, line in enumerate(content, 1):
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            if not text.strip():
                continue
            try:
                rows = [_JSON.decode(text.strip())]
            except json.JSONDecodeError:
                if found:
                    raise
                rows = _json_values(text + content.read().decode())
            for row in rows:
                found = True
                for item in row if isinstance(row, list) else [row]:
                    yield number, item
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number - 1 + error.lineno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number}: {first_line(error)}") from error


def _json_values(text: str) -> Iterator[Any]:
    """One after the other, with whatever white space between and within them."""
    place, space = 0, re.compile(r"\s*")
    while (place := space.match(text, place).end()) < len(text):
        value, place = _JSON.raw_decode(text, place)
        yield value


def _named(texts: dict[str, str], origin: str) -> Dataset:
    """Of {name: text}, in memory."""
    features = Features({"text": Value("large_string"), "name": Value("string")})  # together they may exceed 2 GiB
    documents = Dataset.from_dict({"text": list(texts.values()), "name": list(texts)}, features)
    return _without_empty(documents, origin)


def read_hub(name: str, config_name: str | None, split: str, column: str, key: str) -> Dataset:
    """Documents of a split of a data set on the Hugging Face hub, one per row; `datasets` caches it on disk.

    Raises PrenormError if it cannot be loaded; `key` is the configuration key that `split` came from.
    """
    with loading_hub(name, config_name, f", {key}={split!r}") as origin:
        return _without_empty(_text_column(load_dataset(name, config_name, split=split), column, origin), origin)


def stream_hub(name: str, config_name: str | None, split: str, column: str) -> Iterator[list[str]]:
    """The documents of a split in their order, a few at a time and none empty, as they arrive: nothing is kept.

    `split` is that of data.train_split. Raises PrenormError, also on the way, if they cannot be loaded or are no text.
    """
    with loading_hub(name, config_name, f", data.train_split={split!r}") as origin:
        for rows in load_dataset(name, config_name, split=split, streaming=True).iter(batch_size=256):
            if column not in rows:
                raise _no_column(column, rows, origin)
            if others := [type(row).__name__ for row in rows[column] if not isinstance(row, str | None)]:
                raise _no_text(column, others[0], origin)
            yield [text for text in rows[column] if text]


@contextlib.contextmanager
def loading_hub(name: str, config_name: str | None, split: str = "") -> Iterator[str]:
    """Gives what to call the data set; raises PrenormError, with `split` in it, for whatever loading it raises."""
    origin = f"data.hub={name!r}"
    try:
        yield origin
    except PrenormError:
        raise
    except Exception as error:  # network, cache, parser, unknown name: each has exceptions of its own
        # Where `datasets` only says that it failed, the cause says why.
        cause = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = (
            "make room for its cache"
            if full
            else "it needs network access, or, for a new run, local files as data.path"
        )
        raise PrenormError(
            f"{origin} with data.hub_config={config_name!r}{split} cannot be loaded: {first_line(cause)}; {remedy}"
        ) from error


def read_stdlib() -> Dataset:
    """The .py files of the running Python's standard library without its tests: 12 MB found everywhere.

    Raises PrenormError if this Python has no sources on disk.
    """
    root, texts = Path(sysconfig.get_path("stdlib")), {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_LIBRARY]  # what is not walked takes no time
        for file in (Path(folder, name) for name in names if name.endswith(".py")):
            # _sysconfigdata*.py records how this very interpreter was built: flags and paths, no library code.
            if file.name.startswith("_sysconfigdata"):
                continue
            with contextlib.suppress(SyntaxError, UnicodeDecodeError), tokenize.open(file) as source:
                texts[file.relative_to(root).as_posix()] = source.read()  # in the encoding that the file declares
    if not texts:
        raise PrenormError(f"no .py files of the standard library in {str(root)!r}: give text as data.path")
    return _named(dict(sorted(texts.items())), str(root))


def holdout_score(value: str) -> float:
    """A number in [0, 1) for a document's name or text: below the fraction to hold out, it is for evaluation."""
    # The same everywhere; Python's own hash differs between processes.
    digest = hashlib.blake2b(value.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def hold_out(documents: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    """Splits into (training, evaluation), about `fraction`, of (0, 1), of the documents in the latter, neither empty.

    A document's side follows from a hash of its name (or text, if it has none) alone: it is the same in every
    process and whichever other documents there are. Only where that leaves a side empty, the nearest document
    moves. A single document is cut in two, its tail for evaluation. Raises PrenormError if there is nothing to
    split.
    """
    if len(documents) == 1:
        text = documents[0]["text"]
        if len(text) < 2:
            raise PrenormError("the data are a single character: give more text, or data.eval_path")
        cut = min(max(round(len(text) * (1 - fraction)), 1), len(text) - 1)
        return Dataset.from_dict({"text": [text[:cut]]}), Dataset.from_dict({"text": [text[cut:]]})
    key = "name" if "name" in documents.column_names else "text"
    scores = np.array([holdout_score(value) for value in _values(documents, key)])
    held = scores < fraction
    if not held.any():
        held = scores == scores.min()
    if held.all():
        held = scores < scores.max()
    if not held.any():
        raise PrenormError("every document is the same, so that none can be held out: give data.eval_path")
    return documents.select(np.flatnonzero(~held)), documents.select(np.flatnonzero(held))


def _values(documents: Dataset, column: str) -> Iterator[str | None]:
    for table in documents.with_format("arrow").iter(batch_size=1000):
        yield from table[column].to_pylist()


def _without_empty(documents: Dataset, origin: str) -> Dataset:
    filled = np.array([bool(text) for text in _values(documents, "text")], bool)
    if not filled.any():
        raise PrenormError(f"{origin} holds no text: it has {len(filled)} documents, all empty")
    return documents if filled.all() else documents.select(np.flatnonzero(filled))


def _text_column(dataset: Dataset, column: str, origin: str) -> Dataset:
    if column not in dataset.features:
        raise _no_column(column, dataset.features, origin)
    feature = dataset.features[column]
    if feature not in (Value("string"), Value("large_string")):
        raise _no_text(column, feature, origin)
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _no_column(column: str, columns: Iterable[str], origin: str) -> PrenormError:
    return PrenormError(f"{origin} has no column data.text_column={column!r}; it has {', '.join(columns) or 'none'}")


def _no_text(column: str, found: object, origin: str) -> PrenormError:
    return PrenormError(f"{origin}: data.text_column={column!r} holds {found}, not text; name another")
