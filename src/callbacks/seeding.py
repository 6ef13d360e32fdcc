"""Random numbers of the network, dropout for one, as a function of the step alone."""

from __future__ import annotations

from hashlib import blake2b

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seed torch before each training step by (seed, epoch, step, process): no generator state needs saving."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        place = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        seed = int.from_bytes(blake2b(repr(place).encode(), digest_size=4).digest())  # NumPy's takes ten times as long
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes a millisecond
        if pl_module.device.type == "cuda":
            torch.cuda.manual_seed(seed)
