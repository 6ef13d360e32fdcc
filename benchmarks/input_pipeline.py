"""Measure the input pipeline alone (index, transfer, augment, standardize) against the network's forward pass.

    python -m benchmarks.input_pipeline [--batch-size 32] [--rounds 60]

Images are random pixels in CIFAR-10's shape: the work does not depend on what they show.
"""

from __future__ import annotations

import argparse
import types
from itertools import chain, repeat
from typing import Any, cast

import numpy as np
import torch

from benchmarks.timing import finished, interleave
from src.data.datamodule import ImageDataModule
from src.data.sources import Images, Source
from src.model.classifier import TransferClassifier
from src.process import prepare_process

IMAGES = 20_000


class RandomPixels(Source):
    """Give random images at once."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple("abcdefghij")

    def prepare(self) -> None:
        """Nothing to prepare."""

    def load(self) -> dict[str, Images]:
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8)
        return {"train": Images(pixels, rng.integers(0, 10, IMAGES))}


def main() -> None:
    """Print images per second of both, and the pipeline's share."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    prepare_process()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = ImageDataModule(RandomPixels(), batch_size=options.batch_size, standardize="dataset")
    data.setup("fit")
    strategy = types.SimpleNamespace(root_device=device)
    place = {"global_rank": 0, "world_size": 1, "strategy": strategy}
    data.trainer = cast(Any, types.SimpleNamespace(training=True, current_epoch=0, limit_train_batches=1.0, **place))
    batches = chain.from_iterable(repeat(data.train_dataloader()))
    model = TransferClassifier(weights=None).to(device).eval()

    def pipeline() -> torch.Tensor:
        batch = next(batches)
        return data.on_after_batch_transfer(batch._replace(inputs=batch.inputs.to(device)), 0).inputs

    fixed = pipeline()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return model(fixed)

    calls = {"input pipeline": pipeline, "forward pass": forward}
    times = interleave({name: finished(call, device.type) for name, call in calls.items()}, options.rounds)
    print(f"batch {options.batch_size}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, (median, low, high) in times.items():
        rate = [options.batch_size / seconds for seconds in (median, high, low)]
        print(f"{name:15} {rate[0]:8.0f} images/s (quartiles {rate[1]:.0f} to {rate[2]:.0f})")
    print(f"share of the forward pass: {times['input pipeline'].median / times['forward pass'].median:.1%}")


if __name__ == "__main__":
    main()
