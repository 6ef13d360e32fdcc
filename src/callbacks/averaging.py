"""Averages of the weights whose memory grows with the training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from src.errors import UserError


class PolynomialAveraging(WeightAveraging):
    """Validate, test and keep an average of the weights, in which recent steps weigh most.

    The weights after step s count in proportion to s to the power of eta: after t steps the average is t / (eta + 2)
    steps old. An exponential moving average has a memory of so many steps instead: one that suits seven thousand steps
    still holds the random head after the few hundred of a small data set. Statistics of BatchNorm are averaged too.

    Source: O. Shamir and T. Zhang, "Stochastic Gradient Descent for Non-smooth Optimization", 2013.

    Args:
        eta: Power; 0 averages all steps alike, and the higher it is, the shorter is the memory.

    Raises:
        UserError: An option is outside its range.
    """

    def __init__(self, eta: float = 7.0) -> None:
        if eta < 0:
            raise UserError(f"eta of PolynomialAveraging is {eta}: it must be 0 or more.")
        self.eta = eta
        super().__init__()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning would ask for the module's device before it moves the module; the averages would stay on the CPU.
        if stage == "fit":
            self._average_model = _Averages(pl_module, trainer.strategy.root_device, self.eta)


class _Averages(AveragedModel):
    """Take in a network's weights and statistics after each step, without waiting for the device.

    Args:
        model: The network, whose weights the average starts from.
        device: Where the averages are, and the network will be.
        eta: As above.
    """

    def __init__(self, model: nn.Module, device: torch.device, eta: float) -> None:
        super().__init__(model, device, use_buffers=True)
        self.eta = eta
        self.n_averaged = torch.tensor(0)  # not on the device, which torch would wait for to know how many there were

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        self.n_averaged += 1
        averages, values = [], []
        for average, value in zip(_tensors(self.module), _tensors(model), strict=True):
            if not value.is_floating_point():  # BatchNorm's number of steps
                average.copy_(value)
            elif value.requires_grad or not isinstance(value, nn.Parameter):  # frozen weights are their average
                averages.append(average)
                values.append(value)
        torch._foreach_lerp_(averages, values, (self.eta + 1) / (self.n_averaged.item() + self.eta))


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())
