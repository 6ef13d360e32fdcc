"""Time one training step in a plain loop: forward, backward and Adam or Muon, with a recipe's layers.

    python -m benchmarks.step [--layers 4] [--batch-size 32] [--image-size 32] [--half] [--muon]
        [--compile] [--cuda-graphs] [--unfused] [--device cuda]

With fewer than eighteen layers it starts from features, as a cached epoch does. Copied to an earlier commit that has
src/process.py, with arithmetic.py and timing.py, it tells what a change of the step brought.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.arithmetic import SIDE, matrix_products, matrix_rate, step_gflop
from benchmarks.timing import finished, interleave
from src.batch import Batch
from src.model import vgg
from src.model.classifier import TransferClassifier
from src.model.muon import Muon
from src.model.vgg import LAYERS, output_shapes
from src.process import prepare_process


def main() -> None:
    """Print the median time of a step, images per second, and the share of the rate of large matrix products."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=4, help="how many train, counted from the top")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=32, help="height and width in pixels")
    parser.add_argument("--half", action="store_true", help="bf16-mixed instead of single precision")
    parser.add_argument("--muon", action="store_true", help="staged's optimizer instead of Adam")
    parser.add_argument("--compile", action="store_true", help="as with model.compile")
    parser.add_argument("--cuda-graphs", action="store_true", help="as with model.cuda_graphs; on a GPU")
    parser.add_argument("--unfused", action="store_true", help="leave bias, ReLU and pooling to torch; on a GPU")
    parser.add_argument("--device", choices=list(SIDE), default="cpu")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    if options.cuda_graphs and options.device != "cuda":
        parser.error("--cuda-graphs needs --device cuda")
    if options.unfused and options.device != "cuda":
        parser.error("--unfused needs --device cuda")
    if options.unfused:
        vgg.fused_for = lambda x, layers: None
    prepare_process()
    torch.manual_seed(0)

    def make_optimizer(groups: Any) -> torch.optim.Optimizer:
        return Muon(groups, ns_steps=3) if options.muon else torch.optim.Adam(groups, lr=1e-4)

    def network(compile: bool) -> TransferClassifier:
        made = TransferClassifier(
            weights=None, image_size=options.image_size, optimizer=make_optimizer, compile=compile,
            cuda_graphs=options.cuda_graphs,
        ).to(options.device)  # fmt: skip
        made.trainable_layers = options.layers
        return made

    model = network(options.compile)
    model.replays = options.cuda_graphs
    optimizer = model.configure_optimizers()
    shape = output_shapes(options.image_size)[model.depth - 1] if model.depth else (3, *[options.image_size] * 2)
    dtype = torch.bfloat16 if options.half else torch.float32
    inputs = torch.rand(options.batch_size, *shape, device=options.device, dtype=dtype if model.depth else None)
    labels = torch.randint(0, 10, (options.batch_size,), device=options.device)
    batch = Batch(inputs, labels, labels, model.depth)

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.half):
            loss = model.training_step(batch)
        if not model.replays:
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()

    products = matrix_products(options.device, dtype)
    times = interleave({"step": finished(step, options.device), **products}, options.rounds)
    median, low, high = times["step"]
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {where}, {options.layers} of {len(LAYERS)} layers train")
    quartiles = f"(quartiles {1e3 * low:.1f} to {1e3 * high:.1f})"
    print(f"{1e3 * median:.1f} ms {quartiles}, {options.batch_size / median:,.0f} images/s")
    ours = step_gflop(network(compile=False), inputs, model.depth, options.half) * options.batch_size / median
    peak, side = matrix_rate((times[way] for way in products), options.device), SIDE[options.device]
    print(f"{ours:,.0f} GFLOP/s, {ours / peak:.0%} of the {peak:,.0f} of a product of {side:,} × {side:,} matrices")


if __name__ == "__main__":
    main()
