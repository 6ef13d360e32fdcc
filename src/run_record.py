"""What a run directory tells of its run."""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import yaml

from src.callbacks.checkpoints import BEST, FOLDER
from src.callbacks.history import HISTORY, Row, best_of, read_history
from src.callbacks.predictions import REPORT
from src.errors import UserError
from src.run_directory import CONFIG, run_at
from src.run_settings import settings
from src.tensor_files import Unreadable, load_tensors


@dataclass(frozen=True)
class Run:
    """What a run directory tells of its run."""

    folder: Path
    name: str
    config: dict[str, Any]
    history: list[Row]
    report: dict[str, Any]
    """Empty where the run was not tested, or was trained on since and has another best epoch."""

    @property
    def recipe(self) -> str:
        """Everything that was configured, except for the seed and for where the run is kept, as text."""
        return json.dumps(self.settings, sort_keys=True)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the recipe, setting by setting."""
        apart = ("seed_everything", "run", "ckpt_path")
        told = settings({key: value for key, value in self.config.items() if key not in apart})
        told |= {"run.warm_start": self.config["run"].get("warm_start")}
        return {name: value for name, value in told.items() if value is not None}  # which earlier versions may lack

    @property
    def unfinished(self) -> str:
        """How far a training came that neither trained all of its epochs nor was told to end sooner; else nothing."""
        trainer = self.config["trainer"]
        epochs, done = trainer["max_epochs"] or -1, int(self.history[-1]["epoch"]) + 1
        steps = trainer["max_steps"] not in (None, -1)
        sooner = steps or trainer["max_time"] or "EarlyStopping" in json.dumps(trainer["callbacks"])
        return f"{done} of {epochs} epochs" if done < epochs and not sooner else ""

    @property
    def outgrown(self) -> bool:
        """Whether a better epoch's checkpoint has taken the place of the best one that was tested."""
        tested = self.report.get("epoch")
        if self.report.get("checkpoint") != BEST or tested is None:
            return False
        return self._best.get("epoch", tested) != tested

    @property
    def images(self) -> str:
        """What training and validation images were, and their classes, as text; nothing where no checkpoint says so."""
        data = self._best.get("ImageDataModule", {})
        identity = data.get("identity", {})
        return json.dumps([data.get("classes"), identity.get("images"), identity.get("files")])

    @cached_property
    def _best(self) -> dict[str, Any]:
        """The best checkpoint; empty where there is none that can be read."""
        with suppress(Unreadable, FileNotFoundError):
            return load_tensors(self.folder / FOLDER / BEST, mmap=True)
        return {}

    @property
    def layers(self) -> str:
        """How many train, stage by stage."""
        return " → ".join(map(str, self.config["unfreezing"]["stages"].values()))

    @property
    def minutes(self) -> list[float]:
        """Minutes of training up to the end of each epoch, validation not counted."""
        # Runs of earlier versions lack it where they were continued at the end of an epoch.
        return [seconds / 60 for seconds in accumulate(row.get("train_seconds", 0.0) for row in self.history)]

    def curve(self, metric: str) -> list[tuple[float, float, float]]:
        """Give the minutes, the epoch (the first is 1) and the value, wherever there is one."""
        rows = zip(self.minutes, self.history, strict=True)
        return [(minutes, row["epoch"] + 1, row[metric]) for minutes, row in rows if metric in row]

    def metrics(self) -> dict[str, float]:
        """Give the figures of the table that can be averaged, as far as this run has them."""
        validated = [best for row in self.history if (best := best_of(row)) is not None]
        rates = [row["images_per_second"] for row in self.history if "images_per_second" in row]
        found = {
            "trainable parameters": self.history[-1]["trainable_parameters"],
            "epochs": float(len(self.history)),
            "best val/acc": max(validated) if validated else None,
            "test/acc": self.report.get("accuracy"),
            "test/acc_tta": self.report.get("test_time_augmentation", {}).get("accuracy"),
            "macro F1": self.report.get("macro_f1"),
            "calibration error": self.report.get("calibration_error"),
            "training minutes": self.minutes[-1],
            "images/s": statistics.median(rates) if rates else None,
        }
        return {name: value for name, value in found.items() if value is not None}


class Unfinished(UserError):
    """A folder without a training of at least one epoch."""


def read_run(path: Path) -> Run:
    """Read a run directory, or the newest one of a recipe's folder.

    Raises:
        Unfinished: It has no finished epoch, or none at all, as that of a test alone.
        UserError: There is no such folder, or the run is damaged.
    """
    try:
        return _read_run(path)
    except OSError as error:
        raise UserError(f"the run '{path}' cannot be read: {error.strerror}: '{error.filename}'.") from error


def _read_run(path: Path) -> Run:
    folder = run_at(path)
    if folder is None:
        kind = Unfinished if path.is_dir() else UserError
        raise kind(f"'{path}' is no run: give folders such as runs/last4 or runs/last4/version_0.")
    if not (folder / HISTORY).is_file():
        raise Unfinished(f"the run '{folder}' has no {HISTORY}: it ended before its first epoch did.")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        report = json.loads((folder / REPORT).read_text(encoding="utf-8")) if (folder / REPORT).is_file() else {}
        run = Run(folder, f"{folder.parent.name}/{folder.name}", config, read_history(folder / HISTORY), report)
        if run.outgrown:
            print(
                f"the test of '{folder}' is left out: its best epoch is another one now; test it again", file=sys.stderr
            )
            run = replace(run, report={})
        # All that will be asked of it, while it is known which run it is about.
        _ = run.layers, run.recipe, run.images, run.unfinished, run.metrics(), [row["epoch"] for row in run.history]
    except (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"the run '{folder}' has a damaged {CONFIG}, {HISTORY} or {REPORT}: {error!r}.") from error
    return run
