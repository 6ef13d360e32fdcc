"""Faster optimizer steps: few groups, none that is frozen, and no repeated search for a GPU.

A group of parameters a layer lets every layer have its rate. torch's optimizers work through the groups one by one,
frozen ones too, and each costs Python and kernel launches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from src.model.muon import Muon

_CONTENT = ("params", "layer")  # of a group; all else says how to update
_INDEPENDENT = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, Muon)
"""They update each parameter by itself, and write nothing into groups. Others may not."""


def step_in_fewer_groups(optimizer: torch.optim.Optimizer) -> None:
    """Show an optimizer, while it updates, what trains in one group for each combination of settings.

    Every parameter keeps its settings and its state, so the step is the same. Whatever else looks at the optimizer,
    hooks during backward and clipping too, sees the groups as they are.
    """
    if type(optimizer) not in _INDEPENDENT:
        return
    update = optimizer.step

    def step(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        self.param_groups = _merged(groups, self.state)
        try:
            update()
        finally:
            self.param_groups = groups
        return loss

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


def forget_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Do as `zero_grad`, but for torch's preparations, which take longer than this."""
    if type(optimizer).zero_grad is not torch.optim.Optimizer.zero_grad:
        optimizer.zero_grad()
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = None


def _merged(groups: list[dict[str, Any]], state: Mapping[Tensor, Any]) -> list[dict[str, Any]]:
    """Gather what trains by settings; what has just thawed apart, for SGD takes a group for all new or all known."""
    merged: list[tuple[dict[str, Any], bool, list[Tensor]]] = []
    for group in groups:
        trained = [parameter for parameter in group["params"] if parameter.requires_grad]
        if not trained:
            continue
        settings = {name: value for name, value in group.items() if name not in _CONTENT}
        for parameter in trained:
            has_state = bool(state.get(parameter))
            same = next((gathered for *key, gathered in merged if key == [settings, has_state]), None)
            if same is None:
                merged.append((settings, has_state, [parameter]))
            else:
                same.append(parameter)
    return [{**settings, "params": gathered} for settings, _, gathered in merged]


def skip_capture_check(optimizer: torch.optim.Optimizer) -> None:
    """Where there is no accelerator, look for one once instead of at every step.

    torch asks at every step whether a CUDA graph is being captured, and for that whether there is a GPU. Lightning has
    it answer by way of NVML, for which it searches the disk: a third of a millisecond in a training (torch 2.15).
    """
    if torch.accelerator.current_accelerator(check_available=True) is None:
        optimizer._accelerator_graph_capture_health_check = lambda: None  # type: ignore[method-assign]
