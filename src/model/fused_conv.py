"""A 3×3 convolution on a GPU, with bias, ReLU and pooling in one pass over its output instead of up to four.

cuDNN's convolutions of a training neither add the bias nor rectify, and torch then reads and writes all of the output
for each of them, and again for each of their gradients: at 32×32 that took nearly as long as the convolutions. The
kernels are written in Triton, which comes with torch on Linux and compiles them when they are first called.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from src.replay import wait_for

_TILE = 4096  # numbers that a kernel holds at once
_PROGRAMS = 1024  # at most, of those that add up a gradient: each leaves a row to be added up
_NOWHERE = tl.constexpr(4)  # the place of a maximum that was rectified to zero
_GEOMETRY = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups
_ALIGNED = 8  # channels; tensor cores take no three of them
_PATCH = 32  # numbers around a pixel that a kernel of the first layer meets, filled up
_PIXELS = 128  # that a program of the first layer takes at once


def convolve(maps: Tensor, weight: Tensor, bias: Tensor, pools: bool) -> Tensor:
    """Do what `relu(conv2d(maps, weight, bias, padding=1))` does, and `max_pool2d(…, 2)` after it if asked.

    In bfloat16 and float16 numbers are rounded where torch rounds them, but for the bias's gradient, which is added up
    in single precision. Gradients have no gradients of their own.

    Args:
        maps: (N, I, H, W), not empty, in bfloat16, float16 or float32, as are the others.
        weight: (O, I, 3, 3); O a power of two, at most 2,048.
        bias: (O,).
        pools: Whether to take the largest of every 2×2.

    Returns:
        (N, O, H, W), or (N, O, H // 2, W // 2), channels last in memory.
    """
    few = maps.shape[1] * 9 <= _PATCH and maps.dtype != torch.float32 and not maps.requires_grad
    if few and not pools:
        return _FirstConvolution.apply(maps, weight, bias)
    return _Convolution.apply(maps, weight, bias, pools)


def try_out(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> None:
    """Compile and run the kernels for so many channels once, and raise what goes wrong: Triton needs a C compiler."""
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for pools in (False, True):
            sizes = (2, inputs, 4, 4), (outputs, inputs, 3, 3), (outputs,)
            maps, weight, bias = (torch.zeros(size, device=device, dtype=dtype) for size in sizes)
            out = convolve(maps, weight.requires_grad_(), bias.requires_grad_(), pools)
            torch.autograd.grad(out.sum(), (weight, bias))
    wait_for(device)


class _FirstConvolution(torch.autograd.Function):
    """Convolve and rectify images, whose three channels take cuDNN ten times as long as their bytes would allow."""

    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        maps = maps.contiguous(memory_format=torch.channels_last)
        images, inputs, height, width = maps.shape
        out = maps.new_empty(images, height, width, len(weight)).permute(0, 3, 1, 2)
        pixels = images * height * width
        _first_kernel[(triton.cdiv(pixels, _PIXELS),)](
            maps, _as_matrix(weight), bias, out, pixels, height, width, inputs, len(weight), _PIXELS, _PATCH
        )
        ctx.save_for_backward(maps, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, out = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        (images, inputs, height, width), channels = maps.shape, grad.shape[1]
        pixels = images * height * width
        sums = _partial_sums(grad, triton.cdiv(pixels, _PIXELS), _PATCH + 1, channels)
        _first_backward_kernel[(len(sums),)](
            maps, grad, out, sums, pixels, height, width, inputs, channels, _PIXELS, _PATCH
        )
        total = sums.sum(0).to(grad.dtype)
        for_weight = total[: inputs * 9].view(3, 3, inputs, channels).permute(3, 2, 0, 1)
        return None, for_weight, total[_PATCH]


def _as_matrix(weight: Tensor) -> Tensor:
    """Lay out kernels (O, I, 3, 3) as (_PATCH, O): taps line by line, the channels of each, then zeros."""
    matrix = weight.new_zeros(_PATCH, len(weight))
    matrix[: weight[0].numel()] = weight.permute(2, 3, 1, 0).flatten(0, 2)
    return matrix


@triton.jit
def _patches(maps, pixel, pixels, height, width, inputs: tl.constexpr, patch: tl.constexpr):
    """Load what a 3×3 kernel meets around each pixel: (pixels, patch), with zeros beyond borders and behind."""
    number = tl.arange(0, patch)
    tap, channel = number // inputs, number % inputs
    down, right = tap // 3 - 1, tap % 3 - 1
    row = (pixel // width % height)[:, None] + down[None, :]
    column = (pixel % width)[:, None] + right[None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source = (pixel[:, None] + (down * width + right)[None, :]) * inputs + channel[None, :]
    return tl.load(maps + source, mask=inside & (tap < 9)[None, :] & (pixel < pixels)[:, None], other=0.0)


@triton.jit
def _first_kernel(
    maps, matrix, bias, out, pixels, height, width,
    inputs: tl.constexpr, channels: tl.constexpr, rows: tl.constexpr, patch: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    channel = tl.arange(0, channels)
    found = _patches(maps, pixel, pixels, height, width, inputs, patch)
    weight = tl.load(matrix + tl.arange(0, patch)[:, None] * channels + channel[None, :])
    value = tl.dot(found, weight).to(out.dtype.element_ty).to(tl.float32)
    value = (value + tl.load(bias + channel)[None, :].to(tl.float32)).to(out.dtype.element_ty)
    at = pixel[:, None] * channels + channel[None, :]
    tl.store(out + at, tl.where(value < 0, 0.0, value), mask=(pixel < pixels)[:, None])


@triton.jit
def _first_backward_kernel(
    maps, grad, out, sums, pixels, height, width,
    inputs: tl.constexpr, channels: tl.constexpr, rows: tl.constexpr, patch: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, channels)
    for_weight = tl.zeros((patch, channels), tl.float32)
    for_bias = tl.zeros((rows, channels), tl.float32)
    for start in range(tl.program_id(0) * rows, pixels, tl.num_programs(0) * rows):
        pixel = start + tl.arange(0, rows).to(tl.int64)
        at, inside = pixel[:, None] * channels + channel[None, :], (pixel < pixels)[:, None]
        value = tl.load(grad + at, mask=inside, other=0.0)
        value = tl.where(tl.load(out + at, mask=inside, other=0.0) <= 0, 0.0, value).to(grad.dtype.element_ty)
        found = _patches(maps, pixel, pixels, height, width, inputs, patch)
        for_weight = tl.dot(tl.trans(found), value, for_weight)
        for_bias += value.to(tl.float32)
    first = sums + tl.program_id(0) * (patch + 1) * channels
    tl.store(first + tl.arange(0, patch)[:, None] * channels + channel[None, :], for_weight)
    tl.store(first + patch * channels + channel, tl.sum(for_bias, 0))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, pools: bool) -> Tensor:
        maps, wide = _aligned(maps), _aligned(weight)
        out = torch.ops.aten.convolution(maps, wide, None, *_GEOMETRY)
        out = out.contiguous(memory_format=torch.channels_last)
        if pools:
            result, kept = _pool(out, bias)
        else:
            result = kept = _rectify(out, bias)
        ctx.pools, ctx.inputs = pools, weight.shape[1]
        ctx.save_for_backward(maps, wide, kept)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, kept = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad, for_bias = _unpool(grad, kept, maps.shape[2:]) if ctx.pools else _unrectify(grad, kept)
        wanted = [*ctx.needs_input_grad[:2], False]
        for_maps = for_weight = None
        if any(wanted):
            for_maps, for_weight, _ = torch.ops.aten.convolution_backward(grad, maps, weight, None, *_GEOMETRY, wanted)
        if for_weight is not None:
            for_weight = for_weight[:, : ctx.inputs]
        if for_maps is not None:
            for_maps = for_maps[:, : ctx.inputs]
        return for_maps, for_weight, for_bias.to(grad.dtype), None


def _aligned(tensor: Tensor) -> Tensor:
    """Add channels of zeros, if there are too few."""
    channels = tensor.shape[1]
    if channels >= _ALIGNED:
        return tensor
    wide = tensor.new_zeros(len(tensor), *tensor.shape[2:], _ALIGNED).permute(0, 3, 1, 2)
    wide[:, :channels] = tensor
    return wide


def _rectify(maps: Tensor, bias: Tensor) -> Tensor:
    """Add the bias, and rectify, in place."""
    channels = len(bias)
    pixels = maps.numel() // channels
    rows = _rows(channels)
    _rectify_kernel[(triton.cdiv(pixels, rows),)](maps, bias, pixels, channels, rows)
    return maps


@triton.jit
def _rectify_kernel(maps, bias, pixels, channels: tl.constexpr, rows: tl.constexpr):
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    channel = tl.arange(0, channels)
    at, inside = pixel[:, None] * channels + channel[None, :], (pixel < pixels)[:, None]
    value = _biased(maps + at, tl.load(bias + channel)[None, :], inside)
    tl.store(maps + at, tl.where(value < 0, 0.0, value).to(maps.dtype.element_ty), mask=inside)


@triton.jit
def _biased(place, bias, inside):
    """Load numbers and add a bias to them, rounded as they are stored."""
    value = tl.load(place, mask=inside, other=0.0)
    return (value.to(tl.float32) + bias.to(tl.float32)).to(value.dtype).to(tl.float32)


def _pool(maps: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Add the bias, take the largest of every 2×2, and rectify; tell which: 0 to 3, or 4 if none is positive."""
    images, channels, height, width = maps.shape
    shape = (images, height // 2, width // 2, channels)
    largest, places = maps.new_empty(shape), maps.new_empty(shape, dtype=torch.uint8)
    pixels = largest.numel() // channels
    rows = _rows(channels) // 2
    _pool_kernel[(triton.cdiv(pixels, rows),)](
        maps, bias, largest, places, pixels, height // 2, width // 2, height, width, channels, rows
    )
    return largest.permute(0, 3, 1, 2), places.permute(0, 3, 1, 2)


@triton.jit
def _pool_kernel(
    maps, bias, largest, places, pixels, out_height, out_width, height, width,
    channels: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)
    channel = tl.arange(0, channels)
    inside = (pixel < pixels)[:, None]
    first = _first_of_four(pixel, out_height, out_width, height, width)
    own = tl.load(bias + channel)[None, :]
    best = _biased(maps + first[:, None] * channels + channel[None, :], own, inside)
    place = tl.zeros((rows, channels), tl.int32)
    for number in tl.static_range(1, 4):
        source = first + (number // 2) * width + number % 2
        value = _biased(maps + source[:, None] * channels + channel[None, :], own, inside)
        better = (value > best) | (value != value)  # torch takes the last that is no number
        best, place = tl.where(better, value, best), tl.where(better, number, place)
    place = tl.where(best <= 0, _NOWHERE, place)
    at = pixel[:, None] * channels + channel[None, :]
    tl.store(largest + at, tl.where(best < 0, 0.0, best).to(largest.dtype.element_ty), mask=inside)
    tl.store(places + at, place.to(tl.uint8), mask=inside)


@triton.jit
def _first_of_four(pixel, out_height, out_width, height, width):
    """Tell which pixel is the upper left one of the four that a pooled one is made of."""
    image = pixel // (out_height * out_width)
    within = pixel % (out_height * out_width)
    return (image * height + within // out_width * 2) * width + within % out_width * 2


def _unrectify(grad: Tensor, rectified: Tensor) -> tuple[Tensor, Tensor]:
    """Let a gradient, (N, O, H, W), through where something positive was; give the bias's too, (O,), float32."""
    channels = grad.shape[1]
    through = torch.empty_like(grad, memory_format=torch.channels_last)
    pixels, rows = grad.numel() // channels, _rows(channels) // 2
    sums = _partial_sums(grad, triton.cdiv(pixels, rows), channels)
    _unrectify_kernel[(len(sums),)](grad, rectified, through, sums, pixels, channels, rows)
    return through, sums.sum(0)


@triton.jit
def _unrectify_kernel(grad, rectified, through, sums, pixels, channels: tl.constexpr, rows: tl.constexpr):
    channel = tl.arange(0, channels)
    total = tl.zeros((rows, channels), tl.float32)
    for start in range(tl.program_id(0) * rows, pixels, tl.num_programs(0) * rows):
        pixel = start + tl.arange(0, rows).to(tl.int64)
        at, inside = pixel[:, None] * channels + channel[None, :], (pixel < pixels)[:, None]
        value = tl.load(grad + at, mask=inside, other=0.0)
        value = tl.where(tl.load(rectified + at, mask=inside, other=0.0) <= 0, 0.0, value)
        tl.store(through + at, value, mask=inside)
        total += value.to(tl.float32)
    tl.store(sums + tl.program_id(0) * channels + channel, tl.sum(total, 0))


def _unpool(grad: Tensor, places: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
    """Give a gradient, (N, O, h, w), to the one of each four that it comes from; and the bias's, (O,), float32.

    Args:
        grad: Channels last in memory, as the result is.
        places: What `_pool` told.
        size: Height and width of what was pooled.
    """
    channels, (height, width) = grad.shape[1], size
    make = torch.zeros if height % 2 or width % 2 else torch.empty  # a last line or column has no part in it
    through = make(len(grad), height, width, channels, dtype=grad.dtype, device=grad.device)
    pixels, rows = grad.numel() // channels, _rows(channels) // 2
    sums = _partial_sums(grad, triton.cdiv(pixels, rows), channels)
    _unpool_kernel[(len(sums),)](grad, places, through, sums, pixels, *grad.shape[2:], height, width, channels, rows)
    return through.permute(0, 3, 1, 2), sums.sum(0)


@triton.jit
def _unpool_kernel(
    grad, places, through, sums, pixels, out_height, out_width, height, width,
    channels: tl.constexpr, rows: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, channels)
    total = tl.zeros((rows, channels), tl.float32)
    for start in range(tl.program_id(0) * rows, pixels, tl.num_programs(0) * rows):
        pixel = start + tl.arange(0, rows).to(tl.int64)
        at, inside = pixel[:, None] * channels + channel[None, :], (pixel < pixels)[:, None]
        value = tl.load(grad + at, mask=inside, other=0.0)
        place = tl.load(places + at, mask=inside, other=_NOWHERE)
        first = _first_of_four(pixel, out_height, out_width, height, width)
        for number in tl.static_range(4):
            target = first + (number // 2) * width + number % 2
            tl.store(
                through + target[:, None] * channels + channel[None, :],
                tl.where(place == number, value, 0.0).to(value.dtype), mask=inside,
            )  # fmt: skip
        total += tl.where(place == _NOWHERE, 0.0, value).to(tl.float32)
    tl.store(sums + tl.program_id(0) * channels + channel, tl.sum(total, 0))


def _partial_sums(grad: Tensor, blocks: int, *shape: int) -> Tensor:
    """Make room for what each program adds up, for as many programs as there are blocks of pixels, within a limit."""
    return grad.new_empty(min(blocks, _PROGRAMS), *shape, dtype=torch.float32)


def _rows(channels: int) -> int:
    """Give how many pixels a kernel takes at once that holds one number for each of a pixel's channels."""
    return _TILE // channels
