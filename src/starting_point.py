"""What a command starts from: whether a checkpoint fits it, and what the user should know of that."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Timer, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only

from src.callbacks.distillation import Distillation
from src.callbacks.history import HISTORY, read_history
from src.callbacks.stopping import callbacks_of
from src.data.datamodule import ImageDataModule
from src.errors import UserError, say, shorten
from src.files import make_folder, user_path
from src.model.classifier import TransferClassifier
from src.model.vgg import PUBLISHED, expected_input
from src.preflight import count_batches
from src.run_directory import RunLogger, run_of
from src.saved_training import SavedTraining


def load_checkpoint(
    saved: SavedTraining, trainer: Trainer, model: TransferClassifier, data: ImageDataModule, trains: bool
) -> None:
    """Refuse a checkpoint that does not fit optimizer, classes and network, and take over its standardization.

    Args:
        saved: The checkpoint, whose weights Lightning loads later.
        trainer: With the user's settings.
        model: The network that it is for.
        data: The images, not yet read.
        trains: Whether the command goes on with its training.

    Raises:
        UserError: It does not fit.
    """
    if trains:
        if trainer.max_steps != -1 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise UserError(
                "a run with trainer.max_steps cannot be continued, for Lightning would count its epochs wrong: "
                "give trainer.max_epochs instead, or start anew from its weights with --run.warm_start."
            )
        saved.check_optimizer(type(model.configure_optimizers()).__name__)
        saved.check_averages(bool(callbacks_of(trainer, WeightAveraging)))
        if not callbacks_of(trainer, Distillation):
            saved.check_teacher(Distillation.__qualname__)
    elif model.frozen_precision == "int8":
        saved.check_ranges()
    if saved.data:
        data.load_state_dict(saved.data)
    else:
        _check_input(model, data)
    saved.check_size(data.source.image_size, model.image_size)  # on which the head depends
    saved.check_network(model.state_dict())


def load_warm_start(path: Path, model: TransferClassifier, data: ImageDataModule) -> SavedTraining:
    """Give a new training the weights of a checkpoint, backbone and head.

    Args:
        path: The checkpoint.
        model: The network, which gets the weights.
        data: The images, not yet read.

    Returns:
        What the checkpoint says of its data, without its weights.

    Raises:
        UserError: It is none, or of another network.
    """
    saved = SavedTraining.read(path)
    saved.check_network(model.state_dict(), anew=True)
    if "mean" not in saved.data:
        _check_input(model, data)
    model.load_state_dict(saved.content["state_dict"])
    return saved.data_alone()


def _check_input(model: TransferClassifier, data: ImageDataModule) -> None:
    """Ask the network's first weights what input they expect, for there is nothing else to tell."""
    if data.standardize == "weights":
        expected_input(model.weights, model.hparams["weights_input"])


def training_of(weights: str | None) -> SavedTraining | None:
    """Give the training whose checkpoint a file of weights is, without its weights; None for any other weights."""
    if weights is None or weights in PUBLISHED:
        return None
    try:
        return SavedTraining.read(user_path(weights)).data_alone()
    except UserError:  # a state dict alone
        return None


def check_continuation(saved: SavedTraining, trainer: Trainer, data: ImageDataModule, stay: bool) -> None:
    """Refuse to go on with other images or batches, or where nothing is left to train.

    Args:
        saved: The checkpoint to go on from.
        trainer: With the user's settings.
        data: The images, read.
        stay: Whether every epoch gives a process the same images.

    Raises:
        UserError: It cannot go on.
    """
    tries = trainer.fast_dev_run  # type: ignore[attr-defined]
    saved.check_whole()
    saved.check_data(data.identity(trainer.world_size, stay))
    saved.check_step(trainer.accumulate_grad_batches)
    if tries:
        return
    saved.check_rest(count_batches(data, trainer, "train")[0])
    check_place(saved.path, trainer)
    if saved.check_end(trainer.max_epochs):
        saved.check_time(callbacks_of(trainer, Timer))
        saved.say_where()
        _announce_replaced(saved.path, saved.content["epoch"])


def _announce_replaced(checkpoint: Path, epoch: int) -> None:
    run = run_of(checkpoint)
    history = read_history(run / HISTORY) if run is not None and (run / HISTORY).is_file() else []
    later = [row for row in history if row["epoch"] > epoch]
    if later:
        rank_zero_only(say)(
            f"'{checkpoint}' is of epoch {epoch}, counted from 0: the {len(later)} that came after will be replaced"
        )


def check_place(checkpoint: Path, trainer: Trainer) -> None:
    """Refuse a checkpoint if what comes of it cannot be kept where it belongs: in its run, if it has one.

    Args:
        checkpoint: Where it lies.
        trainer: Whose logger makes a run for one that has none.

    Raises:
        UserError: The folder cannot be written to.
    """
    run = run_of(checkpoint)
    if run is not None and not os.access(run, os.W_OK):
        raise UserError(
            f"what comes of '{checkpoint}' belongs to its run, and '{run}' cannot be written to: copy the "
            "checkpoint elsewhere, and give the copy as --ckpt_path."
        )
    if run is None and isinstance(trainer.logger, RunLogger):
        make_folder(Path(trainer.logger.root_dir), "runs", "--run.root")


def say_if_seen(saved: SavedTraining, data: ImageDataModule) -> None:
    """Say that a network may know the images by which it is judged from now on.

    Args:
        saved: The training that its weights come from.
        data: The images, read.
    """
    if "train" in data.datasets and not saved.saw(data.identity(1, False)):
        rank_zero_only(say)(
            f"'{saved.path}' was trained and validated on other images, or on another split of them: if it was "
            "trained on some that validate now, their accuracy is too good"
        )


def say_of_other_classes(saved: SavedTraining, data: ImageDataModule) -> None:
    """Say that a head was trained for other classes than those that it shall learn.

    Args:
        saved: The training that the head comes from.
        data: The images.
    """
    if saved.data.get("classes", list(data.classes)) != list(data.classes):
        rank_zero_only(say)(
            f"'{saved.path}' tells other classes apart, or in another order: {shorten(saved.classes)}. Its head "
            f"was trained for those; to start with a new one give --model.weights {saved.word} instead"
        )
