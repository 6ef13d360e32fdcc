"""Learn from a trained network, the teacher, instead of from labels."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.nn import functional as F

from src.callbacks.feature_cache import FrozenFeatureCache
from src.data.datamodule import ImageDataModule
from src.data.standardization import standardized
from src.errors import UserError
from src.files import user_path
from src.model.classifier import TransferClassifier
from src.saved_training import SavedTraining


class Distillation(Callback):
    """Train towards the probabilities that a teacher gives each image, and not towards the image's label.

    The teacher sees what the network sees, CutMix included, at the size that it was trained on: so a network for small
    images can learn from one for enlarged ones. It computes as a frozen layer does (`model.frozen_precision`). Labels
    still count for `train/acc`; `train/loss` measures how far the network is from its teacher.

    Source: G. Hinton, O. Vinyals and J. Dean, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531; that
    both see the same view, and labels are not needed: L. Beyer and others, "Knowledge distillation: A good teacher is
    patient and consistent", arXiv:2106.05237.

    Args:
        teacher: Checkpoint of a training on the same classes.
        temperature: By what the logits of both are divided before they are compared: the higher, the more the classes
            count that the teacher takes for unlikely.

    Raises:
        UserError: The temperature is not above 0.
    """

    def __init__(self, teacher: str, temperature: float = 2.0) -> None:
        if not temperature > 0:
            raise UserError(f"temperature of Distillation is {temperature}: it must be above 0.")
        self.path = user_path(teacher)
        self.temperature = temperature
        self.teacher: TransferClassifier | None = None
        self.scale = torch.empty(2, 3)  # mean and deviation of the teacher's input

    def load(self, model: TransferClassifier, data: ImageDataModule, cache: FrozenFeatureCache) -> None:
        """Read the teacher, and refuse one that this training cannot learn from.

        Args:
            model: The network that is to learn.
            data: The images, not yet read.
            cache: Its feature cache, which must be off.

        Raises:
            UserError: The file is no checkpoint, or does not fit.
        """
        if not self.path.is_file():
            raise UserError(f"Distillation's teacher: no checkpoint '{self.path}'. Give the path of one.")
        if cache.views is not None:
            raise UserError("Distillation's teacher must see the images: give --feature_cache.views null.")
        if model.label_smoothing:
            raise UserError("Distillation learns from no labels: give --model.label_smoothing 0.")
        saved = SavedTraining.read(self.path)
        if saved.classes != list(data.classes):
            raise UserError(f"Distillation's teacher '{self.path}' tells other classes apart: {saved.classes}.")
        self.teacher = saved.network(frozen_precision=model.frozen_precision).eval()
        self.scale = torch.tensor([saved.data["mean"], saved.data["std"]])
        side = saved.data.get("image_size", self.teacher.image_size)  # earlier versions' tell the network's only
        if side != data.source.image_size:
            raise UserError(
                f"Distillation's teacher '{self.path}' was trained on images of {side} pixels, and these have "
                f"{data.source.image_size}: to it everything in them would be of another size."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        teacher, data = self.teacher, ImageDataModule.of(trainer)
        assert teacher is not None, "load() comes before the training"
        teacher.to(trainer.strategy.root_device)
        mean, std = self.scale.to(trainer.strategy.root_device).view(2, 1, 3, 1, 1)

        def seen(inputs: Tensor) -> Tensor:
            return standardized(data.pixels(inputs), mean, std, teacher.image_size)

        def loss(logits: Tensor, inputs: Tensor) -> Tensor:
            with torch.no_grad():
                taught = teacher(seen(inputs))
            return divergence(logits, taught, self.temperature)

        if teacher.needs_calibration:
            teacher.calibrate(seen(data.sample_images()))
        pl_module.loss_on_images = loss

    def on_fit_end(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        pl_module.loss_on_images = None


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
