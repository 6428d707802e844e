"""Images: where they come from, their split, and what augmentation makes of a batch."""

import gzip
import io
import re
import shutil
from types import SimpleNamespace

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from commands import error_of, here, losses_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.config import base_config
from prenorm_jax.data import images as images_module
from prenorm_jax.data.augment import image_examples, mix, resized_crop, shifted_crop
from prenorm_jax.data.image_files import square
from prenorm_jax.data.images import load_images
from prenorm_jax.data.windows import example_rows
from prenorm_jax.train.loss import rank_of_label
from prenorm_jax.train.restore import check_data


def vit_config(**changes):
    """Keys as model__classes=3."""
    config = base_config("vit")
    config.model.update({"image_size": 8, "patch_size": 2, "channels": 1, "classes": 10})
    config.batch_size = 4
    for key, value in changes.items():
        *groups, name = key.split("__")
        group = config
        for part in groups:
            group = group[part]
        group[name] = value
    return config


# --- Sources. ---


def idx(array: np.ndarray) -> bytes:
    return b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_idx(folder, train=20, test=6, side=8, zipped=False):
    rng = np.random.default_rng(0)
    for name, count in (("train", train), ("t10k", test)):
        for kind, array in (
            ("images-idx3", rng.integers(256, size=(count, side, side))),
            ("labels-idx1", rng.integers(3, size=count)),
        ):
            content = idx(array)
            path = folder / f"{name}-{kind}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(content) if zipped else content)


def test_digits_are_the_default_and_a_fifth_is_held_out():
    data = load_images(vit_config())
    assert (len(data.train.labels), len(data.eval.labels)) == (1438, 359)
    assert (data.side, data.channels, data.classes) == (8, 1, 10)
    pixels = data.train.read(np.arange(1438))[0]
    assert pixels.dtype == np.uint8 and pixels.max() == 255
    # Both sides together are all of them, and no image is on both.
    from sklearn.datasets import load_digits

    everything = np.concatenate([pixels, data.eval.read(np.arange(359))[0]])[..., 0]
    expected = np.round(load_digits().images * (255 / 16)).astype(np.uint8)
    key = lambda rows: sorted(row.tobytes() for row in rows)  # noqa: E731
    assert key(everything) == key(expected)
    assert load_images(vit_config(seed=5)).digest == data.digest, "the split must not depend on the seed"


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files(tmp_path, zipped):
    write_idx(tmp_path, zipped=zipped)
    data = load_images(vit_config(data__path=str(tmp_path)))
    assert (len(data.train.labels), len(data.eval.labels), data.classes) == (20, 6, 3)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(data.train.read(np.arange(20))[0][..., 0], rng.integers(256, size=(20, 8, 8)))
    np.testing.assert_array_equal(data.train.labels, rng.integers(3, size=20))
    # Without files of an evaluation split a part is held out.
    for file in tmp_path.glob("t10k*"):
        file.unlink()
    data = load_images(vit_config(data__path=str(tmp_path)))
    assert (len(data.train.labels), len(data.eval.labels)) == (16, 4)


def make_pictures(folder, splits=("",)):
    for split in splits:
        for label, value in (("cat", 40), ("dog", 200)):
            place = folder / split / label
            place.mkdir(parents=True)
            for i in range(5):
                Image.new("RGB", (12 + i, 9), (value, 10, i)).save(place / f"{i}.png")


def test_a_folder_of_class_folders(tmp_path):
    make_pictures(tmp_path)
    config = vit_config(data__path=str(tmp_path), model__channels=3)
    data = load_images(config)
    assert (len(data.train.labels), len(data.eval.labels), data.classes) == (8, 2, 2)
    for split in (data.train, data.eval):
        pixels = split.read(np.arange(len(split.labels)))[0]
        assert pixels.shape[1:] == (8, 8, 3)
        np.testing.assert_array_equal(pixels[:, 0, 0, 0], np.where(split.labels == 0, 40, 200))
    grey = load_images(vit_config(data__path=str(tmp_path)))
    assert grey.train.read(np.arange(2))[0].shape == (2, 8, 8, 1)
    assert load_images(vit_config(data__path=str(tmp_path), data__image_size=16)).side == 16


def make_classes(folder, *names, count=10, prefixes=("",)):
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (9, 9), 20 * label + i).save(folder / name / f"{prefixes[i % len(prefixes)]}{i}.bmp")


@pytest.mark.parametrize(
    ("classes", "place", "prefixes"),
    [
        (("bus", "car", "bullet train", "steam train"), "pictures", ("",)),
        (("bus", "car", "train"), "pictures", ("",)),
        (("test", "train", "val", "dev", "eval-set"), "train test", ("",)),
        (("a", "b"), "pictures", ("train_", "val_", "test-", "eval")),
        (("a", "b"), "pictures[1]::*? {x}", ("",)),
        (("__background__", "Zebra", "ape"), "pictures", ("",)),
    ],
)
def test_names_of_classes_and_files_decide_nothing(tmp_path, classes, place, prefixes):
    make_classes(tmp_path / place, *classes, prefixes=prefixes)
    data = load_images(vit_config(data__path=str(tmp_path / place)))
    total = 10 * len(classes)
    assert f": train {total * 4 // 5}, eval {total // 5} images" in data.description
    assert data.description.endswith(f"{len(classes)} classes"), "nothing is left out"
    for split in (data.train, data.eval):
        pixels, good = split.read(np.arange(len(split.labels)))
        ranks = [sorted(classes).index(classes[value // 20]) for value in pixels[:, 0, 0, 0]]
        assert good.all() and split.labels.tolist() == ranks


def test_a_split_is_a_folder_that_is_called_so(tmp_path):
    make_classes(tmp_path / "train", "bottle", "test tube", count=5)
    make_classes(tmp_path / "test", "bottle", "test tube", count=2)

    def described(**changes):
        config = vit_config(data__path=str(tmp_path), **{f"data__{key}": value for key, value in changes.items()})
        return load_images(config).description.removeprefix(f"{tmp_path}: ")

    assert described(eval_split="test") == "train 10, eval 4 images of 8 × 8 × 1, 2 classes"
    assert described(train_split="test", eval_split="train") == "train 4, eval 10 images of 8 × 8 × 1, 2 classes"
    unused = "; left out: 4 beside the splits (test/bottle/0.bmp)"
    assert described() == f"train 8, eval 2 images of 8 × 8 × 1, 2 classes{unused}"
    for key in ("train_split", "eval_split"):  # `validation` is no other name of val, nor `testing` one of test
        (tmp_path / "val").mkdir(exist_ok=True)
        with pytest.raises(PrenormError, match=rf"has no data\.{key}='validation' .* it has test, train, val$"):
            described(**{key: "validation"})


def test_folders_of_splits_under_other_names_are_not_taken_for_classes_without_a_remedy(tmp_path):
    for split in ("Train", "Test"):
        make_classes(tmp_path / split, "a", "b")
    keys = r"no images of two classes; left out: 40 nested .*data\.train_split, data\.eval_split$"
    with pytest.raises(PrenormError, match=keys):
        load_images(vit_config(data__path=str(tmp_path)))


def test_what_is_left_out_of_a_folder_is_counted_and_said(tmp_path):
    make_classes(tmp_path, "a", "b", "c")
    make_classes(tmp_path / "b" / "more", "deep", count=2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "0.bmp").rename(tmp_path / "loose.bmp")
    (tmp_path / "a" / "notes.txt").touch()
    (tmp_path / "a" / ".hidden.bmp").touch()
    (tmp_path / "a" / "gone.bmp").symlink_to("nowhere")
    (tmp_path / "a" / "back").symlink_to("..")
    (tmp_path / "self").symlink_to("self")
    (tmp_path / "linked").symlink_to(tmp_path / "c")
    (tmp_path / "c" / "0.bmp").write_bytes(b"no image")
    (tmp_path / "c" / "1.bmp").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # would be run
    Image.fromarray(np.full((9, 9), 20000, np.uint16)).save(tmp_path / "b" / "deeper.png")
    data = load_images(vit_config(data__path=str(tmp_path)))
    assert (len(data.train.labels) + len(data.eval.labels), data.classes) == (9 + 10 + 8 + 8, 4)
    said = data.description.split("; left out: ")[1]
    for part in (
        "1 loose (loose.bmp)",
        "2 nested (b/more/deep/0.bmp)",
        "1 folders without images (empty)",
        "1 of other types (a/notes.txt)",
        "1 hidden (a/.hidden.bmp)",
        "2 links to nothing (self)",
        "1 links back (a/back)",
        "5 unreadable (b/deeper.png: mode 'I;16' has more than 8 bits a channel: convert it first)",
    ):
        assert part in said
    for name in ("a", "b", "c"):
        (tmp_path / name).rename(tmp_path / f".{name}")
    (tmp_path / "linked").unlink()
    with pytest.raises(PrenormError, match=r"holds no images of two classes; left out: .*loose.bmp.*: give a folder"):
        load_images(vit_config(data__path=str(tmp_path)))


def test_digests_of_folders_are_those_of_runs_that_are_there(tmp_path):
    for split in ("train", "test"):
        for label, count in (("cat", 4), ("Dog", 3), ("a b", 2), ("a", 2), ("10", 1), ("2", 2)):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                name = f"{i * 3} x.{'BMP' if i % 2 else 'bmp'}"
                Image.new("RGB", (9 + i, 9), (i * 40, 10, 200)).save(tmp_path / split / label / name)

    def digest(path, **changes):
        return load_images(vit_config(data__path=str(path), model__channels=3, **changes)).digest

    assert digest(tmp_path / "train") == digest(tmp_path) == "752a9fb98298a6e98caf33aae49d2999"
    assert digest(tmp_path, data__eval_split="test") == "a5371f1c2c7420f3249680663bc41c81"


def truncate(file, keep=0.5):
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * keep)])


def test_an_image_that_cannot_be_decoded_ends_nothing(tmp_path, capsys):
    make_classes(tmp_path / "train", "a", "b", count=6)
    make_classes(tmp_path / "test", "a", "b", count=6)
    config = vit_config(data__path=str(tmp_path), data__eval_split="test", batch_size=1)
    whole = load_images(config)
    pixels, _ = whole.train.read(np.arange(12))
    for split in ("train", "test"):
        for name in ("a/5.bmp", "b/0.bmp", "b/5.bmp"):  # rows 5, 6 and 11
            truncate(tmp_path / split / name)
    data = load_images(config)
    assert "; left out" not in data.description, "their headers are whole"
    instead = np.array([0, 1, 2, 3, 4, 7, 7, 7, 8, 9, 10, 0])
    for step in range(24):
        batch, rows = data.train_batch(config, step), instead[example_rows(config.seed, step, 1, 12)]
        np.testing.assert_array_equal(batch["images"], pixels[rows])
        assert batch["labels"] == whole.train.labels[rows] and batch["weights"] == 1
    for size in (1, 5):
        config.batch_size = size
        batches = list(data.eval_batches(config))
        weights = np.concatenate([batch["weights"] for batch in batches])
        assert np.flatnonzero(weights[:12] == 0).tolist() == [5, 6, 11] and weights.sum() == 9
        assert {batch["images"].shape for batch in batches} == {(size, 8, 8, 1)}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6, "each is said once"
    assert all(re.search(r"warning: .*bmp cannot be decoded \(.*\): .* so far", line) for line in said)
    with pytest.raises(PrenormError, match="no image of the evaluation split can be decoded"):
        data.summarize({"weight": 0.0, "nats": 0.0, "top1": 0.0, "top5": 0.0})
    for file in (tmp_path / "train").rglob("*.bmp"):
        truncate(file, keep=0.9)
    with pytest.raises(
        PrenormError, match=r"12 images in a row cannot .* restore them as they were; .*another workdir"
    ):
        load_images(config).train_batch(config, 0)
    (tmp_path / "test" / "a" / "1.bmp").unlink()
    with pytest.raises(PrenormError, match=r"1\.bmp cannot be read any more \(No such file"):
        list(data.eval_batches(config))


def test_of_many_images_that_cannot_be_decoded_only_the_first_are_named(tmp_path, capsys):
    make_classes(tmp_path, "a", "b", count=60)
    for file in tmp_path.rglob("*.bmp"):
        truncate(file)
    data = load_images(vit_config(data__path=str(tmp_path)))
    for _ in range(2):
        assert not data.train.read(np.arange(96))[1].any()
    said = capsys.readouterr().err.splitlines()
    assert [" cannot be decoded (" in line for line in said] == [True] * 10 + [False] * 8
    assert said[9].endswith("10 so far, more are only counted")
    assert said[-1] == f"warning: data.path={str(tmp_path)!r}: 90 images cannot be decoded so far"


@pytest.mark.slow
def test_a_run_goes_on_past_a_damaged_image_but_not_past_a_mended_one(tmp_path):
    make_classes(tmp_path / "pictures", "a", "b", count=10)
    flags = ["--config=configs/vit_digits.py", f"--config.data.path={tmp_path / 'pictures'}", "--config.batch_size=4"]
    flags += ["--config.model.depth=1", "--config.steps=6", "--config.eval_every=3", f"--workdir={tmp_path / 'run'}"]
    truncate(tmp_path / "pictures" / "a" / "3.bmp")
    printed = here("train.py", *flags)
    assert "done: 6 of 6 steps" in printed.stderr and printed.stderr.count("3.bmp cannot be decoded") == 1
    assert len(losses_of(tmp_path / "run")) == 6 and np.isfinite(list(losses_of(tmp_path / "run").values())).all()
    assert "leave it as it is" in printed.stderr
    shutil.copy(tmp_path / "pictures" / "a" / "4.bmp", tmp_path / "pictures" / "a" / "3.bmp")
    message = error_of("train.py", *flags[1:], "--config.steps=7")
    assert "restore them as they were, damaged files too, say where they lie now (--config.data.path=), or " in message
    assert f"with --config.init_from={tmp_path / 'run'}" in message


def test_only_keys_that_say_where_these_data_lie_are_offered(tmp_path):
    make_pictures(tmp_path)
    cases = [(vit_config(), "too, or go"), (vit_config(data__path=str(tmp_path)), "too, say where they lie now (")]
    for config, message in cases:
        with pytest.raises(PrenormError, match=re.escape(message)):
            check_data({"data": "another"}, load_images(config), config, "here", "go")


def test_pictures_that_change_change_the_digest(tmp_path):
    make_pictures(tmp_path)
    config = vit_config(data__path=str(tmp_path), model__channels=3)
    before = load_images(config).digest
    assert load_images(config).digest == before
    noise = np.random.default_rng(0).integers(256, size=(40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(next(tmp_path.rglob("3.png")))
    assert load_images(config).digest != before
    write_idx(tmp_path)
    idx_config = vit_config(data__path=str(tmp_path))
    before = load_images(idx_config).digest
    for name in ("t10k-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        content = bytearray((tmp_path / name).read_bytes())
        content[-1] ^= 1
        (tmp_path / name).write_bytes(content)
        assert load_images(idx_config).digest != before
        before = load_images(idx_config).digest


def test_pictures_of_more_than_8_bits_are_refused(tmp_path):
    make_pictures(tmp_path)
    for file in tmp_path.rglob("*.png"):
        Image.fromarray(np.full((9, 9), 20000, np.uint16)).save(file)
    with pytest.raises(PrenormError, match="has more than 8 bits a channel"):
        load_images(vit_config(data__path=str(tmp_path))).train.read(np.arange(2))


def test_columns_of_many_chunks_beyond_2_gib():
    """As the hub's data sets are stored. Their chunks share one buffer here, so that it costs no memory."""
    buffer = pa.array([b"x" * 10_000_000])
    struct = pa.StructArray.from_arrays([buffer, pa.array(["a.png"])], ["bytes", "path"])
    table = pa.table({"image": pa.chunked_array([struct] * 230)})
    encoded = SimpleNamespace(data=datasets.table.InMemoryTable(table))
    assert len(images_module._contents(encoded, "image")) == 16


def test_a_folder_with_splits(tmp_path):
    make_pictures(tmp_path, ("train", "test"))
    data = load_images(vit_config(data__path=str(tmp_path), data__eval_split="test", model__channels=3))
    assert (len(data.train.labels), len(data.eval.labels)) == (10, 10)
    with pytest.raises(PrenormError, match=r"has no data\.eval_split='validation' that .*; it has test, train"):
        load_images(vit_config(data__path=str(tmp_path), data__eval_split="validation"))


def test_hub_data(monkeypatch):
    pictures = [Image.new("L", (10, 10), value) for value in range(0, 200, 10)]
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(num_classes=7)})
    split = datasets.Dataset.from_dict({"img": pictures, "fine": [i % 7 for i in range(20)]}, features=features)
    asked = []

    def load_dataset(*names):
        asked.append(names)
        return datasets.DatasetDict({"train": split, "valid": split.select(range(5))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    keys = {"data__hub": "x/y", "data__image_column": "img", "data__label_column": "fine"}
    data = load_images(vit_config(**keys, data__eval_split="valid"))
    assert asked == [("x/y", None)]
    assert (len(data.train.labels), len(data.eval.labels), data.classes) == (20, 5, 7)
    np.testing.assert_array_equal(data.train.read(np.array([3, 1]))[0][:, 0, 0, 0], [30, 10])
    with pytest.raises(PrenormError, match=r"no column data\.label_column='label'; it has img, fine"):
        load_images(vit_config(data__hub="x/y", data__image_column="img"))
    with pytest.raises(PrenormError, match=r"data\.image_column='fine' holds no images"):
        load_images(vit_config(**keys | {"data__image_column": "fine"}))


def test_damaged_and_missing_images_of_hub_data_are_left_out_too(monkeypatch, capsys):
    png = io.BytesIO()
    Image.new("L", (10, 10), 7).save(png, "png")
    rows = [{"bytes": content, "path": None} for content in (png.getvalue(), b"no image", b"", png.getvalue()[:45])]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=2)})
    split = datasets.Dataset.from_dict({"image": [*rows, None], "label": [1, 0, 0, 0, 0]}, features=features)
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: datasets.DatasetDict({"train": split}))
    data = load_images(vit_config(data__hub="x/y", data__eval_split="train"))
    batch = data.train_batch(vit_config(batch_size=5), 0)
    assert (batch["images"] == 7).all() and batch["labels"].tolist() == [1] * 5
    assert [batch["weights"].tolist() for batch in data.eval_batches(vit_config())] == [[1, 0, 0, 0], [0, 0, 0, 0]]
    said = capsys.readouterr().err
    assert all(f"row {row} cannot be decoded (" in said for row in (1, 2, 3, 4))


def test_the_central_square_is_taken():
    picture = Image.fromarray(np.repeat(np.arange(30, dtype=np.uint8)[None], 10, axis=0))
    np.testing.assert_array_equal(square(picture, 10)[0], np.arange(10, 20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__path": "/nowhere"}, "data.path='/nowhere' is no folder"),
        ({"data__path": "/nowhere", "data__hub": "x"}, "data.path and data.hub exclude each other"),
        ({"data__holdout": 0.0}, "data.holdout=0.0 of 1797 images leaves a side empty"),
        ({"data__holdout": 1.5}, "data.holdout=1.5 must be at least 0 and below 1"),
        ({"data__image_size": 16}, "data.image_size=16: images of digits are 8 wide"),
        ({"data__mean": (0.1, 0.2)}, "has 2 numbers: give 1 or model.channels"),
        ({"data__std": (0.0,)}, "must be above 0"),
        ({"data__std": (float("nan"),)}, "must be above 0"),
        ({"data__std": ("a",)}, "must be numbers"),
    ],
)
def test_refused_keys(changes, message):
    with pytest.raises(PrenormError) as error:
        load_images(vit_config(**changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train-images-idx3-ubyte", b"\0\0\x0d\x03" + bytes(12), "is no IDX file of unsigned bytes"),
        ("train-images-idx3-ubyte", b"\0\0\x08", "is no IDX file of unsigned bytes"),
        ("train-images-idx3-ubyte", b"", "is no IDX file of unsigned bytes"),
        ("train-images-idx3-ubyte", idx(np.zeros((20, 8, 8)))[:-1], "is cut short or too long"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 12 + bytes(9), "is cut short or too long"),
        ("train-images-idx3-ubyte", idx(np.zeros((19, 8, 8))), "not as many labels as square images"),
        ("train-images-idx3-ubyte", idx(np.zeros((20, 8, 7))), "not as many labels as square images"),
        ("train-images-idx3-ubyte", b"\0\0\x08\xc8" + bytes(900), "is no IDX file of unsigned bytes"),
        ("train-images-idx3-ubyte", b"\0\0\x08\x03" + b"\xff" * 8 + bytes(4), "is cut short or too long"),
        ("train-images-idx3-ubyte", idx(np.zeros((0, 8, 8))), "not as many labels as square images"),
        ("t10k-images-idx3-ubyte", idx(np.zeros((6, 5, 5))), "differ in size"),
        ("t10k-labels-idx1-ubyte", None, "has no IDX file of eval labels"),
        ("emnist-train-images-idx3-ubyte", idx(np.zeros((20, 8, 8))), "has two files of train images"),
        ("train-images-idx3-ubyte.gz", b"\x1f\x8b no gzip", "cannot be read"),
    ],
)
def test_refused_idx_files(tmp_path, file, content, message):
    write_idx(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file.removesuffix(".gz")).unlink(missing_ok=True)
        (tmp_path / file).write_bytes(content)
    with pytest.raises(PrenormError) as error:
        load_images(vit_config(data__path=str(tmp_path)))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__channels": 3}, "model.channels=3, but the images have 1"),
        ({"model__image_size": 28}, r"model.image_size=28 is larger than the images \(8 × 8\)"),
        ({"model__classes": 9}, "model.classes=9 is too small: the images have 10 classes"),
    ],
)
def test_models_that_do_not_fit(changes, message):
    config = vit_config(**changes)
    with pytest.raises(PrenormError, match=message):
        load_images(config).check_model(config)


# --- Batches. ---


@given(batch_size=st.integers(1, 40))
@settings(max_examples=10)
def test_evaluation_has_every_image_once_and_an_epoch_too(batch_size):
    pixels = np.arange(23, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    split = images_module._array_images(pixels, np.arange(23))
    data = images_module.ImageData(split, split, 8, 1, 23, "", "")
    config = vit_config(batch_size=batch_size)
    seen = []
    for batch in data.eval_batches(config):
        assert batch["images"].shape == (batch_size, 8, 8, 1)
        np.testing.assert_array_equal(batch["images"][:, 0, 0, 0], batch["labels"])
        seen += batch["labels"][batch["weights"] > 0].tolist()
    assert seen == list(range(23))
    examples = np.concatenate([data.train_batch(config, step)["labels"] for step in range(46 // batch_size + 1)])
    assert sorted(examples[:23]) == list(range(23))


# --- On the device. ---


def a_batch(size=6, side=8):
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(256, size=(size, side, side, 1), dtype=np.uint8),
        "labels": rng.integers(10, size=size).astype(np.int32),
        "weights": np.ones(size, np.float32),
    }


def test_evaluation_takes_the_centre_as_it_is():
    config = vit_config(augment__flip=True, augment__shift=2, augment__mixup=1.0)
    batch = a_batch(side=12)
    examples = image_examples(config, batch)
    np.testing.assert_allclose(examples.inputs, batch["images"][:, 2:10, 2:10] / 127.5 - 1, atol=1e-6)
    np.testing.assert_array_equal(examples.targets, batch["labels"])


@pytest.mark.slow
def test_augmentation_is_a_function_of_its_key_and_each_part_does_something():
    batch, key = a_batch(), jax.random.key(0)

    def inputs(key=key, **changes):
        return np.asarray(image_examples(vit_config(**changes), batch, key).inputs)

    plain = batch["images"] / 127.5 - 1
    np.testing.assert_allclose(inputs(), plain, atol=1e-6)
    for changes in (
        {"augment__flip": True},
        {"augment__shift": 1},
        {"augment__min_area": 0.5},
        {"augment__mixup": 0.5},
        {"augment__cutmix": 0.5},
    ):
        once, again, other = inputs(**changes), inputs(**changes), inputs(jax.random.key(1), **changes)
        assert (once == again).all()
        assert np.abs(once - plain).max() > 0.01, changes
        assert np.abs(once - other).max() > 0.01, changes


def test_flips_are_whole_mirror_images():
    batch = a_batch(64)
    config = vit_config(augment__flip=True)
    inputs = np.asarray(image_examples(config, batch, jax.random.key(0)).inputs)
    plain = batch["images"] / 127.5 - 1
    same, mirrored = (np.isclose(inputs, x, atol=1e-5).all((1, 2, 3)) for x in (plain, plain[:, :, ::-1]))
    assert (same ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_a_shifted_crop_is_a_window_of_the_padded_image():
    images = jnp.asarray(a_batch(40)["images"], jnp.float32)
    cropped = np.asarray(shifted_crop(images, 8, 2, jax.random.key(0)))
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    places = set()
    for i in range(40):
        windows = {(y, x): padded[i, y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
        found = [place for place, window in windows.items() if (window == cropped[i]).all()]
        assert len(found) == 1
        places |= set(found)
    assert len(places) > 10


def test_a_resized_crop_stays_inside_and_keeps_a_gradient_a_gradient():
    """Of an image that is linear in x and y: so is every crop of it, with the slopes its size and shape say."""
    y, x = np.mgrid[:32, :32]
    images = jnp.asarray(np.stack([x, y], -1)[None].repeat(100, 0), jnp.float32)
    crops = np.asarray(resized_crop(images, 16, 0.25, jax.random.key(0)))[:, 2:-2, 2:-2]
    across, down = crops[:, 5, :, 0], crops[:, :, 5, 1]
    np.testing.assert_allclose(crops[..., 0], across[:, None].repeat(12, 1), atol=1e-3)  # x does not depend on y
    np.testing.assert_allclose(crops[..., 1], down[:, :, None].repeat(12, 2), atol=1e-3)
    slopes = [(line[:, -1] - line[:, 0]) / 11 for line in (across, down)]
    for line, slope in zip((across, down), slopes, strict=True):
        # Antialiasing weighs whole pixels, and so follows a line to a fraction of one.
        np.testing.assert_allclose(line, line[:, :1] + slope[:, None] * np.arange(12), atol=0.3)
    widths, heights = (slope * 16 for slope in slopes)
    area, ratio = widths * heights / 32**2, widths / heights
    assert 0.24 < area.min() < 0.35 and 0.9 < area.max() < 1.03
    assert 0.7 < ratio.min() < 0.85 and 1.2 < ratio.max() < 1.4
    assert crops.min() > 0 and crops.max() < 31


@pytest.mark.slow
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_mixing_is_in_the_proportion_of_the_targets(mixup, cutmix):
    images = jnp.arange(6.0)[:, None, None, None] * jnp.ones((6, 16, 16, 1))
    targets = jax.nn.one_hot(jnp.arange(6), 6)
    for seed in range(4):
        mixed, mixed_targets = mix(images, targets, mixup, cutmix, jax.random.key(seed))
        np.testing.assert_allclose(mixed_targets.sum(1), 1, rtol=1e-6)
        # Each image is a constant, its own number: the mean is that of the targets.
        np.testing.assert_allclose(mixed.mean((1, 2, 3)), mixed_targets @ np.arange(6.0), rtol=1e-5)
        constant = np.ptp(mixed, axis=(1, 2, 3)) < 1e-6
        assert constant.all() if not cutmix else not (constant.all() and not mixup)


def test_label_smoothing_spreads_its_mass_over_all_classes():
    targets = image_examples(vit_config(augment__label_smoothing=0.2), a_batch(), jax.random.key(0)).targets
    np.testing.assert_allclose(np.sort(np.asarray(targets), axis=1)[:, -1], 0.8 + 0.02, rtol=1e-6)
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)


def test_the_rank_of_a_label():
    logits = jnp.array([[3.0, 1, 2], [3, 1, 2], [1, 1, 1], [1, 1, 1], [np.nan, 5, 1], [np.inf, 1, 0]])
    labels = jnp.array([0, 1, 0, 2, 1, 0])
    np.testing.assert_array_equal(rank_of_label(logits, labels), [0, 2, 0, 2, 2**63 - 1, 0])
