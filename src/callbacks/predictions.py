"""What the network says of each image, and how good that is."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics.functional import classification

from src.batch import Batch
from src.callbacks.figures import confusion_figure, grid_figure, save_and_log, write_png
from src.data.datamodule import ImageDataModule
from src.data.loading import ArrayDataset
from src.data.sources import UNKNOWN
from src.errors import say
from src.files import replacing
from src.model.classifier import TransferClassifier
from src.model.loss_and_accuracy import counting_plainly

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PREDICTIONS = "predictions"
CONFUSION = "confusion_matrix"
MISTAKES = "mistakes"
UNLABELLED = "unlabelled"
REPORT = "test_report.json"

_DRAWN = 24  # images that a picture shows
_PRINTED = 10  # answers that the terminal shows
_WHOLE = ("accuracy", "macro_f1", "loss", "calibration_error")
"""What a report says of all images together."""


class Predictions(NamedTuple):
    """Hold what was predicted, in the order of the images."""

    indices: Tensor
    """Which images, int64, (N,)."""
    labels: Tensor
    """True classes, int64, (N,); UNKNOWN for all if nobody told."""
    probabilities: Tensor
    """One probability a class, float32, (N, classes)."""

    @property
    def have_labels(self) -> bool:
        """Whether the true classes are known."""
        return bool((self.labels != UNKNOWN).all())

    def examples(self) -> Predictions:
        """Choose up to 24, evenly spread."""
        return self._only(torch.linspace(0, len(self.labels) - 1, min(_DRAWN, len(self.labels))).long())

    def surest_mistakes(self) -> Predictions:
        """Choose up to 24 of the wrong ones, the surest first."""
        confidence, predicted = self.probabilities.max(dim=1)
        wrong = (predicted != self.labels).nonzero().flatten()
        return self._only(wrong[confidence[wrong].argsort(descending=True, stable=True)][:_DRAWN])

    def _only(self, chosen: Tensor) -> Predictions:
        return Predictions(*(column[chosen] for column in self))


class PredictionWriter(Callback):
    """Collect the probabilities of test, predict and validate from all processes, and write them to the run directory.

    Test and validate also give a report and the confusion matrix; a training's own validations give nothing.
    """

    def __init__(self) -> None:
        self.parts: list[list[Tensor]] = []
        self.directory = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.directory = Path(trainer.log_dir or ".")
        self.parts = []

    def on_test_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Tensor], batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        self.parts.append([batch.indices, batch.labels, *outputs.values()])

    on_predict_batch_end = on_test_batch_end

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: LightningModule, outputs: dict[str, Tensor], batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if trainer.state.fn == TrainerFn.VALIDATING:  # not in a training, after each epoch
            self.on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        self._report(trainer, pl_module, "test")

    def on_validation_epoch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: TransferClassifier
    ) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._report(trainer, pl_module, "val")

    def _report(self, trainer: Trainer, model: TransferClassifier, split: str) -> None:
        prefix = "" if split == "test" else f"{split}_"
        found = self._gather(trainer)
        if not trainer.is_global_zero:
            return
        plain, shown = found[0], found[-1]  # averaged ones, if there are any
        data = ImageDataModule.of(trainer)
        dataset = data.datasets[split]
        report = classification_report(plain, data.classes)
        if trainer.ckpt_path:
            report = {"checkpoint": Path(trainer.ckpt_path).name, "epoch": model.checkpoint_epoch} | report
        if shown is not plain:
            averaged = classification_report(shown, data.classes)
            report["test_time_augmentation"] = {key: averaged[key] for key in _WHOLE}
        self._write(shown, dataset, data.classes, f"{prefix}{PREDICTIONS}.csv")
        with replacing(self.directory / f"{split}_report.json") as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        title, mistakes = f"{split} images and predictions (red: wrong)", shown.surest_mistakes()
        figures = {
            CONFUSION: confusion_figure(report["confusion_matrix"], data.classes),
            PREDICTIONS: _grid(shown.examples(), dataset, data.classes, title),
        }
        (self.directory / f"{prefix}{MISTAKES}.png").unlink(missing_ok=True)  # of a test before, and now there are none
        if len(mistakes.labels):
            figures[MISTAKES] = _grid(mistakes, dataset, data.classes, f"surest mistakes of the {split} images", True)
        for kind, figure in figures.items():
            save_and_log(trainer, f"{prefix}{kind}", figure, self.directory / f"{prefix}{kind}.png")

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        (predictions,) = self._gather(trainer)
        if not trainer.is_global_zero:
            return
        data = ImageDataModule.of(trainer)
        dataset = data.datasets[data.predicted]
        if predictions.have_labels:
            self._write(predictions, dataset, data.classes, f"{PREDICTIONS}.csv")
        else:  # files of their own: the run keeps what it said of its test images
            self._write(predictions, dataset, data.classes, f"{UNLABELLED}.csv")
            write_png(
                _grid(predictions.examples(), dataset, data.classes, "predictions"),
                self.directory / f"{UNLABELLED}.png",
            )
            guesses = _guesses(predictions.probabilities[:_PRINTED], data.classes)
            for index, guess in zip(predictions.indices.tolist(), guesses, strict=False):
                say(f"{dataset.name_of(index)}  {guess}")
            if len(predictions.indices) > _PRINTED:
                say(f"and {len(predictions.indices) - _PRINTED} more")

    def _gather(self, trainer: Trainer) -> list[Predictions]:
        """Join the parts of all processes: plain predictions, then averaged ones if there are any."""
        joined = [torch.cat(column).cpu() for column in zip(*self.parts, strict=True)]
        self.parts = []
        if trainer.world_size > 1:
            everyone: list[list[Tensor]] = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(everyone, joined)
            joined = [torch.cat(column) for column in zip(*everyone, strict=True)]
        order = joined[0].argsort()
        indices, labels, *probabilities = (column[order] for column in joined)
        return [Predictions(indices, labels, some) for some in probabilities]

    def _write(self, predictions: Predictions, dataset: ArrayDataset, classes: tuple[str, ...], file_name: str) -> None:
        with (
            replacing(self.directory / file_name) as temporary,
            temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
        ):
            writer = csv.writer(file)
            truth = predictions.have_labels
            writer.writerow(["image", *["true"] * truth, "predicted", *(f"p({each})" for each in classes)])
            for index, label, row in zip(*predictions, strict=True):  # numbers of all at once would fill the memory
                values = (f"{value:.6f}" for value in row.tolist())
                best = int(row.argmax())
                name, true = dataset.name_of(int(index)), [classes[int(label)]] * truth
                writer.writerow([name, *true, classes[best], *values])


def classification_report(predictions: Predictions, classes: tuple[str, ...]) -> dict:
    """Measure predictions against the truth.

    Returns:
        Number of images, accuracy, macro F1, cross-entropy loss in nats, expected calibration error (15 bins,
        C. Guo and others, "On Calibration of Modern Neural Networks", 2017), the confusion matrix (rows: true
        class), and for each class its number of images, precision (None if it was never predicted) and recall
        (None if it has no images).
    """
    _, labels, probabilities = predictions
    predicted, n = probabilities.argmax(dim=1), len(classes)
    with counting_plainly():
        matrix = classification.multiclass_confusion_matrix(predicted, labels, n)
        f1 = classification.multiclass_f1_score(predicted, labels, n, average="macro").item()
    hits, support, answers = matrix.diag(), matrix.sum(dim=1), matrix.sum(dim=0)
    precision, recall = ((hits / count).tolist() for count in (answers, support))
    return {
        "images": len(labels),
        "accuracy": (hits.sum() / len(labels)).item(),
        "macro_f1": f1,
        "loss": torch.nn.functional.nll_loss(probabilities.clamp(min=1e-12).log(), labels).item(),
        "calibration_error": classification.multiclass_calibration_error(probabilities, labels, n, n_bins=15).item(),
        "classes": {
            name: {
                "images": int(support[i]),
                "precision": precision[i] if answers[i] else None,
                "recall": recall[i] if support[i] else None,
            }
            for i, name in enumerate(classes)
        },
        "confusion_matrix": matrix.tolist(),
    }


def _guesses(probabilities: Tensor, classes: tuple[str, ...]) -> list[str]:
    """Say what each image is taken for, and how surely."""
    confidence, predicted = probabilities.max(dim=1)
    return [f"{classes[p]} {c:.0%}" for p, c in zip(predicted.tolist(), confidence.tolist(), strict=True)]


def _grid(
    predictions: Predictions, dataset: ArrayDataset, classes: tuple[str, ...], heading: str, name_truth: bool = False
) -> Figure:
    """Draw images with what they are taken for and, if asked to, with what they are."""
    indices, labels, probabilities = predictions
    pixels = dataset.pixels[indices.to(dataset.pixels.device)].permute(0, 2, 3, 1).cpu().numpy()
    titles = _guesses(probabilities, classes)
    if name_truth:
        titles = [f"{guess}, is {classes[label]}" for guess, label in zip(titles, labels.tolist(), strict=True)]
    if name_truth or not predictions.have_labels:
        return grid_figure(pixels, titles, heading)
    colours = ["green" if right else "crimson" for right in (probabilities.argmax(dim=1) == labels).tolist()]
    return grid_figure(pixels, titles, heading, colours)
