"""The optimizer of a training: one group a layer, and a step as lean as its kind allows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from src.errors import UserError
from src.model.lean_step import skip_capture_check, step_in_fewer_groups
from src.model.memory_order import step_in_memory_order
from src.model.muon import Muon


def parameter_groups(layers: Iterable[tuple[str, nn.Module]]) -> list[dict[str, Any]]:
    """Group all parameters, frozen ones included, by layer and by whether weight decay applies.

    The order and the number of groups never change, so a schedule or a checkpoint fits at every stage.

    Args:
        layers: Names and modules, from the bottom up.

    Returns:
        Groups in the order of the layers; each with its layer's name under `layer`.
    """
    groups: list[dict[str, Any]] = []
    for name, layer in layers:
        parameters = list(layer.parameters())
        decayed = [parameter for parameter in parameters if parameter.ndim > 1]
        spared = [parameter for parameter in parameters if parameter.ndim <= 1]
        if decayed:
            groups.append({"params": decayed, "layer": name})
        if spared:
            groups.append({"params": spared, "layer": name, "weight_decay": 0.0})
    return groups


def build_optimizer(
    make: OptimizerCallable, groups: list[dict[str, Any]], cuda_graphs: bool = False
) -> torch.optim.Optimizer:
    """Make an optimizer, fused where torch can and nobody decided otherwise.

    Args:
        make: What makes it from groups.
        groups: As `parameter_groups` gives them.
        cuda_graphs: Whether Muon records its orthogonal steps.

    Raises:
        UserError: Its options do not go together.
    """
    try:
        optimizer = make(groups)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"model.optimizer cannot be made: {str(error).rstrip('.')}.") from error
    undecided = all(optimizer.defaults.get(kind) is None for kind in ("fused", "foreach"))
    if undecided and isinstance(optimizer, (torch.optim.Adam, torch.optim.SGD)):  # torch would not take the fastest
        for settings in (optimizer.defaults, *optimizer.param_groups):
            settings["fused"] = True
    vars(optimizer)["_step_supports_amp_scaling"] = False  # or Lightning would not clip what is fused
    if isinstance(optimizer, Muon):
        optimizer.cuda_graphs = cuda_graphs
    step_in_memory_order(optimizer)
    skip_capture_check(optimizer)
    step_in_fewer_groups(optimizer)
    _keep_settings(optimizer)
    return optimizer


def _keep_settings(optimizer: torch.optim.Optimizer) -> None:
    """Let a run that goes on take its settings from its configuration, as its rates, and not from the checkpoint."""
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]

    def restore(optimizer: torch.optim.Optimizer) -> None:
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
            there = group.get("fused") or group.get("capturable")
            for parameter in group["params"]:  # torch has put these numbers where the old settings want them
                state = optimizer.state.get(parameter, {})
                if isinstance(state.get("step"), Tensor) and (there or isinstance(optimizer, torch.optim.Adam)):
                    state["step"] = state["step"].to(parameter.device if there else "cpu", torch.float32)

    optimizer.register_load_state_dict_post_hook(restore)
