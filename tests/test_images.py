"""Images: where they come from, their split, and what augmentation makes of a batch."""

import gzip
from types import SimpleNamespace

import datasets
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prenorm_jax.base.errors import PrenormError
from prenorm_jax.config import base_config
from prenorm_jax.data import images as images_module
from prenorm_jax.data.augment import image_examples, mix, resized_crop, shifted_crop
from prenorm_jax.data.image_files import square
from prenorm_jax.data.images import load_images
from prenorm_jax.train.loss import rank_of_label


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
