"""Thaw everything on two processes, with thaw's callback and with Lightning's, and compare the replicas' weights.

    python -m benchmarks.replicas thaw
    python -m benchmarks.replicas lightning

Lightning's `BackboneFinetuning` gives the thawed parameters to the optimizer, but not to the DDP wrapper made before:
their gradients are not averaged, and the replicas drift apart without an error (Lightning-AI/pytorch-lightning#20340).
"""

from __future__ import annotations

import argparse
import logging
import warnings

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import BackboneFinetuning
from torch.utils.data import DataLoader

from src.batch import Batch
from src.callbacks.unfreezing import StagedUnfreezing
from src.model.classifier import TransferClassifier

EPOCHS = 3
STEPS = 2


class TrainableOnly(TransferClassifier):
    """Give the optimizer only what trains at first, as `BackboneFinetuning` wants it."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class LargestDifference(Callback):
    """Print how far the weights of two processes are apart."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        weights = torch.cat([parameter.detach().flatten() for parameter in pl_module.parameters()])
        both = trainer.strategy.all_gather(weights)
        assert isinstance(both, torch.Tensor)
        if trainer.is_global_zero:
            print(f"epoch {trainer.current_epoch}: largest difference {(both[0] - both[1]).abs().max().item():.3g}")


def random_batches(rank: int) -> list[Batch]:
    """Make batches that differ between processes, as real ones do."""
    generator = torch.Generator().manual_seed(rank)
    return [
        Batch(
            torch.randn(8, 3, 32, 32, generator=generator),
            torch.randint(0, 10, (8,), generator=generator),
            torch.arange(8),
        )
        for _ in range(STEPS)
    ]


class RankData(Callback):
    """Choose a process's data once it knows which one it is."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        batches = random_batches(trainer.global_rank)
        pl_module.train_dataloader = lambda: DataLoader(batches, batch_size=None)  # type: ignore[method-assign,arg-type]


def main() -> None:
    """Train, and print the difference after each epoch."""
    parser = argparse.ArgumentParser()
    parser.add_argument("who", choices=("thaw", "lightning"))
    who = parser.parse_args().who
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    torch.set_num_threads(1)
    seed_everything(0, verbose=False)
    if who == "thaw":
        model: TransferClassifier = TransferClassifier(weights=None)
        unfreezing: Callback = StagedUnfreezing({0: 0, 1: 18})
    else:
        model = TrainableOnly(weights=None)
        model.depth = 0  # what trains is Lightning's to decide
        unfreezing = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-4, verbose=False)
    Trainer(
        accelerator="cpu", devices=2, strategy="ddp",
        max_epochs=EPOCHS, limit_val_batches=0, callbacks=[unfreezing, RankData(), LargestDifference()],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    ).fit(model)  # fmt: skip


if __name__ == "__main__":
    main()
