"""Look at files and settings before a run begins: a mistake then costs seconds and leaves nothing behind.

Every check raises a UserError that says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from src.callbacks.checkpoints import BEST, LAST
from src.data.datamodule import ImageDataModule
from src.data.sampling import taken_batches
from src.errors import UserError
from src.plain_errors import LINKED

METRICS = ("train/loss", "train/acc", "val/loss", "val/acc", "val/f1")
_UNFIT: dict[type[Callback], str] = {
    BatchSizeFinder: "a batch's size is part of its recipe, and it would try others with the head alone. Give "
    "--data.batch_size.",
    BaseFinetuning: "layers thaw by unfreezing.stages.",
    GradientAccumulationScheduler: (
        "a run that continues within an epoch would not accumulate in it. Give --trainer.accumulate_grad_batches."
    ),
    LearningRateFinder: "rates belong to the stages. Try some with --model.optimizer.init_args.lr.",
    OnExceptionCheckpoint: "a stop saves last.ckpt. Go on from it with --ckpt_path last.",
    ModelPruning: "it cannot prune weights in the order in which they lie in memory here.",
    StochasticWeightAveraging: (
        "its rates would have no effect, for those of the stages hold. Average with "
        "src.callbacks.averaging.PolynomialAveraging or lightning.pytorch.callbacks.EMAWeightAveraging."
    ),
    Timer: "give --trainer.max_time.",
}
"""Callbacks of Lightning's that would fail here, do nothing or end otherwise if continued, and what to do instead."""
NOT_OFFERED: dict[str, tuple[tuple[Any, ...], str]] = {
    "return_predictions": ((False,), "the run's folder holds them."),
    "weights_only": ((None, True), "checkpoints are read as data, and never run as programs."),
    "trainer.logger": ((None, True), "every run has TensorBoard's files and history.csv."),
    "trainer.enable_checkpointing": ((None, True), "every run keeps its best and its last checkpoint."),
    "trainer.barebones": ((None, False), "a run has its checkpoints and its curves."),
    "trainer.default_root_dir": ((None,), "--run.root says where runs are kept."),
    "trainer.overfit_batches": (
        (None, 0),
        "every epoch has its own order. Train on a folder of a few images instead (configs/with/folder.yaml).",
    ),
}
"""Options of Lightning's: what leaves them alone, and why not."""
_STRATEGIES = ("auto", "ddp")
_PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "16-mixed", "16")
_OURS = [Path(name).stem for name in (BEST, LAST)]
_SECTIONS = ("model", "data", "trainer", "unfreezing", "feature_cache", "run")


def check_configs(args: Sequence[str]) -> None:
    """Refuse files of options that are no YAML, or set what cannot be set; the parser would not say which file it is.

    Args:
        args: Words of the command line.
    """
    given = [(word, value) for word, value in pairwise(args) if word.startswith("-")]
    given += [(option, value) for option, equals, value in (word.partition("=") for word in args) if equals]
    sections = {"-c": None, "--config": None} | {f"--{section}": section for section in _SECTIONS}
    for option, value in given:
        if option in sections and os.path.isfile(value):  # else the parser says so; or it is YAML itself
            _check_file(Path(value), sections[option])


def _check_file(path: Path, section: str | None) -> None:
    """Look into a file of one section's options; of all if there is none."""
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"'{path}' is not valid YAML{where}: {error.problem}.") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        line = "trainer: …" if section is None else "option: value"
        raise UserError(f"'{path}' holds no options: it should consist of lines such as '{line}'.")
    _check_sections(path, content if section is None else {section: content})


def _check_sections(path: Path, content: Mapping[Any, Any]) -> None:
    for name, section in content.items():
        if name in _SECTIONS and isinstance(section, str) and os.path.isfile(path.parent / section):
            _check_file(path.parent / section, name)
        for key in (name, *section) if isinstance(section, dict) else (name,):
            if not isinstance(key, str):
                raise UserError(
                    f"'{path}' has {key} where an option's name should be: mind the indentation, as in "
                    "'unfreezing:', and below it, two spaces further right, 'stages: {0: 4}'."
                )
            if f"{name}.{key}" in LINKED:  # the parser would take it, and then forget it
                raise UserError(f"'{path}' sets {name}.{key}, which cannot be set: {LINKED[f'{name}.{key}']}")
        if section is None and name in _SECTIONS:
            raise UserError(f"'{path}' has nothing below '{name}:': give it options, or leave it out.")


def check_offered(config: Namespace) -> None:
    """Refuse options of Lightning's that are not offered.

    Args:
        config: A command's options.
    """
    for option, (unset, why) in NOT_OFFERED.items():
        if option in config and config[option] not in unset:
            raise UserError(f"{option} is not offered: {why}")


def check_trainer(config: Namespace) -> None:
    """Refuse values of the trainer's options with which it would fail late or do otherwise.

    Args:
        config: Those options, classes made.
    """
    for option in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        if config[option] is not None and config[option] < 1:
            raise UserError(f"trainer.{option} is {config[option]}: it must be at least 1.")
    interval = config.val_check_interval
    if interval == 0 or not isinstance(interval, int | float | None):  # by the clock no run could be repeated
        raise UserError(
            f"trainer.val_check_interval is {interval}: give a number of batches, or a part of an epoch, as 0.5."
        )
    if config.check_val_every_n_epoch is None and not isinstance(interval, int):
        raise UserError(
            "trainer.check_val_every_n_epoch null counts batches through all epochs: give trainer.val_check_interval "
            "a number of batches, or leave both out."
        )
    clip = config.gradient_clip_val
    if clip is not None and clip < 0:
        raise UserError(f"trainer.gradient_clip_val is {clip}: give the largest norm or value, or leave it out.")
    if clip is None and config.gradient_clip_algorithm in ("norm", "value"):
        raise UserError("trainer.gradient_clip_algorithm has no effect without trainer.gradient_clip_val: give both.")
    if str(config.precision or 32) not in _PRECISIONS:
        raise UserError(f"trainer.precision {config.precision} is not supported: use 32-true, bf16-mixed or 16-mixed.")
    strategy = config.strategy
    if isinstance(strategy, str) and strategy not in _STRATEGIES:
        raise UserError(f"trainer.strategy is '{strategy}': expected {' or '.join(_STRATEGIES)}.")
    # A process that forks others would only wait for those that train, and know nothing of their run.
    forks = getattr(strategy, "_start_method", "popen") != "popen"
    if type(strategy) not in (str, SingleDeviceStrategy, DDPStrategy) or forks:  # others derive from DDP
        raise UserError(f"trainer.strategy {type(strategy).__name__} is not supported so: use auto or ddp.")


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks of Lightning's that do not fit.

    Args:
        callbacks: Those that the user added.
    """
    for callback in callbacks:
        for kind, why in _UNFIT.items():
            if isinstance(callback, kind):
                raise UserError(f"{type(callback).__name__} does not fit as one of trainer.callbacks: {why}")
        if isinstance(callback, ModelCheckpoint) and not callback.dirpath and callback.filename in _OURS:
            raise UserError(f"ModelCheckpoint's filename is '{callback.filename}', which every run has: give another.")
        if isinstance(callback, ModelCheckpoint) and not callback.dirpath and callback.save_last:
            raise UserError("ModelCheckpoint's save_last would write last.ckpt, which every run has: leave it out.")
        if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
            raise UserError(
                "ModelCheckpoint's save_on_exception would save within a step: leave it out. A stop saves last.ckpt."
            )
        if type(callback) is WeightAveraging and callback._use_buffers and not any(callback._kwargs.values()):
            raise UserError(
                "WeightAveraging by itself would fail on a GPU, at BatchNorm's counts: average with "
                "src.callbacks.averaging.PolynomialAveraging, whose eta of 0 takes all steps alike."
            )
        averaged = any(isinstance(other, WeightAveraging) for other in callbacks)
        if isinstance(callback, ModelCheckpoint) and callback.save_weights_only and averaged:
            raise UserError("ModelCheckpoint's save_weights_only would keep weights not averaged: leave it out.")


def check_accumulation(callbacks: Sequence[Callback], batches: int) -> None:
    """Refuse to save by the clock where a step takes several batches: what it has added up would be left out.

    Args:
        callbacks: Those that the user added.
        batches: How many a step takes.
    """
    timed = [one for one in callbacks if isinstance(one, ModelCheckpoint) and one._train_time_interval is not None]
    if timed and batches > 1:
        raise UserError(
            "ModelCheckpoint's train_time_interval would save within a step, which takes several batches "
            "(trainer.accumulate_grad_batches): give every_n_train_steps instead."
        )


def check_averages(callbacks: Sequence[Callback]) -> None:
    """Refuse averages that begin late in a training: until then they are the weights that it started from.

    Args:
        callbacks: Those that the user added.
    """
    for callback in callbacks:
        for option in ("update_starting_at_step", "update_starting_at_epoch"):
            if isinstance(callback, EMAWeightAveraging) and getattr(callback, option):
                raise UserError(
                    f"EMAWeightAveraging's {option} would have the untrained weights validated, and kept as the best, "
                    "until then: leave it out."
                )


def check_monitors(callbacks: Sequence[Callback], trainer: Trainer) -> None:
    """Refuse to stop early, or to keep a checkpoint, by a metric that does not exist, or by its wrong end.

    Lightning finds out about the first in training, and not about the second.

    Args:
        callbacks: Those that the user added.
        trainer: What says when there is a validation.
    """
    always = trainer.check_val_every_n_epoch == 1
    # Lightning's callbacks then look when a validation ends, and there is nothing yet of the epoch's training.
    early = trainer.val_check_interval != 1.0 or not always
    of_libraries = all(type(callback).__module__.startswith(("lightning.", "src.")) for callback in callbacks)
    for callback in callbacks:
        if isinstance(callback, EarlyStopping):
            option, looks_late = "check", callback._check_on_train_epoch_end
        elif isinstance(callback, ModelCheckpoint) and callback.monitor not in (None, "epoch", "step"):
            option, looks_late = "save", callback._save_on_train_epoch_end
        else:
            continue
        monitor = str(callback.monitor)
        said = f"{type(callback).__name__}'s monitor is '{monitor}'"
        better = "min" if monitor.endswith("/loss") else "max"
        if monitor in METRICS and callback.mode != better:
            raise UserError(f"{said}, and its mode '{callback.mode}' takes the worst for the best: give mode {better}.")
        if isinstance(callback, EarlyStopping) and not callback.strict:  # it waits for a metric that may come
            continue
        if monitor not in METRICS and of_libraries:  # the user's own may log metrics that nobody knows here
            raise UserError(f"{said}: give one of {', '.join(METRICS)}.")
        if monitor.startswith("val/") and not trainer.limit_val_batches:
            raise UserError(f"{said}, and trainer.limit_val_batches leaves none of it.")
        if monitor.startswith("val/") and isinstance(callback, EarlyStopping) and looks_late and not always:
            raise UserError(
                f"{said}, and it looks at the end of every epoch, though not each has a validation: leave out the "
                "callback's check_on_train_epoch_end, or give --trainer.check_val_every_n_epoch 1."
            )
        if monitor.startswith("train/") and not looks_late and (early or looks_late is False):
            raise UserError(
                f"{said}, known when an epoch ends, and it looks when a validation does: give val/loss, val/acc or "
                f"val/f1, or the callback's {option}_on_train_epoch_end: true."
            )


def count_batches(data: ImageDataModule, trainer: Trainer, split: str) -> tuple[int, int]:
    """Count a process's batches of a split: those that are taken, and all that there are."""
    batches = len(data.batches(split, trainer.global_rank, trainer.world_size))
    return taken_batches(batches, getattr(trainer, f"limit_{split}_batches")), batches


def check_whole_classes(data: ImageDataModule, trainer: Trainer, splits: Collection[str]) -> None:
    """Refuse to judge by a part of images that lie class by class: whole classes would be left out.

    Args:
        data: The images.
        trainer: Says how many batches are taken.
        splits: Those to judge by.
    """
    for split in data.datasets.keys() & splits:
        taken, batches = count_batches(data, trainer, split)
        if 0 < taken < batches and data.datasets[split].lie_by_class:
            raise UserError(
                f"trainer.limit_{split}_batches is {getattr(trainer, f'limit_{split}_batches')}, and the {split} "
                "images lie class by class, so that whole classes would be left out: keep fewer images in the folder "
                f"{split}/ instead."
            )


def check_batches(data: ImageDataModule, trainer: Trainer, tests: bool) -> None:
    """Refuse numbers of batches that Lightning would only refuse after the run has begun.

    Args:
        data: The images.
        trainer: Says how many batches are taken.
        tests: Whether a test follows the training.
    """
    for split in data.datasets.keys() if tests else data.datasets.keys() - {"test"}:
        taken, batches = count_batches(data, trainer, split)
        limit = getattr(trainer, f"limit_{split}_batches")
        if (limit or split == "train") and not taken:
            raise UserError(f"trainer.limit_{split}_batches is {limit}: of {batches} batches that leaves none.")
    taken, _ = count_batches(data, trainer, "train")
    interval = trainer.val_check_interval
    if trainer.check_val_every_n_epoch is not None and isinstance(interval, int) and interval > taken:
        raise UserError(
            f"trainer.val_check_interval is {interval}, but an epoch has {taken} batches: give at most so many, or a "
            "part of an epoch such as 0.5."
        )
