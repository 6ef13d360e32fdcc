"""One row an epoch: history.csv, the two curves of history.png, and a line on the terminal."""

from __future__ import annotations

import csv
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_only

from src.callbacks.figures import history_figure, write_png
from src.errors import UserError, say
from src.files import replacing

HISTORY = "history.csv"
PNG = "history.png"
Row = dict[str, float]
_BEST = "val/acc_best"  # of an epoch with several validations; val/acc is the last one's


class History(Checkpoint):
    """Write the metrics of every epoch to the run directory.

    It counts as a checkpoint callback for Lightning, which runs those after the module has logged its epoch; and
    before the run's own checkpoints, so that neither best.ckpt nor last.ckpt is newer than the history.
    """

    def __init__(self, announce: bool) -> None:
        """Start without rows.

        Args:
            announce: Whether to print a line an epoch, for want of a progress bar.
        """
        self.announce = announce
        self.rows: list[Row] = []
        self.validation: Row = {}  # the latest within the epoch
        self.trained = False
        self.before: Row | None = None  # of the epoch within which this run goes on
        self.directory = Path()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.directory = Path(trainer.log_dir or ".")  # asks all processes, so not within a rank_zero_only hook

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done = read_history(self.directory / HISTORY) if (self.directory / HISTORY).exists() else []
        self.rows = [row for row in done if row["epoch"] < trainer.current_epoch]
        self.before = next((row for row in done if row["epoch"] == trainer.current_epoch), None)
        self.trained = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        self.trained = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        earlier = best_of(self.validation)
        self.validation = {name: value for name, value in metrics.items() if name.startswith("val/")}
        if earlier is not None:
            self.validation[_BEST] = max(earlier, self.validation["val/acc"])

    def state_dict(self) -> dict[str, Any]:
        return {"validation": self.validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validation = dict(state_dict["validation"])  # of an epoch that goes on after it

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        # Lightning also keeps the values of validations in earlier epochs.
        own = {name: value for name, value in metrics.items() if not name.startswith("val/")}
        row = {"epoch": float(trainer.current_epoch)} | dict(sorted((own | self.validation).items()))
        self.validation = {}
        if not self.trained and self.before is not None:  # the best checkpoint is made when its epoch has been trained
            row = self.before
        self.rows.append(row)
        write_history(self.rows, self.directory / HISTORY)
        if self.announce:
            say(_line(row))

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw()

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(OSError):  # GracefulStop's hook comes next, and has other processes to end
            self._draw()

    def _draw(self) -> None:
        if self.rows:
            write_png(history_figure(self.rows), self.directory / PNG)


def best_of(row: Row) -> float | None:
    """Give the best validation accuracy of an epoch, which may have several validations; None if it has none."""
    return row.get(_BEST, row.get("val/acc"))


def write_history(rows: list[Row], path: Path) -> None:
    """Write one line an epoch; columns are the union of all rows' metrics."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({**row, "epoch": int(row["epoch"])} for row in rows)


def read_history(path: Path) -> list[Row]:
    """Read what `write_history` wrote; empty cells are left out.

    Raises:
        UserError: Somebody else has written it.
    """
    with path.open(newline="", encoding="utf-8") as file:
        try:
            rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
            _ = [row["epoch"] for row in rows]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"'{path}' is damaged: it has lines without an epoch, or something else than numbers. Mend it, or move "
                "it away: a program for tables may have saved it in a way of its own."
            ) from error
    return rows


def _line(row: Row) -> str:
    shown = {
        "train loss": "train/loss", "acc": "train/acc", "val loss": "val/loss", "val acc": "val/acc",
        "images/s": "images_per_second",
    }  # fmt: skip
    values = "  ".join(f"{label} {row[name]:.4g}" for label, name in shown.items() if name in row)
    return f"epoch {int(row['epoch']):3d}  {values}"
