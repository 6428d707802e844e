"""Digests: the same wherever an array lies, another for any other array."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prenorm_jax.train.checksum import _checksum, _factor, checksum, digest

DTYPES = ["bool", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
SHAPES = [(), (0,), (5,), (8, 16), (2, 0, 3), (4, 2, 8)]


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Of random bits: NaNs and infinities are among them."""
    rng = np.random.default_rng(seed)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    dtype = np.dtype(dtype if dtype != "bfloat16" else ml_dtypes.bfloat16)
    return np.frombuffer(rng.bytes(dtype.itemsize * int(np.prod(shape))), dtype).reshape(shape)


def expected_checksum(array: np.ndarray, start: tuple[int, ...]) -> list[int]:
    """What the docstrings say, entry by entry, in Python's integers."""
    if array.dtype == bool:
        array = array.astype(np.uint8)
    words = np.ascontiguousarray(array).view(f"uint{8 * min(array.dtype.itemsize, 4)}")
    words = words.reshape((*array.shape, *([2] if array.dtype.itemsize == 8 else [])))
    start = (*start, 0)[: words.ndim]

    def mix(x):
        x = (x ^ x >> 16) * 0x85EBCA6B % 2**32
        x = (x ^ x >> 13) * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    sums = [0] * 4
    for index, word in np.ndenumerate(words):
        for key in range(4):
            place = sum((i + o) * _factor(key, axis) for axis, (i, o) in enumerate(zip(index, start, strict=True)))
            sums[key] += mix(int(word) ^ (_factor(key, -1) + place) % 2**32)
    return [value % 2**32 for value in sums]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_is_what_the_docstrings_say_in_numpy_and_in_jax(dtype, shape, monkeypatch):
    array = random_array(dtype, shape)
    expected = expected_checksum(array, (0,) * array.ndim)
    start = (0,) * array.ndim
    assert checksum(array, start).tolist() == checksum(jnp.asarray(array), start).tolist() == expected
    monkeypatch.setattr("prenorm_jax.train.checksum._SMALL", -1)  # as for a large one
    for wide in (True, False):
        with jax.enable_x64(wide):  # NumPy's 64-bit arrays must not become 32-bit ones
            assert checksum(array, start).tolist() == expected


def test_entries_beyond_the_first_2_to_the_32():
    array, start = random_array("float32", (2, 3)), (2**20 + 1, 2**31)
    for form in (array, jnp.asarray(array)):
        assert checksum(form, start).tolist() == expected_checksum(array, start)


def test_the_digest_of_a_tree_stays_what_it_is():
    """A golden value: checkpoints that exist must stay readable."""
    tree = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [np.ones(2, np.int32), np.float64(0.5)]}
    assert digest(tree) == "086842f52e8051249b49843025177348"
    assert digest({"b": tree["b"], "a": jnp.asarray(tree["a"])}) == digest(tree)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_is_the_same_on_every_mesh(dtype):
    array = random_array(dtype, (8, 16))
    expected = digest({"x": array})
    for sizes in ((8, 1), (2, 4), (1, 4)):
        mesh = jax.make_mesh(
            sizes, ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[: sizes[0] * sizes[1]]
        )
        for spec in (PartitionSpec(), PartitionSpec("a", "b"), PartitionSpec(("b", "a"))):
            placed = jax.device_put(array, NamedSharding(mesh, spec))
            assert digest({"x": placed}) == expected, (sizes, spec)


@given(st.data())
@settings(max_examples=100)
def test_a_flipped_bit_or_two_swapped_entries_change_it(data):
    array = random_array(data.draw(st.sampled_from(DTYPES[1:])), data.draw(st.sampled_from([(5,), (8, 16), (4, 2, 8)])))
    before, swapped = digest({"x": array}), array.copy()
    raw = bytearray(array.tobytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert digest({"x": np.frombuffer(raw, array.dtype).reshape(array.shape)}) != before
    one, other = (tuple(data.draw(st.integers(0, size - 1)) for size in array.shape) for _ in range(2))
    swapped[one], swapped[other] = array[other], array[one]
    assert (digest({"x": swapped}) == before) == (swapped.tobytes() == array.tobytes())


def test_names_dtypes_and_shapes_count():
    one, other = random_array("float32", (2, 3), 0), random_array("float32", (2, 3), 1)
    trees = [
        {"a": one, "b": other},
        {"a": other, "b": one},
        {"a": one, "c": other},
        {"a": one, "b": other.reshape(3, 2)},
        {"a": one, "b": other.view(np.int32)},
        {"a": one},
        {"a": one, "b": other, "c": np.zeros(0, np.float32)},
        {},
    ]
    assert len({digest(tree) for tree in trees}) == len(trees)


def test_parts_add_up():
    array = random_array("bfloat16", (7, 6, 5))
    sums = np.zeros(4, np.uint32)
    for i in range(0, 7, 3):
        for j in range(0, 6, 4):
            sums += np.asarray(checksum(array[i : i + 3, j : j + 4], (i, j, 0)))
    assert sums.tolist() == checksum(array, (0, 0, 0)).tolist()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float64])
def test_needs_no_memory_of_the_size_of_the_array(dtype):
    abstract = jax.ShapeDtypeStruct((2048, 3072), dtype)
    compiled = _checksum.lower(abstract, np.zeros(4, np.uint32), dtype == jnp.float64).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2**20
