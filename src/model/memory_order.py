"""Optimizer steps on weights whose order in memory is not that of their shape.

Kernels lie channels last, or tap by tap (`small_maps`). torch's fused Adam for CPUs copies such weights, their
gradients and its averages before it updates them, which takes longer than the update; and where only one of them lies
in another order, it takes the elements of one for those of the other (seen in torch 2.15).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def step_in_memory_order(optimizer: torch.optim.Optimizer) -> None:
    """Show a fused Adam on a CPU its tensors with dimensions in the order in which the weight lies in memory.

    Adam treats every element alike, so the step is the same. What any optimizer restores from a checkpoint is put into
    the order of its weight.
    """
    optimizer.register_load_state_dict_post_hook(_order_state)
    if isinstance(optimizer, torch.optim.Adam):
        _gather_in_memory_order(optimizer)


def _order_state(optimizer: torch.optim.Optimizer) -> None:
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _gather_in_memory_order(optimizer: torch.optim.Adam) -> None:
    gather = optimizer._init_group

    def gather_in_order(
        group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], *others: list[Tensor]
    ) -> Any:
        result = gather(group, parameters, gradients, *others)
        if group["fused"] and parameters and parameters[0].device.type == "cpu":
            orders = [None if parameter.is_contiguous() else memory_order(parameter) for parameter in parameters]
            for tensors in (parameters, gradients, *others):  # others: averages, and numbers of steps
                tensors[:] = [
                    t.permute(order) if order and t.ndim else t for t, order in zip(tensors, orders, strict=False)
                ]
            gradients[:] = [gradient.contiguous() for gradient in gradients]  # copies only what lies otherwise
        return result

    optimizer._init_group = gather_in_order  # type: ignore[method-assign]


def memory_order(tensor: Tensor) -> list[int]:
    """List the dimensions, those first along which neighbours lie furthest apart."""
    return sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
