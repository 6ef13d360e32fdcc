"""`history.csv` and `history.png`: what a training leaves behind, and what a resumed one continues."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from src.callbacks import history
from src.callbacks.figures import history_figure
from src.callbacks.history import HISTORY, PNG, History, read_history, write_history

ROWS = [
    {"epoch": 0.0, "train/loss": 2.0, "train/acc": 0.25},
    {"epoch": 1.0, "train/loss": 1.5, "train/acc": 0.5, "val/loss": 1.75, "val/acc": 0.375},
    {"epoch": 2.0, "train/loss": 1 / 3, "val/loss": 1.0, "val/acc": 0.625, "lr/head": 1e-4},
]


class Metrics(LightningModule):
    """Log numbers that tell the epoch, and fail if asked to."""

    def __init__(self, offset: float = 0.0, fail_in: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.offset = offset
        self.fail_in = fail_in

    def training_step(self, batch: object) -> Tensor:
        if self.current_epoch == self.fail_in:
            raise RuntimeError("broken")
        return self.weight.sum()

    def on_train_epoch_end(self) -> None:
        self.log("train/loss", self.current_epoch + 0.5 + self.offset)
        self.log("train/acc", self.current_epoch / 8)

    def validation_step(self, batch: object) -> None:
        self.log("val/acc", self.current_epoch / 4)
        self.log("val/loss", self.current_epoch + 0.25)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, max_epochs: int, announce: bool = False, every: int = 1) -> Trainer:
    return Trainer(
        accelerator="cpu", max_epochs=max_epochs, callbacks=[History(announce)], logger=False,
        check_val_every_n_epoch=every, num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip


def test_a_picture_that_cannot_be_written_hides_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(history, "write_png", refuse)
    with pytest.raises(RuntimeError, match="broken"):
        trainer(tmp_path, 2).fit(Metrics(fail_in=1), loader(), loader())


def loader() -> DataLoader:
    return DataLoader(TensorDataset(torch.zeros(2, 1)))


def fit(module: Metrics, folder: Path, max_epochs: int, start: Path | None = None, **options: bool | int) -> Trainer:
    once = trainer(folder, max_epochs, **options)
    once.fit(module, loader(), loader(), ckpt_path=start, weights_only=True)
    return once


def lines(rows: list[dict[str, float]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Give the points of each line by its panel and its label."""
    return {
        (axes.get_title(), str(line.get_label())): [tuple(point) for point in np.asarray(line.get_xydata()).tolist()]
        for axes in history_figure(rows).axes
        for line in axes.lines
    }


def test_rows_come_back_bit_for_bit(tmp_path: Path) -> None:
    write_history(ROWS, tmp_path / HISTORY)
    assert read_history(tmp_path / HISTORY) == ROWS


def test_columns_are_the_union_of_all_rows(tmp_path: Path) -> None:
    write_history(ROWS, tmp_path / HISTORY)
    header, first, *rest = (tmp_path / HISTORY).read_text().splitlines()
    assert header == "epoch,train/loss,train/acc,val/loss,val/acc,lr/head"
    assert first == "0,2.0,0.25,,,"
    assert len(rest) == 2


def test_zero_is_a_value(tmp_path: Path) -> None:
    rows = [{"epoch": 0.0, "val/acc": 0.0}]
    write_history(rows, tmp_path / HISTORY)
    assert read_history(tmp_path / HISTORY) == rows


def test_training_leaves_one_row_an_epoch_and_a_picture(tmp_path: Path) -> None:
    fit(Metrics(), tmp_path, 3)
    assert read_history(tmp_path / HISTORY) == [
        {
            "epoch": epoch, "train/loss": epoch + 0.5, "train/acc": epoch / 8,
            "val/acc": epoch / 4, "val/loss": epoch + 0.25,
        }
        for epoch in range(3)
    ]  # fmt: skip
    assert (tmp_path / PNG).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == [HISTORY, PNG]


def test_history_is_written_every_epoch(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        fit(Metrics(fail_in=2), tmp_path, 5)
    assert [row["epoch"] for row in read_history(tmp_path / HISTORY)] == [0, 1]
    assert (tmp_path / PNG).exists()


def test_failure_before_the_first_epochs_end_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"):
        fit(Metrics(fail_in=0), tmp_path, 5)
    assert list(tmp_path.iterdir()) == []


def test_resumed_training_continues_where_its_checkpoint_was(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "two.ckpt"
    fit(Metrics(), run, 2).save_checkpoint(elsewhere)
    fit(Metrics(offset=10), run, 4, start=elsewhere)  # this one is given up: its epochs 2 and 3 are superseded
    assert [row["train/loss"] for row in read_history(run / HISTORY)] == [0.5, 1.5, 12.5, 13.5]
    fit(Metrics(offset=20), run, 3, start=elsewhere)
    assert [row["train/loss"] for row in read_history(run / HISTORY)] == [0.5, 1.5, 22.5]


def test_new_training_forgets_what_the_folder_held(tmp_path: Path) -> None:
    fit(Metrics(), tmp_path, 3)
    fit(Metrics(offset=10), tmp_path, 1)
    assert [row["train/loss"] for row in read_history(tmp_path / HISTORY)] == [10.5]


def test_line_an_epoch_is_printed_when_there_is_no_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(Metrics(), tmp_path, 2, announce=True)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert printed == [
        "epoch   0  train loss 0.5  acc 0  val loss 0.25  val acc 0",
        "epoch   1  train loss 1.5  acc 0.125  val loss 1.25  val acc 0.25",
    ]
    fit(Metrics(), tmp_path, 2, announce=False)
    assert "epoch" not in capsys.readouterr().out


def test_figure_draws_the_values() -> None:
    assert lines(ROWS) == {
        ("loss", "training"): [(1, 2.0), (2, 1.5), (3, 1 / 3)],
        ("loss", "validation"): [(2, 1.75), (3, 1.0)],
        ("accuracy", "training"): [(1, 0.25), (2, 0.5)],
        ("accuracy", "validation"): [(2, 0.375), (3, 0.625)],
    }


def test_figure_without_validation_has_empty_lines() -> None:
    assert lines(ROWS[:1])["loss", "validation"] == []


def test_figure_says_what_it_shows() -> None:
    for axes in history_figure(ROWS).axes:
        legend = axes.get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == ["training", "validation"]
        assert axes.get_xlabel() == "epoch"


def test_picture_is_of_the_whole_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[list[float]] = []

    def note(rows: list[dict[str, float]]) -> object:
        drawn.append([row["epoch"] for row in rows])
        return history_figure(rows)

    monkeypatch.setattr(history, "history_figure", note)
    fit(Metrics(), tmp_path, 2).save_checkpoint(tmp_path / "two.ckpt")
    fit(Metrics(), tmp_path, 4, start=tmp_path / "two.ckpt")
    assert drawn == [[0, 1], [0, 1, 2, 3]]


def test_best_of_several_validations_in_an_epoch_is_kept_beside_the_last(tmp_path: Path) -> None:
    callback, directory = History(announce=False), tmp_path
    current: Any = SimpleNamespace(sanity_checking=False, current_epoch=0, callback_metrics={}, is_global_zero=True)
    callback.directory = directory
    for accuracies in ((0.3, 0.5, 0.4), (0.2,)):
        for accuracy in accuracies:
            current.callback_metrics = {"val/acc": torch.tensor(accuracy)}
            callback.on_validation_end(current, None)  # type: ignore[arg-type]
        callback.trained = True
        callback.on_train_epoch_end(current, None)  # type: ignore[arg-type]
    first, second = read_history(directory / HISTORY)
    assert (first["val/acc"], first["val/acc_best"]) == (pytest.approx(0.4), 0.5)
    assert second == {"epoch": 0, "val/acc": pytest.approx(0.2)}
    assert history.best_of(first) == 0.5


def test_epoch_without_validation_repeats_no_old_values(tmp_path: Path) -> None:
    fit(Metrics(), tmp_path, 4, every=2)
    validated = [row["epoch"] for row in read_history(tmp_path / HISTORY) if "val/acc" in row]
    assert validated == [1, 3]
