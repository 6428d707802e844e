"""Where arrays live: one mesh axis, `data`, over all devices, splits the batch; the state is on every device."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from prenorm_jax.errors import PrenormError


def make_mesh(batch_size: int, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `devices` (None: all). Raises PrenormError if they do not divide the batch."""
    devices = jax.devices() if devices is None else devices
    if batch_size % len(devices):
        raise PrenormError(f"batch_size={batch_size} is not a multiple of the {len(devices)} devices it is split over")
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec("data"))
