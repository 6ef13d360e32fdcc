"""Race thaw against other ways to train the same network: `make bench`.

    python -m benchmarks.race [--rounds 5] [--jobs last4 head] [--only NAME ...] [--keras .venv-keras/bin/python]

Each contestant is a process of its own. They run epochs in turn, so that whatever else the machine does hits all of
them alike; while one runs the others wait. Rates are medians over the rounds, with quartiles. Each one's first epoch is
left out: caches fill in it, and libraries warm up. Without Keras's environment (`make keras`) Keras is left out. All
wait in memory, a gigabyte or more each: with less than 16 race some at a time (`--only`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.arithmetic import SIDE, matrix_products, matrix_rate, step_gflop
from benchmarks.contestants import BATCH, TRAINABLE, material
from benchmarks.timing import commit, interleave, quartiles
from src.callbacks.figures import new_figure, write_png
from src.model import int8
from src.process import cores

THAW, CACHED = "thaw", "thaw, from cached features"
HALF, HALF_CACHED = "thaw, bf16-mixed", "thaw, bf16-mixed, from cached features"
INT8, INT8_CACHED = "thaw, bf16-mixed and int8", "thaw, bf16-mixed and int8, from cached features"
BARE, BARE_CACHED = "bare loop", "bare loop, from cached features"
STOCK, STOCK_HALF, KERAS = "stock Lightning", "stock Lightning, bf16-mixed", "Keras script"
CACHED_END = "from cached features"
MIXED = "--trainer.precision=bf16-mixed"
BYTES = "--model.frozen_precision=int8"
PAIRS = {"A step of thaw": (THAW, BARE), "A step of thaw from cached features": (CACHED, BARE_CACHED)}
EVERYONE = (THAW, CACHED, HALF, HALF_CACHED, INT8, INT8_CACHED, BARE, BARE_CACHED, STOCK, STOCK_HALF, KERAS)
EPOCHS, TRAIN, VAL = 30, 35_000, 15_000  # the tutorial's job
SHORT = 5  # epochs a round of those whose epochs are short


@dataclass
class Contestant:
    """A process that runs one epoch whenever it is told to."""

    name: str
    command: list[str]
    rates: dict[str, list[float]] = field(default_factory=lambda: {"train": [], "val": []})
    """Images per second."""
    rest: list[float] = field(default_factory=list)
    """Seconds of an epoch that are neither training nor validation: files written, loaders started."""
    ready: float = 0.0
    """Seconds from the command to the first epoch."""
    peak_mib: float = 0.0

    def start(self) -> None:
        """Start the process, and time how long it takes to be ready for the first step."""
        begin = time.perf_counter()
        # In a pipe they would fill up what holds them, and the process would wait for somebody to read it.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self._answer()
        self.ready = time.perf_counter() - begin

    def epoch(self, count: bool) -> None:
        """Let it run one epoch."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        answer = self._answer()
        self.peak_mib = answer["peak_mib"]
        if count:
            seconds = answer["seconds"]
            for part, images in answer["images"].items():
                self.rates[part].append(images / seconds[part])
            self.rest.append(seconds["whole"] - seconds["train"] - seconds["val"])

    def stop(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError, subprocess.TimeoutExpired):
            self.process.communicate("stop\n", timeout=20)
        self.process.kill()
        self.errors.close()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise SystemExit(f"{self.name} ended early: {' '.join(self.command)}\n{self.errors.read()[-2000:]}")
        return json.loads(line)

    def rate(self, part: str) -> float:
        """Give images per second, the median."""
        return statistics.median(self.rates[part])

    def spread(self, part: str) -> str:
        """Write the median with quartiles."""
        median, low, high = quartiles(self.rates[part])
        return f"{median:,.0f} ({low:,.0f} to {high:,.0f})"

    def epoch_seconds(self) -> float:
        """Add up one epoch of the tutorial's job."""
        # In some races Keras spent half a minute of each epoch so, and by itself 2.5 s: why is not known.
        rest = 0.0 if self.name == KERAS else statistics.median(self.rest)
        return TRAIN / self.rate("train") + VAL / self.rate("val") + rest


def contestants(job: str, folder: Path, keras: Path | None, only: list[str]) -> list[Contestant]:
    """List who takes part: of those named in `only`, who can here."""
    ours = {
        THAW: ("thaw", "null", folder / "thaw"),
        CACHED: ("thaw", "1", folder / "cached"),
        HALF: ("thaw", "null", folder / "half", MIXED),
        HALF_CACHED: ("thaw", "1", folder / "half_cached", MIXED),
        INT8: ("thaw", "null", folder / "int8", MIXED, BYTES),
        INT8_CACHED: ("thaw", "1", folder / "int8_cached", MIXED, BYTES),
        BARE: ("bare", "null"),
        BARE_CACHED: ("bare", "1"),
        STOCK: ("stock", str(cores()), folder / "stock"),
        STOCK_HALF: ("stock", str(cores()), folder / "stock_half", "bf16-mixed"),
    }
    if not int8.supported():
        ours = {name: options for name, options in ours.items() if BYTES not in options}
    ours = {name: options for name, options in ours.items() if name in only}
    python = [sys.executable, "-W", "ignore", "-m"]
    found = [
        Contestant(name, [*python, f"benchmarks.contestants.{module}", job, *map(str, options)])
        for name, (module, *options) in ours.items()
    ]
    if keras and KERAS in only:
        material.write_arrays(folder / "arrays.npz")
        script = "benchmarks.contestants.keras_script"
        found.append(Contestant(KERAS, [str(keras), "-m", script, job, str(folder / "arrays.npz")]))
    return found


def race(racers: list[Contestant], rounds: int) -> dict[str, Contestant]:
    """Let all run in turn; the first round does not count."""
    try:
        for contestant in racers:
            print(f"starting: {contestant.name}", flush=True)
            contestant.start()
        for turn in range(1 + rounds):
            for contestant in racers:
                for _ in range(SHORT if turn and contestant.name.endswith(CACHED_END) else 1):
                    contestant.epoch(count=turn > 0)
            print(f"round {turn} of {rounds}", flush=True)
    finally:
        for contestant in racers:
            if hasattr(contestant, "process"):
                contestant.stop()
    return {contestant.name: contestant for contestant in racers}


def thirty_epochs(racers: dict[str, Contestant], views: list[int]) -> dict[str, float]:
    """Add up the tutorial's job, in seconds: each contestant, and thaw with so many cached views."""
    sums = {
        f"{name}, {count} cached views": _with_cache(racers[name], racers[cached], count)
        for name, cached in ((INT8, INT8_CACHED), (HALF, HALF_CACHED), (THAW, CACHED))
        if name in racers and cached in racers
        for count in views
    }
    alone = (INT8, HALF, THAW, STOCK_HALF, STOCK, KERAS)
    return sums | {name: EPOCHS * racers[name].epoch_seconds() for name in alone if name in racers}


def report(job: str, racers: dict[str, Contestant], views: list[int]) -> str:
    """Lay the results out as Markdown."""
    lines = [f"| {job}, images per second | training | validation | rest of an epoch | to first epoch | peak memory |"]
    lines += ["|---|---|---|---|---|---|"]
    for contestant in racers.values():
        lines.append(
            f"| {contestant.name} | {contestant.spread('train')} | {contestant.spread('val')} "
            f"| {statistics.median(contestant.rest):.2f} s | {contestant.ready:.1f} s "
            f"| {contestant.peak_mib:,.0f} MiB |"
        )
    sums = thirty_epochs(racers, views)
    others = (STOCK, STOCK_HALF, KERAS)
    if sums:
        lines += [
            "",
            f"Added up to {EPOCHS} epochs of {TRAIN:,} training and {VAL:,} validation images, each epoch with what it "
            "takes beside them (but for Keras's, see docs/speed.md):",
            "",
            f"| {job}, {EPOCHS} epochs | minutes | {' | '.join(f'{name} takes' for name in others)} |",
            "|---|---|---|---|---|",
        ]
    for name, total in sums.items():
        times = [f"{sums[other] / total:.1f} times as long" if other in racers else "" for other in others]
        lines.append(f"| {name} | {total / 60:.1f} | {' | '.join(times)} |")
    for what, (name, bare) in PAIRS.items():
        if name in racers and bare in racers:
            ratio = racers[bare].rate("train") / racers[name].rate("train")
            lines += ["", f"{what} takes {ratio:.3f} times as long as the bare loop's."]
    if THAW in racers:
        gflop = step_gflop(material.model(job), torch.zeros(BATCH, 3, 32, 32))
        ours = gflop * racers[THAW].rate("train")
        rate = matrix_rate(interleave(matrix_products(), rounds=20).values())
        lines += [
            "",
            f"Without a cache thaw computes {ours:.0f} GFLOP/s, {ours / rate:.0%} of the {rate:.0f} of a product of "
            f"{SIDE['cpu']} × {SIDE['cpu']} matrices.",
        ]
    return "\n".join(lines) + "\n"


def _with_cache(filling: Contestant, cached: Contestant, views: int) -> float:
    """Add up the job: as many epochs as views fill the cache, the first of them that of the validation images."""
    extra = min(views, EPOCHS) * TRAIN * (1 / filling.rate("train") - 1 / cached.rate("train"))
    return EPOCHS * cached.epoch_seconds() + extra + VAL * (1 / filling.rate("val") - 1 / cached.rate("val"))


def draw(results: dict[str, dict[str, Contestant]], views: list[int], path: Path) -> None:
    """Draw the minutes of the tutorial's job as bars."""
    figure = new_figure(7.5 * len(results), 3.5)
    for panel, (job, racers) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        slowest_first = sorted(thirty_epochs(racers, views).items(), key=lambda each: -each[1])
        minutes = {name: seconds / 60 for name, seconds in slowest_first}
        colours = ["C0" if name.startswith(THAW) else "C7" for name in minutes]
        bars = panel.barh(list(minutes), list(minutes.values()), color=colours)
        panel.bar_label(bars, fmt="{:.1f}", padding=3)
        panel.set(title=f"{job}, {EPOCHS} epochs", xlabel="minutes")
        panel.margins(x=0.18)
    write_png(figure, path)


def main() -> None:
    """Race, print the tables, and write them with a picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", nargs="+", default=["last4", "head"], choices=list(TRAINABLE))
    parser.add_argument(
        "--only", nargs="+", default=[*EVERYONE], choices=EVERYONE, metavar="NAME", help="who takes part, of the tables"
    )
    parser.add_argument("--views", type=int, nargs="+", default=[8, 16], help="cached views in the sums over 30 epochs")
    parser.add_argument(
        "--keras", type=Path, default=Path(".venv-keras/bin/python"), help="its Python, if there is one"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1: the first epoch of each does not count")
    keras = options.keras if options.keras.exists() else None
    results = {}
    text = (
        f"torch {torch.__version__}, {cores()} CPU cores, batch {BATCH}, 32×32 pixels, random weights, "
        f"commit {commit()}. Images per second: median (quartiles).\n"
    )
    for job in options.jobs:
        with tempfile.TemporaryDirectory() as folder:
            results[job] = race(contestants(job, Path(folder), keras, options.only), options.rounds)
        text += "\n" + report(job, results[job], options.views)
    options.output.mkdir(parents=True, exist_ok=True)
    print(text)
    (options.output / "race.md").write_text(text)
    if all(thirty_epochs(racers, options.views) for racers in results.values()):
        draw(results, options.views, options.output / "race.png")


if __name__ == "__main__":
    main()
