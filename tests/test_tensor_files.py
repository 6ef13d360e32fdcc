"""What is no file of tensors is told apart from what cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from src.errors import UserError
from src.tensor_files import Unreadable, load_tensors


def truncated(path: Path, zipped: bool, size: int) -> bytes:
    torch.save({"0.weight": torch.zeros(64, 3, 3, 3)}, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()[:size]


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda _: b"",
        lambda _: b"\n",
        lambda _: b".",
        lambda _: b"X\x01",
        lambda _: b"\x80",
        lambda _: b"\x80\x02",
        lambda _: b"<!DOCTYPE html>\n<html>\nNot found\n</html>",
        lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        lambda _: "Gewichte gibt es hier nicht, für niemanden\n".encode() * 100,
        lambda _: b"{'a': 1}",
        lambda _: b"PK",
        lambda _: b"PK\x03\x04 and no more",
        lambda _: bytes(range(256)) * 9,
        lambda _: b"\x89HDF\r\n\x1a\n" + bytes(100),  # Keras's own format
        lambda _: b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}",
        lambda path: truncated(path, True, 100),
        lambda path: truncated(path, True, 4000),
        lambda path: truncated(path, False, 20),
        lambda path: truncated(path, False, 200),
        lambda path: truncated(path, False, 3000),
    ],
)
def test_what_holds_no_tensors(tmp_path: Path, make: Callable[[Path], bytes], mmap: bool) -> None:
    path = tmp_path / "notes.pth"
    path.write_bytes(make(path))
    with pytest.raises(Unreadable):
        load_tensors(path, mmap)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "nowhere.pth")
    with pytest.raises(IsADirectoryError):
        load_tensors(tmp_path)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_a_file_too_large_for_the_memory_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def load(*args: object, **more: object) -> None:
        raise error

    path = tmp_path / "large.pth"
    torch.save({}, path)
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(UserError, match=r"large\.pth' takes more memory than there is"):
        load_tensors(path)
