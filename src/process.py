"""How this process takes memory, and what it does with the smallest numbers."""

from __future__ import annotations

import ctypes
import sys

import torch

# Parameters of glibc's mallopt(3) by their numbers in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_FROM_HEAP = 32 * 2**20  # glibc refuses more
_KEPT = 2**30


def prepare_process() -> None:
    """Do both of the following, where the system and the processor can. It must come before torch computes anything."""
    keep_freed_memory()
    flush_denormals()


def flush_denormals() -> bool:
    """Count numbers below 1.2e-38 as zero, in this thread and in all that it starts from now on.

    Where a unit never fires its gradient is zero, and Adam's average of it shrinks with every step until, after some
    hundred, it is too small for full precision. It would stay there for good, and processors compute such numbers more
    than a hundred times as slowly.

    Returns:
        Whether it was done: not every processor can.
    """
    return torch.set_flush_denormal(True)


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
