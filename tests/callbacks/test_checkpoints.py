"""Checkpoints of a GPU, written in the background; here the CPU takes its place."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from src.callbacks import checkpoints
from src.callbacks.checkpoints import AtomicCheckpointIO


class Copy:
    """A copy on the CPU, written once the test allows it."""

    allowed = Event()
    begun = Event()
    written: list[int]

    def __init__(self, checkpoint: dict[str, Any], device: torch.device) -> None:
        self.content = deepcopy(checkpoint)

    def write(self, path: Path) -> None:
        self.begun.set()
        assert self.allowed.wait(timeout=60)
        self.written.append(self.content["epoch"])
        checkpoints._write(self.content, path)


@pytest.fixture
def background(monkeypatch: pytest.MonkeyPatch) -> type[Copy]:
    monkeypatch.setattr(checkpoints, "_gpu_of", lambda checkpoint: torch.device("cpu"))
    monkeypatch.setattr(checkpoints, "_Copy", Copy)
    Copy.allowed.clear()
    Copy.begun.clear()
    Copy.written = []
    return Copy


def checkpoint(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "weights": torch.full((3,), float(epoch))}


def test_it_holds_what_was_there_when_it_was_saved(tmp_path: Path, background: type[Copy]) -> None:
    files, content = AtomicCheckpointIO(), checkpoint(1)
    files.save_checkpoint(content, tmp_path / "last.ckpt")
    content["weights"].fill_(9)
    assert not (tmp_path / "last.ckpt").exists()
    background.allowed.set()
    assert files.load_checkpoint(tmp_path / "last.ckpt")["weights"].tolist() == [1, 1, 1]


def test_what_a_newer_one_replaces_is_not_written(tmp_path: Path, background: type[Copy]) -> None:
    files = AtomicCheckpointIO()
    files.save_checkpoint(checkpoint(1), tmp_path / "last.ckpt")
    assert background.begun.wait(timeout=60)
    for epoch in (2, 3):
        files.save_checkpoint(checkpoint(epoch), tmp_path / "last.ckpt")
    files.save_checkpoint(checkpoint(4), tmp_path / "best.ckpt")
    background.allowed.set()
    files.teardown()
    assert background.written == [1, 3, 4]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.ckpt", "last.ckpt"]


@pytest.mark.parametrize("found", ["save", "end"])
def test_what_went_wrong_is_told(tmp_path: Path, background: type[Copy], found: str) -> None:
    (tmp_path / "file").touch()
    files = AtomicCheckpointIO()
    background.allowed.set()
    files.save_checkpoint(checkpoint(1), tmp_path / "file" / "last.ckpt")
    if found == "save":
        files._writer.shutdown()
    with pytest.raises(OSError, match="file"):
        files.save_checkpoint(checkpoint(2), tmp_path / "last.ckpt") if found == "save" else files.teardown()
    files.teardown()  # once


def test_tensors_are_found_wherever_they_are() -> None:
    nested = {"a": [1, {"b": (torch.ones(1), "text")}], "c": torch.ones(2)}
    assert [len(tensor) for tensor in checkpoints._tensors(nested)] == [1, 2]
    assert checkpoints._gpu_of(nested) is None
