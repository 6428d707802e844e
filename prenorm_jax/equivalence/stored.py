"""Conversion of a stored tree in parts: it needs the memory of some parts, whatever the size of the tree."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np

from prenorm_jax.base.trees import Flat, Path
from prenorm_jax.equivalence.convert import convert_config, convert_leaves
from prenorm_jax.equivalence.roles import parameter_roles
from prenorm_jax.equivalence.rules import modules
from prenorm_jax.models.abstract import abstract_params, param_shapes
from prenorm_jax.models.config import ModelConfig
from prenorm_jax.models.coordinates import coordinates
from prenorm_jax.models.parameters import HEAD_AXES, STREAM_AXES

PART = 2**22  # entries of the largest leaf that are read and written at once
BLOCK = 2**18  # and that are converted at once: few enough for the copies in float64 to stay in a core's cache
Part = tuple[slice, ...]  # an index of a leaf: a slice for each axis


class Readable(Protocol):
    """Leaves that are read in parts, such as those of a checkpoint (`train/leaves.py`)."""

    def read(self, path: Path, part: Part = ()) -> np.ndarray:
        """Part of the leaf; of (), all of it."""


class Writable(Protocol):
    """Leaves that are written in parts."""

    def write(self, path: Path, part: Part, array: np.ndarray) -> None:
        """Writes part of the leaf, once."""


# Logical axis name -> what of it is in a part; the whole of those that are not named.
Tile = dict[str, slice]


def convert_stored(
    stored: Readable,
    new: Writable,
    source: ModelConfig,
    to: str,
    part_size: int = PART,
    keep_affine: bool = False,
) -> None:
    """Writes `convert_params` of the stored tree, of a model `source`, to `new`, reading each leaf once.

    A QK-norm's means that have to be zero are measured by the largest heads of a block. Raises what `convert_params`
    does of the leaves' values, and what reading and writing raise.
    """
    target, roles = convert_config(source, to, keep_affine), parameter_roles(source)
    both = coordinates(source), coordinates(target)
    axes, new_axes = ({path: x.names for path, x in abstract_params(of).items()} for of in (source, target))
    shapes = param_shapes(target)
    for tile, flat in read_parts(stored, source, part_size):
        converted: Flat = {}
        own_roles = {path: roles[path] for path in flat}
        sizes = {path: list(zip(axes[path], leaf.shape, strict=True)) for path, leaf in flat.items()}
        for block in tiles(sizes, source.head_dim, BLOCK):
            own = {path: leaf[part(axes[path], block)] for path, leaf in flat.items()}
            for path, leaf in convert_leaves(own, own_roles, *both, new_axes, keep_affine).items():
                if path not in converted:
                    shape = np.broadcast_to(0, shapes[path].shape)[part(new_axes[path], tile)].shape
                    converted[path] = np.empty(shape, leaf.dtype)
                converted[path][part(new_axes[path], block)] = leaf
        for path, leaf in converted.items():
            new.write(path, part(new_axes[path], tile), leaf)


def copy_stored(stored: Readable, new: Writable, leaves: Flat, part_size: int = PART) -> None:
    """Writes the stored leaves of these shapes to `new` as they are."""
    for path, leaf in leaves.items():
        names = tuple(map(str, range(len(leaf.shape))))
        for tile in tiles({path: list(zip(names, leaf.shape, strict=True))}, 1, part_size):
            index = part(names, tile)
            new.write(path, index, stored.read(path, index))


def read_parts(stored: Readable, source: ModelConfig, part_size: int = PART) -> Iterator[tuple[Tile, Flat]]:
    """The stored tree, of a model `source`, in parts that convert by themselves (`convert_leaves`)."""
    leaves, roles = abstract_params(source), parameter_roles(source)
    small = {path: stored.read(path) for path, role in roles.items() if role.affine is not None or role.scales}
    for paths in modules(roles).values():
        axes = {path: list(zip(leaves[path].names, leaves[path].value.shape, strict=True)) for path in paths}
        for tile in tiles(axes, source.head_dim, part_size):
            parts = {path: part(leaves[path].names, tile) for path in paths}
            yield (
                tile,
                {
                    path: small[path][index] if path in small else stored.read(path, index)
                    for path, index in parts.items()
                },
            )


def tiles(leaves: Mapping[object, list[tuple[str, int]]], head_dim: int, part_size: int) -> Iterator[Tile]:
    """Divides a module's leaves, each given as its axes' (name, size), along axes on which entries do not depend.

    Each tile has at most `part_size` entries of the largest leaf, if there are axes enough to divide.
    """
    largest = max(leaves.values(), key=lambda axes: math.prod(size for _, size in axes))
    sizes, steps = dict(largest), dict(largest)
    whole = {*STREAM_AXES, "raw"} | {name for axes in leaves.values() for name, _ in set(axes) if _repeats(name, axes)}
    for name, size in largest:
        entries = math.prod(steps[name] for name, _ in largest)
        if entries > part_size and name not in whole:
            unit = head_dim if name in HEAD_AXES else 1
            units = -(-size // unit)
            parts = -(-units // max(part_size // (entries // size) // unit, 1))
            steps[name] = -(-units // parts) * unit  # of about one size
    starts = {name: range(0, size, steps[name]) for name, size in largest if steps[name] < size}
    for tile in itertools.product(*starts.values()):
        yield {name: slice(i, min(i + steps[name], sizes[name])) for name, i in zip(starts, tile, strict=True)}


def part(names: tuple[str, ...], tile: Tile) -> Part:
    """The index of a leaf with axes of these names for a tile."""
    return tuple(tile.get(name, slice(None)) for name in names)


def _repeats(name: str, axes: list[tuple[str, int]]) -> bool:
    return sum(other == name for other, _ in axes) > 1
