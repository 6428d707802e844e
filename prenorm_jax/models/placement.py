"""What a model asks of the devices it is traced for: how arrays are split, which platform computes."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")


# logical axis -> (mesh axes that split it, further ones that split it in storage). What is not here is not split.
_SPLIT_BY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "batch": (("data", "fsdp"), ()),
    **dict.fromkeys(("heads", "kv_heads", "normed_heads", "normed_kv_heads", "mlp", "vocab"), (("tensor",), ("fsdp",))),
    **dict.fromkeys(("class", "position", "patch"), ((), ("fsdp",))),
}


_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def axes_spec(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh, stored: bool) -> PartitionSpec:
    """The spec of an array with these logical axes. A mesh axis that does not divide a size is left out."""
    taken: set[str] = set()
    spec: list[tuple[str, ...] | None] = []
    for name, size in zip(names, shape, strict=True):
        chosen: list[str] = []
        used, storing = _SPLIT_BY.get(name, ((), ()))
        for axis in (*used, *(storing if stored else ())):
            parts = mesh.shape[axis]
            if axis not in taken and parts > 1 and size % parts == 0:
                chosen.append(axis)
                taken.add(axis)
                size //= parts
        spec.append(tuple(chosen) or None)
    return PartitionSpec(*spec)


@contextlib.contextmanager
def computing_on(mesh: Mesh | None) -> Iterator[None]:
    """While a function is traced, or as its decorator: the devices that it is for. None: one of JAX's default ones.

    All below refers to it, and so do those who ask for the platform: attention, linear maps and the loss.
    """
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def constrain(x: jax.Array, *names: str | None, in_order: bool = False) -> jax.Array:
    """x, split as an array with these logical axes is in computation. Outside `computing_on` it is as it was.

    With `in_order`, TPUs, which choose for each array, also lay it in memory with its axes in order.
    """
    mesh = _mesh.get()
    if mesh is None:
        return x
    sharding = NamedSharding(mesh, axes_spec(names, x.shape, mesh, stored=False))
    if mesh.size > 1:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return _in_order(x, sharding) if in_order else x


def _in_order(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """x, which is split so and which TPUs lay with its axes in order."""
    if computing_platform() != "tpu":
        return x

    def lay(share: jax.Array) -> jax.Array:
        return with_layout_constraint(share, Layout(tuple(range(share.ndim))))

    if sharding.mesh.size == 1:
        return lay(x)
    # Share by share: where the whole is asked for, XLA may have every device hold all of it.
    return jax.shard_map(lay, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec)(x)


def apart(x: Any) -> Any:
    """x, of which TPUs do not make one operation of what it is made by and what reads it; in the derivative likewise.

    Of a tree, all leaves are made before one is read.
    """
    return jax.lax.optimization_barrier(x) if computing_platform() == "tpu" else x


def computing_device() -> jax.Device:
    """One of `computing_on`, where they are known, or else of JAX's default."""
    mesh = _mesh.get()
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]


def computing_platform() -> str:
    """That of the `computing_device`: "cpu", "gpu" or "tpu"."""
    return computing_device().platform


def parts_by(axis: str) -> int:
    """How many devices the mesh of `computing_on` has along this axis."""
    mesh = _mesh.get()
    return 1 if mesh is None else mesh.shape[axis]


def is_split_by(axis: str) -> bool:
    """Whether the mesh of `computing_on` has more than one device along this axis."""
    return parts_by(axis) > 1
