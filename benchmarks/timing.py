"""Time several things fairly: interleaved, in one process, medians with their spread."""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch


class Quartiles(NamedTuple):
    """Median of what was measured, and its spread."""

    median: float
    low: float
    """A quarter is below it."""
    high: float
    """A quarter is above it."""


def interleave(candidates: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> dict[str, Quartiles]:
    """Call each candidate once a round, so that whatever else the machine does hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(warmup + rounds):
        for name, call in candidates.items():
            begin = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - begin)
    return {name: quartiles(values) for name, values in seconds.items()}


def finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    """Make a call wait until the device has done what it was told."""
    if device != "cuda":
        return call

    def wait() -> None:
        call()
        torch.cuda.synchronize()

    return wait


def commit() -> str:
    """Name the commit that is measured, with a + where files differ from it."""
    words = ["git", "describe", "--always", "--exclude=*", "--dirty=+"]
    with suppress(OSError):  # there may be no git
        found = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parent)
        return found.stdout.strip() or "unknown"
    return "unknown"


def quartiles(values: Sequence[float]) -> Quartiles:
    """Give median and quartiles; of three or fewer the least and the largest for the latter."""
    low, high = min(values), max(values)
    if len(values) > 3:
        low, _, high = statistics.quantiles(values, n=4)
    return Quartiles(statistics.median(values), low, high)
