"""Checkpoints of a GPU, written in the background; here the CPU takes its place."""

from __future__ import annotations

from pathlib import Path
from threading import Event, Semaphore
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.callbacks import checkpoints
from src.callbacks.checkpoints import AtomicCheckpointIO


class Copy(checkpoints._Copy):
    """A copy on the CPU, written once the test allows it."""

    allowed = Event()
    begun = Event()
    written: list[int]

    def _event(self, device: torch.device) -> Any:
        return SimpleNamespace(wait=lambda: None)

    def write(self, path: Path) -> None:
        self.begun.set()
        assert self.allowed.wait(timeout=60)
        self.written.append(self._content["epoch"])
        super().write(path)


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> type[Copy]:
    monkeypatch.setattr(checkpoints, "_gpu_of", lambda checkpoint: torch.device("cpu"))
    monkeypatch.setattr(checkpoints, "_Copy", Copy)
    monkeypatch.setattr(checkpoints, "streams", lambda device: SimpleNamespace(checkpoints=None))
    Copy.allowed.clear()
    Copy.begun.clear()
    Copy.written = []
    return Copy


def checkpoint(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "weights": torch.full((3,), float(epoch))}


def test_it_holds_what_was_there_when_it_was_saved(tmp_path: Path, background: type[Copy]) -> None:
    files, content = AtomicCheckpointIO(), checkpoint(1)
    files.save_checkpoint(content, tmp_path / "checkpoints" / "last.ckpt")
    content["weights"].fill_(9)
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()
    background.allowed.set()
    assert files.load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["weights"].tolist() == [1, 1, 1]


def test_what_a_newer_one_replaces_is_not_written(tmp_path: Path, background: type[Copy]) -> None:
    files = AtomicCheckpointIO()
    files.save_checkpoint(checkpoint(1), tmp_path / "checkpoints" / "last.ckpt")
    assert background.begun.wait(timeout=60)
    for epoch in (2, 3):
        files.save_checkpoint(checkpoint(epoch), tmp_path / "checkpoints" / "last.ckpt")
    files.save_checkpoint(checkpoint(4), tmp_path / "checkpoints" / "best.ckpt")
    background.allowed.set()
    files.teardown()
    assert background.written == [1, 4, 3]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["epoch"] == 3
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_the_last_one_is_not_written_before_the_best_one_it_names(tmp_path: Path, background: type[Copy]) -> None:
    files = AtomicCheckpointIO()
    for epoch in (1, 2):
        files.save_checkpoint(checkpoint(10 * epoch), tmp_path / "checkpoints" / "best.ckpt")
        assert background.begun.wait(timeout=60)
        files.save_checkpoint(checkpoint(epoch), tmp_path / "checkpoints" / "last.ckpt")
    background.allowed.set()
    files.teardown()
    assert background.written == [10, 20, 2]


def test_the_last_one_is_written_though_each_epoch_is_the_best(
    tmp_path: Path, background: type[Copy], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs 20 and 30 end while the best one of the epoch before is being written."""
    begun, allowed = Semaphore(0), Semaphore(0)

    class OneByOne(background):  # type: ignore[misc, valid-type]
        def write(self, path: Path) -> None:
            begun.release()
            assert allowed.acquire(timeout=60)
            super().write(path)

    monkeypatch.setattr(checkpoints, "_Copy", OneByOne)
    background.allowed.set()
    files = AtomicCheckpointIO()
    for epoch in (10, 20, 30):
        files.save_checkpoint(checkpoint(epoch), tmp_path / "checkpoints" / "best.ckpt")
        if epoch > 10:
            files.save_checkpoint(checkpoint(epoch + 1), tmp_path / "checkpoints" / "last.ckpt")
            allowed.release()
        assert begun.acquire(timeout=60)
    for _ in range(4):
        allowed.release()
    files.teardown()
    assert background.written == [10, 20, 21, 30, 31]


def test_other_files_are_there_at_once(tmp_path: Path, background: type[Copy]) -> None:
    files = AtomicCheckpointIO()
    files.save_checkpoint(checkpoint(1), tmp_path / "mine.ckpt")
    assert (tmp_path / "mine.ckpt").exists()
    assert background.written == []


@pytest.mark.parametrize("found", ["save", "end"])
def test_what_went_wrong_is_told_and_ends_the_writing(tmp_path: Path, background: type[Copy], found: str) -> None:
    (tmp_path / "checkpoints").touch()  # no folder
    files = AtomicCheckpointIO()
    background.allowed.set()
    files.save_checkpoint(checkpoint(1), tmp_path / "checkpoints" / "best.ckpt")
    if found == "save":
        files._writer.shutdown()
    with pytest.raises(OSError, match="checkpoints"):
        files.save_checkpoint(
            checkpoint(2), tmp_path / "checkpoints" / "last.ckpt"
        ) if found == "save" else files.teardown()
    (tmp_path / "checkpoints").unlink()
    if found == "end":
        files.save_checkpoint(checkpoint(2), tmp_path / "checkpoints" / "last.ckpt")
    files.teardown()  # which has told it once
    assert background.written == [1]


def test_tensors_are_found_wherever_they_are() -> None:
    nested = {"a": [1, {"b": (torch.ones(1), "text")}], "c": torch.ones(2)}
    assert [len(tensor) for tensor in checkpoints._tensors(nested)] == [1, 2]
    assert checkpoints._gpu_of(nested) is None
