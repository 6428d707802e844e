"""What a model asks of the devices that it is traced for: how its arrays are sharded, and what their platform is told.

One table leads from logical axis names to the axes of the mesh, which `train/sharding.py` makes:

    data    splits the batch; every group of devices along the other axes holds all parameters
    fsdp    splits the batch too, and the stored parameters and optimizer state, which are gathered layer by layer where
            they are used (ZeRO stage 3, arXiv 1910.02054)
    tensor  splits heads, MLP and vocabulary, in storage and in computation (arXiv 1909.08053)

The stream axis of a parameter or an activation is never split: under crmsnorm it has d-1 entries, which nothing
divides, and a norm needs all of them. So both fsdp and tensor split the other axis of a matrix.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from prenorm_jax.models.platform import Platform, platform_named

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> (mesh axes that split it, further ones that split it in storage). What is not here is not split.
SPLIT_BY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "batch": (("data", "fsdp"), ()),
    **dict.fromkeys(("heads", "kv_heads", "normed_heads", "normed_kv_heads", "mlp", "vocab"), (("tensor",), ("fsdp",))),
    **dict.fromkeys(("class", "position", "patch"), ((), ("fsdp",))),
}

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh, stored: bool) -> PartitionSpec:
    """The spec of an array with these logical axes. A mesh axis that does not divide a size is left out."""
    taken: set[str] = set()
    spec: list[tuple[str, ...] | None] = []
    for name, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        used, storing = SPLIT_BY.get(name, ((), ()))
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
    """While a function is traced, or as its decorator: the devices that it is for. None: JAX's default device."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def computing_device() -> jax.Device:
    """One of `computing_on`, or else JAX's default. (Of an abstract mesh, too, it is the default.)"""
    mesh = _mesh.get()
    return mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]


def computing_platform() -> str:
    """That of the `computing_device`: "cpu", "gpu" or "tpu"."""
    return computing_device().platform


def platform() -> Platform:
    """What programs for `computing_platform` are built with."""
    return platform_named(computing_platform())


def mesh_axis_size(axis: str) -> int:
    """How many devices the mesh of `computing_on` has along this axis."""
    mesh = _mesh.get()
    return 1 if mesh is None else mesh.shape[axis]


def constrain(x: jax.Array, *axes: str | None, row_major: bool = False) -> jax.Array:
    """x, sharded as an array with these logical axes is in computation. Outside `computing_on` it is x itself.

    With `row_major`, it also gets that layout on platforms that are told so.
    """
    mesh = _mesh.get()
    if mesh is None:
        return x
    sharding = NamedSharding(mesh, partition_spec(axes, x.shape, mesh, stored=False))
    if mesh.size > 1:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return constrain_row_major(x, sharding) if row_major else x


def constrain_row_major(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """x, which has this sharding, in the row-major layout on platforms that are told so."""
    if not platform().row_major:
        return x

    def constrain_shard(shard: jax.Array) -> jax.Array:
        return with_layout_constraint(shard, Layout(tuple(range(shard.ndim))))

    if sharding.mesh.size == 1:
        return constrain_shard(x)
    # Shard by shard: a layout constraint on the global array makes XLA's partitioner replicate it.
    return jax.shard_map(constrain_shard, mesh=sharding.mesh, in_specs=sharding.spec, out_specs=sharding.spec)(x)


def fusion_barrier(x: Any) -> Any:
    """`jax.lax.optimization_barrier`, in the derivative too, on platforms that are told so.

    XLA then fuses nothing across it; of a tree, all leaves are computed before one is read.
    """
    return jax.lax.optimization_barrier(x) if platform().barriers else x
