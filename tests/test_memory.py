"""Freed memory is kept for the next step."""

import json
import subprocess
import sys

import pytest

LARGE, COUNT = 20_000_000, 8
ALLOCATE = f"""
import ctypes, json, sys
from src.memory import keep_freed_memory

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks mapped hblkhd a b c d e".split()]

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.mallinfo2.restype = ctypes.c_void_p, Info
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
if "keep" in sys.argv:
    assert keep_freed_memory()
blocks = [libc.malloc({LARGE}) for _ in range({COUNT})]
mapped = libc.mallinfo2().mapped
for block in blocks:
    libc.free(block)
print(json.dumps([mapped, libc.mallinfo2().arena]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there is nothing to do elsewhere")
def test_large_blocks_come_from_memory_that_is_kept_when_they_are_freed() -> None:
    as_it_comes, kept = (
        json.loads(subprocess.run([sys.executable, "-c", ALLOCATE, *words], check=True, capture_output=True).stdout)
        for words in ([], ["keep"])
    )
    assert as_it_comes[0] >= COUNT  # each is mapped by itself, and unmapped when it is freed
    assert as_it_comes[1] < LARGE
    assert kept[0] < COUNT
    assert kept[1] > COUNT * LARGE
