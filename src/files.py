"""Paths as users write them, and files of which a reader, or a killed run, never finds half."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

_PATIENCE = 3.0  # seconds
_umask_lock = Lock()


def user_path(text: str) -> Path:
    """Turn a path as a user writes it, with `~` and `$VARIABLES`, into one; shells leave those after a `=`."""
    return Path(os.path.expandvars(os.path.expanduser(text)))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder; when the block succeeds its file takes the place of `path`.

    Raises:
        OSError: The folder cannot be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~umask())  # mkstemp's files are private, ordinary ones are not
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def one_at_a_time(lock: Path, doing: str) -> Iterator[None]:
    """Wait until no other process is within the same block, and say so if that takes long.

    Args:
        lock: File that stands for the block.
        doing: What is done within it, for the message.
    """
    held = FileLock(lock)
    try:
        held.acquire(timeout=_PATIENCE)
    except Timeout:
        rank_zero_only(print)(f"another process is {doing}; waiting for it to end ({lock})", flush=True)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def umask() -> int:
    """Tell which permissions new files of this process do not get."""
    with _umask_lock:  # between the two calls another thread would read 0, and set it for good
        mask = os.umask(0)
        os.umask(mask)
    return mask
