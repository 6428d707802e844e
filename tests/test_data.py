"""The data pipeline: what is read, how it is split, that each token is predicted once, what is refused."""

from __future__ import annotations

import bz2
import functools
import gzip
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
import sysconfig
import time
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import datasets
import huggingface_hub.constants
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from test_images import make_pictures
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from prenorm_jax.base.errors import PrenormError, first_line
from prenorm_jax.config import base_config
from prenorm_jax.data import documents as sources
from prenorm_jax.data import windows as batches
from prenorm_jax.data.text import TextData, load_text
from prenorm_jax.data.tokenizer import load_tokenizer
from prenorm_jax.data.windows import eval_batches, train_batch
from prenorm_jax.models.continuation import of_documents, write_texts
from prenorm_jax.models.sampling import Sampling

settings.register_profile("no_deadline", deadline=None)  # machines that run tests are busy
settings.load_profile("no_deadline")

EOT = 256  # of the bytes tokenizer
SHAPES = {"batch_size": st.integers(1, 7), "seq_len": st.integers(1, 9)}
STREAM = st.integers(2, 120).map(lambda n: np.arange(n, dtype=np.uint16))  # a token tells its position


def data_config(**changes: object) -> ConfigDict:
    config = base_config().data
    config.update({"seq_len": 2, **changes})
    return config


def write(folder: Path, files: dict[str, str | bytes]) -> str:
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder)


def write_rows(file: Path, rows: list[dict]) -> str:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def texts_of(stream: np.ndarray) -> list[str]:
    """The documents of a byte stream whose documents are separated."""
    assert stream[0] == EOT and stream[-1] == EOT
    ends = np.flatnonzero(stream == EOT)
    return [bytes(stream[a + 1 : b].tolist()).decode() for a, b in itertools.pairwise(ends)]


def save_tokenizer(file: Path, eot: str = "<|endoftext|>") -> str:
    """Words to ids with a gap in them; the file asks for all that has to be ignored."""
    vocab = {"[UNK]": 0, "a": 1, "b": 2, "c": 3, "[CLS]": 4, eot: 300}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"[CLS] $A {eot}", special_tokens=[("[CLS]", 4), (eot, 300)]
    )
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(file))
    return str(file)


# --- batches


@given(stream=STREAM, **SHAPES)
def test_evaluation_predicts_every_token_once_in_context(stream, batch_size, seq_len):
    found = list(eval_batches(stream, batch_size, seq_len))
    for batch in found:
        assert batch["tokens"].shape == (batch_size, seq_len + 1) and batch["tokens"].dtype == np.int32
        assert batch["weights"].shape == (batch_size, seq_len) and batch["weights"].dtype == np.float32
    tokens_NxT = np.concatenate([batch["tokens"] for batch in found])
    counted_NxT = np.concatenate([batch["weights"] for batch in found]) == 1
    np.testing.assert_array_equal(tokens_NxT[:, 1:][counted_NxT], stream[1:])
    np.testing.assert_array_equal(tokens_NxT[:, :-1][counted_NxT], stream[:-1])
    assert sum(batch["weights"].sum() for batch in found) == len(stream) - 1
    assert found[-1]["weights"].any() and tokens_NxT.max() <= stream[-1]  # no empty batch, no invented id


@given(stream=STREAM, seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 3), **SHAPES)
def test_an_epoch_has_each_window_once(stream, seed, epoch, batch_size, seq_len):
    count = (len(stream) - 1) // seq_len
    if count == 0:
        with pytest.raises(PrenormError, match=r"lower data\.seq_len"):
            train_batch(stream, seed, 0, batch_size, seq_len)
        return
    first, last = (
        epoch * count,
        (epoch + 1) * count,
    )  # examples of this epoch, found through batches that span it
    steps = range(first // batch_size, (last - 1) // batch_size + 1)
    found = [train_batch(stream, seed, step, batch_size, seq_len) for step in steps]
    tokens_NxT = np.concatenate([batch["tokens"] for batch in found])[first - steps[0] * batch_size :][:count]
    assert sorted(tokens_NxT[:, 0]) == [seq_len * window for window in range(count)]
    np.testing.assert_array_equal(tokens_NxT, tokens_NxT[:, :1] + np.arange(seq_len + 1))
    for batch in found:
        assert batch["tokens"].shape == (batch_size, seq_len + 1) and batch["tokens"].dtype == np.int32
        assert batch["weights"].dtype == np.float32
        np.testing.assert_array_equal(batch["weights"], np.ones((batch_size, seq_len)))


@given(seed=st.integers(0, 9), calls=st.lists(st.integers(0, 60), min_size=2, max_size=8))
def test_a_training_batch_depends_on_seed_and_step_alone(seed, calls):
    stream = np.arange(50, dtype=np.uint8)
    fresh = {}
    for step in calls:
        batches._permutation.cache_clear()
        fresh[step] = train_batch(stream, seed, step, 4, 5)["tokens"]
    for step in reversed(calls):  # now with whatever the other calls have left in the cache
        np.testing.assert_array_equal(train_batch(stream, seed, step, 4, 5)["tokens"], fresh[step])


def test_seeds_and_epochs_differ_and_the_order_is_pinned():
    stream = np.arange(2001, dtype=np.uint16)
    orders = [train_batch(stream, seed, epoch, 200, 10)["tokens"] for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4
    order = train_batch(np.arange(9), seed=3, step=0, batch_size=8, seq_len=1)["tokens"][:, 0]
    # A run that is resumed with another NumPy relies on this.
    assert order.tolist() == [4, 1, 6, 7, 0, 5, 2, 3]


@given(sizes=st.tuples(st.integers(1, 12), st.integers(1, 12)), seq_len=st.integers(1, 6))
def test_the_batch_size_does_not_change_the_order(sizes, seq_len):
    stream = np.arange(40, dtype=np.uint8)
    total = 60
    first, second = (
        np.concatenate([train_batch(stream, 7, s, size, seq_len)["tokens"] for s in range(-(-total // size))])
        for size in sizes
    )
    np.testing.assert_array_equal(first[:total], second[:total])


@given(cuts=st.lists(st.integers(0, 8), max_size=3), step=st.integers(0, 20))
def test_row_ranges_are_parts_of_the_batch(cuts, step):
    stream = np.arange(45, dtype=np.uint8)
    edges = [0, *sorted(cuts), 8]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    whole = train_batch(stream, 1, step, 8, 3)
    pieces = [train_batch(stream, 1, step, 8, 3, rows=part) for part in parts]
    for key, value in whole.items():
        np.testing.assert_array_equal(np.concatenate([piece[key] for piece in pieces]), value)
    whole = list(eval_batches(stream, 8, 3))
    pieces = [list(eval_batches(stream, 8, 3, rows=part)) for part in parts]
    for i, batch in enumerate(whole):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([piece[i][key] for piece in pieces]), value)


# --- sources and splits


def test_stdlib_is_the_default_and_has_no_tests():
    documents = sources.read_stdlib()
    names = list(documents["name"])
    assert names == sorted(names) and {"ast.py", "json/decoder.py"} < set(names)
    assert not [n for n in names if re.search(r"(^|/)(tests?|idle_test|site-packages|__pycache__)/", n)]
    assert documents[names.index("ast.py")]["text"] == Path(sysconfig.get_path("stdlib"), "ast.py").read_text(
        encoding="utf-8"
    )
    data = load_text(base_config().data)
    assert 0.002 < len(data.eval) / len(data.train) < 0.1
    assert set(texts_of(data.train)).isdisjoint(texts_of(data.eval))
    assert sorted(texts_of(data.train) + texts_of(data.eval)) == sorted(documents["text"])
    assert data.train.dtype == np.uint16 and data.vocab_size == 257 and data.eot == EOT
    assert "standard library" in data.description and f"{len(data.train) - 1:,} tokens" in data.description


def test_a_folder_gives_one_document_per_file_and_the_split_follows_the_name(tmp_path, monkeypatch):
    files = {f"sub{i % 3}/f{i}{('.txt', '.md', '.rst', '.py')[i % 4]}": f"text ünïcode {i}\n" for i in range(60)}
    ignored = {"sub0/.hidden.txt": "h", ".git/x.txt": "h", "picture.png": b"\xff", "empty.txt": ""}
    path = write(tmp_path / "one", files | ignored)
    data = load_text(data_config(path=path, holdout=0.2))
    train, held = texts_of(data.train), texts_of(data.eval)
    assert sorted(train + held) == sorted(files.values()) and 4 <= len(held) <= 20
    assert data.eval_bytes == sum(len(text.encode()) for text in held)
    assert f"eval {len(held)} documents" in data.description and "\n" not in data.description

    # Moved elsewhere, with changed texts and with more files: every old file stays on its side.
    other = {name: text + "!" for name, text in files.items()} | {f"new{i}.txt": f"new {i}" for i in range(9)}
    moved = load_text(data_config(path=write(tmp_path / "two", other), holdout=0.2))
    assert {text + "!" for text in held} <= set(texts_of(moved.eval))
    assert {text + "!" for text in train} <= set(texts_of(moved.train))

    by_glob = load_text(data_config(path=path + "/sub1/*.txt", holdout=0.2))
    expected = [text for name, text in files.items() if re.fullmatch(r"sub1/[^/]*\.txt", name)]
    assert sorted(texts_of(by_glob.train) + texts_of(by_glob.eval)) == sorted(expected)
    monkeypatch.chdir(tmp_path / "one" / "sub1")
    relative = load_text(data_config(path="*.txt", holdout=0.2))
    np.testing.assert_array_equal(relative.train, by_glob.train)
    recursive = load_text(data_config(path=path + "/**/f*.txt", holdout=0.2))
    assert set(texts_of(recursive.eval)) <= set(held)  # the same relative names, so the same side


def test_names_that_look_like_patterns_and_newlines(tmp_path):
    path = write(tmp_path, {"a[1].txt": "one\r\ntwo", "__init__.py": "init", "b*.txt": "star", "b1.txt": "b1"})
    data = load_text(data_config(path=path, holdout=0.5))
    assert sorted(texts_of(data.train) + texts_of(data.eval)) == ["b1", "init", "one\ntwo", "star"]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
def test_rows_are_documents_and_copies_stay_together(tmp_path, suffix):
    rows = [{"body": f"row {i % 40} é", "n": i} for i in range(80)] + [
        {"body": None, "n": 0},
        {"body": "", "n": 1},
    ]
    path = write_rows(tmp_path / f"rows.{suffix}", rows)
    data = load_text(data_config(path=path, text_column="body", holdout=0.2))
    train, held = texts_of(data.train), texts_of(data.eval)
    assert sorted(train + held) == sorted(row["body"] for row in rows if row["body"])
    assert set(train).isdisjoint(held) and 2 <= len(set(held)) <= 16
    assert data.eval_bytes == sum(len(text.encode()) for text in held)


def test_links_are_followed_and_compressed_files_read(tmp_path):
    texts = {"a.txt": "aaa", "inner/b.txt": "bbb"}
    path = write(tmp_path / "data", texts)
    write(tmp_path / "elsewhere", {"c.txt": "ccc"})
    for name, target in {"more": "../elsewhere", "again": "inner", "inner/up": "..", "self": "self"}.items():
        (tmp_path / "data" / name).symlink_to(target)
    zst = functools.partial(pa.compress, codec="zstd", asbytes=True)
    for end, compress in {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst}.items():
        write(tmp_path / "data", {f"{end}.txt.{end.upper()}": compress(end.encode()), f"a.txt.{end}": b"?"})
    data = load_text(data_config(path=path, holdout=0.2))
    expected = ["aaa", "bbb", "bz2", "ccc", "gz", "xz", "zst"]
    assert sorted(texts_of(data.train) + texts_of(data.eval)) == expected
    said = "1 links back (inner/up), 4 compressed copies (a.txt.bz2)"
    assert "1 links to nothing (self)" in data.description and said in data.description
    by_glob = load_text(data_config(path=path + "/**/*.[tT][xX]*", holdout=0.2))
    assert sorted(texts_of(by_glob.train) + texts_of(by_glob.eval)) == expected
    rows = "".join(json.dumps({"text": text}) + "\n" for text in expected).encode()
    for end, compress in {"gz": gzip.compress, "zst": zst}.items():
        write(tmp_path / "rows", {f"r.jsonl.{end}": compress(rows)})
        data = load_text(data_config(path=str(tmp_path / "rows" / f"r.jsonl.{end}"), holdout=0.2))
        assert sorted(texts_of(data.train) + texts_of(data.eval)) == expected
    for end, compress in {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zst}.items():
        cut = write(tmp_path / "cut", {f"x.txt.{end}": compress(bytes(range(128)) * 99)[:-7]})
        assert f"'x.txt.{end}' cannot be read as UTF-8 text (" in refusal(path=f"{cut}/x.txt.{end}")


def test_a_folder_called_like_a_pattern_is_a_folder(tmp_path):
    path = write(tmp_path / "[1]::*", {"a.txt": "aaa", "in[2]/b.txt": "bbb"})
    for name in (path, path + "/**/*.txt"):
        data = load_text(data_config(path=name))
        assert sorted(texts_of(data.train) + texts_of(data.eval)) == ["aaa", "bbb"]
    one = load_text(data_config(path=path + "/in[2]/*.txt", holdout=0.5, seq_len=1))
    assert texts_of(one.train)[0] + texts_of(one.eval)[0] == "bbb"


def test_what_is_left_out_is_said(tmp_path, capsys):
    files = {"a.txt": "aaa", "b.txt": "bbb", "c.csv": "c", "d.pdf": "d", ".git/e.txt": "e", "f.txt": ""}
    path, other = write(tmp_path / "train", files), write(tmp_path / "eval", {"g.txt": "ggg", ".h": "h"})
    description = load_text(data_config(path=path, eval_path=other)).description
    assert "; left out: 1 hidden (.git), 2 of other types (c.csv), 1 empty (f.txt); eval 1 documents" in description
    assert description.endswith("; left out: 1 hidden (.h)")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "names",
    [("train.jsonl", "test.jsonl"), ("x/train-0.jsonl", "x/valid-0.jsonl"), ("books/a.jsonl", "test.jsonl")],
)
def test_a_test_set_is_not_trained_on_without_a_word(tmp_path, capsys, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_rows(tmp_path / name, [{"text": name}, {"text": name + "!"}])
    load_text(data_config(path=str(tmp_path)))
    assert f"trains not only on {names[0]} but also on {names[1]}: " in capsys.readouterr().err
    load_text(data_config(path=str(tmp_path), eval_path=str(tmp_path / names[1])))
    load_text(data_config(path=str(tmp_path / names[1])))
    load_text(data_config(path=write(tmp_path / "code", {"train.py": "a", "test_train.py": "b", "test.py": "c"})))
    assert capsys.readouterr().err == ""


def test_of_rows_only_the_text_is_read(tmp_path):
    """Whatever the other columns of the files, a shard that has no rows, and a disk that has no room for a cache."""
    kinds = [1, "x", [2.5], {"y": None}]
    texts = [f"row {i}" for i in range(len(kinds))]
    for i, (text, other) in enumerate(zip(texts, kinds, strict=True)):
        for suffix in ("jsonl", "parquet"):
            (tmp_path / suffix).mkdir(exist_ok=True)
            write_rows(tmp_path / suffix / f"{i}.{suffix}", [{"n": other, "text": text, f"only{i}": i}])
    none = {"text": pa.array([], pa.null()), "n": pa.array([], pa.float64())}
    pyarrow.parquet.write_table(pa.table(none), tmp_path / "parquet" / "none.parquet")
    pyarrow.parquet.write_table(pa.table({"other": pa.array([], pa.int8())}), tmp_path / "parquet" / "nothing.parquet")
    encoded = {"text": pa.array(["dictionary"]).dictionary_encode()}
    pyarrow.parquet.write_table(pa.table(encoded), tmp_path / "parquet" / "types.parquet")
    (tmp_path / "jsonl" / "blank.jsonl").write_text("\n\n")
    for suffix, found in {"jsonl": texts, "parquet": ["dictionary", *texts]}.items():
        with mock.patch("tempfile.tempdir", "/nowhere"):
            data = load_text(data_config(path=str(tmp_path / suffix)))
        assert sorted(texts_of(data.train) + texts_of(data.eval)) == found


def test_digests_of_texts_are_those_of_runs_that_are_there(tmp_path):
    def digest(name: str, content: str | bytes) -> str:
        write(tmp_path, {name: content})
        return load_text(data_config(path=str(tmp_path / name), holdout=0.3)).digest

    rows = [{"n": i, "text": f"row é {i}\r\n\u2028x"} for i in range(12)] + [{"text": None}, {"text": ""}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    for content in (
        "\n".join(lines),
        "\ufeff" + "\r\n\n".join(lines) + "\n",
        json.dumps(rows, indent=1),
        "[" + ",".join(lines) + "]",
        json.dumps([row["text"] for row in rows if row["text"]]),
        "\n".join(json.dumps(row, indent=1) for row in rows),
    ):
        assert digest("rows.json", content) == "a327422698ad133da91b3454562c4795"
    rows = write_rows(tmp_path / "rows.parquet", rows)
    assert digest("rows.parquet", Path(rows).read_bytes()) == "a327422698ad133da91b3454562c4795"
    folder = write(tmp_path / "texts", {f"{i}.txt": f"text {i}" for i in range(9)} | {"sub/x.md": "mm"})
    write(tmp_path / "texts", {"sub b/x.md": "mmb"})
    (tmp_path / "texts" / "link.txt").symlink_to("0.txt")
    for path in (folder, folder + "/**/*"):
        digest_now = load_text(data_config(path=path, holdout=0.3)).digest
        assert digest_now == "5c8124c807fe93a43f4de859fb220deb"


def test_one_document_is_cut_and_few_leave_no_side_empty(tmp_path):
    text = "".join(map(str, range(500)))
    one = load_text(data_config(path=write(tmp_path / "one", {"big.txt": text}) + "/big.txt", holdout=0.1))
    assert texts_of(one.train)[0] + texts_of(one.eval)[0] == text
    assert one.eval_bytes == round(0.1 * len(text))
    path = write(tmp_path / "few", {f"{i}.txt": f"text {i}" for i in range(3)})
    for holdout in (1e-9, 1 - 1e-9):
        data = load_text(data_config(path=path, holdout=holdout))
        sizes = len(texts_of(data.train)), len(texts_of(data.eval))
        assert sizes == ((2, 1) if holdout < 0.5 else (1, 2))
    tiny = load_text(data_config(path=write_rows(tmp_path / "t.jsonl", [{"text": "ab"}]), holdout=0.01, seq_len=1))
    assert (texts_of(tiny.train), texts_of(tiny.eval)) == (["a"], ["b"])


def test_eval_path_is_used_and_kept_out_of_training(tmp_path):
    path = write(tmp_path, {"a.txt": "aaa", "b.txt": "bbb", "val/c.txt": "ccc"})
    data = load_text(data_config(path=path, eval_path=path + "/val", holdout=0))  # holdout is not looked at
    assert (texts_of(data.train), texts_of(data.eval)) == (["aaa", "bbb"], ["ccc"])
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "row"}])
    assert texts_of(load_text(data_config(path=path + "/*.txt", eval_path=rows)).eval) == ["row"]
    assert texts_of(load_text(data_config(eval_path=rows)).eval) == ["row"]  # training on the standard library


def test_documents_may_be_joined_without_separators(tmp_path):
    path = write(tmp_path, {"a.txt": "aaa", "b.txt": "bbb", "val/c.txt": "ccc"})
    data = load_text(data_config(path=path, eval_path=path + "/val", separate_documents=False))
    assert data.train.tolist() == [EOT, *b"aaabbb"] and data.eval.tolist() == [EOT, *b"ccc"]


def test_changed_files_are_read_anew_even_with_an_old_time(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("first text", "other text"):
        file.write_text(text)
        os.utime(file, (10**9, 10**9))
        data = load_text(data_config(path=str(file), holdout=0.5))
        assert texts_of(data.train) + texts_of(data.eval) == [text[:5], text[5:]]


def test_loading_leaves_nothing_behind(tmp_path, monkeypatch):
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    load_text(data_config(path=write(tmp_path / "data", {"a.txt": "aaa", "b.txt": "bbb"})))
    assert not cache.exists() and not list(temporary.iterdir())


SCRIPT = """
import hashlib, sys
from prenorm_jax.config import base_config, load_data
from prenorm_jax.data.windows import train_batch
from prenorm_jax.data.text import load_text
*texts, images = sys.argv[1:]
for path in texts:
    config = base_config().data
    config.path, config.holdout = path, 0.3
    data = load_text(config)
    batch = train_batch(data.train, 5, 9, 4, 16)["tokens"]
    print(*(hashlib.sha256(a.tobytes()).hexdigest() for a in (data.train, data.eval, batch)))
config = base_config("vit")
config.data.path, config.model.image_size, config.model.patch_size, config.model.classes = images, 8, 4, 2
print(load_data(config).digest)
"""


@pytest.mark.slow
def test_every_process_gets_the_same_and_says_nothing(tmp_path):
    files = write(tmp_path / "files", {f"{i}.txt": f"some text {i} " * 20 for i in range(30)})
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": f"some row {i} " * 20} for i in range(30)])
    make_pictures(tmp_path / "images")
    command = [sys.executable, "-W", "error", "-c", SCRIPT, files, rows, tmp_path / "images"]
    children = [
        subprocess.Popen(
            command,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for seed in ("1", "2")
    ]
    (first, noise), (second, _) = [child.communicate(timeout=120) for child in children]
    assert first == second and len(first.split()) == 7
    assert noise == b"", "nothing but what the caller prints: no progress bars, no warnings"


# --- tokenizers


@settings(max_examples=15)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=2), min_size=2, unique=True))
def test_bytes_round_trip(tmp_path_factory, texts):
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.parquet", [{"text": text} for text in texts])
    data = load_text(data_config(path=path, holdout=0.5, seq_len=1))
    assert sorted(texts_of(data.train) + texts_of(data.eval)) == sorted(texts)
    assert data.eval_bytes == len(data.eval) - 1 - len(texts_of(data.eval))


def test_a_tokenizer_file_is_used_without_its_truncation_padding_and_template(tmp_path):
    name = save_tokenizer(tmp_path / "tokenizer.json")
    path = write(tmp_path / "data", {"a.txt": "a b c nope c", "val/b.txt": "c a"})
    data = load_text(data_config(path=path, eval_path=path + "/val", tokenizer=name))
    assert data.train.tolist() == [300, 1, 2, 3, 0, 3, 300] and data.eval.tolist() == [300, 3, 1, 300]
    assert (data.vocab_size, data.eot, data.train.dtype, data.eval_bytes) == (301, 300, np.uint16, 3)
    assert load_tokenizer(name, "c").eot == 3


@pytest.mark.parametrize("eot", ["<|endoftext|>", "<|end_of_text|>", "</s>", "[SEP]", "<eos>"])
def test_usual_end_of_text_tokens_are_found(tmp_path, eot):
    assert load_tokenizer(save_tokenizer(tmp_path / "t.json", eot)).eot == 300


@pytest.mark.parametrize(("top", "dtype"), [(255, np.uint8), (256, np.uint16), (65536, np.uint32)])
def test_the_stream_dtype_is_the_smallest_that_fits(tmp_path, top, dtype):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1, "</s>": top}, unk_token="[UNK]"))
    tokenizer.save(str(tmp_path / "t.json"))
    path = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}])
    data = load_text(data_config(path=path, tokenizer=str(tmp_path / "t.json")))
    assert data.train.dtype == data.eval.dtype == dtype and data.train[-1] == top == data.vocab_size - 1


# --- hub data, with the network replaced


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A fake hub with one data set on disk, as `datasets` would cache it; gives the calls made to it."""
    calls = []
    for split in ("train", "test"):
        rows = {"text": [f"{split} {i}" for i in range(20)] + [""]}
        datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / split)

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return datasets.load_from_disk(tmp_path / kwargs["split"])

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    return calls


def test_hub_data_use_their_splits_or_hold_rows_out(hub, tmp_path):
    data = load_text(data_config(hub="some/set", hub_config="raw", eval_split="test"))
    assert texts_of(data.eval) == [f"test {i}" for i in range(20)]
    assert texts_of(data.train) == [f"train {i}" for i in range(20)]
    assert hub == [(("some/set", "raw"), {"split": split}) for split in ("train", "test")]  # no remote code
    held_out = load_text(data_config(hub="some/set", holdout=0.3))
    assert sorted(texts_of(held_out.train) + texts_of(held_out.eval)) == sorted(texts_of(data.train))


def test_cached_tokens_are_those_of_the_tokenizer_asked_for(hub, tmp_path):
    def load(**changes: object) -> TextData:
        return load_text(data_config(hub="some/set", eval_split="test", **changes))

    def cached() -> set[Path]:
        return set((tmp_path / "train").glob("cache-*"))

    first, files = load(), cached()
    words = load(tokenizer=save_tokenizer(tmp_path / "t.json"))
    assert words.eot == 300 and words.train.tolist() == [300] + [0, 0, 300] * 20
    joined = load(separate_documents=False)
    assert bytes(joined.train[1:].tolist()).decode() == "".join(texts_of(first.train))
    after = cached()
    np.testing.assert_array_equal(load().train, first.train)
    assert files and len(after) > len(files) and cached() == after  # the last call found its result


# --- streamed hub data: the same code path for a folder of files, which `datasets` streams like a repository


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A data set of 600 documents in two files, its rows told apart by their text; for `stream_config`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": f"document {i} é" if i % 50 else "", "n": i} for i in range(600)] + [{"text": None, "n": 0}]
    write_rows(folder / "train-0.parquet", rows[:400])
    write_rows(folder / "train-1.parquet", rows[400:])
    return folder


def stream_config(corpus: Path, **changes: object) -> ConfigDict:
    keys = {"hub": str(corpus), "cache": str(corpus.parent / "cache"), "stream_tokens": 1000, "holdout": 0.1}
    return data_config(**keys | changes)


def streamed_files(corpus: Path) -> set[str]:
    return {file.name for file in (corpus.parent / "cache").rglob("*") if file.is_file()}


def no_streaming(monkeypatch) -> None:
    def load_dataset(*args, **kwargs):
        raise AssertionError("the data set is loaded again")

    monkeypatch.setattr(sources, "load_dataset", load_dataset)


def test_streamed_tokens_are_the_first_of_those_loaded_whole(corpus):
    whole = load_text(data_config(path=str(corpus), holdout=0.1))
    data = load_text(stream_config(corpus))
    assert isinstance(data.train, np.memmap) and isinstance(data.eval, np.memmap)
    assert data.train.dtype == np.uint16 and len(data.train) == 1001
    np.testing.assert_array_equal(data.train, whole.train[:1001])
    held = texts_of(data.eval)
    assert held and held == texts_of(whole.eval)[: len(held)]
    assert data.eval_bytes == sum(len(text.encode()) for text in held)
    assert f"{corpus} (streamed)" in data.description and "1,000 tokens" in data.description
    for step in (0, 7, 300):  # of three epochs
        batch = train_batch(data.train, 5, step, 4, 16)["tokens"]
        assert type(batch) is np.ndarray
        np.testing.assert_array_equal(batch, train_batch(np.array(data.train), 5, step, 4, 16)["tokens"])
    joined = load_text(stream_config(corpus, separate_documents=False, holdout=0.2))
    assert (joined.train[1:] != EOT).all() and len(joined.train) == 1001


def test_a_corpus_that_ends_sooner_is_said_and_used_whole(corpus, capsys):
    whole = load_text(data_config(path=str(corpus), holdout=0.1))
    for _ in range(2):  # streamed, then mapped
        data = load_text(stream_config(corpus, stream_tokens=10**9))
        np.testing.assert_array_equal(data.train, whole.train)
        np.testing.assert_array_equal(data.eval, whole.eval)
        found = len(whole.train) - 1
        assert f"has only {found:,} of data.stream_tokens=1,000,000,000: all are used" in capsys.readouterr().err


def test_later_runs_map_the_same_files_and_others_have_their_own(corpus, monkeypatch, tmp_path):
    first = load_text(stream_config(corpus))
    assert streamed_files(corpus) == {"train.bin", "eval.bin", "about.json", "lock"}
    (about,) = (tmp_path / "cache").glob("*/about.json")
    said = json.loads(about.read_text())
    assert said["dataset"] == str(corpus) and said["stream_tokens"] == 1000 and said["tokenizer"] == "bytes"
    assert said["train"]["tokens"] == 1001
    others = [{"tokenizer": save_tokenizer(tmp_path / "t.json")}, {"holdout": 0.2}, {"stream_tokens": 1001}]
    others += [{"separate_documents": False}, {"train_split": "train[:]"}]
    for other in others[:-1]:
        assert load_text(stream_config(corpus, **other)).digest != first.digest
    no_streaming(monkeypatch)
    again = load_text(stream_config(corpus))
    assert again.digest == first.digest and again.description == first.description
    assert Path(again.train.filename).samefile(first.train.filename)
    np.testing.assert_array_equal(again.train, first.train)
    for other in others:
        if other != others[-1]:
            load_text(stream_config(corpus, **other))
        else:
            with pytest.raises(PrenormError, match="loaded again"):
                load_text(stream_config(corpus, **other))


def test_streamed_training_data_go_with_an_evaluation_split_or_path(corpus, tmp_path):
    write_rows(corpus / "test.parquet", [{"text": "held", "n": 1}])
    data = load_text(stream_config(corpus, eval_split="test"))
    assert texts_of(data.eval) == ["held"] and streamed_files(corpus) == {"train.bin", "about.json", "lock"}
    assert texts_of(np.append(data.train, EOT))[0] == "document 1 é"  # the fixture's first is empty
    other = load_text(stream_config(corpus, eval_path=write(tmp_path / "eval", {"a.txt": "other"})))
    assert texts_of(other.eval) == ["other"] and other.digest != data.digest
    np.testing.assert_array_equal(other.train, data.train)


def test_what_was_cut_short_is_not_taken_for_whole(corpus, monkeypatch, capsys):
    expected = np.array(load_text(stream_config(corpus)).train)
    (file,) = (corpus.parent / "cache").glob("*/train.bin")
    file.write_bytes(file.read_bytes()[:-2])
    capsys.readouterr()
    np.testing.assert_array_equal(load_text(stream_config(corpus)).train, expected)
    assert "are damaged and made anew" in capsys.readouterr().err
    (file.parent / "about.json").write_text('{"dataset": ')
    np.testing.assert_array_equal(load_text(stream_config(corpus)).train, expected)

    # The network goes in the middle: nothing stays that a later run could find, and it starts again.
    def broken(*args, **kwargs):
        whole = datasets.load_dataset(*args, **kwargs)

        class Broken:
            def iter(self, batch_size):
                yield next(iter(whole.iter(batch_size)))
                raise ConnectionError("connection reset\nby somebody")

        return Broken()

    with monkeypatch.context() as context:
        context.setattr(sources, "load_dataset", broken)
        with pytest.raises(PrenormError, match=r"cannot be loaded: connection reset by somebody; it needs network"):
            load_text(stream_config(corpus, stream_tokens=5000))
    assert [folder for folder in (corpus.parent / "cache").iterdir() if list(folder.glob("*.*")) == []]
    assert len(load_text(stream_config(corpus, stream_tokens=5000)).train) == 5001


def test_processes_that_start_together_stream_once(corpus, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append(args)
        time.sleep(0.2)
        return datasets.load_dataset(*args, **kwargs)

    monkeypatch.setattr(sources, "load_dataset", load_dataset)
    with ThreadPoolExecutor(2) as pool:  # the lock is of an open file: threads are as processes to it
        loaded = list(pool.map(load_text, [stream_config(corpus)] * 2))
    assert len(calls) == 1 and loaded[0].digest == loaded[1].digest


def test_streaming_holds_no_more_than_a_few_documents_in_memory(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    write_rows(corpus / "train.parquet", [{"text": f"{i:04d}" * 500} for i in range(4000)])  # 8 MB
    tracemalloc.start()
    try:
        data = load_text(stream_config(corpus, stream_tokens=7_000_000, holdout=0.001))
        train_batch(data.train, 0, 0, 8, 128)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(data.train) == 7_000_001
    assert peak < 6e6, "the stream is 14 MB"


def test_refused_streams(corpus, monkeypatch, tmp_path):
    def refused(**changes: object) -> str:
        with pytest.raises(PrenormError) as caught:
            load_text(stream_config(corpus, **changes))
        message = str(caught.value)
        assert "\n" not in message and len(message) < 400
        return message

    assert "data.stream_tokens is for hub data: set data.hub" in refused(hub=None)
    assert "data.stream_tokens=0 must be at least 1" in refused(stream_tokens=0)
    assert "data.holdout=0.0 must be above 0" in refused(holdout=0.0)
    assert "no column data.text_column='body'; it has text, n" in refused(text_column="body")
    assert "data.text_column='n' holds int, not text; name another" in refused(text_column="n")
    assert "data.train_split='nowhere' cannot be loaded: " in refused(train_split="nowhere")
    assert "documents was held out: raise data.holdout=1e-09 or data.stream_tokens=1000" in refused(holdout=1e-9)
    assert "10 tokens, too few for one window of data.seq_len=11" in refused(stream_tokens=10, seq_len=11, holdout=0.9)
    assert not [name for name in streamed_files(corpus) if name.endswith(".partial")]
    empty = tmp_path / "empty"
    empty.mkdir()
    write_rows(empty / "train.jsonl", [{"text": ""}])
    assert "holds no text to train on" in refused(hub=str(empty))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert "it needs network access, or, for a new run, local files as data.path" in refused(
        hub="no-such-owner/no-such-set"
    )


def test_the_cache_is_that_of_the_user(corpus, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_text(stream_config(corpus, cache=None))
    assert len(list((tmp_path / "xdg" / "prenorm_jax").glob("*/train.bin"))) == 1


def test_a_model_may_have_more_ids_than_its_tokenizer(corpus):
    config = base_config()
    config.data = stream_config(corpus)
    data = load_text(config.data)
    for size in (257, 384):
        config.model.vocab_size = size
        data.check_model(config)
    assert load_tokenizer("bytes").decode([65, 300, 66]) == "AB"  # what such a model might say
    words = load_tokenizer(save_tokenizer(corpus / "t.json"))
    assert words.decode([1, 303, 2]) == words.decode([1, 2])
    config.model.vocab_size = 256
    with pytest.raises(PrenormError, match="it needs 257"):
        data.check_model(config)


# --- what is refused


def refusal(**changes: object) -> str:
    with pytest.raises(PrenormError) as caught:
        load_text(data_config(**changes))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_refused_keys(tmp_path):
    path = write(tmp_path, {"a.txt": "aaa", "b.txt": "bbb"})
    assert "data.path and data.hub exclude" in refusal(path=path, hub="x")
    assert "data.eval_path and data.eval_split exclude" in refusal(hub="x", eval_path=path, eval_split="test")
    assert "data.eval_split is for hub data" in refusal(path=path, eval_split="test")
    assert "data.eval_path takes every file of data.path" in refusal(path=path, eval_path=path)
    for holdout in (0.0, 1.0, -0.1, float("nan")):
        assert f"data.holdout={holdout} must be" in refusal(path=path, holdout=holdout)
    assert "data.seq_len=0 must be" in refusal(path=path, seq_len=0)
    assert "4 tokens, too few for one window of data.seq_len=5: lower" in refusal(path=path, seq_len=5)
    assert len(load_text(data_config(path=path, seq_len=4)).train) == 5  # one window is enough


def test_refused_files(tmp_path):
    path = write(
        tmp_path,
        {
            "one.csv": "a",
            "mixed/a.txt": "a",
            "mixed/b.jsonl": '{"text": "b"}',
            "none/a.csv": "a",
            "empty/a.txt": "",
            "empty/b.txt": "",
            "bad/ok.txt": "fine",
            "bad/no.txt": b"caf\xe9 \xff",
            "bad.parquet": b"PAR1 not really",
            "bad.jsonl": '{"text": "a"}\n{"text": ',
            "char.txt": "a",
        },
    )
    for key in ("path", "eval_path"):
        for nowhere in ("/nowhere", "~nobody-of-that-name/x", "a\0b"):
            assert f"data.{key}={nowhere!r} does not exist" in refusal(**{key: nowhere})
    assert "matches no file" in refusal(path=path + "/*.md")
    assert "matches no file" in refusal(path=path + "/none")
    assert "'one.csv' is of an unknown type; the types are .txt .md" in refusal(path=path + "/one.csv")
    assert "is of an unknown type" in refusal(path=path + "/one*")
    assert "mixes json (b.jsonl) and text (a.txt): give one kind" in refusal(path=path + "/mixed")
    assert "holds no text" in refusal(path=path + "/empty")
    assert "data.eval_path=" in (message := refusal(eval_path=path + "/empty")) and "holds no text" in message
    assert "'no.txt' cannot be read as UTF-8 text ('utf-8' codec" in refusal(path=path + "/bad")
    assert "cannot be read as parquet (" in refusal(path=path + "/bad.parquet")
    assert "cannot be read as json (" in refusal(path=path + "/bad.jsonl")
    assert "a single character" in refusal(path=path + "/char.txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', "line 2: 'utf-8' codec can't decode byte 0xff"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2: 'utf-8' codec can't encode"),
        (b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "line 2: Expecting value"),
        (b'[\n{"text": "a"},\n{"text": }\n]', "line 3: Expecting value"),
        (b'{"text": "a"}\n' + b"[" * 100_000, "line 2: maximum recursion depth"),
        (b'{"text": "a"}\n3\n', "line 2: int, not an object"),
        (b'{"text": "a"}\n{"text": 3}\n', "line 2: data.text_column='text' holds int, not text"),
        (b'{"body": "a"}\n{"body": "b"}\n', "has no column data.text_column='text'; it has body"),
        (b"{}\n{}\n", "has no column data.text_column='text'; it has none"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_lines_are_named(tmp_path, content, message):
    good = write_rows(tmp_path / "good.jsonl", [{"text": "good"}])
    (tmp_path / "bad.jsonl").write_bytes(content)
    assert f"data.path={str(tmp_path)!r}: 'bad.jsonl'" in (said := refusal(path=str(tmp_path))) and message in said
    (tmp_path / "bad.jsonl").unlink()
    assert Path(good).exists() and texts_of(load_text(data_config(path=str(tmp_path), holdout=0.5)).eval)


@pytest.mark.parametrize("space", [" ", "\n"], ids=["in one line", "in many"])
def test_no_number_is_too_long_for_a_column_that_is_not_read(tmp_path, space):
    content = '{"text": "a",S"n": D}\n{"n": -D, "text": "b"}'.replace("S", space).replace("D", "1" * 5000)
    data = load_text(data_config(path=write(tmp_path, {"a.jsonl": content}), holdout=0.5, seq_len=1))
    assert sorted(texts_of(data.train) + texts_of(data.eval)) == ["a", "b"]


def test_a_path_that_is_there_but_no_file_is_called_what_it_is(tmp_path):
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(tmp_path / "fifo.txt")
    (tmp_path / "to_fifo.txt").symlink_to("fifo.txt")
    for name, what in {"gone": "links to nothing", "fifo": "is neither", "to_fifo": "is neither"}.items():
        for key in ("path", "eval_path"):
            place = f"{tmp_path}/{name}.txt"
            assert f"data.{key}={place!r} {what}" in refusal(**{key: place})
    left_out = "left out: 2 neither file nor folder (fifo.txt), 1 links to nothing (gone.txt); the types"
    assert left_out in refusal(path=str(tmp_path))


def test_parquet_columns_that_are_no_text(tmp_path):
    bytes_ = pa.array([b"ok", b"\xff\xfe"], pa.binary())
    wrong = {"text": pa.Array.from_buffers(pa.string(), 2, bytes_.buffers()), "bytes": bytes_}
    pyarrow.parquet.write_table(pa.table(wrong), tmp_path / "a.parquet")
    assert "'a.parquet' cannot be read as parquet (" in (said := refusal(path=str(tmp_path))) and "UTF8" in said
    assert "data.text_column='bytes' holds binary, not text" in refusal(path=str(tmp_path), text_column="bytes")
    assert "no column data.text_column='x'; it has text, bytes" in refusal(path=str(tmp_path), text_column="x")


def test_names_that_are_no_utf8_are_refused(tmp_path):
    (tmp_path / "\udcff.txt").write_text("a")
    assert r"the file name '\udcff.txt' is not UTF-8: rename the file" in refusal(path=str(tmp_path))


def test_tokenizers_without_their_unknown_token(tmp_path):
    """In training and in `generate`, which calls write_texts; and where the library's Rust panics."""
    path = write(tmp_path, {"data/a.txt": "a", "data/b.txt": "b"})
    for model in (
        {"type": "WordLevel", "vocab": {"a": 0, "</s>": 1}, "unk_token": "[UNK]"},
        {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0], ["</s>", -1.0]], "byte_fallback": False},
    ):
        (tmp_path / "t.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        name = str(tmp_path / "t.json")
        message = f"data.tokenizer={name!r} cannot encode a text: "
        assert message in refusal(path=path + "/data", tokenizer=name)
        with pytest.raises(PrenormError, match=re.escape(message)):
            write_texts(None, None, of_documents(load_tokenizer(name)), ["b"], 1, Sampling(), 0)
    broken = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (tmp_path / "t.json").write_text(json.dumps({"version": "1.0", "normalizer": broken, "model": model}))
    assert f"data.tokenizer={name!r} cannot be loaded: " in refusal(tokenizer=name)


def test_an_error_of_many_lines_says_what_and_why():
    def lines(*lines: str) -> str:
        return first_line(ValueError("\n".join(lines)))

    assert lines("401 Client Error.", "", "  No such\trepository ", "====") == "401 Client Error. No such repository"
    long = lines("Couldn't cast", *["column: string"] * 40, "because column names don't match")
    assert long == "Couldn't cast … because column names don't match"
    assert len(lines("a" * 900)) == 300 and lines("") == "ValueError"


def test_refused_rows(tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", [{"body": "x", "n": 1}, {"body": "x", "n": 2}])
    assert "no column data.text_column='text'; it has body, n" in refusal(path=rows)
    assert "data.text_column='n' holds int, not text; name another" in refusal(path=rows, text_column="n")
    assert "every document is the same" in refusal(path=rows, text_column="body")
    pyarrow.parquet.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "none.parquet")
    (tmp_path / "none.jsonl").touch()
    assert "holds no text: every file is empty" in refusal(path=str(tmp_path / "none.jsonl"))
    # A file without rows: refused by the parser or, where that takes it, by us.
    assert re.search("cannot be read|holds no text", refusal(path=str(tmp_path / "none.parquet")))
    blank = write_rows(tmp_path / "blank.jsonl", [{"text": ""}, {"text": ""}])
    assert "holds no text: it has 2 documents, all empty" in refusal(path=blank)


def test_refused_tokenizers(tmp_path):
    path = write(tmp_path, {"a.txt": "aaa", "b.txt": "bbb", "broken.json": "{}"})
    path += "/*.txt"
    name = save_tokenizer(tmp_path / "t.json", eot="<unusual>")
    assert "data.eot_token has no use" in refusal(path=path, eot_token="</s>")
    assert "knows no <|endoftext|> or <|end_of_text|>" in (message := refusal(path=path, tokenizer=name))
    assert "set data.eot_token" in message
    assert "knows no </s>: set data.eot_token" in refusal(path=path, tokenizer=name, eot_token="</s>")
    for bad in ("missing.json", "broken.json", "."):
        message = refusal(path=path, tokenizer=str(tmp_path / bad))
        assert "data.tokenizer=" in message
        # What holds for a new run, for one that goes on and for what reads one; 'bytes' would only suit the first.
        assert message.endswith("; give a valid tokenizers .json file (--config.data.tokenizer=FILE)")
    # An empty text after tokenisation: whitespace is no word.
    spaces = write(tmp_path / "spaces", {"s.txt": "   "})
    message = refusal(path=path, eval_path=spaces, separate_documents=False, tokenizer=name, eot_token="<unusual>")
    assert "the evaluation data hold no tokens" in message


def test_refused_hub_names(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    message = refusal(hub="no-such-owner/no-such-set")
    assert "data.hub='no-such-owner/no-such-set'" in message and "data.train_split='train'" in message
    assert "network" in message and "data.path" in message

    def from_pretrained(name: str) -> None:
        raise Exception("401 Client Error.\n\nNo such repository")

    monkeypatch.setattr("prenorm_jax.data.tokenizer.Tokenizer.from_pretrained", from_pretrained, raising=False)
    message = refusal(tokenizer="gpt2")
    assert (
        "data.tokenizer='gpt2' cannot be loaded: 401 Client Error. No such repository; it needs network access"
        in message
    )
