"""Whether convolutions take bias, ReLU and pooling along, by kernels of our own for GPUs (`fused_conv`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from src.errors import say

_CAPABLE = (8, 0)  # compute capability: Ampere, the oldest GPUs with bfloat16
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # of torch's modules

Convolve = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def fused_for(x: Tensor, layers: Sequence[nn.Module]) -> Convolve | None:
    """Find what runs convolutions in one pass (see `fused_conv.convolve`); None where torch's own are to run them.

    Args:
        x: What enters the first layer.
        layers: Those to be run, one after the other.
    """
    if not x.is_cuda or len(x) == 0 or torch.compiler.is_compiling():
        return None
    if x.device.index != torch.cuda.current_device():  # where Triton's kernels would run
        return None
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    if not convolutions or any(map(is_watched, layers)):
        return None
    dtype = working_dtype(x.device, convolutions[0].weight)
    sizes = {(layer.in_channels, layer.out_channels) for layer in convolutions}
    if dtype == torch.float64 or not all(runs(x.device, dtype, *size) for size in sorted(sizes)):
        return None
    from src.model.fused_conv import convolve  # Triton is not part of every torch

    return convolve


def is_watched(layer: nn.Module) -> bool:
    """Tell whether somebody wants to see what enters or leaves a layer, which must then be called by itself."""
    return any(getattr(layer, hooks) for hooks in _HOOKS)


def working_dtype(device: torch.device, weight: Tensor) -> torch.dtype:
    """Tell what numbers a layer with this weight computes with, now."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return weight.dtype


@cache
def runs(device: torch.device, dtype: torch.dtype, inputs: int, outputs: int) -> bool:
    """Try whether this GPU runs a convolution of so many channels; say so if it fails."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < _CAPABLE:
        return False
    try:
        from src.model.fused_conv import try_out

        try_out(device, dtype, inputs, outputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever importing, compiling and loading meet
        _tell(str(error).strip().partition("\n")[0] or type(error).__name__)
        return False
    return True


@cache
def _tell(why: str) -> None:
    rank_zero_only(say)(f"convolutions are slower than they could be: Triton does not work here ({why})")
