"""How this process takes memory from the system."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3) by their numbers in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_FROM_HEAP = 32 * 2**20  # glibc refuses more
_KEPT = 2**30


def keep_freed_memory() -> bool:
    """Let glibc keep up to a gigabyte of freed memory for the next allocation.

    As glibc comes, a large tensor that is freed goes back to the system, and the next step's takes fresh pages, each
    of which the system must clear and map first: at small batches that takes as long as computing.

    Returns:
        Whether it was done: there is nothing to do on other systems and C libraries.
    """
    if sys.platform != "linux":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all([mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP), mallopt(_TRIM_THRESHOLD, _KEPT)])
