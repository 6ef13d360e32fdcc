"""Random numbers of the network."""

from itertools import product
from types import SimpleNamespace
from typing import Any

import torch

from src.callbacks.seeding import StepSeed


def test_each_epoch_step_and_process_draws_numbers_of_its_own() -> None:
    def draw(epoch: int, step: int, rank: int, seed: int = 1) -> tuple[float, ...]:
        trainer: Any = SimpleNamespace(current_epoch=epoch, global_rank=rank)
        model: Any = SimpleNamespace(device=torch.device("cpu"))
        StepSeed(seed).on_train_batch_start(trainer, model, None, step)
        return tuple(torch.rand(4).tolist())

    places = list(product(range(2), repeat=3))
    drawn = [draw(*place) for place in places]
    assert len(set(drawn)) == 8
    assert [draw(*place) for place in places] == drawn
    assert draw(*places[0], seed=2) not in drawn
