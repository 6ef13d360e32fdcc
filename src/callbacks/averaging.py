"""Averages of the weights whose memory grows with the training."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, WeightAveraging
from torch import Tensor

from src.errors import UserError


def averages_weights(callbacks: Iterable[Callback]) -> bool:
    """Tell whether one of the callbacks averages the weights, this module's or Lightning's."""
    return any(isinstance(callback, WeightAveraging) for callback in callbacks)


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
        super().__init__(multi_avg_fn=self._average)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Lightning asks for the module's device before it moves the module; the averages would stay on the CPU.
        self._device = trainer.strategy.root_device
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert self._average_model is not None
            self._average_model.n_averaged = torch.tensor(0)  # not on a GPU, which would be waited for at every step

    @torch.no_grad()
    def _average(self, averages: list[Tensor], current: list[Tensor], _: Tensor) -> None:
        """Take in one more step; torch tells on the device how many there were."""
        if not averages[0].is_floating_point():  # BatchNorm's number of steps
            torch._foreach_copy_(averages, current)
            return
        assert self._average_model is not None
        weight = (self.eta + 1) / (self._average_model.n_averaged.item() + 1 + self.eta)
        torch._foreach_lerp_(averages, current, weight)
