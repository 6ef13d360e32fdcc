"""Measure how long thaw takes from the command to the first training step, beyond what its libraries take to import.

    python -m benchmarks.startup [--rounds 7]

Each start is a process of its own, on the built-in sample with random weights.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from benchmarks.timing import interleave

LIBRARIES = "import lightning.pytorch, torchvision"


class Leave(Callback):
    """End the process within its first training step: when all callbacks are done with the batch, pictures too."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        os._exit(0)


def main() -> None:
    """Print seconds of both, and their difference."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words = ["-m", "src.cli", "fit", "--config=configs/last4.yaml", "--config=configs/with/sample.yaml"]
        words += [f"--run.root={folder}", "--trainer.accelerator=cpu", "--trainer.callbacks+=benchmarks.startup.Leave"]
        candidates = {
            name: lambda arguments=arguments: subprocess.run(
                [sys.executable, "-W", "ignore", *arguments], check=True, stdout=subprocess.DEVNULL
            )
            for name, arguments in {"command to first step": words, LIBRARIES: ["-c", LIBRARIES]}.items()
        }
        times = interleave(candidates, options.rounds, warmup=1)
    for name, (median, low, high) in times.items():
        print(f"{name}: {median:.2f} s (quartiles {low:.2f} to {high:.2f})")
    print(f"thaw itself: {times['command to first step'].median - times[LIBRARIES].median:.2f} s")


if __name__ == "__main__":
    main()
