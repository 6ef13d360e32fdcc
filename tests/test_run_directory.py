"""Where a run lives, what it is called, and how its checkpoints are found."""

from __future__ import annotations

import errno
import math
import os
import shutil
from pathlib import Path

import pytest
import yaml
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.errors import UserError
from src.run_directory import RunLogger, RunOptions, find_checkpoint, newest_run, run_meant, run_name, run_of


@pytest.mark.parametrize(
    ("name", "configs", "expected"),
    [
        (None, [], "default"),
        (None, ["configs/last4.yaml"], "last4"),
        (None, ["configs/last4.yaml", "configs/with/sample.yaml"], "last4"),
        ("mine", ["configs/last4.yaml"], "mine"),
        (None, ["runs/last4/version_3/config.yaml"], "last4"),
        (None, ["elsewhere/config.yaml"], "config"),
    ],
)
def test_run_name(name: str | None, configs: list[str], expected: str) -> None:
    assert run_name(RunOptions(name=name), [Path(config) for config in configs]) == expected


def test_run_name_from_within_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "last4" / "version_3"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert run_name(RunOptions(), [Path("config.yaml")]) == "last4"


def test_a_new_run_is_held_until_its_training_and_its_test_have_ended(tmp_path: Path) -> None:
    first, second = (RunLogger(tmp_path, "last4", version) for version in (None, "version_0"))
    _ = first.experiment
    first.finalize("success")  # as Lightning does between training and test
    with pytest.raises(UserError, match=r"another training is at work in .* remove .*version_0/\.lock"):
        second.hold()
    first.release()
    second.hold()
    second.finalize("failed")
    first.hold()
    first.hold()  # once is enough
    first.release()
    assert not list((tmp_path / "last4" / "version_0").glob(".*"))


def test_a_run_goes_on_where_there_are_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: FileLock, timeout: float) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    logger = RunLogger(tmp_path, "last4")
    logger.experiment.close()
    logger.release()


def test_a_lock_that_fails_for_another_reason_is_not_gone_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: FileLock, timeout: float) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="No space left"):
        RunLogger(tmp_path, "last4").hold()


def make_run(root: Path, version: str, *checkpoints: str) -> Path:
    folder = root / "last4" / version
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").touch()
    for name in checkpoints:
        (folder / "checkpoints" / name).touch()
    return folder


def test_runs_that_start_at_once_get_directories_of_their_own(tmp_path: Path) -> None:
    loggers = [RunLogger(tmp_path, "last4") for _ in range(3)]
    (tmp_path / "last4").mkdir()
    assert {logger.version for logger in loggers} == {0}
    for logger in loggers:
        assert logger.experiment.log_dir == logger.log_dir
    assert [Path(logger.log_dir).name for logger in loggers] == ["version_0", "version_1", "version_2"]
    for logger in loggers:
        logger.experiment.close()  # its thread would otherwise write to a folder that is gone


def test_newest_run_counts_versions(tmp_path: Path) -> None:
    for version in ("version_2", "version_10", "version_9", "version_x"):
        make_run(tmp_path, version)
    (tmp_path / "last4" / "version_11").mkdir()  # as a test of another folder's checkpoint makes it
    os.utime(tmp_path / "last4" / "version_2")  # touched last, yet not the newest
    assert newest_run(tmp_path / "last4") == tmp_path / "last4" / "version_10"
    assert newest_run(tmp_path / "full") is None


def test_best_and_last_are_of_the_newest_run(tmp_path: Path) -> None:
    make_run(tmp_path, "version_0", "best.ckpt", "last.ckpt")
    newest = make_run(tmp_path, "version_1", "best.ckpt", "last.ckpt")
    place = tmp_path / "last4"
    for configs in ([], [Path("configs/last4.yaml")], [tmp_path / "elsewhere/version_0/config.yaml"]):
        run = run_meant(place, configs)
        assert find_checkpoint("best", run, place) == newest / "checkpoints" / "best.ckpt"
        assert find_checkpoint("last", run, place) == newest / "checkpoints" / "last.ckpt"


def test_best_is_of_the_run_whose_configuration_it_is(tmp_path: Path) -> None:
    older = make_run(tmp_path, "version_0", "best.ckpt")
    make_run(tmp_path, "version_1", "best.ckpt")
    assert run_meant(older.parent, [older / "config.yaml", Path("configs/with/cpu.yaml")]) == older


@pytest.mark.parametrize("name", [None, "named"])
def test_a_run_that_was_moved_is_the_one_that_its_configuration_means(tmp_path: Path, name: str | None) -> None:
    newest = make_run(tmp_path, "version_1", "best.ckpt")
    if name is not None:
        newest = newest.parent.rename(tmp_path / name) / newest.name
    moved = make_run(tmp_path / "elsewhere", "version_7", "best.ckpt")
    (moved / "config.yaml").write_text(yaml.safe_dump({"run": {"root": str(tmp_path), "name": name}}))
    assert run_meant(newest.parent, [moved / "config.yaml"]) == moved
    assert run_meant(tmp_path / "other" / newest.parent.name, [moved / "config.yaml"]) is None  # a root that was given
    assert run_meant(tmp_path / "last4_best", [moved / "config.yaml"]) is None  # or a name
    shutil.rmtree(moved / "checkpoints")  # as where the file alone was copied
    assert run_meant(newest.parent, [moved / "config.yaml"]) == newest


def test_checkpoint_by_its_path(tmp_path: Path) -> None:
    path = make_run(tmp_path, "version_0", "best.ckpt") / "checkpoints" / "best.ckpt"
    assert find_checkpoint(str(path), None, Path("elsewhere")) == path


def test_missing_checkpoints_say_where_they_were_looked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"no run in '{tmp_path}/last4'.*fit --config"):
        find_checkpoint("best", None, tmp_path / "last4")
    newest = make_run(tmp_path, "version_0", "best.ckpt")
    with pytest.raises(UserError, match=rf"no '{newest}/checkpoints/last.ckpt'.*--ckpt_path"):
        find_checkpoint("last", newest, newest.parent)
    with pytest.raises(UserError, match=r"no checkpoint 'nope\.ckpt'"):
        find_checkpoint("nope.ckpt", newest, newest.parent)
    with pytest.raises(UserError, match="no checkpoint"):
        find_checkpoint(str(newest), newest, newest.parent)  # a folder


def test_run_of_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_run(tmp_path, "version_0")
    assert run_of(folder / "checkpoints" / "best.ckpt") == folder
    assert run_of(folder / "checkpoints" / "epoch=3-val" / "f1=0.8.ckpt") == folder
    assert run_of(folder / "best.ckpt") is None
    assert run_of(tmp_path / "checkpoints" / "best.ckpt") is None
    monkeypatch.chdir(folder)
    assert run_of(Path("checkpoints") / "best.ckpt") == folder


def test_epochs_are_drawn_by_epoch_and_batches_by_step(tmp_path: Path) -> None:
    logger = RunLogger(str(tmp_path), "run", "version_0")
    logger.log_metrics({"val/acc": 0.5, "train/batch_loss": 2.0, "epoch": 3}, step=400)
    logger.log_metrics({"train/batch_loss": 1.0}, step=450)
    logger.log_metrics({"test/acc": 0.6}, step=7)
    logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()
    assert set(events.Tags()["scalars"]) == {"val/acc", "train/batch_loss", "test/acc"}  # no curve of the epoch itself
    assert [(point.step, point.value) for point in events.Scalars("val/acc")] == [(3, 0.5)]
    assert [(point.step, point.value) for point in events.Scalars("train/batch_loss")] == [(400, 2.0), (450, 1.0)]
    assert [point.step for point in events.Scalars("test/acc")] == [7]


def test_final_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RunLogger(str(tmp_path), "run", "version_0")
    saved: list[bool] = []
    save = RunLogger.save
    monkeypatch.setattr(RunLogger, "save", lambda self: saved.append(True) or save(self))
    logger.log_hyperparams({"model": {"hidden": 8}})
    logger.log_final({"val/acc": 0.25, "test/f1": 0.75})
    assert saved  # or a process that ends could leave them in its memory
    logger.finalize("success")
    assert not list(tmp_path.rglob("hparams.yaml"))  # config.yaml has them all
    events = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()
    last = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    assert last.pop("best/val_acc") == 0.25
    assert last.keys() == {"final/test_acc", "final/test_loss"}
    assert all(map(math.isnan, last.values()))  # a loss of 0 would be the best of all
