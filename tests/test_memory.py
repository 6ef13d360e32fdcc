"""Freed memory is kept for the next step."""

import resource
import subprocess
import sys

import pytest

PAGES = 8 * 4_000_000 // resource.getpagesize()
TOUCH = """
import resource, sys
from src.memory import keep_freed_memory
assert len(sys.argv) < 2 or keep_freed_memory()
import torch
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones(1_000_000) for _ in range(8)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there is nothing to do elsewhere")
def test_no_fresh_pages_are_taken_for_what_was_freed() -> None:
    plain, kept = (
        int(subprocess.run([sys.executable, "-c", TOUCH, *words], check=True, capture_output=True, text=True).stdout)
        for words in ([], ["keep"])
    )
    assert plain > PAGES // 2
    assert kept < PAGES // 4
