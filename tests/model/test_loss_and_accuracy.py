"""What counts as right; that all images weigh alike is tested with the classifier."""

from __future__ import annotations

import pytest
import torch

from src.model.loss_and_accuracy import LossAndAccuracy


def test_what_is_no_number_is_never_right() -> None:
    """Though argmax takes it for the largest, and so for the first class."""
    metric = LossAndAccuracy()
    logits = torch.tensor([[2.0, 1.0], [torch.nan, torch.nan], [1.0, torch.nan], [torch.inf, 0.0]])
    metric.update(logits, torch.tensor([0, 0, 1, 0]), torch.tensor(torch.nan))
    assert metric.compute()["acc"] == 0.5


@pytest.mark.parametrize("validating", [False, True])
def test_it_goes_on_in_the_same_tensors_after_processes_were_added_up(validating: bool) -> None:
    metric = LossAndAccuracy()
    update = torch.eye(3), torch.tensor([0, 1, 0]), torch.tensor(1.0)
    metric.update(*update)
    places = [value.data_ptr() for value in metric.metric_state.values()]
    with torch.inference_mode(validating):
        metric.sync(dist_sync_fn=lambda value, group: [value, value], distributed_available=lambda: True)
        assert [value.item() for value in metric.metric_state.values()] == [6, 4, 6]
        metric.unsync()
    assert [value.data_ptr() for value in metric.metric_state.values()] == places
    metric.update(*update)
    assert [value.item() for value in metric.metric_state.values()] == [6, 4, 6]
