"""A hub corpus that is streamed once: tokenised as it arrives, into files that this run and later ones map into memory.

Each corpus has a folder of its own in the cache: train.bin, the token stream; eval.bin, that of the documents held out,
if any were to be; about.json, written last, which says what they are and so that they are whole.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash
from ml_collections import ConfigDict
from tqdm import tqdm

from prenorm_jax.base.console import say
from prenorm_jax.base.errors import PrenormError, check_range
from prenorm_jax.base.files import locked, read_json
from prenorm_jax.data.documents import holdout_score, stream_hub

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
    `documents.hold_out`, goes to the second split. A corpus that ends sooner is said and used as it is.

    Raises PrenormError if the corpus cannot be loaded or has no such text, or if no document was held out.
    """
    check_range("data.stream_tokens", config.stream_tokens, at_least=1)
    asked = {
        "dataset": config.hub,
        "config": config.hub_config,
        "split": config.train_split,
        "column": config.text_column,
        "tokenizer": tokenizer.digest,
        "separate_documents": config.separate_documents,
        "holdout": config.holdout if hold_out else None,
        "stream_tokens": config.stream_tokens,
        "dtype": np.min_scalar_type(tokenizer.vocab_size - 1).newbyteorder("<").str,
    }
    name = re.sub(r"[^\w.-]+", "-", config.hub)[-60:].strip("-.")
    cache = config.cache or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "prenorm_jax")
    folder = Path(os.path.expanduser(cache)) / f"{name}-{xxhash.xxh3_64_hexdigest(json.dumps(asked).encode())}"
    files = {side: folder / f"{side}.bin" for side in ("train", "eval")[: 1 + hold_out]}
    if (about := _about(folder, files, asked)) is None:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, "filling", wait=True):  # another process may have just done it
            about = _about(folder, files, asked) or _write(folder, files, asked, config, tokenizer)
    if (found := about["train"]["tokens"] - 1) < config.stream_tokens:
        say(f"warning: {config.hub} has only {found:,} of data.stream_tokens={config.stream_tokens:,}: all are used")
    splits = {
        side: Split(np.memmap(file, asked["dtype"], "r"), about[side]["documents"], about[side]["bytes"])
        for side, file in files.items()
    }
    return splits["train"], splits.get("eval"), about["train"]["digest"]


def _about(folder: Path, files: dict[str, Path], asked: dict[str, Any]) -> dict[str, Any] | None:
    """What about.json says, if the files are those asked for, and whole."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged: as if it were not there
        about, itemsize = read_json(folder / "about.json"), np.dtype(asked["dtype"]).itemsize
        if asked.items() <= about.items() and all(
            file.stat().st_size == itemsize * about[side]["tokens"] for side, file in files.items()
        ):
            return about
    return None


def _write(
    folder: Path, files: dict[str, Path], asked: dict[str, Any], config: ConfigDict, tokenizer: TextTokenizer
) -> dict[str, Any]:
    """Streams the corpus into the files; gives what about.json then says. After an error none of them is left."""
    if (folder / "about.json").exists():
        say(f"warning: the files in {folder} are damaged and made anew")
        (folder / "about.json").unlink()
    say(f"streaming {config.hub} into {folder}, once: later runs find it there")
    eot, wanted = np.array([tokenizer.eot], asked["dtype"]), config.stream_tokens + 1
    known = {side: {"tokens": 0, "documents": 0, "bytes": 0, "digest": xxhash.xxh3_128()} for side in files}
    texts = stream_hub(config.hub, config.hub_config, config.train_split, config.text_column)
    bar = tqdm(total=config.stream_tokens, unit="token", unit_scale=True, dynamic_ncols=True, leave=False)
    with contextlib.closing(texts), bar, contextlib.ExitStack() as undo, contextlib.ExitStack() as opened:
        for side, file in files.items():
            file.unlink(missing_ok=True)  # not written over: a run may have it mapped
            known[side]["file"] = opened.enter_context(file.open("wb"))
            undo.callback(file.unlink)

        def add(side: dict[str, Any], ids: np.ndarray) -> None:
            content = ids.astype(eot.dtype).tobytes()
            side["file"].write(content)
            side["digest"].update(content)
            side["tokens"] += len(ids)

        for side in known.values():
            add(side, eot)
        train = known["train"]
        encoded = (zip(batch, tokenizer.encode(batch), strict=True) for batch in texts)
        for text, ids in itertools.chain.from_iterable(encoded):
            side = known["eval"] if "eval" in known and holdout_score(text) < config.holdout else train
            side["documents"] += 1
            side["bytes"] += len(text.encode())
            ids = np.append(ids, eot) if config.separate_documents else ids
            add(side, ids[: wanted - train["tokens"]] if side is train else ids)
            bar.update(train["tokens"] - 1 - bar.n)
            if train["tokens"] == wanted:
                break
        if not train["documents"]:
            raise PrenormError(f"data.hub={config.hub!r} holds no text to train on: name another split or column")
        if "eval" in known and not known["eval"]["documents"]:
            raise PrenormError(
                f"none of {train['documents']} documents was held out: raise data.holdout={config.holdout} or "
                f"data.stream_tokens={config.stream_tokens}, or give data.eval_split or data.eval_path"
            )
        for side in known.values():
            side["digest"] = side["digest"].hexdigest()
            file = side.pop("file")
            file.flush()
            os.fsync(file.fileno())
        undo.pop_all()
    (folder / "about.json").write_text(json.dumps(asked | known, indent=2) + "\n")
    return asked | known
