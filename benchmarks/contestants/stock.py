"""What most Lightning projects do: a PIL image and torchvision transforms per sample, workers, a frozen backbone.

python -m benchmarks.contestants.stock JOB WORKERS FOLDER [PRECISION]
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy
from torchvision.models import vgg16
from torchvision.transforms import v2

from benchmarks.contestants import BATCH, material
from benchmarks.contestants.thaw import AtTheGate
from src.data.loading import ArrayDataset

FIRST_TRAINED = {"last4": 24, "head": 31}  # torchvision numbers convolutions, ReLUs and poolings each by themselves


class Samples(Dataset):
    """One image at a time."""

    def __init__(self, dataset: ArrayDataset, transform: v2.Transform) -> None:
        self.pixels = dataset.pixels[dataset.chosen].permute(0, 2, 3, 1).numpy()
        self.labels = dataset.labels[dataset.chosen].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


class Stock(LightningModule):
    """A frozen backbone under a new head."""

    def __init__(self, job: str) -> None:
        super().__init__()
        self.features = vgg16(weights=None).features
        for parameter in self.features[: FIRST_TRAINED[job]].parameters():
            parameter.requires_grad = False
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 10)
        )  # fmt: skip
        self.accuracy = nn.ModuleDict({part: MulticlassAccuracy(10, average="micro") for part in ("fit", "val")})

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._step(batch, "fit")

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self._step(batch, "val")

    def _step(self, batch: list[Tensor], part: str) -> Tensor:
        images, labels = batch
        logits = self.head(self.features(images))
        loss = nn.functional.cross_entropy(logits, labels)
        accuracy: Any = self.accuracy[part]
        accuracy(logits, labels)
        self.log(f"{part}_loss", loss)
        self.log(f"{part}_acc", accuracy, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=1e-4)


def main() -> None:
    """Fit, with what Lightning does by default except for its progress bar and table."""
    job, workers, folder, *more = sys.argv[1:]
    precision: Any = more[0] if more else None
    data = material.data()
    mean, std = (data.statistics / 255).tolist()
    common = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    random = [v2.RandomHorizontalFlip(), v2.RandomAffine(30, translate=(0.1, 0.1), scale=(0.8, 1.2))]
    train, val = (
        DataLoader(
            Samples(data.datasets[split], v2.Compose(transforms)), batch_size=BATCH,
            shuffle=split == "train", num_workers=int(workers), persistent_workers=int(workers) > 0,
        )
        for split, transforms in (("train", [*random, *common]), ("val", common))
    )  # fmt: skip
    trainer = Trainer(
        max_epochs=1000, default_root_dir=folder, num_sanity_val_steps=0, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[AtTheGate()], precision=precision, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Stock(job), train, val)


if __name__ == "__main__":
    main()
