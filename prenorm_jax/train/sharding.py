"""Where arrays lie: the mesh, and the shardings and formats of parameters, states and batches on it.

Which mesh axes split which logical axis is in `models/placement.py`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from ml_collections import ConfigDict

from prenorm_jax.base.errors import PrenormError, check_range
from prenorm_jax.base.processes import check_joined
from prenorm_jax.models.abstract import abstract_params, param_shapes
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.placement import MESH_AXES, SPLIT_BY, constrain_row_major, partition_spec
from prenorm_jax.models.platform import platform_named


def make_mesh(config: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `config.mesh` over `devices` (None: all of all processes); the axis data takes what is left.

    Raises PrenormError if they cannot be split so, if they do not divide the batch, or if not all processes are joined.
    """
    if devices is None:
        check_joined()
        devices = jax.devices()
    fsdp, tensor = config.mesh.fsdp, config.mesh.tensor
    for axis in ("fsdp", "tensor"):
        check_range(f"mesh.{axis}", config.mesh[axis], at_least=1)
    if len(devices) % (fsdp * tensor):
        raise PrenormError(
            f"mesh.fsdp={fsdp} times mesh.tensor={tensor} does not divide the {len(devices)} devices: change one"
        )
    shape = (len(devices) // (fsdp * tensor), fsdp, tensor)
    check_range("accumulate", config.accumulate, at_least=1)
    groups = shape[0] * fsdp
    if config.batch_size % (groups * config.accumulate):
        pieces = f"{groups} groups of devices times accumulate={config.accumulate}"
        raise PrenormError(f"batch_size={config.batch_size} is not a multiple of the {pieces} that it is split over")
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of an array whose first axis is the batch."""
    return NamedSharding(mesh, PartitionSpec(SPLIT_BY["batch"][0]))


def params_sharding(config: ModelConfig, mesh: Mesh) -> Any:
    """The tree of shardings in which the parameters of a model are stored."""
    shardings = {
        path: NamedSharding(mesh, partition_spec(leaf.names, leaf.value.shape, mesh, stored=True))
        for path, leaf in abstract_params(config).items()
    }
    return unflatten_dict(shardings)


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


def row_major_formats(shardings: Any, tree: Any) -> Any:
    """The same shardings, with the row-major layout for arrays whose last axis is not sharded.

    XLA:TPU would store a table whose rows just exceed a tile, such as (vocabulary, d+1) under crmsnorm, column by
    column, and copy it at each step: parameters, both moments, in and out. (Where the last axis is sharded a row may be
    much less than a tile: there the compiler chooses.)
    """

    def place(sharding: NamedSharding, leaf: Any) -> Format | NamedSharding:
        split = len(sharding.spec) == leaf.ndim and leaf.ndim and sharding.spec[-1]
        return sharding if split else Format(Layout(tuple(range(leaf.ndim))), sharding)

    return jax.tree.map(place, shardings, tree)


def params_formats(config: ModelConfig, mesh: Mesh) -> Any:
    """`params_sharding` with the layouts in which programs take the parameters of a model."""
    return row_major_formats(params_sharding(config, mesh), unflatten_dict(param_shapes(config)))


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """What XLA is to do otherwise than by default for the devices of the mesh."""
    return platform_named(mesh.devices.flat[0].platform).compiler_options


def to_formats(tree: Any, formats: Any) -> Any:
    """The tree, whose arrays have the formats' shardings, with those copied that have another layout."""

    def place(leaf: jax.Array, format: Format | NamedSharding) -> jax.Array:
        if not isinstance(format, Format) or leaf.format.layout.major_to_minor == format.layout.major_to_minor:
            return leaf
        return jax.device_put(leaf, format)

    return jax.tree.map(place, tree, formats)


def constrain_formats(tree: Any, formats: Any) -> Any:
    """The tree, which is traced, in the layouts of the formats, on platforms that are told so."""

    def place(leaf: jax.Array, format: Format | NamedSharding) -> jax.Array:
        return constrain_row_major(leaf, format.sharding) if isinstance(format, Format) else leaf

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
        axes = {axis for name in leaf.names for axes in SPLIT_BY.get(name, ()) for axis in axes}
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
