"""What the terminal shows before training."""

from __future__ import annotations

import pytest

from src.callbacks.schedule import HEAD_NUMBER, parse_stages
from src.callbacks.summary import image_line, layer_table, stage_table
from src.data.datamodule import ImageDataModule
from src.data.sources import Sample
from src.model.classifier import TransferClassifier

HEAD = 512 * 256 + 256 + 2 * 256 + 256 * 10 + 10


@pytest.fixture(scope="module")
def model() -> TransferClassifier:
    return TransferClassifier(weights=None)


def test_layers_that_train_are_marked_and_counted(model: TransferClassifier) -> None:
    rows = [line.split() for line in layer_table(model, 4).splitlines()[2:]]
    convolutions = ["block5_conv1", "block5_conv2", "block5_conv3"]
    assert [row[0] for row in rows if row[-1] == "yes"] == [*convolutions, "head.hidden", "head.norm", "head.linear"]
    assert rows[-2] == ["backbone", "14,714,688", "7,079,424"]
    assert rows[-1] == ["backbone", "and", "head", f"{14_714_688 + HEAD:,}", f"{7_079_424 + HEAD:,}"]


def test_schedule_tells_each_stages_parameters_and_rates(model: TransferClassifier) -> None:
    def rate(number: int, epoch: int) -> float:
        return (1e-3 if number == HEAD_NUMBER else 1e-5 * number) / (1 + epoch)

    rows = stage_table(model, parse_stages({0: 0, 1: 4}), rate, 9).splitlines()[2:]
    assert rows[0].split() == ["0", "to", "0", "0", "head", f"{HEAD:,}", "0.001"]
    assert rows[1].split()[:3] == ["1", "to", "8"]
    assert rows[1].split()[3:] == ["4", "block5_conv1", "…", "head", f"{7_079_424 + HEAD:,}", "0.0005", "…", "7e-05"]


def test_images_of_the_rarest_and_the_commonest_class_are_counted() -> None:
    data = ImageDataModule(Sample(size=50), standardize="dataset", val_fraction=0.5, split_seed=1)
    data.setup("fit")
    labels = data.datasets["train"].labels[data.datasets["train"].chosen].tolist()
    counts = sorted((labels.count(number), name) for number, name in enumerate(data.classes))
    (few, rare), (many, common) = counts[0], counts[-1]
    assert few < many
    images = f"25 training images ({few} of {rare} to {many} of {common}), 25 to validate, 10 to test"
    assert image_line(data) == f"10 classes: {images}"


def test_classes_of_which_a_split_has_nothing_are_named() -> None:
    data = ImageDataModule(Sample(size=50), standardize="dataset", val_fraction=0.5, split_seed=1)
    data.setup("fit")
    for split, without in (("train", (3,)), ("val", (0, 7))):
        dataset = data.datasets[split]
        for number in without:
            dataset.chosen = dataset.chosen[dataset.labels[dataset.chosen] != number]
    assert image_line(data).splitlines()[1:] == [
        f"none to train on of {data.classes[3]}",
        f"none to validate of {data.classes[0]}, {data.classes[7]}",
    ]


def test_stages_after_the_end_are_marked(model: TransferClassifier) -> None:
    lines = stage_table(model, parse_stages({0: 0, 9: 4}), lambda number, epoch: 1e-3, 9).splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == ["0 to 8", "9 (after the end)"]


def test_schedule_without_an_end(model: TransferClassifier) -> None:
    lines = stage_table(model, parse_stages({0: 0, 3: 4}), lambda number, epoch: 1e-3, -1).splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == ["0 to 2", "3 on"]
