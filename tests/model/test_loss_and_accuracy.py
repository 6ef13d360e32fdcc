"""What counts as right; that all images weigh alike is tested with the classifier."""

from __future__ import annotations

import torch

from src.model.loss_and_accuracy import LossAndAccuracy


def test_what_is_no_number_is_never_right() -> None:
    """Though argmax takes it for the largest, and so for the first class."""
    metric = LossAndAccuracy()
    logits = torch.tensor([[2.0, 1.0], [torch.nan, torch.nan], [1.0, torch.nan], [torch.inf, 0.0]])
    metric.update(logits, torch.tensor([0, 0, 1, 0]), torch.tensor(torch.nan))
    assert metric.compute()["acc"] == 0.5
