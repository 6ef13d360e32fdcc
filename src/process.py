"""Cores and memory of this process, and what it does with the smallest numbers."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

# Parameters of glibc's mallopt(3) by their numbers in malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_FROM_HEAP = 32 * 2**20  # glibc refuses more
_KEPT = 2**30


def prepare_process() -> None:
    """Make steps faster, where system and processor can; torch must not have computed anything before.

    Up to a gigabyte of freed memory is kept for the next allocation. Numbers below 1.2e-38 (denormals) count as zero,
    in this thread and in all that it starts from now on.
    """
    _keep_freed_memory()
    # Where a unit never fires its gradient is zero, and Adam's average of it shrinks until, after some 700 steps, it is
    # a denormal. It would stay one, and processors compute those many times as slowly.
    torch.set_flush_denormal(True)


def cores() -> int:
    """Count the processor cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory() -> None:
    # As glibc comes, a large tensor that is freed goes back to the system, and the next step's takes fresh pages, each
    # of which the system must clear and map first: at small batches that takes as long as computing.
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGEST_FROM_HEAP)
        mallopt(_TRIM_THRESHOLD, _KEPT)
