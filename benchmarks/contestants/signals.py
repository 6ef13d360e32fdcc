"""How a contestant takes part in a race: it says that it is ready, and runs an epoch for each line it is sent.

No import of torch here: the Keras contestant lives in an environment without it.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

_answers = sys.stdout
sys.stdout = sys.stderr  # whatever a library prints must not be taken for an answer


class Gate:
    """Stand at the start of each epoch, and time what follows."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.images: dict[str, int] = {}
        self.since = 0.0
        self.opened = 0.0

    def wait(self) -> None:
        """Say that the next epoch can begin, and wait until it may; end the process if it may not."""
        if self.seconds:
            self.seconds["whole"] = time.perf_counter() - self.opened
        report = {"seconds": self.seconds, "images": self.images, "peak_mib": _peak_mib()}
        print(json.dumps(report), file=_answers, flush=True)
        if sys.stdin.readline().strip() != "go":
            sys.exit(0)
        self.seconds, self.images = {}, {}
        self.opened = time.perf_counter()

    def begin(self) -> None:
        """Start the clock of a part of the epoch."""
        self.since = time.perf_counter()

    def end(self, part: str, images: int) -> None:
        """Stop it."""
        self.seconds[part] = time.perf_counter() - self.since
        self.images[part] = images


def _peak_mib() -> float:
    """Measure the most memory that this process has taken.

    On Linux not by `getrusage`, which counts what the parent had taken when it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        peak = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes on macOS
