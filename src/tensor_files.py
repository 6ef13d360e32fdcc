"""Files of tensors, which may be anything until they have been read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from src.errors import UserError

NO_MEMORY = "can't allocate memory"  # in what torch says where a CPU's is full


class Unreadable(Exception):
    """Say that a file is damaged, or holds other things than tensors and plain values."""


def load_tensors(path: Path, mmap: bool = False) -> Any:
    """Read what `torch.save` wrote onto the CPU; nothing in the file is run as a program.

    Args:
        path: The file.
        mmap: Whether to fetch tensors from the file only where they are used, if its format allows that.

    Raises:
        OSError: It cannot be read.
        Unreadable: It holds something else.
        UserError: There is not enough memory for it.
    """
    with path.open("rb") as file:
        mmap = mmap and file.read(2) == b"PK"  # a zip archive, as torch has long been writing
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch comments on foreign pickles before it refuses them
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or NO_MEMORY in str(error):
            raise UserError(f"'{path}' takes more memory than there is: free some.") from error
        # Broken bytes surface as errors of many types.
        raise Unreadable(str(error)) from error
