"""What several processes must have alike beside the weights, which DDP keeps so."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging


class SharedStatistics(Callback):
    """Give all processes the first one's BatchNorm statistics before each validation and at the end of each epoch.

    DDP does so before a training step only: after the last one each process has added its own images. They would then
    validate as many networks as there are processes, none of which but the first is the one that a checkpoint keeps.
    """

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _share(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _share(trainer, pl_module)


def _share(trainer: Trainer, model: LightningModule) -> None:
    if trainer.world_size == 1:
        return
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averages = [callback._average_model for callback in callbacks if isinstance(callback, WeightAveraging)]
    for module in (model, *(average.module for average in averages if average is not None)):
        for statistic in module.buffers():
            torch.distributed.broadcast(statistic, src=0)
