"""Global arrays: which rows a process reads, and what is made of them; in one process that has all devices."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from prenorm_jax.train.arrays import global_batch, local_rows, put_everywhere


@pytest.mark.parametrize("axes", ["data", ("data", "fsdp")])
def test_a_global_batch_is_what_its_rows_were(axes):
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    assert local_rows(sharding, 8) == slice(0, 8)
    rows = {"tokens": np.arange(24).reshape(8, 3), "labels": np.arange(8)}
    batch = global_batch(rows, sharding, 8)
    for name, array in batch.items():
        assert array.sharding.is_equivalent_to(sharding, array.ndim)
        np.testing.assert_array_equal(array, rows[name])


def test_rows_are_those_of_the_devices_of_the_process():
    class Elsewhere:
        """A sharding of which this process has two of eight devices."""

        def addressable_devices_indices_map(self, shape):
            width = shape[0] // 8
            return {i: (slice(i * width, (i + 1) * width),) for i in (4, 5)}

    assert local_rows(Elsewhere(), 16) == slice(8, 12)


def test_placed_arrays_are_whole_everywhere():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tree = {"a": np.arange(16.0), "b": np.int32(3)}
    placed = put_everywhere(tree, {name: NamedSharding(mesh, PartitionSpec()) for name in tree})
    jax.tree.map(np.testing.assert_array_equal, placed, tree)
    assert placed["b"].dtype == np.int32 and placed["b"].shape == ()
