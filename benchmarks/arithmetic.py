"""How much a training step computes, and how fast the machine multiplies matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.timing import Quartiles, finished
from src.model import small_maps, vgg
from src.model.classifier import TransferClassifier

SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices, so large that a product takes milliseconds


def matrix_products(device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Callable[[], object]]:
    """Give each way in which a device may multiply large square matrices of side `SIDE`, to be timed."""
    square = torch.randn(SIDE[device], SIDE[device], device=device, dtype=dtype)
    ways = {"torch": finished(lambda: square @ square, device)}
    if device == "cpu" and small_maps.has_faster_product(square):
        ways["oneDNN"] = lambda: small_maps.faster_product(square, square)
    return ways


def matrix_rate(times: Iterable[Quartiles], device: str = "cpu") -> float:
    """Work out the rate of the fastest way, in GFLOP/s."""
    return max(2 * SIDE[device] ** 3 / each.median / 1e9 for each in times)


def step_gflop(model: TransferClassifier, inputs: Tensor, entry: int = 0, half: bool = False) -> float:
    """Count the GFLOP an image that a training step computes, forward and backward, without padding it leaves out.

    Args:
        model: The network, not compiled: a compiled one hides what it computes.
        inputs: What enters layer `entry`.
        entry: Number of the first layer that is computed.
        half: Whether to compute as in bf16-mixed.
    """
    labels = torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)
    own = {torch.ops.mkldnn._linear_pointwise: _product_flop, torch.ops.aten.addmm_: _added_product_flop}
    # Kernels of our own for GPUs would not be counted; earlier commits have none.
    plain = patch.object(vgg, "fused_for", lambda x, layers: None, create=True)
    with plain, FlopCounterMode(display=False, custom_mapping=own) as counter:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=half):
            loss = torch.nn.functional.cross_entropy(model(inputs, entry), labels)
        loss.backward()
    model.zero_grad()
    return counter.get_total_flops() / len(inputs) / 1e9


def _product_flop(left: Sequence[int], right: Sequence[int], *_: object, **__: object) -> int:
    """Count a product of (N, K) with the transpose of (M, K), whose shapes these are."""
    return 2 * math.prod(left) * right[0]


def _added_product_flop(_: Sequence[int], left: Sequence[int], right: Sequence[int], **__: object) -> int:
    """Count a product of (N, K) with (K, M) that is added to something."""
    return 2 * math.prod(left) * right[1]
