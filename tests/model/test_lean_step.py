"""Optimizer steps in fewer groups, and as ever."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from src.model.classifier import TransferClassifier
from src.model.lean_step import forget_gradients, skip_capture_check, step_in_fewer_groups
from src.model.muon import Muon

RATES = {"low": 0.01, "middle": 0.1, "high": 0.1}
Make = Callable[[Any], torch.optim.Optimizer]
Layers = dict[str, list[nn.Parameter]]
OPTIMIZERS: list[Make] = [
    lambda groups: torch.optim.Adam(groups, lr=0.1, fused=True),
    lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3, foreach=False),
    lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.3),
    lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, weight_decay=0.3, fused=True),
    lambda groups: Muon(groups, lr=0.1),
    lambda groups: Muon(groups, lr=0.1, weight_decay=0.0),  # so that weights and biases come into one group
]


class Counting(torch.optim.SGD):
    """Write into its groups, as some optimizers do."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group in self.param_groups:
            group["made"] = group.get("made", 0) + 1
        return super().step(closure)


def layers() -> Layers:
    """Make a weight and a bias for each of three layers, the lowest frozen."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for layer in RATES:
        made[layer] = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (4,))]
        for parameter in made[layer]:
            parameter.requires_grad_(layer != "low")
    return made


def groups(parameters: Layers) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for layer, (weight, bias) in parameters.items():
        made.append({"params": [weight], "layer": layer, "lr": RATES[layer]})
        made.append({"params": [bias], "layer": layer, "lr": RATES[layer], "weight_decay": 0})
    return made


def step(optimizer: torch.optim.Optimizer, parameters: Layers) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        for parameter in (p for both in parameters.values() for p in both if p.requires_grad):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


def groups_while_updating(optimizer: torch.optim.Optimizer) -> list[list[dict[str, Any]]]:
    """Note the groups at each update from now on."""
    seen: list[list[dict[str, Any]]] = []
    optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(list(optimizer.param_groups)))
    return seen


def both_ways(make: Make) -> tuple[torch.optim.Optimizer, Layers, torch.optim.Optimizer, Layers]:
    """Make an optimizer that steps in fewer groups, and a plain one, for parameters alike."""
    parameters = layers()
    twins = copy.deepcopy(parameters)
    ours, theirs = make(groups(parameters)), make(groups(twins))
    step_in_fewer_groups(ours)
    return ours, parameters, theirs, twins


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_fewer_groups_make_the_same_steps(make: Make) -> None:
    ours, parameters, theirs, twins = both_ways(make)
    seen, before = groups_while_updating(ours), list(ours.param_groups)
    step(ours, parameters)
    step(theirs, twins)
    assert {len(found) for found in seen} == {1 if ours.defaults["weight_decay"] == 0 else 2}  # biases do not decay
    assert all(now is then for now, then in zip(ours.param_groups, before, strict=True))
    for layer in RATES:
        for mine, expected in zip(parameters[layer], twins[layer], strict=True):
            assert torch.equal(mine, expected)
            assert ours.state[mine].keys() == theirs.state[expected].keys()


@pytest.mark.parametrize("make", OPTIMIZERS)
def test_what_has_just_thawed_takes_the_same_steps(make: Make) -> None:
    ours, parameters, theirs, twins = both_ways(make)
    for optimizer, own in ((ours, parameters), (theirs, twins)):
        step(optimizer, own)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        for parameter in own["low"]:
            parameter.requires_grad_(True)
        step(optimizer, own)
    for layer in RATES:
        assert all(torch.equal(mine, its) for mine, its in zip(parameters[layer], twins[layer], strict=True))


def test_different_rates_stay_apart() -> None:
    parameters = layers()
    for parameter in parameters["low"]:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups(parameters), lr=0.1)
    step_in_fewer_groups(optimizer)
    seen = groups_while_updating(optimizer)
    optimizer.step()
    rates = {id(p): group["lr"] for group in seen[0] for p in group["params"]}
    assert rates == {id(p): RATES[layer] for layer, both in parameters.items() for p in both}


def test_an_optimizer_that_writes_into_its_groups_keeps_them() -> None:
    parameters = layers()
    optimizer = Counting(groups(parameters), lr=0.1)
    step_in_fewer_groups(optimizer)
    step(optimizer, parameters)
    assert [group["made"] for group in optimizer.param_groups] == [3] * 6


def test_whoever_looks_before_the_update_sees_every_group() -> None:
    optimizer = torch.optim.Adam(groups(layers()), lr=0.1)
    step_in_fewer_groups(optimizer)
    names: list[str] = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        names.extend(group["layer"] for group in optimizer.param_groups)
        return 0.5

    with torch.no_grad():
        assert optimizer.step(closure) == 0.5
    assert names == [layer for layer in RATES for _ in range(2)]


def test_groups_come_back_after_an_error() -> None:
    parameters = layers()
    optimizer = torch.optim.Adam(groups(parameters), lr=0.1)
    step_in_fewer_groups(optimizer)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    optimizer.register_step_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert [group["layer"] for group in optimizer.param_groups] == [layer for layer in RATES for _ in range(2)]


def test_the_models_optimizer_steps_in_fewer_groups() -> None:
    model = TransferClassifier(weights=None)
    model.trainable_layers = 4
    optimizer = model.configure_optimizers()
    seen = groups_while_updating(optimizer)
    optimizer.step()
    assert len(seen[0]) == 1
    assert len(optimizer.param_groups) > 1


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


class Own(torch.optim.SGD):
    """Forget gradients in a way of its own."""

    forgot = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.forgot += 1


def test_gradients_are_forgotten_as_the_optimizer_forgets_them() -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    usual, own = torch.optim.SGD(parameters, lr=0.1), Own(parameters, lr=0.1)
    for optimizer in (own, usual):
        for parameter in parameters:
            parameter.grad = torch.ones(2)
        forget_gradients(optimizer)
        assert all((parameter.grad is None) == (optimizer is usual) for parameter in parameters)
    assert own.forgot == 1
