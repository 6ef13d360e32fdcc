"""Optimizer steps in fewer groups, and as ever."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from src.model.classifier import TransferClassifier
from src.model.lean_step import merged_groups, skip_capture_check
from src.model.muon import Muon

RATES = {"low": 0.01, "middle": 0.1, "high": 0.1}
OPTIMIZERS: list[Callable[[Any], torch.optim.Optimizer]] = [
    lambda groups: torch.optim.Adam(groups, lr=0.1, fused=True),
    lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3, foreach=False),
    lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.3),
    lambda groups: Muon(groups, lr=0.1),
]


def layers() -> dict[str, list[nn.Parameter]]:
    """Make a weight and a bias for each of three layers, the lowest frozen."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in RATES:
        made[layer] = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (4,))]
        for parameter in made[layer]:
            parameter.requires_grad_(layer != "low")
    return made


def groups(parameters: dict[str, list[nn.Parameter]]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for layer, (weight, bias) in parameters.items():
        made.append({"params": [weight], "layer": layer, "lr": RATES[layer]})
        made.append({"params": [bias], "layer": layer, "lr": RATES[layer], "weight_decay": 0})
    return made


def step(optimizer: torch.optim.Optimizer, parameters: dict[str, list[nn.Parameter]]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in (p for both in parameters.values() for p in both if p.requires_grad):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_merged_groups_make_the_same_steps(make: Callable[[Any], torch.optim.Optimizer]) -> None:
    parameters = layers()
    twins = copy.deepcopy(parameters)
    ours, theirs = make(groups(parameters)), make(groups(twins))
    step(theirs, twins)
    before = list(ours.param_groups)
    with merged_groups(ours):
        assert len(ours.param_groups) == (1 if ours.defaults["weight_decay"] == 0 else 2)  # biases do not decay
        step(ours, parameters)
    assert all(now is then for now, then in zip(ours.param_groups, before, strict=True))
    for layer in RATES:
        for mine, expected in zip(parameters[layer], twins[layer], strict=True):
            assert torch.equal(mine, expected)
            assert ours.state[mine].keys() == theirs.state[expected].keys()


def test_different_rates_stay_apart() -> None:
    parameters = layers()
    for parameter in parameters["low"]:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups(parameters), lr=0.1)
    with merged_groups(optimizer):
        rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates == {id(p): RATES[layer] for layer, both in parameters.items() for p in both}


def test_groups_come_back_after_an_error() -> None:
    optimizer = torch.optim.Adam(groups(layers()), lr=0.1)
    with pytest.raises(KeyboardInterrupt), merged_groups(optimizer):
        raise KeyboardInterrupt
    assert [group["layer"] for group in optimizer.param_groups] == [layer for layer in RATES for _ in range(2)]


def test_the_model_steps_with_merged_groups() -> None:
    model = TransferClassifier(weights=None)
    model.trainable_layers = 4
    optimizer = model.configure_optimizers()
    seen = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(len(optimizer.param_groups)))
    model.optimizer_step(0, 0, optimizer, lambda: None)
    assert seen == [1]
    assert len(optimizer.param_groups) > 2


def test_a_step_on_a_cpu_looks_for_no_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    parameter = nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.Adam([parameter])
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    skip_capture_check(optimizer)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("looked for an accelerator")

    monkeypatch.setattr("torch.accelerator.current_accelerator", fail)
    parameter.grad = torch.ones(())
    optimizer.step()
    assert parameter.item() != 0


def test_with_an_accelerator_torch_goes_on_checking(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(()))])
    check = optimizer._accelerator_graph_capture_health_check
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: torch.device("cuda"))
    skip_capture_check(optimizer)
    assert optimizer._accelerator_graph_capture_health_check == check
