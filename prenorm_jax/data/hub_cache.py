"""A hub corpus that is streamed once: tokenised as it arrives, into files that this run and later ones map into memory.

Each corpus has a folder of its own in the cache: train.bin, the token stream; eval.bin, that of the documents held out,
if any were to be; about.json, written last, which says what they are and so that they are whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
from ml_collections import ConfigDict
from tqdm import tqdm

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError, check_range
from prenorm_jax.base.files import locked, write_whole
from prenorm_jax.data.documents import check_holdout, holdout_score, stream_hub

if TYPE_CHECKING:
    from prenorm_jax.data.tokenizer import TextTokenizer


class Split(NamedTuple):
    """A token stream (1-D, unsigned; its first token is an end-of-text, see `TextData`) and what it was made of."""

    tokens: np.ndarray
    documents: int
    size: int  # of the documents in UTF-8 bytes


def stream_corpus(config: ConfigDict, tokenizer: TextTokenizer, hold_out: bool) -> tuple[Split, Split | None, str]:
    """The first `stream_tokens` training tokens of the hub data that `config` (a run's `config.data`) names.

    Gives (training split, held-out documents if asked for, digest of the training tokens); the tokens are memory maps,
    and no more than a few documents are in memory at any time. What is in the cache is taken from there: its size is
    checked, its content is not read. With `hold_out` the fraction `config.holdout` of the documents, chosen as in
    `sources.hold_out`, goes to the second split. A corpus that ends sooner is said and used as it is.

    Raises PrenormError if the corpus cannot be loaded or has no such text, or if no document was held out.
    """
    check_range("data.stream_tokens", config.stream_tokens, at_least=1)
    if hold_out:
        check_holdout(config.holdout)
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    asked = {
        "dataset": config.hub,
        "config": config.hub_config,
        "split": config.train_split,
        "column": config.text_column,
        "tokenizer": tokenizer.digest,
        "separate_documents": config.separate_documents,
        "holdout": config.holdout if hold_out else None,
        "stream_tokens": config.stream_tokens,
        "dtype": dtype.newbyteorder("<").str,
    }
    name = re.sub(r"[^\w.-]+", "-", config.hub)[-60:].strip("-.")
    folder = _cache(config) / f"{name}-{xxhash.xxh3_64_hexdigest(json.dumps(asked).encode())}"
    if (about := _about(folder, asked)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "filling", wait=True):
            if (about := _about(folder, asked)) is None:  # another process may have just done it
                about = _write(folder, asked, config, tokenizer)
    if (found := about["train"]["tokens"] - 1) < config.stream_tokens:
        say(f"warning: {config.hub} has only {found:,} of data.stream_tokens={config.stream_tokens:,}: all are used")
    splits = [_map(folder / f"{side}.bin", about[side], asked["dtype"]) for side in ("train", "eval") if side in about]
    return splits[0], splits[1] if hold_out else None, about["train"]["digest"]


def _cache(config: ConfigDict) -> Path:
    if config.cache:
        return Path(config.cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "prenorm_jax"


def _about(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What about.json says, if the files are those asked for, and whole."""
    path = folder / "about.json"
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, KeyError, TypeError, OSError):  # damaged: as if it were not there
        about, item = json.loads(path.read_text()), np.dtype(asked["dtype"]).itemsize
        sides = [side for side in ("train", "eval") if side in about]
        if {key: about[key] for key in asked} == asked and all(
            (folder / f"{side}.bin").stat().st_size == item * about[side]["tokens"] for side in sides
        ):
            return about
    return None


def _map(path: Path, about: dict[str, Any], dtype: str) -> Split:
    return Split(np.memmap(path, dtype, "r"), about["documents"], about["bytes"])


def _write(folder: Path, asked: dict[str, Any], config: ConfigDict, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Streams the corpus into the folder's files; gives the content of about.json."""
    if (folder / "about.json").exists():
        say(f"warning: the files in {folder} are damaged and made anew")
        (folder / "about.json").unlink()
    say(f"streaming {config.hub} into {folder}, once: later runs find it there")
    texts = stream_hub(config.hub, config.hub_config, config.train_split, config.text_column)
    bar = tqdm(total=config.stream_tokens, unit="token", unit_scale=True, dynamic_ncols=True, leave=False)
    with bar, contextlib.closing(texts), contextlib.ExitStack() as files:
        splits = ("train",) if asked["holdout"] is None else ("train", "eval")
        sides = {side: files.enter_context(_Writer(folder / f"{side}.bin", asked["dtype"])) for side in splits}
        eot = np.array([tokenizer.eot], asked["dtype"])
        end = eot if config.separate_documents else eot[:0]
        for side in sides.values():
            side.add(eot)
        train, wanted = sides["train"], config.stream_tokens + 1
        for text, ids in _encoded(texts, tokenizer):
            side = sides["eval" if asked["holdout"] and holdout_score(text) < asked["holdout"] else "train"]
            side.documents, side.bytes = side.documents + 1, side.bytes + len(text.encode())
            room = wanted - train.tokens if side is train else None
            side.add(np.concatenate([ids, end])[:room])
            bar.update(train.tokens - 1 - bar.n)
            if train.tokens == wanted:
                break
        if not train.documents:
            raise PrenormError(f"data.hub={config.hub!r} holds no text to train on: name another split or column")
        if "eval" in sides and not sides["eval"].documents:
            raise PrenormError(
                f"none of {train.documents} documents was held out: raise data.holdout={config.holdout} or "
                f"data.stream_tokens={config.stream_tokens}, or give data.eval_split or data.eval_path"
            )
        for side in sides.values():
            side.finish()
    about = asked | {name: side.about() for name, side in sides.items()}
    write_whole(folder / "about.json", (json.dumps(about, indent=2) + "\n").encode())
    return about


def _encoded(texts: Iterator[list[str]], tokenizer: TextTokenizer) -> Iterator[tuple[str, np.ndarray]]:
    for batch in texts:
        yield from zip(batch, tokenizer.encode(batch), strict=True)


class _Writer:
    """A file of tokens that gets its name when it is `finish`ed; if it never is, it goes. A context manager."""

    def __init__(self, path: Path, dtype: str):
        self.tokens = self.documents = self.bytes = 0
        self._path, self._dtype, self._digest = path, dtype, xxhash.xxh3_128()
        # Always the same name: what a process that was killed left behind is written over, not left for ever.
        self._file = path.with_name(f"{path.name}.partial").open("wb")

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        Path(self._file.name).unlink(missing_ok=True)

    def add(self, ids: np.ndarray) -> None:
        """Appends token ids: (n,), of any unsigned dtype."""
        content = ids.astype(self._dtype).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.tokens += len(ids)

    def finish(self) -> None:
        """Makes what was added the file's content, for good."""
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._file.name, self._path)

    def about(self) -> dict[str, Any]:
        """What about.json says of this file."""
        counts = {"tokens": self.tokens, "documents": self.documents, "bytes": self.bytes}
        return counts | {"digest": self._digest.hexdigest()}
