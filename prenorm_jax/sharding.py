"""Where arrays live: a mesh of devices with the axes data, fsdp and tensor, and one table from logical axes to them.

    data    splits the batch; every group of devices along the other axes holds all parameters
    fsdp    splits the batch too, and the stored parameters and optimizer state, which are gathered layer by layer where
            they are used (ZeRO stage 3, arXiv 1910.02054)
    tensor  splits heads, MLP and vocabulary, in storage and in computation (arXiv 1909.08053)

The stream axis of a parameter or an activation is never split: under crmsnorm it has d-1 entries, which nothing
divides, and a norm needs all of them. So both fsdp and tensor split the other axis of a matrix.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.layout import Format, Layout, with_layout_constraint
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from ml_collections import ConfigDict

from prenorm_jax.distributed import check_joined
from prenorm_jax.errors import PrenormError, check_range
from prenorm_jax.model_config import ModelConfig
from prenorm_jax.stream import abstract_params

MESH_AXES = ("data", "fsdp", "tensor")

# logical axis -> (mesh axes that split it, further ones that split it in storage). What is not here is not split.
_SPLIT_BY: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "batch": (("data", "fsdp"), ()),
    **dict.fromkeys(("heads", "kv_heads", "normed_heads", "normed_kv_heads", "mlp", "vocab"), (("tensor",), ("fsdp",))),
    **dict.fromkeys(("class", "position", "patch"), ((), ("fsdp",))),
}

_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over `devices` (None: all of all processes); the axis data takes what is left.

    Raises PrenormError if they cannot be split so, if they do not divide the batch, or if not all processes are joined.
    """
    if devices is None:
        check_joined()
    devices = jax.devices() if devices is None else devices
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    for axis in ("fsdp", "tensor"):
        check_range(f"mesh.{axis}", config.mesh[axis], at_least=1)
    if len(devices) % (fsdp * tensor):
        raise PrenormError(
            f"mesh.fsdp={fsdp} times mesh.tensor={tensor} does not divide the {len(devices)} devices: change one"
        )
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    check_range("accumulate", config.accumulate, at_least=1)
    groups = shape[0] * fsdp * config.accumulate
    if config.batch_size % groups:
        pieces = f"{shape[0] * fsdp} groups of devices" + (
            f" times accumulate={config.accumulate}" * (groups > shape[0] * fsdp)
        )
        raise PrenormError(f"batch_size={config.batch_size} is not a multiple of the {pieces} it is split over")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(_SPLIT_BY["batch"][0]))


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


def params_sharding(config: ModelConfig, mesh: Mesh) -> Any:
    """The tree of shardings in which the parameters of a model are stored."""
    return unflatten_dict(
        {
            path: NamedSharding(mesh, axes_spec(leaf.names, leaf.value.shape, mesh, stored=True))
            for path, leaf in abstract_params(config).items()
        }
    )


def tree_sharding(tree: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """The same for any tree of (abstract) arrays in which parameters, or arrays like them, lie: an optimizer's state.

    What ends in a parameter's path and has its shape is stored as that parameter is; the rest is on every device.
    """
    params = abstract_params(config)
    shardings = flatten_dict(params_sharding(config, mesh))

    def place(path: Any, leaf: Any) -> Sharding:
        keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
        end = next((keys[i:] for i in range(len(keys)) if keys[i:] in params), None)
        return shardings[end] if end and params[end].value.shape == leaf.shape else replicated(mesh)

    return jax.tree_util.tree_map_with_path(place, tree)


def row_major(shardings: Any, tree: Any) -> Any:
    """The same shardings, and with them the layout of arrays whose last axis is whole: their axes in order.

    TPUs would store a table whose rows just exceed a tile, such as (vocabulary, d+1) under crmsnorm, the other way
    round, and copy it at each step: parameters, both moments, in and out. (Where the last axis is split, a row may be
    much less than a tile: there they choose.)
    """

    def place(sharding: NamedSharding, leaf: Any) -> Format | NamedSharding:
        split = len(sharding.spec) == leaf.ndim and leaf.ndim and sharding.spec[-1]
        return sharding if split else Format(Layout(tuple(range(leaf.ndim))), sharding)

    return jax.tree.map(place, shardings, tree)


def params_format(config: ModelConfig, mesh: Mesh) -> Any:
    """`params_sharding` with the layout in which programs take the parameters of a model."""
    shapes = unflatten_dict({path: leaf.value for path, leaf in abstract_params(config).items()})
    return row_major(params_sharding(config, mesh), shapes)


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """What XLA is to do otherwise than by default for the devices of the mesh.

    TPUs would have the largest parameter, such as a table of embeddings, fetched into their fast memory before a
    program starts, and keep it there to its end: the blocks in between have no room then.
    """
    return {"xla_max_cross_program_prefetches": 0} if mesh.devices.flat[0].platform == "tpu" else None


def lay_out(tree: Any, formats: Any) -> Any:
    """The tree, of arrays that are split as `formats` say, with those copied whose axes lie in another order."""

    def place(leaf: jax.Array, format: Format | NamedSharding) -> jax.Array:
        if not isinstance(format, Format) or leaf.format.layout.major_to_minor == format.layout.major_to_minor:
            return leaf
        return jax.device_put(leaf, format)

    return jax.tree.map(place, tree, formats)


def constrain_layout(tree: Any, formats: Any) -> Any:
    """The tree, which is traced; on TPUs those of its arrays that have a `Format` lie with their axes in order."""

    def place(leaf: jax.Array, format: Format | NamedSharding) -> jax.Array:
        return _in_order(leaf, format.sharding) if isinstance(format, Format) else leaf

    return jax.tree.map(place, tree, formats)


def check_sharding(config: ModelConfig, mesh: Mesh, largest: int) -> None:
    """Raises PrenormError if a mesh that is to split parameters leaves much of one unsplit.

    That is, if a device holds more than `largest` numbers of one that not all axes split which could.
    """
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return
    shardings = flatten_dict(params_sharding(config, mesh))
    unsplit = []
    for path, leaf in abstract_params(config).items():
        held = math.prod(shardings[path].shard_shape(leaf.value.shape))
        axes = {axis for name in leaf.names for axes in _SPLIT_BY.get(name, ()) for axis in axes}
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if held > largest and (held == leaf.value.size or held * parts > leaf.value.size):
            unsplit.append(f"{held:,} numbers of {'/'.join(path)} {leaf.value.shape}")
    if unsplit:
        raise PrenormError(
            f"every device would hold {', '.join(unsplit[:4])}, whose sizes mesh.fsdp={mesh.shape['fsdp']} and "
            f"mesh.tensor={mesh.shape['tensor']} do not divide: pad them (such as model.vocab_size to a multiple of "
            "128), change the mesh, or raise mesh.largest_replicated"
        )


def sharding_table(config: ModelConfig, mesh: Mesh) -> str:
    """A line a parameter: path, shape, logical axes, spec, numbers on a device."""
    shardings = flatten_dict(params_sharding(config, mesh))
    rows = [("parameter", "shape", "axes", "split by", "numbers on a device")]
    for path, leaf in abstract_params(config).items():
        spec, shape = shardings[path].spec, leaf.value.shape
        split = ", ".join("+".join((axes,) if isinstance(axes, str) else axes) if axes else "-" for axes in spec)
        per_device = math.prod(shardings[path].shard_shape(shape))
        rows.append(("/".join(path), "×".join(map(str, shape)), ", ".join(leaf.names), split, f"{per_device:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


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
