"""Learn from a trained network, the teacher, instead of from labels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.nn import functional as F

from src.data.datamodule import ImageDataModule
from src.data.standardization import standardized
from src.errors import UserError, say, shorten
from src.files import user_path
from src.model.classifier import TransferClassifier
from src.run_directory import checkpoint_at
from src.saved_training import SavedTraining

_HIGHEST = 1000.0  # where logits already count by their differences alone, and nothing can be softened further


class Distillation(Callback):
    """Train towards the probabilities that a teacher gives each image, and not towards the image's label.

    The teacher sees what the network sees, CutMix included, at the size that it was trained on: so a network for small
    images can learn from one for enlarged ones. It computes as a frozen layer does (`model.frozen_precision`). Labels
    still count for `train/acc`; `train/loss` measures how far the network is from its teacher.

    The command line calls `load` before it trains; so must who trains without it.

    Source: G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; that
    both see the same view, and labels are not needed: L. Beyer and others, "Knowledge distillation: A good teacher is
    patient and consistent", arXiv:2106.05237.

    Args:
        teacher: What was trained on the same classes: a checkpoint, a run directory for its best one, or a recipe's
            folder for that of its newest run.
        temperature: By what the logits of both are divided before they are compared, up to 1,000: the higher, the more
            the classes count that the teacher takes for unlikely.

    Raises:
        UserError: The temperature is outside its range.
    """

    def __init__(self, teacher: str, temperature: float = 2.0) -> None:
        if not 0 < temperature <= _HIGHEST:
            raise UserError(
                f"Distillation's temperature is {temperature}: it must be above 0, and {_HIGHEST:g} at most."
            )
        self.path = user_path(teacher)
        self.temperature = temperature
        self.teacher: TransferClassifier | None = None
        self.training: SavedTraining | None = None  # the teacher's, without weights
        self.origin: dict[str, str] = {}  # where the teacher lies, and what its file holds

    def check_settings(self, model: TransferClassifier, cached: bool) -> None:
        """Refuse what a training from a teacher cannot do or would not use.

        Args:
            model: The network that is to learn.
            cached: Whether features are cached.
        """
        if cached:
            raise UserError("Distillation's teacher must see the images: give --feature_cache.views null.")
        if model.label_smoothing:
            raise UserError("Distillation learns from no labels: give --model.label_smoothing 0.")

    def load(
        self, model: TransferClassifier, data: ImageDataModule, continued: SavedTraining | None = None
    ) -> SavedTraining:
        """Read the teacher, and refuse one that this training cannot learn from.

        Args:
            model: The network that is to learn.
            data: The images, not yet read.
            continued: The checkpoint to go on from.

        Returns:
            What the teacher's checkpoint says of its data.

        Raises:
            UserError: The file is no checkpoint, or does not fit.
        """
        path = teacher_at(self.path)
        try:
            saved = SavedTraining.read(path)
            self.teacher = saved.network(frozen_precision=model.frozen_precision).eval()
        except UserError as error:
            raise UserError(f"Distillation's teacher: {error}") from error
        if saved.classes != list(data.classes):
            raise UserError(
                f"Distillation's teacher '{path}' tells other classes apart, or in another order: "
                f"{shorten(saved.classes)}. Give one that was trained on these data."
            )
        stored, enlarged = data.source.image_size, data.image_size
        side = saved.data.get("image_size", stored)  # earlier versions' do not tell
        if side != stored:
            raise UserError(
                f"Distillation's teacher '{path}' was trained on images of {side} pixels, and these have {stored}, so "
                "that all in them would be of another size. Train it on such ones; data.input_size may differ."
            )
        if enlarged not in (stored, self.teacher.image_size):
            raise UserError(
                f"Distillation's teacher '{path}' sees images enlarged to {self.teacher.image_size} pixels, and these "
                f"are enlarged to {enlarged} already: give --data.input_size null or {self.teacher.image_size}."
            )
        with path.open("rb") as file:
            self.origin = {"path": str(path), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        if continued is not None:
            self._check_same(continued)
        self.training = saved.data_alone()
        return self.training

    def _check_same(self, continued: SavedTraining) -> None:
        """Refuse to go on with another teacher; what learnt from labels may go on with one."""
        before = continued.content.get("callbacks", {}).get(self.state_key, self.origin)
        if before["sha256"] != self.origin["sha256"]:
            raise UserError(
                f"'{continued.path}' learnt from '{before['path']}' as it was then, and '{self.origin['path']}' is "
                "another network: give the same teacher, or start anew from its weights: "
                f"--run.warm_start {continued.word}."
            )

    def state_dict(self) -> dict[str, Any]:
        return self.origin

    def on_fit_start(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        teacher, data = self.teacher, ImageDataModule.of(trainer)
        assert teacher is not None, "load() comes before the training"
        assert self.training is not None
        device = trainer.strategy.root_device
        teacher.to(device)
        scale = torch.tensor([self.training.data["mean"], self.training.data["std"]], device=device)
        mean, std = scale.view(2, 1, 3, 1, 1)

        def seen(inputs: Tensor) -> Tensor:
            return standardized(data.pixels(inputs), mean, std, teacher.image_size)

        def loss(logits: Tensor, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                taught = teacher(seen(inputs))
            return divergence(logits, taught, self.temperature)

        rank_zero_only(say)(f"learns from '{self.origin['path']}', and from no labels")
        if teacher.needs_calibration:
            teacher.calibrate(seen(data.sample_images()))
        pl_module.loss_on_images = loss

    def on_fit_end(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        pl_module.loss_on_images = None
        if self.teacher is not None:
            self.teacher.cpu()  # a test may need the memory


def teacher_at(path: Path) -> Path:
    """Find the checkpoint of a teacher.

    Raises:
        UserError: There is none.
    """
    try:
        return checkpoint_at(path)
    except UserError as error:
        raise UserError(f"Distillation's teacher: {error}") from error


def divergence(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Give the mean Kullback-Leibler divergence of the teacher's probabilities from a network's.

    It is multiplied by the square of the temperature, so that gradients keep their size.

    Args:
        logits: The network's, (N, classes).
        taught: The teacher's, likewise.
        temperature: By what both are divided.
    """
    ours, theirs = ((each.float() / temperature).log_softmax(dim=1) for each in (logits, taught))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True) * temperature**2
