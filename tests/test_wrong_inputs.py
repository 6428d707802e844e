"""Two hundred wrong inputs over all commands: one line that names the thing and the remedy, and nothing written."""

import gzip
import itertools
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from commands import SMALL, error_of, here
from PIL import Image

from prenorm_jax.base.files import flatten
from prenorm_jax.config import base_config

VIT = ["--config=configs/vit_digits.py", "--config.model.depth=1", "--config.model.d_model=12"]
VIT += ["--config.model.heads=2", "--config.batch_size=4", "--config.steps=2"]
FREE = {"init_from", "data.path", "data.hub", "data.hub_config", "data.cache", "data.eval_path", "data.eval_split"}
FREE |= {"data.eot_token", "data.text_column", "data.train_split", "data.image_column", "data.label_column"}
FREE |= {"data.stream_tokens", "data.tokenizer"}  # names: what they name is asked for below


def wrong_values() -> list[tuple[str, str, str]]:
    """(family, key, value): for every key of the configuration one value that cannot be meant."""
    wrong = {bool: "perhaps", int: "-1", float: "nan", str: "nonsense", tuple: "none"}
    found = []
    for family, known in (("gpt", set()), ("vit", set(flatten(base_config("gpt"))))):
        config = base_config(family)
        for key in flatten(config):
            group, _, name = key.rpartition(".")
            kind = (config[group] if group else config).get_type(name)
            if key not in known | FREE:
                found.append((family, key, wrong[kind]))
    return found


@pytest.mark.parametrize(("family", "key", "value"), wrong_values())
def test_a_key_that_makes_no_sense_is_named(tmp_path, family, key, value):
    flags = [*(SMALL if family == "gpt" else VIT), f"--workdir={tmp_path / 'run'}"]
    value = {"profile": "1"}.get(key, value)
    error = error_of("train.py", *flags, f"--config.{key}={value}")
    assert re.search(rf"\b{re.escape(key)}\b", error), error
    assert not (tmp_path / "run").exists()


# --- Data that are not what they are called. ---


def write_bad_data(folder: Path) -> None:
    """One file or folder for each row of DATA."""
    for name in ("empty.txt", "empty.jsonl", "empty.parquet"):
        (folder / name).touch()
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00\x81" * 50)
    (folder / "blank.jsonl").write_text('{"text": ""}\n' * 3)
    (folder / "cut.jsonl").write_text('{"text": "one"}\n{"text": "tw')
    (folder / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    (folder / "column.jsonl").write_text('{"content": "one"}\n' * 3)
    (folder / "number.jsonl").write_text('{"text": 5}\n' * 3)
    (folder / "list.json").write_text("[1, 2, 3]")
    (folder / "one.jsonl").write_text('{"text": "x"}\n')
    (folder / "same.jsonl").write_text('{"text": "the same text, again and again"}\n' * 9)
    (folder / "junk.parquet").write_bytes(b"PAR1" + bytes(99))
    pq.write_table(pa.table({"body": ["text"]}), folder / "column.parquet")
    pq.write_table(pa.table({"text": [1, 2]}), folder / "number.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "rows.parquet")
    latin = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.int32([0, 4])), pa.py_buffer(b"caf\xe9")])
    pq.write_table(pa.table({"text": latin}), folder / "latin.parquet")
    (folder / "cut.txt.gz").write_bytes(gzip.compress(b"text " * 99)[:-9])
    (folder / "table.csv").write_text("text\none\n")
    (folder / "mixed").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (folder / "mixed" / name).write_text('{"text": "x"}\n')
    (folder / "nothing").mkdir()
    (folder / "good.txt").write_text("good text " * 99)
    (folder / "junk.json").write_text("{")
    (folder / "model.json").write_text('{"a": 1}')


DATA = {
    "data.path={}/missing.txt": r"data\.path='.*missing\.txt' does not exist: give a file",
    "data.path={}/empty.txt": "every file is empty",
    "data.path={}/empty.jsonl": "every file is empty",
    "data.path={}/empty.parquet": "every file is empty",
    "data.path={}/bytes.txt": r"bytes\.txt.*UTF-8.*mend or leave it out",
    "data.path={}/blank.jsonl": r"blank\.jsonl.*(no|holds no) text",
    "data.path={}/cut.jsonl": r"cut\.jsonl.*mend or leave it out",
    "data.path={}/latin.jsonl": r"latin\.jsonl.*utf-8.*mend or leave it out",
    "data.path={}/column.jsonl": r"column\.jsonl.*no column data\.text_column='text'; it has content",
    "data.path={}/number.jsonl": r"number\.jsonl.*data\.text_column='text'.*not text",
    "data.path={}/list.json": r"list\.json",
    "data.path={}/one.jsonl": "a single character: give more text",
    "data.path={}/same.jsonl": r"every document is the same.*give data\.eval_path",
    "data.path={}/junk.parquet": r"junk\.parquet.*mend or leave it out",
    "data.path={}/column.parquet": r"column\.parquet.*no column data\.text_column='text'; it has body",
    "data.path={}/number.parquet": r"number\.parquet.*data\.text_column='text' holds int64, not text",
    "data.path={}/rows.parquet": r"rows\.parquet.*no text",
    "data.path={}/latin.parquet": r"latin\.parquet.*UTF8.*mend or leave it out",
    "data.path={}/cut.txt.gz": r"cut\.txt\.gz",
    "data.path={}/table.csv": r"table\.csv.*unknown type; the types are",
    "data.path={}/mixed": r"mixes json \(b\.jsonl\) and text \(a\.txt\): give one kind",
    "data.path={}/nothing": "matches no file of a known type; the types are",
    "data.path={}/*.nothing": "matches no file of a known type; the types are",
    "data.eval_path={}/missing.txt": r"data\.eval_path='.*missing\.txt' does not exist",
    "data.eval_path={}/bytes.txt": r"bytes\.txt.*UTF-8",
    "data.holdout=0": r"data\.holdout=0",
    "data.holdout=1": r"data\.holdout=1",
    "data.stream_tokens=5": r"data\.stream_tokens",
    "data.eval_split=test": r"data\.eval_split",
    "data.eot_token=<end>": r"data\.eot_token has no use with data\.tokenizer='bytes': unset it",
    "data.tokenizer={}/missing.json": r"missing\.json",
    "data.tokenizer={}/junk.json": r"junk\.json",
    "data.tokenizer={}/model.json": r"model\.json",
    "data.tokenizer={}/bytes.txt": r"bytes\.txt",
    "data.tokenizer={}/nothing": r"data\.tokenizer='.*nothing'",
    "data.tokenizer=": r"data\.tokenizer",
    "init_from={}/missing": "no such workdir: .*missing",
    "init_from={}/nothing": "nothing holds no checkpoints",
}


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_bad_data(folder)
    return folder


def good_text(bad_data: Path, flag: str) -> list[str]:
    return [] if flag.startswith("data.path") else [f"--config.data.path={bad_data / 'good.txt'}"]


@pytest.mark.parametrize("flag", DATA)
def test_data_that_are_not_what_they_are_called_are_named(bad_data, tmp_path, flag):
    given = [*SMALL, f"--workdir={tmp_path / 'run'}", *good_text(bad_data, flag), f"--config.{flag.format(bad_data)}"]
    error = error_of("train.py", *given)
    assert re.search(DATA[flag], error), error
    assert not list(tmp_path.iterdir())


def write_bad_images(folder: Path) -> None:
    """One folder for each row of IMAGES."""

    def png(path: Path, mode: str = "RGB", side: int = 8) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, (side, side)).save(path)

    for name, number in itertools.product(("cat", "dog"), range(5)):
        png(folder / "good" / name / f"{number}.png")
        (folder / "broken" / name).mkdir(parents=True, exist_ok=True)
        (folder / "broken" / name / f"{number}.png").write_bytes(b"no image")
    png(folder / "loose" / "a.png")
    png(folder / "single" / "only" / "a.png")
    (folder / "none").mkdir()
    (folder / "file").touch()
    digits = np.zeros((4, 8, 8), np.uint8)
    head = bytes([0, 0, 8, 3, 0, 0, 0, 4, 0, 0, 0, 8, 0, 0, 0, 8])
    for name in ("no_labels", "cut", "two", "few"):
        (folder / name).mkdir()
        (folder / name / "train-images-idx3-ubyte").write_bytes(
            head + digits.tobytes()[: 99 if name == "cut" else None]
        )
    for name, count in (("cut", 4), ("two", 4), ("few", 3)):
        content = bytes([0, 0, 8, 1, 0, 0, 0, count, *range(count)])
        (folder / name / "train-labels-idx1-ubyte").write_bytes(content)
    (folder / "two" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(head + digits.tobytes()))


IMAGES = {
    ("data.path={}/missing",): r"data\.path='.*missing' is no folder",
    ("data.path={}/file",): r"data\.path='.*file' is no folder",
    ("data.path={}/none",): r"data\.path='.*none'",
    ("data.path={}/loose",): r"data\.path='.*loose'",
    ("data.path={}/single",): r"leaves a side empty|single",
    ("data.path={}/broken",): r"broken",
    ("data.path={}/no_labels",): "has no IDX file of train labels",
    ("data.path={}/cut",): "is cut short or too long",
    ("data.path={}/two",): "has two files of train images",
    ("data.path={}/few",): "not as many labels as square images",
    ("data.path={}/good", "data.hub=x"): r"data\.path and data\.hub exclude each other: unset one",
    ("data.path={}/good", "data.eval_split=test"): r"no data\.train_split='train' that holds folders of images; it has",
    ("data.path={}/good", "data.holdout=0.01"): r"data\.holdout=0\.01 of 10 images leaves a side empty",
    ("data.path={}/good", "model.channels=4"): r"model\.channels=4",
    ("data.path={}/good", "model.classes=1"): r"model\.classes=1 is too small: the images have 2 classes",
    ("data.path={}/good", "data.image_size=4"): r"model\.image_size=8 is larger than the images",
    ("data.mean=(0.5,0.5)",): r"data\.mean=.* has 2 numbers: give 1 or model\.channels",
    ("data.std=(0.0,)",): r"data\.std=.* must be above 0",
    ("data.image_size=9",): r"data\.image_size=9: images of digits are 8 wide; unset it",
    ("model.channels=3",): r"model\.channels=3, but the images have 1: set it to that",
    ("model.classes=9",): r"model\.classes=9 is too small: the images have 10 classes",
    ("model.image_size=16",): r"model\.image_size=16 is larger than the images",
    ("model.patch_size=3",): r"model\.patch_size=3 does not divide model\.image_size",
    ("augment.shift=1", "augment.min_area=0.5"): r"augment\.shift and augment\.min_area<1 exclude each other",
    ("loss=sigmoid", "augment.label_smoothing=0.1"): r"loss=sigmoid takes no augment\.label_smoothing: set it to 0",
}


@pytest.fixture(scope="module")
def bad_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    write_bad_images(folder)
    return folder


@pytest.mark.parametrize("flags", IMAGES)
def test_images_that_are_not_what_they_are_called_are_named(bad_images, tmp_path, flags):
    given = [f"--config.{flag.format(bad_images)}" for flag in flags]
    error = error_of("train.py", *VIT, f"--workdir={tmp_path / 'run'}", *given)
    assert re.search(IMAGES[flags], error), error
    assert not list(tmp_path.iterdir())


# --- Command lines, and folders that hold no run or a damaged one. ---


def place_runs(saved: Path, folder: Path) -> None:
    """What the rows of COMMANDS name: `run`, which is sound, and others that are not."""
    shutil.copytree(saved, folder / "run")
    (folder / "empty").mkdir()
    (folder / "file").write_text("x")
    (folder / "other.txt").write_text("another text " * 99)
    for name, (file, content) in {
        "no_config": ("config.json", None),
        "cut_config": ("config.json", '{"steps": 6'),
        "list_config": ("config.json", "[]"),
        "typed_config": ("config.json", '{"steps": "many", "model": {"family": "gpt"}}'),
        "family_config": ("config.json", '{"model": {"family": "bert"}}'),
        "model_config": ("config.json", '{"model": 5}'),
        "deep_config": ("config.json", "[" * 100_000),
        "binary_config": ("config.json", b"\xff\xfe\x81"),
        "junk_metadata": ("checkpoints/6/metadata/metadata", "{"),
        "typed_metadata": ("checkpoints/6/metadata/metadata", '{"digests": 5, "model": []}'),
        "deep_metadata": ("checkpoints/6/metadata/metadata", "[" * 100_000),
        "no_checkpoints": ("checkpoints", None),
    }.items():
        path = shutil.copytree(saved, folder / name) / file
        if content is None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, source in {
        "none.py": "def get_config(): return None\n",
        "number.py": "def get_config(): return 5\n",
        "missing.py": "x = 1\n",
        "syntax.py": "def get_config(:\n",
        "raises.py": "def get_config(): return 1 / 0\n",
        "imports.py": "import nothing_of_this_name\n",
        "empty.py": "",
    }.items():
        (folder / name).write_text(source)


NO_RUN = {
    "missing": "no such workdir: .*missing",
    "empty": "empty holds no run: there is no config.json",
    "file": "file",
    "no_config": "no config.json",
    "cut_config": r"config\.json is damaged: .*restore it from a copy",
    "list_config": r"config\.json is damaged: it holds no JSON object; restore it from a copy",
    "typed_config": r"config\.json is damaged: .*steps.*restore it from a copy",
    "family_config": r"bert",
    "model_config": r"config\.json is damaged",
    "deep_config": r"config\.json is damaged",
    "binary_config": r"config\.json is damaged",
    "no_checkpoints": r"no checkpoint",
}
DAMAGED = {
    "junk_metadata": r"checkpoints/6 is damaged.*names another",
    "typed_metadata": r"checkpoints/6 is damaged.*names another",
    "deep_metadata": r"checkpoints/6 is damaged.*names another",
}
EVALUATE, GENERATE = "eval.py --workdir={}/%s", "-m prenorm_jax.generate {}/%s --tokens=1"
CONVERT, TRAIN = "-m prenorm_jax.convert {}/%s {}/new --to=rmsnorm", "train.py --workdir={}/%s --config.steps=9"
COMMANDS = {
    command % place: message
    for command in (EVALUATE, GENERATE, CONVERT)
    for place, message in (NO_RUN | DAMAGED).items()
}
NEW = {name: rf"{name} holds no run to go on with; a new one needs --config=FILE" for name in ("missing", "empty")}
COMMANDS |= {TRAIN % place: message for place, message in (NO_RUN | NEW).items()}
COMMANDS |= {
    # train.py
    "train.py --config=configs/gpt_stdlib.py": "--workdir is missing: name the folder",
    "train.py --workdir= --config=configs/gpt_stdlib.py": "--workdir: '' names no file or folder",
    "train.py --workdir={}/run surplus": "'surplus' is not a flag; flags look like",
    "train.py --workdir={}/run --config.stpes=9": "stpes.*steps",
    "train.py --workdir={}/run --config.model.nrom=rmsnorm": "nrom.*norm",
    "train.py --workdir={}/run --norm=rmsnorm": r"--norm.*--config\.model\.norm",
    "train.py --workdir={}/run --steps=9": r"--steps.*--config\.steps",
    "train.py --workdir={}/run --wrokdir=x": "wrokdir",
    "train.py --workdir={}/run --config.model.d_model=14": r"model\.d_model: 12 -> 14.*name another workdir",
    "train.py --workdir={}/run --config.model.heads=5": r"model\.kv_heads=2 does not divide model\.heads=5",
    "train.py --workdir={}/run --config.steps=many": r"--config\.steps=many",
    "train.py --workdir={}/run --config.data.path={}/other.txt --config.steps=9": "the data are not those",
    "train.py --workdir={}/file --config=configs/gpt_stdlib.py": "file is a file: name a folder",
    "train.py --workdir={}/file/below --config=configs/gpt_stdlib.py": "below",
    "train.py --workdir={}/new": r"new holds no run to go on with; a new one needs --config=FILE: configs/",
    "train.py --workdir={}/new --config=configs/nothing.py": r"configs/nothing\.py: no such file; .*configs/",
    "train.py --workdir={}/new --config=configs": "configs",
    "train.py --workdir={}/new --config={}/none.py": r"none\.py.*get_config",
    "train.py --workdir={}/new --config={}/number.py": r"number\.py.*get_config",
    "train.py --workdir={}/new --config={}/missing.py": r"get_config",
    "train.py --workdir={}/new --config={}/empty.py": r"get_config",
    "train.py --workdir={}/new --config={}/syntax.py": r"syntax\.py|invalid syntax",
    "train.py --workdir={}/new --config={}/raises.py": r"division by zero",
    "train.py --workdir={}/new --config={}/imports.py": r"nothing_of_this_name",
    "train.py --workdir={}/new --config={}/file": r"file",
    "train.py --workdir={}/new --config=configs/gpt3.py:Huge": "Huge.*Small",
    "train.py --workdir={}/new --config=configs/vit.py:Z/99": "Z/99",
    "train.py --workdir={}/new --config=configs/gpt_stdlib.py --config.mesh.fsdp=3": r"mesh\.fsdp=3",
    "train.py --workdir={}/new --config=configs/gpt_stdlib.py --config.profile=9:3": r"profile='?9:3",
    "train.py --workdir={}/new --config=configs/gpt_stdlib.py --config.data.seq_len=999": r"data\.seq_len=999 is above",
    "train.py --workdir={}/run --processes=2": "--coordinator, --processes and --process go together: give all three",
    "train.py --workdir={}/run --coordinator=here --processes=2 --process=0": "--coordinator=here is not HOST:PORT",
    "train.py --workdir={}/run --coordinator=127.0.0.1:1 --processes=2 --process=2": "--process=2 must be",
    "train.py --workdir={}/run --coordinator=127.0.0.1:1 --processes=two --process=1": "--processes: .*two",
    # eval.py
    "eval.py": "--workdir",
    "eval.py --workdir={}/run --norm=batchnorm": "batchnorm",
    "eval.py --workdir={}/run --step=5": r"no checkpoint at step 5; it has \[2, 4, 6\]",
    "eval.py --workdir={}/run --step=last": "--step.*last",
    "eval.py --workdir={}/run --nosuch": "--nosuch",
    "eval.py --workdir={}/run --config.model.norm=rmsnorm": r"model\.norm",
    "eval.py --workdir={}/run --config.data.path={}/other.txt": "the data are not those|data.*trained",
    "eval.py --workdir={}/run --config.data.path={}/nothing.txt": "does not exist",
    "eval.py --workdir={}/run --process=1": "go together: give all three",
    # generate
    "-m prenorm_jax.generate": "workdir",
    "-m prenorm_jax.generate {}/run --tokens=0": "tokens=0 must be at least 1",
    "-m prenorm_jax.generate {}/run --tokens=many": "--tokens.*many",
    "-m prenorm_jax.generate {}/run --temperature=-1": "temperature=-1",
    "-m prenorm_jax.generate {}/run --temperature=nan": "temperature=nan",
    "-m prenorm_jax.generate {}/run --temperature=1 --top-k=0": "top.k=0",
    "-m prenorm_jax.generate {}/run --temperature=1 --top-p=2": "top.p=2",
    "-m prenorm_jax.generate {}/run --seed=-1": "seed=-1 must be at least 0",
    "-m prenorm_jax.generate {}/run --norm=nonorm": "nonorm",
    "-m prenorm_jax.generate {}/run --step=1": "no checkpoint at step 1",
    "-m prenorm_jax.generate {}/run --prompt=far_too_long_for_it": r"model\.max_len",
    # convert
    "-m prenorm_jax.convert": "source",
    "-m prenorm_jax.convert {}/run": "target",
    "-m prenorm_jax.convert {}/run {}/new": "--to",
    "-m prenorm_jax.convert {}/run {}/new --to=batchnorm": "--to='batchnorm' is not one of layernorm",
    "-m prenorm_jax.convert {}/run {}/new --to=layernorm": "is layernorm already: there is nothing to convert",
    "-m prenorm_jax.convert {}/run {}/run --to=rmsnorm": "run exists: name a new folder",
    "-m prenorm_jax.convert {}/run {}/run/checkpoints/new --to=rmsnorm": "checkpoints/new",
    "-m prenorm_jax.convert {}/run {}/file/new --to=rmsnorm": "file/new|file",
    "-m prenorm_jax.convert {}/run {}/new --to=rmsnorm --step=3": "no checkpoint at step 3",
    # certify
    "-m prenorm_jax.certify": "workdir, source",
    "-m prenorm_jax.certify {}/run": "source",
    "-m prenorm_jax.certify {}/run {}/run": "run is named twice: name what it was made from",
    "-m prenorm_jax.certify {}/missing {}/run": "no such workdir: .*missing",
    "-m prenorm_jax.certify {}/empty {}/run": "holds no checkpoints",
    "-m prenorm_jax.certify {}/junk_metadata {}/run": "checkpoints/6 is damaged",
    "-m prenorm_jax.certify {}/run {}/missing": "missing does not exist: give a workdir, a model's folder",
    "-m prenorm_jax.certify {}/run {}/empty": "empty: there is no config.json",
    "-m prenorm_jax.certify {}/run {}/no_checkpoints": "neither a workdir .* nor another library's model",
    "-m prenorm_jax.certify {}/run {}/no_config --step=3": "no checkpoint at step 3",
    "-m prenorm_jax.certify {}/run {}/no_config --length=17": "--length=17 must be at least 1 and below 17",
    "-m prenorm_jax.certify {}/run {}/no_config --reference=theirs": "--reference='theirs' is not one of auto",
    "-m prenorm_jax.certify {}/run {}/no_config --reference=library": "which no other library computes: leave out",
    # explain
    "-m prenorm_jax.explain": "source",
    "-m prenorm_jax.explain {}/missing": "missing does not exist",
    "-m prenorm_jax.explain {}/empty": "empty: there is no config.json",
    "-m prenorm_jax.explain {}/no_checkpoints": "neither a workdir .* nor another library's model",
    "-m prenorm_jax.explain {}/junk_metadata": "checkpoints/6 is damaged",
    # compare
    "-m prenorm_jax.compare": "WORKDIR",
    "-m prenorm_jax.compare {}/missing": "missing",
    "-m prenorm_jax.compare {}/empty": "empty",
    "-m prenorm_jax.compare {}/cut_config --out={}/out": "config.json is damaged",
    "-m prenorm_jax.compare {}/run {}/run --out={}/out": "run.*twice|named run|same",
    "-m prenorm_jax.compare {}/run --reference={}/other --out={}/out": "other",
    "-m prenorm_jax.compare {}/run --out={}/file/out": "file",
    # benchmark
    "-m prenorm_jax.benchmark --quick --model=gpt": "model 'gpt' is none of gpt3:SIZE",
    "-m prenorm_jax.benchmark --quick --model=bert:6x384": "bert",
    "-m prenorm_jax.benchmark --quick --model=gpt:0x8": "gpt:0x8|depth=0|must be at least",
    "-m prenorm_jax.benchmark --quick --model=gpt3:Huge": "Huge",
    "-m prenorm_jax.benchmark --quick --task=nothing": "task.*nothing",
    "-m prenorm_jax.benchmark --quick --only=batchnorm": "--only=batchnorm: batchnorm is not among",
    "-m prenorm_jax.benchmark --quick --only=": "--only=: nothing is not among",
    "-m prenorm_jax.benchmark --quick --rounds=0": "--rounds=0 must be at least 1",
    "-m prenorm_jax.benchmark --quick --batch=-1": "--batch=-1 must be at least 1",
    "-m prenorm_jax.benchmark --quick --length=many": "--length.*many",
    "-m prenorm_jax.benchmark --quick --dtype=int8": "dtype.*int8",
    "-m prenorm_jax.benchmark --quick --in-a-row=0": "--in-a-row=0 must be at least 1",
    "-m prenorm_jax.benchmark --quick --topology=v9:1x1 --out={}/out": "v9:1x1",
    "-m prenorm_jax.benchmark --quick --out={}/file": "file",
    # numerics
    "-m prenorm_jax.numerics": "a WORKDIR and --synthetic are missing: give one",
    "-m prenorm_jax.numerics {}/run --synthetic": "a WORKDIR and --synthetic exclude each other: give one",
    "-m prenorm_jax.numerics --synthetic --nosuch --out={}/out": "--nosuch",
    "-m prenorm_jax.numerics {}/missing --out={}/out": "no such workdir: .*missing",
    "-m prenorm_jax.numerics {}/empty --out={}/out": "empty holds no run",
    "-m prenorm_jax.numerics {}/junk_metadata --out={}/out": r"checkpoints/6 is damaged.*names another",
    "-m prenorm_jax.numerics {}/run --step=5 --out={}/out": r"no checkpoint at step 5; it has \[2, 4, 6\]",
    "-m prenorm_jax.numerics {}/run --rows=0": "--rows=0 must be at least 1",
    "-m prenorm_jax.numerics {}/run --dtypes=int8": "--dtypes=int8: int8 is not among float32, bfloat16, float16",
    "-m prenorm_jax.numerics {}/run --out={}/file": "file",
    "-m prenorm_jax.numerics {}/run --config.data.path={}/other.txt --out={}/out": "the data are not those",
    "-m prenorm_jax.numerics {}/run --config.model.norm=rmsnorm": r"model\.norm",
    # aot
    "-m prenorm_jax.aot": "--config is missing: name a config file",
    "-m prenorm_jax.aot --config=configs/nothing.py": "no such file",
    "-m prenorm_jax.aot --config=configs/gpt3_175b.py --topology=v9:1": "v9:1",
    "-m prenorm_jax.aot --config=configs/gpt3_175b.py --norm=batchnorm --parameters": "batchnorm",
    "-m prenorm_jax.aot --config=configs/gpt3_175b.py --out={}": "is a folder: name a file in it",
    "-m prenorm_jax.aot --config=configs/gpt3_175b.py --config.nosuch=1": "nosuch",
    # demo
    "-m prenorm_jax.demo --nosuch": "--nosuch",
    "-m prenorm_jax.demo --workdir={}/file": "file",
}


@pytest.fixture(scope="module")
def places(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, saved = tmp_path_factory.mktemp("places"), tmp_path_factory.mktemp("saved") / "run"
    flags = ["--config.checkpoint_every=2", "--config.model.max_len=16"]
    here("train.py", *SMALL, f"--config.data.path={text}", *flags, f"--workdir={saved}")
    place_runs(saved, folder)
    return folder


def what_is_in(folder: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times; of a lock file the name."""
    files = ((path, path.stat()) for path in sorted(folder.rglob("*")) if path.name != "lock")
    return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in files if path.is_file()]


@pytest.mark.xdist_group("places")  # which are made once, then
@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_that_cannot_be_done_says_why_and_writes_nothing(places, line):
    before = what_is_in(places)
    error = error_of(*(part.replace("{}", str(places)) for part in line.split()))
    assert re.search(COMMANDS[line], error), error
    assert what_is_in(places) == before


def test_there_are_two_hundred():
    assert len(wrong_values()) + len(DATA) + len(IMAGES) + len(COMMANDS) >= 200
