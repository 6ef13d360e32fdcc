"""Adam steps without copies, and as ever."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from src.model.classifier import TransferClassifier
from src.model.memory_order import step_in_memory_order
from src.model.small_maps import store_by_tap


def kernels(store: Callable[[nn.Parameter], None]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((5, 4, 3, 3), (6, 1, 3, 3), (7,))]
    for parameter in parameters[:-1]:
        store(parameter)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def channels_last(weight: nn.Parameter) -> None:
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def plainly(weight: nn.Parameter) -> None:
    pass


def steps(optimizer: torch.optim.Adam, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    for number in range(3):
        optimizer.step()
        for parameter in parameters:
            parameter.grad = parameter.grad * (number - 0.5)
    return [parameter.detach() for parameter in parameters]


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"weight_decay": 0.1}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("store", [store_by_tap, channels_last, plainly])
def test_steps_are_those_of_the_ordinary_optimizer(
    store: Callable[[nn.Parameter], None], kind: type[torch.optim.Adam], options: dict[str, Any]
) -> None:
    parameters = kernels(store)
    twins = copy.deepcopy(parameters)
    for parameter, twin in zip(parameters, twins, strict=True):
        twin.grad = parameter.grad.contiguous()  # in another order than its weight
    ours, theirs = kind(twins, lr=0.1, fused=True, **options), kind(parameters, lr=0.1, foreach=False, **options)
    step_in_memory_order(ours)
    for mine, expected in zip(steps(ours, twins), steps(theirs, parameters), strict=True):
        torch.testing.assert_close(mine, expected)
    for parameter, twin in zip(parameters, twins, strict=True):  # and so does what a checkpoint keeps
        for name, value in theirs.state[parameter].items():
            torch.testing.assert_close(ours.state[twin][name], value)


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
def test_a_state_of_another_order_is_put_into_that_of_the_weights(kind: type[torch.optim.Optimizer]) -> None:
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    plain, stored = kernels(plainly), kernels(channels_last)
    reference, ours = kind(plain, lr=0.1, foreach=False, **options), kind(stored, lr=0.1, fused=True, **options)
    step_in_memory_order(ours)
    reference.step()
    with torch.no_grad():
        for mine, other in zip(stored, plain, strict=True):
            mine.copy_(other)
            mine.grad = torch.empty_like(mine).copy_(other.grad)
    saved = copy.deepcopy(reference.state_dict())
    saved["param_groups"] = ours.state_dict()["param_groups"]
    ours.load_state_dict(saved)
    reference.step()
    ours.step()
    for mine, other in zip(stored, plain, strict=True):
        torch.testing.assert_close(mine, other)


def test_step_of_the_classifier_copies_nothing() -> None:
    model = TransferClassifier(weights=None)
    model.trainable_layers = 8  # some kernels lie channels last, others tap by tap
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        optimizer.step()
    assert any(event.input_shapes for event in recorded.events() if event.name != "aten::copy_")  # shapes are recorded
    copied = [event.input_shapes[0] for event in recorded.events() if event.name == "aten::copy_"]
    assert not [shape for shape in copied if len(shape) > 1]
