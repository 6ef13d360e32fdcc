"""The test report against scikit-learn, and predictions.csv in the order of the images."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, precision_recall_fscore_support
from torch import Tensor
from torch.utils.data import DataLoader

from src.batch import Batch
from src.callbacks import predictions
from src.callbacks.predictions import REPORT, PredictionWriter
from src.data.datamodule import ImageDataModule
from src.data.sources import Images, Source

pytestmark = pytest.mark.pictures

CLASSES = ("cat", "dog", "cow")


def predicted(probabilities: Any, labels: Any) -> predictions.Predictions:
    """Give predictions as the writer collects them."""
    return predictions.Predictions(
        torch.arange(len(labels)), torch.as_tensor(labels), torch.as_tensor(probabilities, dtype=torch.float32)
    )


def random_predictions(n: int, classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += 1
    exp = np.exp(logits)
    return exp / exp.sum(1, keepdims=True), labels


@pytest.mark.parametrize(("n", "classes"), [(500, 10), (60, 3), (40, 2)])
def test_report_is_scikit_learns(n: int, classes: int) -> None:
    probabilities, labels = random_predictions(n, classes)
    names = tuple(f"class {number}" for number in range(classes))
    report = predictions.classification_report(predicted(probabilities, labels), names)
    guess = probabilities.argmax(1)
    precision, recall, _, support = precision_recall_fscore_support(labels, guess, zero_division=0)
    assert report["images"] == n
    assert report["accuracy"] == pytest.approx(accuracy_score(labels, guess))
    assert report["macro_f1"] == pytest.approx(f1_score(labels, guess, average="macro"))
    assert report["loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-5)
    assert report["confusion_matrix"] == confusion_matrix(labels, guess).tolist()
    assert list(report["classes"]) == list(names)
    for number, name in enumerate(names):
        assert report["classes"][name]["images"] == support[number]
        assert report["classes"][name]["precision"] == pytest.approx(precision[number])
        assert report["classes"][name]["recall"] == pytest.approx(recall[number])


def test_precision_of_no_answers_and_recall_of_no_images_are_none() -> None:
    probabilities = [[0.8, 0.2, 0.0], [0.6, 0.4, 0.0], [0.7, 0.3, 0.0]]
    report = predictions.classification_report(predicted(probabilities, [0, 0, 1]), CLASSES)
    assert report["classes"]["dog"] == {"images": 1, "precision": None, "recall": 0.0}
    assert report["classes"]["cow"] == {"images": 0, "precision": None, "recall": None}
    assert report["classes"]["cat"] == {"images": 2, "precision": pytest.approx(2 / 3), "recall": 1.0}
    assert report["confusion_matrix"] == [[2, 0, 0], [1, 0, 0], [0, 0, 0]]


def test_calibration_error_by_hand() -> None:
    # Fifteen bins of width 1/15: 0.62 and 0.65 share one, 0.91 has the next but three, 0.35 stands alone.
    probabilities = [[0.62, 0.38, 0.0], [0.35, 0.65, 0.0], [0.91, 0.09, 0.0], [0.35, 0.33, 0.32]]
    labels = [0, 0, 0, 2]  # right, wrong, right, wrong
    by_hand = (2 * abs(0.5 - (0.62 + 0.65) / 2) + abs(1 - 0.91) + abs(0 - 0.35)) / 4
    report = predictions.classification_report(predicted(probabilities, labels), CLASSES)
    assert report["calibration_error"] == pytest.approx(by_hand)


def test_calibration_error_of_many() -> None:
    probabilities, labels = random_predictions(400, 5, seed=1)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.minimum((confidence * 15).astype(int), 14)
    by_hand = sum(abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins))
    report = predictions.classification_report(predicted(probabilities, labels), tuple("abcde"))
    assert report["calibration_error"] == pytest.approx(by_hand, rel=1e-5)


def test_sure_and_wrong_has_a_finite_loss() -> None:
    report = predictions.classification_report(predicted([[1.0, 0.0, 0.0]], [1]), CLASSES)
    assert 20 < report["loss"] < 100


def test_deterministic_mode_counts_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchmetrics would take images × classes² of memory: for 10,000 of a thousand classes 90 GB."""
    counted, bincount = [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *args, **options: counted.append(1) or bincount(*args, **options))
    probabilities, labels = random_predictions(50, 5)
    torch.use_deterministic_algorithms(True)
    try:
        report = predictions.classification_report(predicted(probabilities, labels), tuple("abcde"))
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(counted) == 2
    assert report == predictions.classification_report(predicted(probabilities, labels), tuple("abcde"))


class Numbered(Source):
    """Give images whose pixels are all the image's own number."""

    image_size = 8

    @property
    def classes(self) -> tuple[str, ...]:
        return CLASSES

    def prepare(self) -> None:
        """Have everything."""

    def load(self) -> dict[str, Images]:
        pixels = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, 1).repeat(8, 2).repeat(8, 3)
        files = [f"test/{'abcdefghij'[number]}.png" for number in range(10)]
        images = Images(pixels, np.arange(10) % 3, files)
        return {"train": images, "test": images}


class Backwards(ImageDataModule):
    """Hand out the test images in batches and in an order of its own, as several processes would."""

    def test_dataloader(self) -> DataLoader:
        return DataLoader(
            [self.datasets["test"][positions] for positions in ([9, 2, 5], [0, 7, 1, 3], [8, 6, 4])],  # type: ignore
            batch_size=None,
        )

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()


class Guesser(LightningModule):
    """Be surer the higher an image's number, and right but for number 4."""

    def __init__(self, offset: float = 0.0, averages: bool = False) -> None:
        super().__init__()
        self.offset = offset
        self.averages = averages

    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        return {"plain": self._guess(batch)}

    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        return {"plain": self._guess(batch)}

    def test_step(self, batch: Batch) -> dict[str, Tensor]:
        right = torch.nn.functional.one_hot(batch.labels, 3).float()
        return {"plain": self._guess(batch)} | ({"tta": right} if self.averages else {})

    def _guess(self, batch: Batch) -> Tensor:
        numbers = batch.inputs[:, 0, 0, 0].round()
        guess = (numbers.long() + (numbers == 4)) % 3
        sure = 0.5 + numbers / 20 + self.offset
        probabilities = ((1 - sure) / 2)[:, None].repeat(1, 3)
        return probabilities.scatter(1, guess[:, None], sure[:, None])


def test_examples_are_taken_from_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a folder come class by class."""
    shown: list[np.ndarray] = []
    monkeypatch.setattr(predictions, "grid_figure", lambda pixels, *_: shown.append(pixels))
    data, numbers = make_data(), torch.arange(47)
    data.setup("test")
    dataset = data.datasets["test"]
    dataset.pixels = numbers.view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    found = predicted(torch.eye(3)[numbers % 3], numbers % 3)
    predictions._grid(found.examples(), dataset, data.classes, "examples")
    assert shown[0][:, 0, 0, 0].tolist() == list(range(0, 47, 2))


def make_data() -> Backwards:
    return Backwards(Numbered(), standardize="weights", weights_input=((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))


def make_trainer(folder: Path) -> Trainer:
    return Trainer(
        accelerator="cpu", callbacks=[PredictionWriter()], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip


def written(folder: Path) -> list[dict[str, str]]:
    with (folder / "predictions.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_file_name_that_is_no_text_stands_as_it_is(tmp_path: Path) -> None:
    data = make_data()
    data.setup("test")
    data.datasets["test"].names = [os.fsdecode(b"M\xfcller.png")] * 10
    make_trainer(tmp_path).predict(Guesser(), data, return_predictions=False)
    assert (tmp_path / "predictions.csv").read_bytes().count(b"M\xfcller.png,") == 10


@pytest.mark.parametrize("command", ["test", "predict"])
def test_predictions_stand_in_the_order_of_the_images(tmp_path: Path, command: str) -> None:
    options: dict[str, bool] = {"verbose": False} if command == "test" else {"return_predictions": False}
    getattr(make_trainer(tmp_path), command)(Guesser(), make_data(), **options)
    rows = written(tmp_path)
    assert list(rows[0]) == ["image", "true", "predicted", "p(cat)", "p(dog)", "p(cow)"]
    assert [row["image"] for row in rows] == [f"test/{letter}.png" for letter in "abcdefghij"]
    for number, row in enumerate(rows):
        assert row["true"] == CLASSES[number % 3]
        assert row["predicted"] == CLASSES[(number + (number == 4)) % 3]
        assert float(row[f"p({row['predicted']})"]) == pytest.approx(0.5 + number / 20, abs=1e-6)
        assert sum(float(row[f"p({name})"]) for name in CLASSES) == pytest.approx(1, abs=1e-5)


def test_test_leaves_report_and_pictures(tmp_path: Path) -> None:
    make_trainer(tmp_path).test(Guesser(), make_data(), verbose=False)
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["accuracy"] == pytest.approx(0.9)
    assert report["confusion_matrix"] == [[4, 0, 0], [0, 2, 1], [0, 0, 3]]
    for name in ("confusion_matrix.png", "predictions.png", "mistakes.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_where_nothing_is_wrong_no_picture_of_mistakes_stays(tmp_path: Path) -> None:
    make_trainer(tmp_path).test(Guesser(), make_data(), verbose=False)
    assert (tmp_path / "mistakes.png").exists()
    make_trainer(tmp_path).test(Guesser(averages=True), make_data(), verbose=False)
    assert not (tmp_path / "mistakes.png").exists()


def test_the_surest_mistakes_come_first() -> None:
    probabilities = [[0.9, 0.1, 0.0], [0.3, 0.7, 0.0], [0.2, 0.8, 0.0], [0.4, 0.0, 0.6], [0.05, 0.95, 0.0]]
    mistakes = predicted(probabilities, [1, 1, 0, 0, 2]).surest_mistakes()  # only the second is right
    assert mistakes.indices.tolist() == [4, 0, 2, 3]
    assert mistakes.labels.tolist() == [2, 1, 0, 0]
    many = predicted([[0.5 + i / 100, 0.5 - i / 100, 0.0] for i in range(40)], [1] * 40).surest_mistakes()
    assert many.indices.tolist() == list(range(39, 15, -1))


def test_report_has_averaged_predictions_apart(tmp_path: Path) -> None:
    make_trainer(tmp_path).test(Guesser(averages=True), make_data(), verbose=False)
    report = json.loads((tmp_path / REPORT).read_text())
    assert report["accuracy"] == pytest.approx(0.9)
    assert report["test_time_augmentation"] == pytest.approx(
        {"accuracy": 1.0, "macro_f1": 1.0, "loss": 0.0, "calibration_error": 0.0}, abs=1e-6
    )
    assert {row["p(cat)"] for row in written(tmp_path)} == {"0.000000", "1.000000"}


def test_predict_leaves_predictions_only(tmp_path: Path) -> None:
    make_trainer(tmp_path).predict(Guesser(), make_data(), return_predictions=False)
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.csv"]


def test_second_test_counts_no_image_of_the_first(tmp_path: Path) -> None:
    trainer, data = make_trainer(tmp_path), make_data()
    trainer.test(Guesser(), data, verbose=False)
    trainer.test(Guesser(offset=-0.1), data, verbose=False)
    assert json.loads((tmp_path / REPORT).read_text())["images"] == 10
    assert float(written(tmp_path)[9]["p(cat)"]) == pytest.approx(0.85)


def test_examples_are_the_images_with_their_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}

    def note(pixels: np.ndarray, titles: list[str], heading: str, colours: list[str] | None = None) -> object:
        if "mistakes" in heading:
            drawn["mistakes"] = dict(zip(pixels[:, 0, 0, 0].tolist(), titles, strict=True))
        else:
            drawn.update(numbers=pixels[:, 0, 0, 0].tolist(), shape=pixels.shape[1:], titles=titles, colours=colours)
        return figure(pixels, titles, heading, colours)

    figure = predictions.grid_figure
    monkeypatch.setattr(predictions, "grid_figure", note)
    make_trainer(tmp_path).test(Guesser(), make_data(), verbose=False)
    assert drawn["numbers"] == list(range(10))
    assert drawn["shape"] == (8, 8, 3)
    assert drawn["titles"][:5] == ["cat 50%", "dog 55%", "cow 60%", "cat 65%", "cow 70%"]
    assert [number for number, colour in enumerate(drawn["colours"]) if colour == "crimson"] == [4]
    assert drawn["mistakes"] == {4: "cow 70%, is dog"}


def test_validation_images_are_those_that_were_split_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    monkeypatch.setattr(predictions, "grid_figure", lambda pixels, *_: drawn.extend(pixels[:, 0, 0, 0].tolist()))
    monkeypatch.setattr(predictions, "save_and_log", lambda *_: None)
    data = make_data()
    make_trainer(tmp_path).validate(Guesser(), data, verbose=False)
    numbers = sorted(data.datasets["val"].chosen.tolist())
    assert drawn == numbers != [0, 1, 2]
    with (tmp_path / "val_predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"test/{'abcdefghij'[number]}.png" for number in numbers]
    assert [row["true"] for row in rows] == [CLASSES[number % 3] for number in numbers]
    assert json.loads((tmp_path / "val_report.json").read_text())["images"] == 3
