"""Files: the old one or the new one, never half of one and nothing beside it; and one process at a time."""

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from src.files import NO_LOCKS, one_at_a_time, replacing, user_path


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSPC])
def test_where_there_are_no_locks_those_of_the_machine_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    acquire, machine = FileLock.acquire, tmp_path / "machine"
    machine.mkdir()
    monkeypatch.setattr("src.files.tempfile.gettempdir", lambda: str(machine))

    def refuse(self: FileLock, *args: Any, **options: Any) -> Any:
        if Path(self.lock_file).parent == tmp_path:
            raise OSError(code, "refused")
        return acquire(self, *args, **options)

    monkeypatch.setattr("src.files.FileLock.acquire", refuse)
    worked = []
    refused = nullcontext() if code in NO_LOCKS else pytest.raises(OSError, match="refused")
    with refused, one_at_a_time(tmp_path / "lock", "working"):
        worked.append(True)
    assert bool(worked) == bool(list(machine.iterdir())) == (code in NO_LOCKS)


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def test_user_path_is_what_a_shell_would_make_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", "features")
    assert user_path("~/data/$WHERE") == tmp_path / "data" / "features"
    assert user_path("data") == Path("data")


def test_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    with replacing(path) as temporary:
        temporary.write_text("whole")
        assert temporary.parent == tmp_path  # on another file system a rename would be a copy
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_reader_sees_the_old_file_until_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "history.csv"
    path.write_text("old and longer")
    with path.open() as reader, replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old and longer"
        temporary.write_text("new")
        assert path.read_text() == reader.read()
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_exception_keeps_what_was_there_and_leaves_nothing(
    tmp_path: Path, error: type[BaseException], existing: bool
) -> None:
    path = tmp_path / "last.ckpt"
    if existing:
        path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        write_half()
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("last.ckpt", "old")] * existing


def test_file_has_an_ordinary_files_permissions(tmp_path: Path, umask: int) -> None:
    (tmp_path / "ordinary").write_text("")
    write(tmp_path / "replaced", "")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "replaced")}
    assert modes == {0o666 & ~umask}
    assert os.umask(umask) == umask  # and the process's own setting is as before


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folders_are_made(tmp_path: Path) -> None:
    write(tmp_path / "runs" / "head" / "config.yaml", "whole")
    assert (tmp_path / "runs" / "head" / "config.yaml").read_text() == "whole"


def test_bytes_are_on_the_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.ckpt"
    synced: list[tuple[int, bool]] = []
    fsync = os.fsync

    def record(file: int) -> None:
        synced.append((os.fstat(file).st_size, path.exists()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", record)
    write(path, "whole")
    assert synced[0] == (len("whole"), False)


def test_who_waits_for_another_process_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order, said, told = [], [], threading.Event()

    def note(line: str, **_: object) -> None:
        said.append(line)
        told.set()

    monkeypatch.setattr("src.files._PATIENCE", 0.05)
    monkeypatch.setattr("src.files.rank_zero_only", lambda _: note)
    with one_at_a_time(tmp_path / "lock", "sleeping"):
        other = threading.Thread(target=wait_and_note, args=(tmp_path / "lock", order))
        other.start()
        assert told.wait(10)
        order.append("first")
    other.join()
    assert order == ["first", "second"]
    assert said == [f"another process is sleeping; waiting for it to end ({tmp_path / 'lock'})"]
    with one_at_a_time(tmp_path / "lock", "sleeping"):
        pass
    assert len(said) == 1


def wait_and_note(lock: Path, order: list[str]) -> None:
    with one_at_a_time(lock, "sleeping"):
        order.append("second")
