"""Images per second: what counts as training, and what does not."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.batch import Batch
from src.callbacks import throughput
from src.callbacks.throughput import Throughput


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Give the time in seconds, which a test moves on."""
    now = [100.0]
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_neither_validation_nor_what_is_saved_after_it_counts(clock: list[float]) -> None:
    logged: dict[str, float] = {}
    trainer: Any = SimpleNamespace(world_size=2)
    model: Any = SimpleNamespace(device=torch.device("cpu"), log=logged.__setitem__)
    batch = Batch(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), torch.arange(4))
    callback = Throughput()
    callback.on_train_start(trainer, model)
    callback.on_train_epoch_start(trainer, model)
    for number in range(2):  # each step takes a second, a validation ten, a checkpoint a hundred
        callback.on_train_batch_start(trainer, model, batch, number)
        clock[0] += 1
        callback.on_train_batch_end(trainer, model, None, batch, number)
        callback.on_validation_start(trainer, model)
        clock[0] += 10
        callback.on_validation_end(trainer, model)
        clock[0] += 100
    callback.on_train_epoch_end(trainer, model)
    assert logged == {"images_per_second": 8.0, "train_seconds": 2.0}
