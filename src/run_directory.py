"""One folder a run, `runs/<name>/version_<n>`: who makes it, and how its checkpoints are found again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import BaseFileLock, FileLock, Timeout
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter

from src.callbacks.checkpoints import BEST, FOLDER, LAST
from src.errors import UserError
from src.files import NO_LOCKS, user_path

CONFIG = "config.yaml"
_VERSION = "version_"
_LOCK = ".lock"
_BATCH = "train/batch_"  # metrics of single batches begin so; all others are of whole epochs
_FINAL_METRICS = {"best/val_acc": "val/acc", "final/test_acc": "test/acc", "final/test_loss": "test/loss"}


@dataclass
class RunOptions:
    """Say where a run is kept and how it begins and ends.

    Args:
        root: Folder of all runs.
        name: Name of the run's folder; null for the name of the first configuration file.
        test_after_fit: Whether to test the best checkpoint, once, after training.
        warm_start: Checkpoint whose weights, backbone and head, a new training starts from.
    """

    root: str = "runs"
    name: str | None = None
    test_after_fit: bool = True
    warm_start: str | None = None


class RunLogger(TensorBoardLogger):
    """Draw the metrics of whole epochs against the epoch, and fill TensorBoard's HParams tab.

    Args:
        root: Folder of all runs.
        name: Name of the run's folder.
        version: The run to go on with; None for a new one.
        draws: Whether metrics belong to its curves. TensorBoard leaves out what comes after a point that is added, so
            that a validation of an earlier epoch, on its own, would cut them short.
    """

    def __init__(self, root: Path | str, name: str, version: str | None = None, draws: bool = True) -> None:
        super().__init__(root, name, version, default_hp_metric=False)
        self._new = version is None
        self._draws = draws
        self._lock: BaseFileLock | None = None
        self._laid_out = False  # whether TensorBoard was told which curves to draw in one chart

    @property
    @rank_zero_experiment
    def experiment(self) -> SummaryWriter:
        """The writer of the event files; to ask for it makes a new run's directory.

        Lightning asks first when all processes have started: before that each looks for runs that are there already.
        """
        while self._new:
            try:
                Path(self.log_dir).mkdir(parents=True)
                self._new = False
                self.hold()
            except FileExistsError:  # another run has just taken this number
                self._version = int(self.version) + 1
        writer: SummaryWriter = super().experiment
        if not self._laid_out:
            self._laid_out = True
            both = {name: ["Multiline", [f"^train/{name}$", f"^val/{name}$"]] for name in ("loss", "acc")}
            writer.add_custom_scalars({"training and validation": both})
        return writer

    def hold(self) -> None:
        """Keep other trainings out of the run's directory until `release`, or until this process ends.

        Raises:
            UserError: Another one is at work there.
        """
        if self._lock is not None:
            return
        lock = FileLock(Path(self.log_dir, _LOCK))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"another training is at work in '{self.log_dir}': wait for its end, or leave out --ckpt_path for a "
                f"new run. If there is none, remove {lock.lock_file}."
            ) from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return
        self._lock = lock

    def finalize(self, status: str) -> None:
        super().finalize(status)
        if status == "failed":
            self.release()  # otherwise a test may follow

    def release(self) -> None:
        """Let others have the run's directory."""
        if self._lock is not None:
            Path(self._lock.lock_file).unlink(missing_ok=True)  # first, or it might be another one's
            self._lock.release()
            self._lock = None

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        if not self._draws:
            return
        metrics = dict(metrics)
        epoch = metrics.pop("epoch", None)
        batches = {name: value for name, value in metrics.items() if name.startswith(_BATCH)}
        epochs = {name: value for name, value in metrics.items() if name not in batches}
        super().log_metrics(batches, step)
        super().log_metrics(epochs, step if epoch is None else int(epoch))

    def log_hyperparams(self, params: dict[str, Any], *_: Any, **__: Any) -> None:  # type: ignore[override]
        # TensorBoard shows only metrics that were announced together with the hyperparameters.
        super().log_hyperparams(params, dict.fromkeys(_FINAL_METRICS, math.nan))  # none yet, and perhaps never

    def log_final(self, metrics: dict[str, float]) -> None:
        """Give the announced metrics their values, from the names that the model logs."""
        for shown, logged in _FINAL_METRICS.items():
            if logged in metrics:
                super().log_metrics({shown: metrics[logged]}, 0)
        self.save()  # nobody closes the file again

    def save(self) -> None:
        # Lightning would repeat the hyperparameters in a file; config.yaml has them all.
        self.experiment.flush()


def run_name(options: RunOptions, configs: Sequence[Path]) -> str:
    """Name the run: as told, or after the first configuration file (`runs/<name>/version_<n>/config.yaml`: `<name>`).

    Args:
        options: What the user said.
        configs: Configuration files in their order.
    """
    if options.name is not None:
        return options.name
    if not configs:
        return "default"
    first = configs[0]
    folder = first.absolute().parent
    return folder.parent.name if folder.name.startswith(_VERSION) else first.stem


def run_meant(place: Path, configs: Sequence[Path]) -> Path | None:
    """Find the run whose config.yaml is the first configuration file, else the newest one; None where there is none.

    A run that was moved as a whole still is the one that its configuration means.

    Args:
        place: The folder of the runs of this name.
        configs: Configuration files in their order.
    """
    own = configs[0].absolute().parent if configs else None
    if own is None or not own.name.startswith(_VERSION):
        return newest_run(place)
    here = own.parent.resolve() == place.resolve()
    return own if here or _moved_from(own) == place else newest_run(place)


def _moved_from(run: Path) -> Path | None:
    """Find the folder that a run with checkpoints was made in, by its configuration; None if that does not say."""
    try:
        made = yaml.safe_load((run / CONFIG).read_text())["run"]
        return user_path(made["root"]) / (made["name"] or run.parent.name) if (run / FOLDER).is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None


def newest_run(place: Path) -> Path | None:
    """Find the directory of a training with the highest version, None where there is none.

    A test of somebody else's checkpoint has a directory too, but no configuration in it.
    """
    found = (path.parent for path in place.glob(f"{_VERSION}*/{CONFIG}"))
    versions = [path for path in found if path.name.removeprefix(_VERSION).isdigit()]
    return max(versions, key=lambda path: int(path.name.removeprefix(_VERSION)), default=None)


def run_at(path: Path) -> Path | None:
    """Find the run that a folder is, or the newest one of a recipe's folder; None if it is neither."""
    return path if (path / CONFIG).is_file() else newest_run(path)


def checkpoint_at(path: Path) -> Path:
    """Find the checkpoint that a user means: a file, or the best one of a run.

    Raises:
        UserError: There is none.
    """
    try:
        if path.is_file():
            return path
        run = run_at(path)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror}.") from error
    if run is None:
        raise UserError(f"'{path}' is no checkpoint and no run: give runs/last4, for example, or one of its files.")
    if not (run / FOLDER / BEST).is_file():
        raise UserError(f"the run '{run}' has no {FOLDER}/{BEST}: give another checkpoint's path.")
    return run / FOLDER / BEST


def find_checkpoint(wanted: str, run: Path | None, place: Path, option: str = "--ckpt_path") -> Path:
    """Turn `best`, `last` or a path into the path of a checkpoint that exists.

    Args:
        wanted: What was given.
        run: The run that is meant.
        place: Where runs of this name are, for the message.
        option: Where it was given, for the message.

    Raises:
        UserError: There is no such file, or no such run.
    """
    if wanted not in ("best", "last"):
        path = user_path(wanted)
        if not path.is_file():
            raise UserError(
                f"no checkpoint '{path}', which {option} names. Give a file, or 'best' or 'last' for one of a run's "
                "own."
            )
        return path
    if run is None:
        raise UserError(f"no run in '{place}', so no '{wanted}' checkpoint. Start one with: fit --config …")
    path = run / FOLDER / (BEST if wanted == "best" else LAST)
    if not path.is_file():
        raise UserError(f"the run has no '{path}'. Give the path of another run's checkpoint as {option}.")
    return path


def last_if_any(run: Path | None) -> Path | None:
    """Find the last checkpoint of a run; None if there is no run, or if it was killed before its first."""
    path = run and run / FOLDER / LAST
    return path if path and path.is_file() else None


def run_of(checkpoint: Path) -> Path | None:
    """Find the run directory that a checkpoint lies in, None if it lies elsewhere."""
    for folder in checkpoint.absolute().parents:  # a name like {val/f1} makes folders of its own
        if folder.name == FOLDER and folder.parent.name.startswith(_VERSION):
            return folder.parent
    return None
