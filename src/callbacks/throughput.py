"""How fast training goes."""

from __future__ import annotations

import time

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from src.batch import Batch


class Throughput(Callback):
    """Log, for every epoch, images trained per second, all processes together, and the seconds of training.

    Validation is not counted. A run resumed within an epoch counts from there.
    """

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin()

    def _begin(self) -> None:
        self.images, self.seconds, self.since = 0, 0.0, time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self.images += len(batch.labels)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _wait(pl_module)
        self.seconds += time.perf_counter() - self.since

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.images:
            return  # a run continued from the end of an epoch
        _wait(pl_module)
        seconds = self.seconds + time.perf_counter() - self.since
        pl_module.log("images_per_second", self.images * trainer.world_size / seconds)
        pl_module.log("train_seconds", seconds)


def _wait(model: LightningModule) -> None:
    """Wait for a GPU to make the steps that it was told to make."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
