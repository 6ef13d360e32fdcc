"""How fast training goes."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from src.batch import Batch
from src.replay import wait_for


class Throughput(Callback):
    """Log, for every epoch, images trained per second, all processes together, and the seconds of training.

    Validation is not counted. A run resumed within an epoch goes on counting.
    """

    def __init__(self) -> None:
        self.images = 0
        self.seconds = 0.0
        self.since: float | None = None  # None: the clock stands still

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.since = time.perf_counter()  # a run resumed within an epoch sees no epoch start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.images, self.seconds, self.since = 0, 0.0, time.perf_counter()

    def state_dict(self) -> dict[str, float]:
        """Tell how many images of the current epoch this process has trained on, and in how many seconds."""
        running = 0.0 if self.since is None else time.perf_counter() - self.since
        return {"images": self.images, "seconds": self.seconds + running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.images, self.seconds = state_dict["images"], state_dict["seconds"]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if self.since is None:  # not when validation ends: the best checkpoint is saved after it
            self.since = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: Batch, batch_idx: int
    ) -> None:
        self.images += len(batch.labels)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.images:
            return  # continued at the end of an epoch, from a checkpoint of an earlier version
        self._stop(pl_module)
        pl_module.log("images_per_second", self.images * trainer.world_size / self.seconds)
        pl_module.log("train_seconds", self.seconds)

    def _stop(self, model: LightningModule) -> None:
        if self.since is not None:
            wait_for(model.device)
            self.seconds += time.perf_counter() - self.since
            self.since = None
