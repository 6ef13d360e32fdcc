"""thaw's network and input pipeline in a plain PyTorch loop, without Lightning: the least a step can cost.

python -m benchmarks.contestants.bare JOB VIEWS        VIEWS: 1 to start from the frozen layers' output, or null
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.contestants import BATCH, material
from benchmarks.contestants.signals import Gate
from src.data.datamodule import ImageDataModule
from src.data.loading import ArrayDataset
from src.model.classifier import TransferClassifier
from src.model.lean_step import skip_capture_check
from src.model.memory_order import step_in_memory_order
from src.process import prepare_process


def main() -> None:
    """Train for as long as the gate opens."""
    prepare_process()
    job, views = sys.argv[1:3]
    data, model, gate = material.data(), material.model(job), Gate()
    augment = data.augmentation
    assert augment is not None
    entry = model.depth if views == "1" else 0
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-4, fused=True)
    step_in_memory_order(optimizer)
    skip_capture_check(optimizer)
    train, val = data.datasets["train"], data.datasets["val"]
    kept = {split: _features(model, data, data.datasets[split]) for split in ("train", "val")} if entry else {}
    epoch = 0
    while True:
        gate.wait()
        gate.begin()
        model.train()
        seen, right, total = 0, torch.zeros(()), torch.zeros(())
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(epoch))
        for positions in order.split(BATCH):
            indices = train.chosen[positions]
            if entry:
                inputs = kept["train"].index_select(0, indices)
            else:
                pixels = augment(train.pixels[indices], seed=material.SEED, view=epoch, indices=indices)
                inputs = data.standardized(pixels)
            labels = train.labels[indices]
            optimizer.zero_grad()
            logits = model(inputs, entry)
            loss = F.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            seen += len(labels)
            right += (logits.detach().argmax(dim=1) == labels).sum()
            total += loss.detach() * len(labels)
        gate.end("train", seen)
        gate.begin()
        model.eval()
        with torch.no_grad():
            for positions in torch.arange(len(val)).split(BATCH):
                indices = val.chosen[positions]
                inputs = kept["val"].index_select(0, indices) if entry else data.standardized(val.pixels[indices])
                logits = model(inputs, entry)
                right += (logits.argmax(dim=1) == val.labels[indices]).sum()
                total += F.cross_entropy(logits, val.labels[indices]) * len(indices)
        gate.end("val", len(val))
        epoch += 1


@torch.no_grad()
def _features(model: TransferClassifier, data: ImageDataModule, dataset: ArrayDataset) -> Tensor:
    """Compute what the frozen layers put out for a split's images."""
    features = torch.zeros(len(dataset.labels), *model.prefix(data.standardized(dataset.pixels[:1])).shape[1:])
    for indices in dataset.chosen.split(100):
        features[indices] = model.prefix(data.standardized(dataset.pixels[indices]))
    return features


if __name__ == "__main__":
    main()
