"""Batches made ahead of their use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

from prenorm_jax.data import HostBatch


def prefetch(make: Callable[[int], HostBatch], steps: range) -> Iterator[HostBatch]:
    """`make(step)` for each step; while one is used, the next is made in a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(make, steps.start)
        for step in steps:
            batch = coming.result()
            if step + 1 in steps:
                coming = pool.submit(make, step + 1)
            yield batch
