"""How a command ends that fails or is told to stop: with one line, and a code that is not 0."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from src.callbacks.stopping import Stopped
from src.errors import UserError, replace_unknown_characters, say
from src.plain_errors import hidden_error, plain
from src.tensor_files import NO_MEMORY

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ENTRY = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EROFS)


@contextmanager
def plain_endings() -> Iterator[None]:
    """Tell on standard error, in one line, what ended the block, and end the process; defects keep their traceback.

    Raises:
        SystemExit: With code 1 for what the user can mend; after a signal with 128 and its number.
    """
    replace_unknown_characters()
    try:
        with threads_that_tell_once():
            yield
    except (UserError, MisconfigurationException, ModuleNotFoundError, OSError, RuntimeError) as error:
        text = _user_message(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(1) from None
    except Stopped as stopped:
        if stopped.exit_code:
            say(str(stopped), sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    # Outside of the steps of a training, where nothing is to be saved:
    except SIGTERMException:
        _leave(signal.SIGTERM)
    except KeyboardInterrupt:
        _leave(signal.SIGINT)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning makes it an ordinary end, with code 1
            _leave(signal.SIGINT)
        raise


@contextmanager
def threads_that_tell_once() -> Iterator[None]:
    """Have no thread print a traceback of what this process will tell in one line: TensorBoard hands its errors on."""
    usual = threading.excepthook

    def tell(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError) or _user_message(failure.exc_value) is None:
            usual(failure)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = usual


def _user_message(error: Exception) -> str | None:
    """Say what a user can mend; None if it is a defect."""
    if isinstance(error, MisconfigurationException):
        return plain(str(error), ()).replace("`", "")
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full. Give a smaller data.batch_size, or leave out data.on_device, model.cuda_graphs, "
            "or the cache in its memory (feature_cache.place disk)."
        )
    if isinstance(error, RuntimeError):
        if NO_MEMORY not in str(error):
            return None
        return (
            "there is not enough memory. In a training give a smaller data.batch_size, smaller images "
            "(data.source.init_args.image_size, data.input_size), or a smaller feature_cache.limit_gib."
        )
    if isinstance(error, OSError):
        if error.errno in _NO_ROOM:
            return "the disk is full. Free some room; a training with a last.ckpt can go on from it."
        if error.errno in _NO_ENTRY and error.filename:
            return f"'{error.filename}' cannot be used: {error.strerror}. Mend that, or give another path."
        return None
    mistake = hidden_error(error)
    return None if mistake is None else str(mistake)


def _leave(by: signal.Signals) -> NoReturn:
    say(f"stopped by {by.name}", sys.stderr)
    raise SystemExit(128 + by) from None
