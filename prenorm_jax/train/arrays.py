"""Global arrays of many processes: which rows of a batch each reads, and how the arrays are made of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from jax.sharding import Sharding


def local_rows(sharding: Sharding, batch_size: int) -> slice:
    """The rows of a global batch that the devices of this process hold (and, should they lie apart, those between)."""
    spans = [index[0].indices(batch_size) for index in _indices(sharding, (batch_size,))]
    return slice(min(start for start, _, _ in spans), max(stop for _, stop, _ in spans))


def _indices(sharding: Sharding, shape: tuple[int, ...]) -> list[tuple[slice, ...]]:
    return list(sharding.addressable_devices_indices_map(shape).values())


def global_batch(local: dict[str, np.ndarray], sharding: Sharding, batch_size: int) -> dict[str, Any]:
    """The global arrays, (batch_size, ...), of which this process has the rows `local_rows`: (rows, ...) each."""
    import jax

    # Not make_array_from_process_local_data: of rows that lie apart it takes those of the devices alone, packed.
    first = local_rows(sharding, batch_size).start

    def make(rows: np.ndarray) -> jax.Array:
        def piece(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            return rows[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback((batch_size, *rows.shape[1:]), sharding, piece)

    return {name: make(rows) for name, rows in local.items()}


def put_everywhere(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has whole, placed by a tree of shardings (or Formats) over the devices of all."""
    import jax
    import numpy as np

    def make(leaf: Any, sharding: Sharding) -> jax.Array:
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__)

    return jax.tree.map(make, tree, shardings)
