"""Time one training step in a plain loop: forward, backward and Adam, with a recipe's layers.

    python -m benchmarks.step [--layers 4] [--batch-size 32] [--half] [--rounds 50]

With fewer than eighteen layers it starts from features, as a cached epoch does. Copied to an earlier commit, it tells
what a change of the step brought.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch.nn import functional as F

from benchmarks.timing import interleave
from src.model.classifier import TransferClassifier
from src.model.vgg import LAYERS, output_shapes
from src.process import prepare_process


def main() -> None:
    """Print the median time of a step, and images per second."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4, help="how many train, counted from the top")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--half", action="store_true", help="bf16-mixed instead of single precision")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    prepare_process()
    torch.manual_seed(0)
    model = TransferClassifier(weights=None)
    model.trainable_layers = options.layers
    optimizer = model.configure_optimizers()
    shape = output_shapes(32)[model.depth - 1] if model.depth else (3, 32, 32)
    inputs = torch.rand(options.batch_size, *shape, dtype=torch.bfloat16 if options.half and model.depth else None)
    labels = torch.randint(0, 10, (options.batch_size,))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=options.half):
            loss = F.cross_entropy(model(inputs, model.depth), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    median, low, high = interleave({"step": step}, options.rounds)["step"]
    print(f"torch {torch.__version__}, {os.cpu_count()} CPU cores, {options.layers} of {len(LAYERS)} layers train")
    times = f"{1e3 * median:.1f} ms (quartiles {1e3 * low:.1f} to {1e3 * high:.1f})"
    print(f"{times}, {options.batch_size / median:,.0f} images/s")


if __name__ == "__main__":
    main()
