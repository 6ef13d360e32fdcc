"""With the real images and the real weights: does the network know what it was trained to know?"""

import csv
import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import vgg16
from torchvision.models.vgg import VGG16_Weights

from src.cli import main
from src.data.datamodule import ImageDataModule
from src.data.sources import CIFAR10, ImageFolder
from src.model.vgg import ConvReLU, VGGBackbone, expected_input

pytestmark = pytest.mark.data

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TRAIN, TEST = 100, 20  # images a class


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    file = VGG16_Weights.IMAGENET1K_FEATURES.url.rpartition("/")[2]
    return torch.load(Path(os.environ["TORCH_HOME"], "hub", "checkpoints", file), weights_only=True)


@pytest.fixture(scope="module")
def backbone() -> VGGBackbone:
    backbone = VGGBackbone()
    backbone.load("IMAGENET1K_FEATURES")
    return backbone


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Link a few real images of each class."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", TRAIN), ("test", TEST)):
        for folder in sorted(Path(os.environ["THAW_DATA"], "cifar10-jpeg", split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for file in islice(sorted(folder.glob("*.jpg")), count):
                (root / split / folder.name / file.name).symlink_to(file)
    return root


@pytest.fixture
def data(images: Path) -> ImageDataModule:
    expected = expected_input("IMAGENET1K_FEATURES", None)
    data = ImageDataModule(ImageFolder(str(images)), standardize="weights", weights_input=expected)
    data.prepare_data()
    data.setup("fit")
    return data


def test_backbone_holds_the_files_weights(backbone: VGGBackbone, weights: dict[str, Tensor]) -> None:
    ours = [layer for layer in backbone.children() if isinstance(layer, ConvReLU)]
    numbers = [int(name.split(".")[1]) for name in weights if name.startswith("features.") and name.endswith("weight")]
    assert len(ours) == len(numbers) == 13
    for layer, number in zip(ours, sorted(numbers), strict=True):
        assert torch.equal(layer.weight, weights[f"features.{number}.weight"])
        assert torch.equal(layer.bias, weights[f"features.{number}.bias"])


def test_features_of_real_images_are_torchvisions(
    backbone: VGGBackbone, weights: dict[str, Tensor], data: ImageDataModule
) -> None:
    with torch.device("meta"):
        theirs: nn.Module = vgg16(weights=None).features
    named = {name.removeprefix("features."): value for name, value in weights.items() if name.startswith("features.")}
    theirs.load_state_dict(named, assign=True)
    batch = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
    mean = torch.tensor([123.68, 116.779, 103.939]).view(3, 1, 1)
    pixels = torch.from_numpy(data.source.load()["train"].pixels)[batch.indices]
    with torch.no_grad():
        features = backbone(batch.inputs)
        expected = theirs(pixels.float() - mean)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.max().item())
    assert (features > 0).flatten(1).any(dim=1).all()  # every image excites something


def test_folder_gives_the_pixels_of_its_files(data: ImageDataModule, images: Path) -> None:
    assert data.classes == CIFAR10().classes
    splits = data.source.load()
    assert {name: len(split) for name, split in splits.items()} == {"train": 10 * TRAIN, "test": 10 * TEST}
    for name, split in splits.items():
        assert np.bincount(split.labels).tolist() == [len(split) // 10] * 10
        for index in (0, len(split) // 2, len(split) - 1):
            path = images / split.names[index]
            assert path.parent == images / name / data.classes[split.labels[index]]
            with Image.open(path) as image:
                assert np.array_equal(np.asarray(image.convert("RGB")).transpose(2, 0, 1), split.pixels[index])


@pytest.mark.slow
def test_new_head_on_the_real_weights_learns_in_a_few_epochs(images: Path, tmp_path: Path) -> None:
    main([
        "fit", "--config", str(CONFIGS / "head.yaml"), "--config", str(CONFIGS / "with/folder.yaml"),
        f"--data.source.init_args.root={images}", "--data.standardize=weights", "--data.augmentation=null",
        "--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=1e-3", "--trainer.max_epochs=5",
        "--feature_cache.views=1", "--trainer.accelerator=cpu", f"--run.root={tmp_path}",
    ])  # fmt: skip
    run = tmp_path / "head" / "version_0"
    with (run / "history.csv").open(newline="") as file:
        accuracies = [float(row["val/acc"]) for row in csv.DictReader(file)]
    assert len(accuracies) == 5
    assert max(accuracies) > 0.45  # chance is 0.1; random weights reach 0.2
    report = json.loads((run / "test_report.json").read_text())
    assert report["images"] == 10 * TEST
    assert report["accuracy"] > 0.4
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["ImageDataModule"]["mean"] == pytest.approx([123.68, 116.779, 103.939])
