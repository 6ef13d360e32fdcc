"""Two checkpoints: the best by validation, and the last of every epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from src.files import replacing

FOLDER = "checkpoints"
BEST = "best.ckpt"
LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its destination and rename it: a run killed in between keeps the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def checkpoints() -> list[ModelCheckpoint]:
    """Make both callbacks; the best comes first, because Lightning resolves `best` by the first one."""
    best = ModelCheckpoint(
        filename=Path(BEST).stem, monitor="val/acc", mode="max", auto_insert_metric_name=False,
        enable_version_counter=False,
    )  # fmt: skip
    last = ModelCheckpoint(
        filename=Path(LAST).stem, monitor=None, every_n_epochs=1, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip
    return [best, last]
