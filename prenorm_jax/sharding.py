"""Where arrays live: one mesh axis, `data`, over all devices. Batches are split along it, the state is on every device."""

from __future__ import annotations

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prenorm_jax.errors import PrenormError


def make_mesh(batch_size: int) -> Mesh:
    """A mesh of all devices. Raises PrenormError if they do not divide the batch."""
    devices = jax.device_count()
    if batch_size % devices:
        raise PrenormError(
            f"batch_size={batch_size} does not divide over {devices} devices: make it a multiple of them"
        )
    return jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec("data"))
