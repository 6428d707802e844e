"""From documents to token streams: `load_text` reads and tokenises what `config.data` names."""

import dataclasses
import math
import platform
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xxhash
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.data import Data, HostBatch
from prenorm_jax.data.documents import (
    find_files,
    hold_out,
    read_files,
    read_hub,
    read_stdlib,
    warn_of_splits,
)
from prenorm_jax.data.hub_cache import Split, stream_corpus
from prenorm_jax.data.quiet import datasets
from prenorm_jax.data.tokenizer import TextTokenizer, check_vocab_size, load_tokenizer
from prenorm_jax.data.windows import eval_batches, train_batch, window_count


@dataclasses.dataclass(frozen=True, eq=False)
class TextData(Data):
    """The splits as 1-D token streams: each starts with an end-of-text that is context, so len - 1 are predicted.

    The dtype is the smallest unsigned one that holds all ids. A stream may be a memory map (`hub_cache.py`): read it by
    windows.
    """

    train: np.ndarray
    eval: np.ndarray
    vocab_size: int  # ids are below it, end-of-text included
    eval_bytes: int  # of the evaluation text in UTF-8, without end-of-text tokens: for bits per byte
    eot: int
    description: str
    digest: str
    vocabulary: str
    unit = "token"

    def check_model(self, config: ConfigDict) -> None:
        check_vocab_size(self.vocab_size, config)
        if config.data.seq_len > config.model.max_len:
            raise PrenormError(f"data.seq_len={config.data.seq_len} is above model.max_len={config.model.max_len}")

    def units_per_batch(self, config: ConfigDict) -> int:
        return config.batch_size * config.data.seq_len

    def train_batch(self, config: ConfigDict, step: int, rows: slice | None = None) -> HostBatch:
        return train_batch(self.train, config.seed, step, config.batch_size, config.data.seq_len, rows)

    def eval_batches(self, config: ConfigDict, rows: slice | None = None) -> Iterator[HostBatch]:
        return eval_batches(self.eval, config.batch_size, config.data.seq_len, rows)

    def summarize(self, sums: dict[str, float]) -> dict[str, float]:
        """{eval_loss (nats per token), eval_perplexity, eval_bits_per_byte (of the text), eval_tokens}."""
        nats, tokens = sums["nats"], sums["weight"]
        return {
            "eval_loss": nats / tokens,
            "eval_perplexity": math.exp(nats / tokens) if nats / tokens < 700 else math.inf,
            "eval_bits_per_byte": nats / math.log(2) / self.eval_bytes,
            "eval_tokens": int(tokens),
        }


def load_text(config: ConfigDict) -> TextData:
    """Reads and tokenises what `config` (a run's `config.data`) names.

    Raises PrenormError, naming the key to change, if keys contradict each other, data or tokenizer cannot be
    read, or there is too little text for one training window.
    """
    for one, other in (("path", "hub"), ("eval_path", "eval_split")):
        if config[one] and config[other]:
            raise PrenormError(f"data.{one} and data.{other} exclude each other: unset one")
    if config.eval_split and not config.hub:
        raise PrenormError("data.eval_split is for hub data: set data.hub, or give files as data.eval_path")
    if config.stream_tokens is not None and not config.hub:
        raise PrenormError("data.stream_tokens is for hub data: set data.hub, or unset it")
    if not (config.eval_path or config.eval_split or 0 < config.holdout < 1):
        raise PrenormError(f"data.holdout={config.holdout} must be above 0 and below 1")
    tokenizer = load_tokenizer(config.tokenizer, config.eot_token)
    eval_files, eval_left_out = find_files(config.eval_path, "data.eval_path") if config.eval_path else ({}, "")
    if config.stream_tokens is None:
        documents, source, left_out = _train_documents(config, eval_files)
        held_out = _eval_documents(config, eval_files)
        if held_out is None:
            documents, held_out = hold_out(documents, config.holdout)
        train = _stream(documents, tokenizer, config.separate_documents)
        digest = xxhash.xxh3_128(train.tokens)
    else:
        held_out, source, left_out = _eval_documents(config, eval_files), f"{config.hub} (streamed)", ""
        train, evaluation, train_digest = stream_corpus(config, tokenizer, hold_out=held_out is None)
        digest = xxhash.xxh3_128(train_digest.encode())
    if held_out is not None:
        evaluation = _stream(held_out, tokenizer, config.separate_documents)
    digest.update(evaluation.tokens)
    window_count(train.tokens, config.seq_len)  # raises if there is none
    if len(evaluation.tokens) < 2:
        raise PrenormError("the evaluation data hold no tokens: raise data.holdout or give data.eval_path")
    description = (
        f"{source}, tokenizer {config.tokenizer} ({tokenizer.vocab_size:,} ids): "
        f"train {train.documents:,} documents, {len(train.tokens) - 1:,} tokens{left_out}; "
        f"eval {evaluation.documents:,} documents, {len(evaluation.tokens) - 1:,} tokens, {evaluation.size:,} bytes"
        f"{eval_left_out}"
    )
    return TextData(
        train=train.tokens,
        eval=evaluation.tokens,
        vocab_size=tokenizer.vocab_size,
        eval_bytes=evaluation.size,
        eot=tokenizer.eot,
        description=description,
        digest=digest.hexdigest(),
        vocabulary=tokenizer.vocabulary,
    )


def _train_documents(config: ConfigDict, eval_files: dict[str, Path]) -> tuple[datasets.Dataset, str, str]:
    """The documents, before any are held out; what to call them; what is left out of their folder."""
    if config.path:
        taken = {file.resolve() for file in eval_files.values()}
        files, left_out = find_files(config.path, "data.path")
        files = {name: file for name, file in files.items() if file.resolve() not in taken}
        if not files:
            raise PrenormError("data.eval_path takes every file of data.path: unset it to hold some out")
        origin = f"data.path={config.path!r}"
        warn_of_splits(files, origin)
        return read_files(files, config.text_column, origin), config.path, left_out
    if config.hub:
        split = config.train_split, config.text_column, "data.train_split"
        return read_hub(config.hub, config.hub_config, *split), config.hub, ""
    return read_stdlib(), f"Python {platform.python_version()} standard library", ""


def _eval_documents(config: ConfigDict, files: dict[str, Path]) -> datasets.Dataset | None:
    """The documents of data.eval_path or data.eval_split; None if neither is given and some are to be held out."""
    if files:
        return read_files(files, config.text_column, f"data.eval_path={config.eval_path!r}")
    if config.eval_split:
        return read_hub(config.hub, config.hub_config, config.eval_split, config.text_column, "data.eval_split")
    return None


def _stream(documents: datasets.Dataset, tokenizer: TextTokenizer, separate: bool) -> Split:
    """The split as a stream in memory."""
    encode = tokenizer.encode
    start = np.array([tokenizer.eot], np.min_scalar_type(tokenizer.vocab_size - 1))
    end = start if separate else start[:0]

    # For hub data `datasets` caches the result, under a hash of this function and all that it captures.
    def tokenise(batch: dict[str, list[str]]) -> dict[str, list]:
        return {
            "tokens": [np.concatenate([ids, end]) for ids in encode(batch["text"])],
            "bytes": [len(text.encode()) for text in batch["text"]],
        }

    tokens_feature = datasets.List(datasets.Value(start.dtype.name))
    tokenised = documents.map(
        tokenise,
        batched=True,
        batch_size=256,
        remove_columns=documents.column_names,
        features=datasets.Features({"tokens": tokens_feature, "bytes": datasets.Value("int64")}),
        keep_in_memory=not documents.cache_files,  # what was read into memory shall leave no files
    )
    pieces, size = [start], 0
    for table in tokenised.with_format("arrow").iter(batch_size=1000):
        pieces += [chunk.flatten().to_numpy() for chunk in table["tokens"].chunks]
        size += sum(table["bytes"].to_pylist())
    return Split(np.concatenate(pieces), len(documents), size)
