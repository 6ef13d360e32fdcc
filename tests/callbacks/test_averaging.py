"""Averages of the weights."""

import math

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.optim.swa_utils import AveragedModel

from src.callbacks.averaging import PolynomialAveraging
from src.errors import UserError

STEPS = 30


class Counting(LightningModule):
    """Hold weights that are t after step t, as are the norm's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.norm = nn.BatchNorm1d(1)

    @torch.no_grad()
    def step_to(self, step: int) -> None:
        for value in (*self.parameters(), *self.buffers()):
            value.fill_(step)


def average(eta: float) -> AveragedModel:
    model, callback = Counting(), PolynomialAveraging(eta)
    callback.setup(Trainer(accelerator="cpu", logger=False), model, "fit")
    averaged = callback._average_model
    assert averaged is not None
    for step in range(1, STEPS + 1):
        model.step_to(step)
        averaged.update_parameters(model)
    return averaged


@pytest.mark.parametrize("eta", [0, 1, 7])
def test_steps_count_by_a_power_of_their_number(eta: int) -> None:
    counts = {step: math.prod(range(step, step + eta)) for step in range(1, STEPS + 1)}  # t (t + 1) … (t + eta - 1)
    wanted = sum(step * count for step, count in counts.items()) / sum(counts.values())
    module = average(eta).module
    assert module.linear.weight.item() == pytest.approx(wanted, rel=1e-5)
    assert module.norm.running_mean.item() == pytest.approx(wanted, rel=1e-5)


def test_steps_are_as_old_as_promised() -> None:
    assert STEPS - average(7).module.linear.weight.item() == pytest.approx(STEPS / 9, rel=0.1)


def test_numbers_of_batches_are_not_averaged() -> None:
    assert average(7).module.norm.num_batches_tracked == STEPS


def test_other_stages_leave_the_number_of_steps_alone() -> None:
    model, callback = Counting(), PolynomialAveraging()
    trainer = Trainer(accelerator="cpu", logger=False)
    callback.setup(trainer, model, "fit")
    assert callback._average_model is not None
    callback._average_model.update_parameters(model)
    callback.setup(trainer, model, "test")
    assert callback._average_model.n_averaged == 1


def test_a_negative_power_is_refused() -> None:
    with pytest.raises(UserError, match="eta of PolynomialAveraging is -1"):
        PolynomialAveraging(-1)


def test_averages_are_where_the_network_will_be() -> None:
    """Lightning moves the network after a callback's setup; and nothing keeps this processor waiting for the device."""
    trainer, callback = Trainer(accelerator="cpu", logger=False), PolynomialAveraging()
    root_device = torch.device("meta")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.strategy), "root_device", root_device)
        callback.setup(trainer, Counting(), "fit")
    assert callback._average_model is not None
    assert callback._average_model.module.linear.weight.device == root_device
    for _ in range(2):  # the first only copies; whoever asks this device for a number fails
        callback._average_model.update_parameters(Counting().to(root_device))
