"""Rectangles of other images: where they are, what they show, and what becomes of the labels."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from src.batch import Batch
from src.data.augment import Augmentation
from src.data.cutmix import Patches, draw_patches, paste, shares
from src.data.datamodule import ImageDataModule
from src.errors import UserError
from tests.data.test_datamodule import SIDE, Noise, make, set_up, trainer

FLIP = Augmentation(rotation=0, shift=0, zoom=0, flip=True)


def rectangles(patches: Patches) -> list[tuple[int, ...]]:
    return list(zip(*(tensor.tolist() for tensor in patches), strict=True))


def test_patches_are_a_function_of_seed_view_and_image() -> None:
    indices = torch.arange(50)
    all_of_them = rectangles(draw_patches(1.0, 777, 3, indices, 1000, 32))
    assert rectangles(draw_patches(1.0, 777, 3, indices[20:30], 1000, 32)) == all_of_them[20:30]
    for seed, view in ((778, 3), (777, 4)):
        other = rectangles(draw_patches(1.0, seed, view, indices, 1000, 32))
        assert sum(a == b for a, b in zip(all_of_them, other, strict=True)) < 3


def test_patches_are_pinned() -> None:
    """Whoever changes them raises `features.VERSION`: kept features are of views drawn so."""
    assert rectangles(draw_patches(1.0, 777, 5, torch.tensor([0, 34_999]), 35_000, 32)) == [
        (2911, 7, 32, 13, 32),
        (27200, 7, 22, 22, 32),
    ]


def test_patches_lie_within_the_image_and_have_any_size() -> None:
    patches = draw_patches(1.0, 1, 0, torch.arange(20_000), 3, 32)
    for begin, end in ((patches.top, patches.bottom), (patches.left, patches.right)):
        assert begin.min() >= 0
        assert (begin <= end).all()
        assert end.max() <= 32
    assert set(patches.others.tolist()) == {0, 1, 2}
    area = shares(patches, 32)
    assert area.dtype == torch.float32
    # Unclipped areas are uniform, so half of them on average; clipping at the borders leaves about a third.
    assert 0.30 < area.mean() < 0.34
    assert area.min() < 0.01
    assert area.max() > 0.9


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_so_many_images_have_a_patch(probability: float) -> None:
    patches = draw_patches(probability, 1, 0, torch.arange(10_000), 100, 32)
    assert (shares(patches, 32) > 0).float().mean() == pytest.approx(probability, abs=0.02)


def test_paste_shows_the_other_image_inside_only() -> None:
    images, others = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
    numbers = (torch.tensor(pair) for pair in ((0, 0), (1, 0), (3, 0), (2, 0), (5, 0)))
    shown = paste(images, others, Patches(*numbers))
    expected = torch.zeros(4, 5)
    expected[1:3, 2:5] = 1
    assert torch.equal(shown[0], expected.expand(3, 4, 5))
    assert not shown[1].any()


class Collector(LightningModule):
    """Keep the training and the validation batches that reach the network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.train_batches: dict[int, list[Batch]] = {}
        self.val_batches: list[Batch] = []

    def training_step(self, batch: Batch) -> Tensor:
        self.train_batches.setdefault(self.current_epoch, []).append(batch)
        return self.weight.sum()

    def validation_step(self, batch: Batch) -> None:
        self.val_batches.append(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def collect(data: ImageDataModule, folder: Path, max_epochs: int = 1) -> Collector:
    collector = Collector()
    trainer(folder, max_epochs).fit(collector, data)
    return collector


@pytest.mark.parametrize("input_size", [None, 2 * SIDE])
def test_training_batches_are_mixed_from_augmented_training_images(tmp_path: Path, input_size: int | None) -> None:
    """Before they are enlarged, if they are."""
    data = make(augmentation=FLIP, cutmix=0.7, input_size=input_size)
    found = collect(data, tmp_path, max_epochs=2)
    train = data.datasets["train"]
    mixed = 0
    for epoch, batches in found.train_batches.items():
        for batch in batches:
            patches = draw_patches(0.7, 777, epoch, batch.indices, len(train), SIDE)
            partners = train.chosen[patches.others]

            def view(rows: Tensor, epoch: int = epoch) -> Tensor:
                return FLIP(train.pixels[rows], seed=777, view=epoch, indices=rows)

            expected = paste(view(batch.indices), view(partners), patches)
            assert torch.equal(batch.inputs, data.standardized(expected))
            assert torch.equal(batch.other_labels, partners % 2)
            assert torch.equal(batch.other_shares, shares(patches, SIDE))
            mixed += int((batch.other_shares > 0).sum())
    assert 0.4 < mixed / (2 * len(train)) < 0.9


def test_validation_is_never_mixed(tmp_path: Path) -> None:
    data = make(augmentation=None, cutmix=1.0)
    for batch in collect(data, tmp_path).val_batches:
        assert batch.other_labels is None
        assert torch.equal(batch.inputs, data.standardized(data.datasets["val"].pixels[batch.indices]))


def test_features_keep_their_mixed_labels(tmp_path: Path) -> None:
    data = set_up(cutmix=1.0)
    collector = Collector()
    data.trainer = trainer(tmp_path)
    data.trainer.fit(collector, data)
    images = collector.train_batches[0][0]
    data.trainer.training, data.views = True, 1  # as in a later epoch, which starts from the first one's features
    features = Batch(torch.randn(len(images.labels), 512, 2, 2), images.labels, images.indices, entry=14)
    mixed = data.on_after_batch_transfer(features, 0)
    assert mixed.inputs is features.inputs
    assert torch.equal(mixed.other_labels, images.other_labels)
    assert torch.equal(mixed.other_shares, images.other_shares)


def test_kept_features_know_what_they_were_mixed_from() -> None:
    origins = [
        set_up(**options).view_origin("train")
        for options in ({}, {"cutmix": 0.5}, {"cutmix": 0.6}, {"cutmix": 0.5, "split_seed": 1})
    ]
    assert all(a != b for number, a in enumerate(origins) for b in origins[:number])
    assert set_up(cutmix=0.5).view_origin("val") == set_up().view_origin("val")


@pytest.mark.parametrize("cutmix", [-0.1, 1.5])
def test_impossible_share_is_refused(cutmix: float) -> None:
    with pytest.raises(UserError, match=r"data\.cutmix"):
        make(Noise(), cutmix=cutmix)
