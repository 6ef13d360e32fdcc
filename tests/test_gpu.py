"""The path of a GPU, checked without one: torch's meta device has shapes and types, but no numbers.

So whatever asks for a number fails here, and on a GPU would keep the processor waiting until all before it is computed;
and so do most operations that mix devices. Lightning's loop, autocast and compiled code are not covered.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from src.batch import Batch
from src.data.datamodule import ImageDataModule
from src.data.features import FeatureStore
from src.data.sources import Sample
from src.model.classifier import TransferClassifier
from src.model.muon import Muon
from src.model.vgg import output_shapes

DEVICE = torch.device("meta")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {  # this device has no fused ones
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-4, foreach=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9, foreach=True),
    "Muon": lambda groups: Muon(groups, lr=1e-3),
}


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # which knows no such device


def make(layers: int, **options: Any) -> TransferClassifier:
    with DEVICE:
        model = TransferClassifier(weights=None, label_smoothing=0.1, dropout=0.2, **options)
    model.trainable_layers = layers
    return model


@pytest.fixture(scope="module")
def data() -> ImageDataModule:
    data = ImageDataModule(Sample(size=50), standardize="dataset", cutmix=0.5, on_device=True)
    data.setup("fit")
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        strategy=SimpleNamespace(root_device=DEVICE), training=True, current_epoch=3, limit_train_batches=1.0,
        global_rank=0, world_size=1,
    )  # fmt: skip
    return data


def first_batch(data: ImageDataModule, split: str) -> Batch:
    data.trainer.training = split == "train"  # type: ignore[union-attr]
    loader = data.train_dataloader() if split == "train" else data.test_dataloader()
    batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    assert {part.device for part in batch if isinstance(part, Tensor)} == {DEVICE}
    return batch


def train(model: TransferClassifier, data: ImageDataModule) -> Batch:
    """Make two steps, the first of which makes the optimizer's state."""
    optimizer = model.configure_optimizers()
    for _ in range(2):
        batch = first_batch(data, "train")
        optimizer.zero_grad()
        model.training_step(batch).backward()
        optimizer.step()
    return batch


@pytest.mark.parametrize("layers", [0, 4, 18])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_waits_for_nothing(data: ImageDataModule, layers: int, optimizer: str) -> None:
    assert train(make(layers, optimizer=OPTIMIZERS[optimizer]), data).entry == 0


@pytest.mark.parametrize("known", [False, True])
def test_training_with_a_cache_waits_for_nothing(
    data: ImageDataModule, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    model, dataset = make(4, optimizer=OPTIMIZERS["Adam"]), data.datasets["train"]
    images, shape = len(dataset.labels), output_shapes(32)[model.depth - 1]
    with monkeypatch.context() as patch:  # to know what is there is worth a wait, once an epoch
        patch.setattr(Tensor, "cpu", lambda filled: torch.full(filled.shape, known))
        store = FeatureStore(images, dataset.chosen, 1, shape, torch.float32, model.depth, device=DEVICE)
    monkeypatch.setattr(dataset, "features", store)
    monkeypatch.setattr(model, "keep_features", {"train": store.put})
    assert train(model, data).entry == (model.depth if known else 0)


@pytest.mark.parametrize("step", ["validation_step", "test_step", "predict_step"])
def test_evaluation_waits_for_nothing(data: ImageDataModule, step: str) -> None:
    model = make(4, test_time_augmentation="flip_shift").eval()
    with torch.inference_mode():
        getattr(model, step)(first_batch(data, "test"))
