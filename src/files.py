"""Paths as users write them, folders to write to, and files of which a reader, or a killed run, never finds half."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from threading import Lock

from filelock import FileLock, Timeout
from lightning.pytorch.utilities import rank_zero_only

from src.errors import UserError, say

NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP)  # of some file systems on other machines
_PATIENCE = 3.0  # seconds
_umask_lock = Lock()


def user_path(text: str) -> Path:
    """Turn a path as a user writes it, with `~` and `$VARIABLES`, into one; shells leave those after a `=`."""
    return Path(os.path.expandvars(os.path.expanduser(text)))


def make_folder(path: Path, what: str, option: str) -> None:
    """Make a folder to write to.

    Args:
        path: The folder.
        what: What is to be kept there.
        option: Which option chooses another one.

    Raises:
        UserError: It cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(path, os.W_OK) else "no permission to write"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise UserError(f"{what} cannot be kept in '{path}': {reason}. Choose another folder with {option}.")


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
        lock: File that stands for the block; where its file system has no locks, one of this machine's temporary files
            does instead, which other machines do not see.
        doing: What is done within it, for the message.
    """
    held = FileLock(lock)
    try:
        _acquire(held, doing)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        name = blake2b(os.fsencode(lock.absolute()), digest_size=8).hexdigest()
        held = FileLock(Path(tempfile.gettempdir(), f"thaw-{name}.lock"))
        _acquire(held, doing)
    try:
        yield
    finally:
        held.release()


def _acquire(lock: FileLock, doing: str) -> None:
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        rank_zero_only(say)(f"another process is {doing}; waiting for it to end ({lock.lock_file})")
        lock.acquire()


def umask() -> int:
    """Tell which permissions new files of this process do not get."""
    with _umask_lock:  # between the two calls another thread would read 0, and set it for good
        mask = os.umask(0)
        os.umask(mask)
    return mask
