"""Two checkpoints: the best by validation, and the last of every epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from src.files import replacing

FOLDER = "checkpoints"
BEST = "best.ckpt"
LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its destination and rename it: a run killed in between keeps the old one."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        with replacing(Path(path)) as temporary, temporary.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # which hides that the disk is full
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class RunCheckpoint(ModelCheckpoint):
    """Keep the best score when a run is continued from another folder, or by another path to the same one.

    Lightning compares the folders as text, and forgets it where they differ.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for unfinished in Path(str(self.dirpath)).glob(f".{self.filename}{self.FILE_EXTENSION}.*"):
                unfinished.unlink(missing_ok=True)  # what a kill while saving left

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.optimizers:
            checkpoint["optimizer"] = type(trainer.optimizers[0]).__name__

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Averaged weights are what was validated. A test after `fit` finds Lightning's averaging still at work, which
        # puts the others in their place, as for a training that goes on.
        if "current_model_state" in checkpoint and trainer.state.fn != TrainerFn.FITTING:
            pl_module.load_state_dict(checkpoint["state_dict"])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        here = Path(str(self.dirpath))
        if not (here / Path(state_dict["best_model_path"]).name).is_file():
            return  # a checkpoint without its run: the new run finds a best one of its own

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        state = {**state_dict, "dirpath": self.dirpath}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = moved(state[name])
        state["best_k_models"] = {moved(path): score for path, score in state["best_k_models"].items()}
        super().load_state_dict(state)


def checkpoints() -> list[ModelCheckpoint]:
    """Make both callbacks."""
    best = RunCheckpoint(
        filename=Path(BEST).stem, monitor="val/acc", mode="max", auto_insert_metric_name=False,
        enable_version_counter=False,
    )  # fmt: skip
    last = RunCheckpoint(
        filename=Path(LAST).stem, monitor=None, every_n_epochs=1, save_on_train_epoch_end=True,
        enable_version_counter=False,
    )  # fmt: skip
    return [best, last]
