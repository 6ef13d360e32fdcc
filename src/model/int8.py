"""Frozen convolutions in eight-bit integers, on CPUs with instructions for them.

Weights have a scale for each output channel, and what flows between layers has one a layer, measured on sample images
beforehand. Source: B. Jacob and others, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018. The convolutions are oneDNN's, by the operators that torch's compiler uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_GEOMETRY = ([1, 1], [1, 1], [1, 1], 1)  # stride, padding, dilation, groups
LEVELS = 255  # of an unsigned byte
_WEIGHT_LEVELS = 127  # on either side of zero
_AT_ONCE = 32  # images, to spare memory
_TINY = 1e-30  # instead of nothing, where a scale must not be zero


class Ranges(NamedTuple):
    """What values flow between the frozen layers."""

    low: float
    """Least value of the images."""
    high: float
    """Largest value of the images."""
    limits: list[float]
    """For each convolution, the largest value of its output; larger ones count as this one."""

    @property
    def scale(self) -> float:
        """What one level of the last layer's output stands for."""
        return self.limits[-1] / LEVELS


UNSUPPORTED = (
    "model.frozen_precision int8 needs a processor with AVX-512 VNNI instructions and a torch with oneDNN: "
    "use bf16, or same."
)


def supported() -> bool:
    """Tell whether this torch and this processor compute in eight bits, fast and without overflow."""
    has_vnni = getattr(torch.cpu, "_is_vnni_supported", lambda: False)  # that of AVX-512
    has_operators = torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise")
    return has_operators and bool(has_vnni())


@torch.no_grad()
def measure(layers: Sequence[nn.Module], images: Tensor) -> Ranges:
    """Run the layers in full precision, and note the largest values.

    Args:
        layers: 3×3 convolutions that end in a ReLU, and poolings.
        images: Standardized, (N, 3, H, W).
    """
    largest = [[part.max().item() for part in _outputs(layers, some)] for some in images.split(_AT_ONCE)]
    # Three digits suffice, and are the same wherever sums are rounded a little differently.
    limits = [float(f"{max(*values, _TINY):.3g}") for values in zip(*largest, strict=True)]
    return Ranges(min(images.min().item(), 0.0), max(images.max().item(), _TINY), limits)


def _outputs(layers: Sequence[nn.Module], values: Tensor) -> Iterator[Tensor]:
    for layer in layers:
        values = layer(values)
        if isinstance(layer, nn.Conv2d):
            yield values


class Int8Layers:
    """Compute layers in eight bits, in a form made once for weights that do not change.

    Args:
        layers: As in `measure`, from the first layer of the network on.
        ranges: What `measure` found for them.
    """

    def __init__(self, layers: Sequence[nn.Module], ranges: Ranges) -> None:
        self.scale = (ranges.high - ranges.low) / LEVELS
        self.zero_point = round(-ranges.low / self.scale)  # the padding's level, which stands for exactly nothing
        self.steps: list[Callable[[Tensor], Tensor]] = []
        scale, zero_point = self.scale, self.zero_point
        limits = iter(ranges.limits)
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                out_scale = next(limits) / LEVELS
                self.steps.append(_Convolution(layer, scale, zero_point, out_scale))
                scale, zero_point = out_scale, 0
            else:
                self.steps.append(_max_pool)

    def __call__(self, images: Tensor) -> Tensor:
        """Turn standardized images, (N, 3, H, W), into levels, uint8 of (N, C, h, w); `Ranges.scale` is their unit."""
        levels = (images / self.scale + self.zero_point).round_().clamp_(0, LEVELS)
        levels = levels.to(torch.uint8).contiguous(memory_format=torch.channels_last)
        for step in self.steps:
            levels = step(levels)
        return levels


class _Convolution:
    """One 3×3 convolution with zero padding, and its ReLU."""

    def __init__(self, layer: nn.Conv2d, scale: float, zero_point: int, out_scale: float) -> None:
        weight = layer.weight.detach()
        self.scale, self.zero_point, self.out_scale = scale, zero_point, out_scale
        self.weight_scales = weight.abs().amax((1, 2, 3)).clamp(min=_TINY) / _WEIGHT_LEVELS
        self.weight_zeros = torch.zeros(len(weight), dtype=torch.int64)
        self.bias = layer.bias.detach().clone() if layer.bias is not None else None
        levels = (weight / self.weight_scales.view(-1, 1, 1, 1)).round().to(torch.int8).contiguous()
        self.packed: Any = torch.ops.onednn.qconv_prepack(
            levels, self.weight_scales, scale, zero_point, *_GEOMETRY, None
        )

    def __call__(self, levels: Tensor) -> Tensor:
        return torch.ops.onednn.qconv2d_pointwise(
            levels, self.scale, self.zero_point, self.packed, self.weight_scales, self.weight_zeros, self.bias,
            *_GEOMETRY, self.out_scale, 0, torch.uint8, "relu", [], "",
        )  # fmt: skip


def _max_pool(maps: Tensor) -> Tensor:
    """Pool 2×2 to their largest: torch's own pooling of bytes counts its places in bytes too, and runs out of them."""
    height, width = (side // 2 * 2 for side in maps.shape[-2:])
    lines = torch.maximum(maps[:, :, 0:height:2, :width], maps[:, :, 1:height:2, :width])
    return torch.maximum(lines[..., 0::2], lines[..., 1::2]).contiguous(memory_format=torch.channels_last)
