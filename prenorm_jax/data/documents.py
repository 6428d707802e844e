"""Where documents come from: local files, a hub data set, or the running Python's standard library.

Every source gives a `Dataset` with a row per document that is not empty: its "text" and, where a document is
a file, its relative path as "name". Nothing that is read is executed.
"""

import contextlib
import glob
import hashlib
import itertools
import os
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from prenorm_jax.base.errors import PrenormError, first_line

FILE_FORMATS = {".txt": "text", ".md": "text", ".rst": "text", ".py": "text"}
FILE_FORMATS |= {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def find_files(path: str, key: str) -> dict[str, Path]:
    """The files that `path` (a file, a folder or a glob) means, as {relative path: path}, sorted.

    A folder is searched recursively for the types in FILE_FORMATS; what is hidden in it is left out. Raises
    PrenormError, naming `key`, if there are no files, unknown types, or kinds that are not read alike.
    """
    given, known = Path(path).expanduser(), " ".join(FILE_FORMATS)
    if given.is_file():
        root, found = given.parent, [given]
    elif given.is_dir():
        root, found = given, [file for file in given.rglob("*") if file.suffix.lower() in FILE_FORMATS]
        found = [file for file in found if not any(part[0] == "." for part in file.relative_to(root).parts)]
    elif glob.has_magic(path):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), given.parts))
        found = [Path(name) for name in glob.glob(str(given), recursive=True)]
    else:
        raise PrenormError(f"{key}={path!r} does not exist: give a file, a folder or a glob")
    found = [file for file in found if file.is_file()]
    if not found:
        raise PrenormError(f"{key}={path!r} matches no file of a known type; the types are {known}")
    if not (found := [file for file in found if file.stat().st_size]):  # parsers choke on empty files
        raise PrenormError(f"{key}={path!r} holds no text: every file is empty")
    if unknown := [file.name for file in found if file.suffix.lower() not in FILE_FORMATS]:
        raise PrenormError(f"{key}={path!r}: {unknown[0]!r} is of an unknown type; the types are {known}")
    kinds = {FILE_FORMATS[file.suffix.lower()]: file.name for file in sorted(found)}
    if len(kinds) > 1:
        mix = " and ".join(f"{kind} ({name})" for kind, name in sorted(kinds.items()))
        raise PrenormError(f"{key}={path!r} mixes {mix}: give one kind, with a glob for example")
    return dict(sorted((file.relative_to(root).as_posix(), file) for file in found))


def read_files(files: dict[str, Path], column: str, origin: str) -> Dataset:
    """Documents of files of one kind: a text file is one; JSON and Parquet files have one a row, in `column`.

    Raises PrenormError, naming `origin`, if the files cannot be read or hold no text.
    """
    kind = FILE_FORMATS[next(iter(files.values())).suffix.lower()]
    if kind == "text":
        texts = {}
        for name, file in files.items():
            try:
                texts[name] = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                problem = f"{name!r} is no readable UTF-8 text ({first_line(error)})"
                raise PrenormError(f"{origin}: {problem}; convert or leave it out") from error
        return _named(texts, origin)
    data_files = [glob.escape(str(file.resolve())) for file in files.values()]  # load_dataset takes patterns
    try:
        # A cache of our own, gone at once: the shared one knows files by path and modification time, and so
        # would give old text after a change by a tool that sets times (cp -p, tar, rsync).
        with tempfile.TemporaryDirectory() as cache:
            dataset = load_dataset(kind, data_files=data_files, split="train", cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # each parser has exceptions of its own
        reason = _reason(error)
        raise PrenormError(f"{origin}: cannot be read as {kind} ({reason}); convert or leave it out") from error
    return _without_empty(_text_column(dataset, column, origin), origin)


def _named(texts: dict[str, str], origin: str) -> Dataset:
    """Of {name: text}, in memory."""
    features = Features({"text": Value("large_string"), "name": Value("string")})  # together they may exceed 2 GiB
    documents = Dataset.from_dict({"text": list(texts.values()), "name": list(texts)}, features)
    return _without_empty(documents, origin)


def read_hub(name: str, config_name: str | None, split: str, column: str, key: str) -> Dataset:
    """Documents of a split of a data set on the Hugging Face hub, one per row; `datasets` caches it on disk.

    Raises PrenormError if it cannot be loaded; `key` is the configuration key that `split` came from.
    """
    with _hub(name, config_name, split, key) as origin:
        return _without_empty(_text_column(load_dataset(name, config_name, split=split), column, origin), origin)


def stream_hub(name: str, config_name: str | None, split: str, column: str) -> Iterator[list[str]]:
    """The documents of a split in their order, a few at a time and none empty, as they arrive: nothing is kept.

    `split` is that of data.train_split. Raises PrenormError, also on the way, if they cannot be loaded or are no text.
    """
    with _hub(name, config_name, split, "data.train_split") as origin:
        for rows in load_dataset(name, config_name, split=split, streaming=True).iter(batch_size=256):
            if column not in rows:
                raise _no_column(column, rows, origin)
            if others := [type(row).__name__ for row in rows[column] if not isinstance(row, str | None)]:
                raise PrenormError(f"{origin}: data.text_column={column!r} holds {others[0]}, not text; name another")
            yield [text for text in rows[column] if text]


@contextlib.contextmanager
def _hub(name: str, config_name: str | None, split: str, key: str) -> Iterator[str]:
    origin = f"data.hub={name!r}"
    try:
        yield origin
    except PrenormError:
        raise
    except Exception as error:  # network, cache, parser, unknown name: each has exceptions of its own
        raise PrenormError(
            f"{origin} with data.hub_config={config_name!r}, {key}={split!r} cannot be loaded: {_reason(error)}; it "
            "needs network access, or give local files as data.path"
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


def _reason(error: BaseException) -> str:
    # Where `datasets` only says that it failed, the cause says why.
    return first_line(error.__cause__ or error if isinstance(error, DatasetGenerationError) else error)


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
        raise PrenormError(f"{origin}: data.text_column={column!r} holds {feature}, not text; name another")
    dataset = dataset.select_columns([column])
    return dataset if column == "text" else dataset.rename_column(column, "text")


def _no_column(column: str, columns: Iterable[str], origin: str) -> PrenormError:
    return PrenormError(f"{origin} has no column data.text_column={column!r}; it has {', '.join(columns)}")
