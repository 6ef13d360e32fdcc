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


class Epoch:
    """Drive a callback through an epoch in which each step of four images takes a second."""

    def __init__(self, clock: list[float], callback: Throughput) -> None:
        self.clock, self.callback, self.logged = clock, callback, dict[str, float]()
        self.trainer: Any = SimpleNamespace(world_size=2)
        self.model: Any = SimpleNamespace(device=torch.device("cpu"), log=self.logged.__setitem__)
        callback.on_train_start(self.trainer, self.model)

    def begin(self) -> None:
        self.callback.on_train_epoch_start(self.trainer, self.model)

    def step(self) -> None:
        batch = Batch(torch.zeros(4, 3, 8, 8), torch.zeros(4).long(), torch.arange(4))
        self.callback.on_train_batch_start(self.trainer, self.model, batch, 0)
        self.clock[0] += 1
        self.callback.on_train_batch_end(self.trainer, self.model, None, batch, 0)

    def validate(self) -> None:
        """Take ten seconds, and a checkpoint a hundred."""
        self.callback.on_validation_start(self.trainer, self.model)
        self.clock[0] += 10
        self.callback.on_validation_end(self.trainer, self.model)
        self.clock[0] += 100

    def end(self) -> dict[str, float]:
        self.callback.on_train_epoch_end(self.trainer, self.model)
        return self.logged


def test_neither_validation_nor_what_is_saved_after_it_counts(clock: list[float]) -> None:
    epoch = Epoch(clock, Throughput())
    epoch.begin()
    for _ in range(2):
        epoch.step()
        epoch.validate()
    assert epoch.end() == {"images_per_second": 8.0, "train_seconds": 2.0}


@pytest.mark.parametrize("validated", [False, True])
def test_a_run_that_continues_goes_on_counting(clock: list[float], validated: bool) -> None:
    first, second = Throughput(), Throughput()
    stopped = Epoch(clock, first)
    stopped.begin()
    stopped.step()
    if validated:
        stopped.validate()
    second.load_state_dict(first.state_dict())
    clock[0] += 1000
    resumed = Epoch(clock, second)
    resumed.step()
    assert resumed.end() == {"images_per_second": 8.0, "train_seconds": 2.0}
    resumed.begin()
    resumed.step()
    assert resumed.end() == {"images_per_second": 8.0, "train_seconds": 1.0}
