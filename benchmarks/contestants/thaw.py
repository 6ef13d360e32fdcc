"""thaw's own command line, stopped at the start of each epoch.

python -m benchmarks.contestants.thaw JOB VIEWS FOLDER [OPTION ...]        VIEWS: 1, or null for no cache
"""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.contestants import BATCH
from benchmarks.contestants.signals import Gate


class AtTheGate(Callback):
    """Wait before each epoch; time its training and its validation."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.images = 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gate.wait()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._begin()
        self.images += len(batch[1])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gate.end("train", self.images)
        self._begin()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.images += len(batch[1])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.gate.end("val", self.images)

    def _begin(self) -> None:
        self.images = 0
        self.gate.begin()


def main() -> None:
    """Run `fit` with a recipe of ours."""
    from benchmarks.contestants.material import IMAGES, SEED
    from src.cli import main as thaw

    job, views, folder, *more = sys.argv[1:]
    options = {
        "data.source.size": IMAGES, "data.batch_size": BATCH, "seed_everything": SEED, "feature_cache.views": views,
        "trainer.max_epochs": 1000, "run.test_after_fit": "false",
        "run.root": folder, "trainer.accelerator": "cpu", "trainer.callbacks+": "benchmarks.contestants.thaw.AtTheGate",
    }  # fmt: skip
    configs = [f"--config=configs/{file}" for file in (f"{job}.yaml", "with/sample.yaml")]
    thaw(["fit", *configs, *(f"--{option}={value}" for option, value in options.items()), *more])


if __name__ == "__main__":
    main()
