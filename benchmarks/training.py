"""Train in a process of its own, as a user would, and go on where an earlier call was cut short."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from src.callbacks.history import Row, read_history
from src.run_directory import newest_run


def train(folder: Path, name: str, epochs: int, words: list[str]) -> list[Row]:
    """Train unless that is done, and give the history.

    Args:
        folder: Where run directories lie.
        name: Name of this run, to which a digest of its options is added.
        epochs: How many epochs it has when it is done.
        words: The other options of `fit`.
    """
    # Options are part of the name: another command must not take this one's results for its own.
    name = f"{name}-{digest(words)}"
    place = folder / name
    directory = newest_run(place) or place / "version_0"
    done = read_history(directory / "history.csv") if (directory / "history.csv").exists() else []
    if len(done) < epochs:
        options = {
            "trainer.max_epochs": epochs, "run.root": folder, "run.name": name, "run.test_after_fit": "false",
            "ckpt_path": "last_if_any",
        }  # fmt: skip
        words = [*words, *(f"--{option}={value}" for option, value in options.items())]
        print(f"{name}: from epoch {len(done)}", flush=True)
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "src.cli", "fit", *words], check=True, stdout=subprocess.DEVNULL
        )
        directory = newest_run(place) or directory  # a run that was killed in its first epoch has left one, too
        done = read_history(directory / "history.csv")
    return done


def digest(words: Sequence[object]) -> str:
    """Give a few letters and figures that tell these words from others."""
    return blake2b(repr(words).encode(), digest_size=3).hexdigest()


def mean_and_std(shares: list[float]) -> str:
    """Write the mean of shares in percent and, of several, their standard deviation."""
    text = f"{100 * statistics.mean(shares):.1f}"
    return f"{text} ± {100 * statistics.stdev(shares):.1f}" if len(shares) > 1 else text
