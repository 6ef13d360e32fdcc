"""A 3×3 convolution for maps of a few pixels, where an ordinary one would multiply much padding.

On 2×2 maps a padded 3×3 convolution makes 36 products of a pixel with a kernel's tap, and 20 of them are with zeros; on
4×4 maps 44 of 144. Here each tap is a matrix, multiplied with the pixels it meets and no others. Kernels are stored tap
by tap, so that nothing is gathered: reading weights is what small batches spend their time on.

In bfloat16 a pixel is rounded after each of its taps, up to nine times, where an ordinary convolution rounds once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TAPS = 3


def store_by_tap(weight: Tensor) -> None:
    """Rearrange a convolution's weight in memory as (3, 3, O, I); its shape remains (O, I, 3, 3)."""
    weight.data = weight.data.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


def convolve_by_tap(maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Do what `conv2d(maps, weight, bias, padding=1)` does, to float tolerance.

    Args:
        maps: (N, I, H, W); fastest if in memory as (H, W, N, I), as the result is.
        weight: (O, I, 3, 3), stored by tap.
        bias: (O,).
    """
    lines = maps.permute(2, 3, 0, 1).contiguous()
    return _Convolution.apply(lines, weight.permute(2, 3, 0, 1), bias).permute(2, 3, 0, 1)


class _Convolution(torch.autograd.Function):
    """Convolve (H, W, N, I) with (3, 3, O, I) into (H, W, N, O)."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(maps, weight)
        out = maps.new_empty(*maps.shape[:3], len(bias))
        out[:] = bias
        _add_product(_rows(out), _rows(maps), weight[1, 1].t())
        for tap, target, source in _rows_of_pixels(*maps.shape[:2]):
            _add_product(_rows(out[target]), _rows(maps[source]), weight[tap].t())
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        grad = grad.contiguous()
        for_maps = for_weight = for_bias = None
        if ctx.needs_input_grad[0]:
            for_maps = torch.zeros_like(maps)
            _add_product(_rows(for_maps), _rows(grad), weight[1, 1])
            for tap, target, source in _rows_of_pixels(*maps.shape[:2]):
                _add_product(_rows(for_maps[source]), _rows(grad[target]), weight[tap])
        if ctx.needs_input_grad[1]:
            for_weight = torch.empty_like(weight)
            for tap, target, source in _pixels(*maps.shape[:2]):
                _put_product(for_weight[tap], _rows(grad[target]).t(), _rows(maps[source]))
        if ctx.needs_input_grad[2]:
            for_bias = _rows(grad).sum(dim=0)
        return for_maps, for_weight, for_bias


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, (N, K) and (K, M), to a total of (N, M)."""
    if has_faster_product(left):
        total.add_(faster_product(left, right))
    else:
        total.addmm_(left, right)


def _put_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    if has_faster_product(left):
        out.copy_(faster_product(left, right))
    else:
        torch.mm(left, right, out=out)


def has_faster_product(matrix: Tensor) -> bool:
    """Tell whether there is more than torch's own product, which in single precision is MKL's.

    MKL was seen to run at half of oneDNN's rate on an AMD EPYC.
    """
    return matrix.dtype == torch.float32 and _HAS_ONEDNN


def faster_product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply (N, K) with (K, M), where `has_faster_product`."""
    return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")


_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_Tap = tuple[int, int]
_Line = tuple[int, slice]
_Area = tuple[slice, slice]


def _pixels(height: int, width: int) -> Iterator[tuple[_Tap, _Area, _Area]]:
    """For each tap, give the pixels it writes to and, in the same order, those it reads."""
    for y in range(TAPS):
        for x in range(TAPS):
            (target_y, source_y), (target_x, source_x) = _overlap(y - 1, height), _overlap(x - 1, width)
            yield (y, x), (target_y, target_x), (source_y, source_x)


def _rows_of_pixels(height: int, width: int) -> Iterator[tuple[_Tap, _Area | _Line, _Area | _Line]]:
    """Do the same, except for the central tap, in pieces that lie in memory without gaps."""
    for tap, (target_y, target_x), (source_y, source_x) in _pixels(height, width):
        if tap == (1, 1):
            continue
        if tap[1] == 1:  # whole lines of the map
            yield tap, (target_y, target_x), (source_y, source_x)
            continue
        for line in range(target_y.stop - target_y.start):
            yield tap, (target_y.start + line, target_x), (source_y.start + line, source_x)


def _overlap(offset: int, length: int) -> tuple[slice, slice]:
    """Give the targets i, and the sources i + offset, that both lie within the length."""
    begin, end = max(0, -offset), min(length, length - offset)
    return slice(begin, end), slice(begin + offset, end + offset)


def _rows(pixels: Tensor) -> Tensor:
    return pixels.reshape(-1, pixels.shape[-1])
