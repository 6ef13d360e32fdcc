"""Measure what freezing saves: the peak memory of a training process, by how many layers train.

    python -m benchmarks.memory [--batch-size 128] [--recipes head last4 full] [--root data/images]

Each recipe runs a few steps in a process of its own, on a folder of images or else on a small built-in sample, with
random weights.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile

RECIPES = {"head": 0, "last4": 4, "full": 18}


def peak(layers: int, batch_size: int, root: str | None) -> float:
    """Train so many layers for a few steps, and give the process's peak resident memory in MiB.

    A root must not have a folder `val`, of whose images a part could only be the first classes.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "unfreezing.stages": f"{{0: {layers}}}", "trainer.max_epochs": 1, "data.batch_size": batch_size,
            "trainer.accelerator": "cpu", "trainer.limit_train_batches": 8, "trainer.limit_val_batches": 8,
            "feature_cache.views": "null", "run.root": folder, "run.test_after_fit": False,
        }  # fmt: skip
        words = ["--config=configs/last4.yaml", "--config=configs/with/sample.yaml"]
        if root is None:
            options["data.source.size"] = 800
        else:
            words.append("--config=configs/with/folder.yaml")
            options["data.source.init_args.root"] = root
        words += [f"--{option}={value}" for option, value in options.items()]
        code = (
            "import resource, sys; from src.cli import main; main(sys.argv[1:]); "
            "print('PEAK', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "fit", *words], stdout=subprocess.PIPE, text=True, check=True
        )
    return int(done.stdout.rpartition("PEAK")[2]) / 1024  # Linux counts in KiB


def main() -> None:
    """Print one line a recipe, above what importing everything takes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--root", help="folder of images; the built-in sample without it")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    options = parser.parse_args()
    subprocess.run([sys.executable, "-c", "import src.cli"], check=True)
    base = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"importing everything: {base:.0f} MiB; training above that, batch {options.batch_size}:")
    for recipe in options.recipes:
        above = peak(RECIPES[recipe], options.batch_size, options.root) - base
        print(f"{recipe:6} {above:6.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
