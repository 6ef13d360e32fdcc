"""Freed memory is kept for the next step, and numbers that are too small count as zero."""

import ctypes
import json
import os
import subprocess
import sys

import pytest
import torch

LARGE, COUNT = 20_000_000, 8
ALLOCATE = f"""
import ctypes, json, sys

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks mapped hblkhd a b c d e".split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, Info
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
if "prepared" in sys.argv:
    from src.process import prepare_process
    prepare_process()
before = libc.mallinfo2()
blocks = [libc.malloc({LARGE}) for _ in range({COUNT})]
mapped = libc.mallinfo2().mapped - before.mapped
for block in blocks:
    libc.free(block)
print(json.dumps([mapped, libc.mallinfo2().arena - before.arena]))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2") or "LD_PRELOAD" in os.environ,
    reason="needs glibc's malloc, from 2.33 on",
)
def test_large_blocks_come_from_memory_that_is_kept_when_they_are_freed() -> None:
    as_it_comes, kept = (
        json.loads(subprocess.run([sys.executable, "-c", ALLOCATE, *words], check=True, capture_output=True).stdout)
        for words in ([], ["prepared"])
    )
    assert as_it_comes[0] >= COUNT  # each is mapped by itself, and unmapped when it is freed
    assert as_it_comes[1] < LARGE
    assert kept[0] < COUNT
    assert kept[1] > (COUNT - 1) * LARGE


COMPUTE = """
import sys
import torch
from src.process import prepare_process

torch.set_num_threads(2)
if "prepared" in sys.argv:
    prepare_process()
smallest = torch.ones(1_000_000, dtype=torch.int32).view(torch.float32)
print(int((smallest * 1).view(torch.int32).count_nonzero()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.set_flush_denormal(False), reason="this processor cannot")
def test_denormals_become_zero_in_all_threads() -> None:
    as_it_comes, flushed = (
        int(subprocess.run([sys.executable, "-c", COMPUTE, *words], check=True, capture_output=True).stdout)
        for words in ([], ["prepared"])
    )
    assert as_it_comes == 1_000_000
    assert flushed == 0
