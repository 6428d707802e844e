"""How this process gets memory from the system, with the GNU C library. Elsewhere nothing here does anything.

XLA:CPU allocates a program's temporaries at each call and frees them after it. The C library gives blocks of that size
back to the system at once, and the next call gets them anew, page by page: that took 7 % of a training step.
"""

import ctypes
import functools

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h


@functools.cache
def keep_freed_memory() -> None:
    """From now on what is freed stays in this process for its next use. Its size is then the largest it ever was."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_ARENA_MAX, 1)):
            libc.mallopt(option, value)


def release_freed_memory() -> None:
    """Gives what is free at present back to the system."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
