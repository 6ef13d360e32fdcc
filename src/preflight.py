"""Look at files, machine and settings before a run begins: a mistake then costs seconds and leaves nothing behind.

Every check raises a UserError that says what to do.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import yaml
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from src.callbacks.checkpoints import BEST, LAST
from src.errors import UserError
from src.model import int8

METRICS = ("train/loss", "train/acc", "val/loss", "val/acc", "val/f1")
_UNFIT: dict[type[Callback], str] = {
    BaseFinetuning: "layers thaw by unfreezing.stages.",
    GradientAccumulationScheduler: (
        "a run that continues within an epoch would not accumulate in it. Give --trainer.accumulate_grad_batches."
    ),
    LearningRateFinder: "rates belong to the stages. Try some with --model.optimizer.init_args.lr.",
    ModelPruning: "it cannot prune weights in the order in which they lie in memory here.",
    StochasticWeightAveraging: (
        "its rates would have no effect, for those of the stages hold. Average with "
        "src.callbacks.averaging.PolynomialAveraging or lightning.pytorch.callbacks.EMAWeightAveraging."
    ),
    Timer: "give --trainer.max_time.",
}
"""Callbacks of Lightning's that would fail here, do nothing or end otherwise if continued, and what to do instead."""
_BATCHES = (
    ("batch_size", "data.batch_size", "the same"),
    ("processes", "the number of processes", "as many devices"),
    ("seed", "seed_everything", "the same"),
    ("stay", "a cache of features in each process", "the same feature_cache.views"),
)
"""What batches depend on, in the data module's identity and for the user, and how to keep it."""
_OURS = [Path(name).stem for name in (BEST, LAST)]
_SECTIONS = ("model", "data", "trainer", "unfreezing", "feature_cache", "run")
_ADVICE = "Give one of runs/<name>/version_<n>/checkpoints/."


def check_configs(args: Sequence[str]) -> None:
    """Refuse configuration files that are no YAML; the parser would not say which file it is.

    Args:
        args: Words of the command line.
    """
    paths = [Path(value) for word, value in pairwise(args) if word in ("-c", "--config")]
    paths += [Path(word.partition("=")[2]) for word in args if word.startswith("--config=")]
    for path in paths:
        if not path.is_file():
            continue  # the parser says so
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise UserError(f"'{path}' is not valid YAML{where}: {error.problem}.") from error
        except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
            raise UserError(f"'{path}' cannot be read as YAML: {' '.join(str(error).split())}") from error
        if not isinstance(content, dict):
            raise UserError(f"'{path}' holds no options: it should consist of lines such as 'trainer: …'.")
        _check_sections(path, content)


def _check_sections(path: Path, content: Mapping[Any, Any]) -> None:
    for name, section in content.items():
        for key in (name, *section) if isinstance(section, dict) else (name,):
            if not isinstance(key, str):
                raise UserError(
                    f"'{path}' has {key} where an option's name should be: mind the indentation, as in "
                    "'unfreezing:', and below it, two spaces further right, 'stages: {0: 4}'."
                )
        if section is None and name in _SECTIONS:
            raise UserError(f"'{path}' has nothing below '{name}:': give it options, or leave it out.")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Raises:
        UserError: The file is none.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.") from error
    except (UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"'{path}' is damaged or no checkpoint. {_ADVICE}") from error
    if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
        raise UserError(f"'{path}' is no checkpoint of a training. {_ADVICE}")
    return content


def check_fit(path: Path, saved: Mapping[str, Tensor], wanted: Mapping[str, Tensor], anew: bool = False) -> None:
    """Refuse a checkpoint of another network.

    Args:
        path: The checkpoint, for the message.
        saved: Its state dict.
        wanted: The network's own.
        anew: Whether a new training is to start from it, for which its backbone alone will do.
    """
    wrong = [f"it lacks {name}" for name in wanted if name not in saved]
    wrong += [f"its {name} has no place" for name in saved if name not in wanted]
    for name in saved.keys() & wanted.keys():
        if saved[name].shape != wanted[name].shape:
            shapes = [" × ".join(map(str, tensor.shape)) for tensor in (saved[name], wanted[name])]
            wrong.append(f"its {name} is {shapes[0]} instead of {shapes[1]}")
    if wrong:
        more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
        advice = "Use the configuration of its run: the config.yaml beside its folder."
        if anew:
            advice = f"Take its backbone alone, instead of run.warm_start: --model.weights {path}."
        raise UserError(f"'{path}' is of another network: {', '.join(sorted(wrong)[:2])}{more}. {advice}")


def check_size(path: Path, saved: int | None, wanted: int) -> None:
    """Refuse images of another size than in training, where each thing in them would look larger or smaller.

    Args:
        path: The checkpoint, for the message.
        saved: Height and width, in pixels, that its network saw; None if it does not say.
        wanted: Those of the images at hand.
    """
    if saved not in (None, wanted):
        raise UserError(
            f"'{path}' was trained on images of {saved} pixels, and these have {wanted}: use the config.yaml of its "
            "run, or give its data.source.init_args.image_size and data.input_size."
        )


def check_optimizer(path: Path, saved: str | None, wanted: str) -> None:
    """Refuse to continue a training with another optimizer, which would not know the first one's state.

    Args:
        path: The checkpoint, for the message.
        saved: Its optimizer's class; None if it does not say.
        wanted: The class to continue with.
    """
    if saved is not None and saved != wanted:
        raise UserError(
            f"'{path}' was trained with {saved} and cannot go on with {wanted}: use the config.yaml of its run, or "
            f"start anew from its weights: --run.warm_start {path}."
        )


def check_averages(path: Path, saved: bool, wanted: bool) -> None:
    """Refuse to continue a training of averaged weights without averaging: optimizer and weights would not fit.

    Args:
        path: The checkpoint, for the message.
        saved: Whether its weights are averages.
        wanted: Whether there is a callback to go on averaging.
    """
    if saved and not wanted:
        raise UserError(
            f"'{path}' holds averaged weights, and no callback goes on averaging: use the config.yaml of its run, or "
            f"start anew from its weights: --run.warm_start {path}."
        )


def check_data(path: Path, content: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to continue a training on other images, or within an epoch with other batches.

    Args:
        path: The checkpoint, for the message.
        content: What it holds.
        now: The data module's identity.
    """
    saved = {**now, **content.get("ImageDataModule", {}).get("identity", {})}
    if any(saved[part] != now[part] for part in ("images", "files")):
        raise UserError(
            f"'{path}' was trained on other images, or on another split of them, so that what it saw may now validate: "
            f"give the data, data.val_fraction and data.split_seed of its run, or start anew: --run.warm_start {path}."
        )
    loaders = content["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
    within = any(loader.get("served") for loader in loaders)
    epoch = content["loops"]["fit_loop"]["epoch_progress"]["current"]
    if within and epoch["processed"] == epoch["started"]:
        raise UserError(
            f"'{path}' is of a training that trainer.max_time, trainer.max_steps or a callback ended within an epoch, "
            "and the rest of that epoch would be left out. Start anew from its weights: "
            f"--run.warm_start {path}; what can be continued is a training ended by SIGTERM or Ctrl-C."
        )
    for name, what, means in _BATCHES:
        if within and saved[name] != now[name]:
            raise UserError(
                f"'{path}' was saved within an epoch, and the rest of its batches is not known with other ones: "
                f"{what} was {json.dumps(saved[name])} and is {json.dumps(now[name])}. Finish the epoch with {means}."
            )


def check_whole(path: Path, content: Mapping[str, Any]) -> None:
    """Refuse to continue from weights alone.

    Args:
        path: The checkpoint, for the message.
        content: What it holds.
    """
    if not {"optimizer_states", "loops", "callbacks"} <= content.keys():
        raise UserError(
            f"'{path}' holds weights only, and no training can go on from it: start anew with --run.warm_start {path}."
        )


def check_end(path: Path, content: Mapping[str, Any], max_epochs: int | None) -> None:
    """Refuse to continue a training beyond its end.

    Args:
        path: The checkpoint, for the message.
        content: What it holds.
        max_epochs: How many epochs there are to be; None or -1 for no end.
    """
    done = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if max_epochs in (None, -1) or max_epochs > done:
        return
    if max_epochs < done:
        raise UserError(f"trainer.max_epochs is {max_epochs}, and '{path}' has trained {done} already: give more.")
    rank_zero_only(print)(f"'{path}' has trained all of its {done} epochs: give trainer.max_epochs more to go on.")


def check_time(path: Path, content: Mapping[str, Any], timers: Sequence[Timer]) -> None:
    """Refuse to continue a training whose time is over, for nothing would be trained.

    Args:
        path: The checkpoint, for the message.
        content: What it holds.
        timers: Those of `trainer.max_time`.
    """
    spent = content["callbacks"].get("Timer", {}).get("time_elapsed", {}).get("train", 0.0)
    for timer in timers:
        given = timer.time_remaining()
        if given is not None and given <= spent:
            limit, before = (timedelta(seconds=round(seconds)) for seconds in (given, spent))
            raise UserError(
                f"trainer.max_time is {limit}, and counts the {before} that '{path}' took before: give more than that."
            )


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


def check_monitors(callbacks: Sequence[Callback], validates: bool, early: bool) -> None:
    """Refuse to stop early, or to keep a checkpoint, by a metric that does not exist: Lightning finds out in training.

    Args:
        callbacks: Those that the user added.
        validates: Whether there is a validation.
        early: Whether it comes within an epoch, or not in each: Lightning's callbacks then look when it ends, and there
            is nothing yet of the epoch's training.
    """
    of_libraries = all(type(callback).__module__.startswith(("lightning.", "src.")) for callback in callbacks)
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is None or not isinstance(callback, EarlyStopping | ModelCheckpoint):
            continue
        if isinstance(callback, EarlyStopping) and not callback.strict:
            continue
        if isinstance(callback, ModelCheckpoint) and monitor in ("epoch", "step"):
            continue
        said = f"{type(callback).__name__}'s monitor is '{monitor}'"
        if monitor not in METRICS and of_libraries:  # the user's own may log metrics that nobody knows here
            raise UserError(f"{said}: give one of {', '.join(METRICS)}.")
        if monitor.startswith("val/") and not validates:
            raise UserError(f"{said}, and trainer.limit_val_batches leaves none of it.")
        looks_late = getattr(callback, "_check_on_train_epoch_end", getattr(callback, "_save_on_train_epoch_end", None))
        if monitor.startswith("train/") and early and not looks_late:
            option = "check" if isinstance(callback, EarlyStopping) else "save"
            raise UserError(
                f"{said}, known when an epoch ends, and it looks when a validation does: give val/loss, val/acc or "
                f"val/f1, or the callback's {option}_on_train_epoch_end: true."
            )


def check_device(device: torch.device, sync_batchnorm: bool) -> None:
    """Refuse what the device cannot do.

    Lightning takes Apple's GPUs on its own, and the augmentation needs float64, which they lack.

    Args:
        device: Where the network runs.
        sync_batchnorm: Whether statistics are shared by all processes, which torch does on GPUs only.
    """
    if device.type == "cpu" and sync_batchnorm:
        raise UserError("trainer.sync_batchnorm is for GPUs: leave it out, or give --trainer.accelerator gpu.")
    if device.type == "mps":
        raise UserError("Apple's GPUs are not supported: add --trainer.accelerator cpu.")


def check_processes(wanted: int) -> None:
    """Refuse to train in another number of processes than torchrun or srun has started.

    Each of them would train alone, and all would write the same run.

    Args:
        wanted: How many there are to be.
    """
    started, by = 0, ""
    if TorchElasticEnvironment.detect():
        started, by = int(os.environ["WORLD_SIZE"]), "torchrun"
    elif SLURMEnvironment.detect():
        started, by = int(os.environ.get("SLURM_STEP_NUM_TASKS", 0)), "srun"  # which sets it for what it has started
        if not started and wanted > 1:
            raise UserError(f"Slurm starts the {wanted} processes of a job by srun: put srun in front of python.")
    if started not in (0, wanted):
        raise UserError(
            f"{by} has started {started} process(es), and trainer.devices times trainer.num_nodes is {wanted}: add "
            "--config configs/with/ddp.yaml, and on a CPU, or for several machines, --trainer.devices and "
            "--trainer.num_nodes as they were started (by srun each must see all GPUs of its machine)."
        )


def check_int8(device: torch.device, known: bool, checkpoint: Path | None) -> None:
    """Refuse frozen layers in eight bits where they could not be computed, fast and right.

    Args:
        device: Where the network runs.
        known: Whether it is known, or will be, what values flow between these layers.
        checkpoint: The one that does not tell, for the message.
    """
    if device.type != "cpu":
        raise UserError(f"model.frozen_precision int8 is for CPUs, and this run is on {device.type}: use bf16.")
    if not int8.supported():
        raise UserError(int8.UNSUPPORTED)
    if not known:
        raise UserError(
            f"'{checkpoint}' was not trained with frozen layers in eight bits: leave out model.frozen_precision int8."
        )


def check_compiler(device: torch.device) -> None:
    """Refuse to compile where torch.compile would not find the compiler it hands its code to.

    Args:
        device: Where the network runs: torch writes C++ for CPUs; for GPUs Triton needs a C compiler.
    """
    language, variable, usual = "C", "CC", ["gcc", "clang"]
    if device.type == "cpu":
        language, variable, usual = "C++", "CXX", ["clang++" if sys.platform == "darwin" else "g++"]
    chosen = shlex.split(os.environ.get(variable, ""))[:1]
    if not any(map(shutil.which, chosen or usual)):
        raise UserError(
            f"model.compile needs a {language} compiler, and {' or '.join(chosen or usual)} is not here: install one "
            f"(set {variable} if it has another name), or leave out model.compile."
        )


def make_folder(path: Path, what: str, option: str) -> None:
    """Make a folder to write to.

    Args:
        path: The folder.
        what: What is to be kept there.
        option: Which option chooses another one.

    Raises:
        UserError: It cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(path, os.W_OK) else "no permission to write"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"{what} cannot be kept in '{path}': {reason}. Choose another folder with {option}.")
