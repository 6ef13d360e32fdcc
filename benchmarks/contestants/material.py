"""The same images, split, weights and sizes for every contestant."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch

from benchmarks.contestants import BATCH, TRAINABLE
from src.data.datamodule import ImageDataModule
from src.data.sources import Sample
from src.model.classifier import TransferClassifier

IMAGES = int(os.environ.get("THAW_BENCH_IMAGES", "1372"))  # 70 % of them to train: 30 steps an epoch
SEED = 777


def data() -> ImageDataModule:
    """Load the images, split 70 to 30."""
    module = ImageDataModule(Sample(size=IMAGES), batch_size=BATCH, standardize="dataset", seed=SEED)
    module.prepare_data()
    module.setup("fit")
    return module


def write_arrays(path: Path) -> None:
    """Write images, (N, 32, 32, 3) uint8, and labels of both splits for a contestant without torch."""
    arrays = {}
    for name, dataset in data().datasets.items():
        if name != "test":
            arrays[f"{name}_images"] = dataset.pixels[dataset.chosen].permute(0, 2, 3, 1).numpy()
            arrays[f"{name}_labels"] = dataset.labels[dataset.chosen].numpy()
    np.savez(path, allow_pickle=False, **arrays)


def model(job: str) -> TransferClassifier:
    """Build the network that thaw trains, with random weights: how long a step takes does not depend on them."""
    torch.manual_seed(SEED)
    network = TransferClassifier(weights=None)
    network.trainable_layers = TRAINABLE[job]
    return network
