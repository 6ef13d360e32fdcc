"""What the frozen layers make of each image, kept for the next time."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.errors import UserError
from src.files import umask

VALUES, FILLED, ORIGIN = "values.bin", "filled.bin", "origin.json"
VERSION = 1  # raise it when the same images, weights and settings would give other features

_CPU = torch.device("cpu")


class FeatureStore:
    """Keep one array of features for each image and view.

    Args:
        images: How many images the source's split has.
        own: Numbers of those that may be kept, int64: several processes each keep their own.
        views: How many views of each to keep.
        shape: Shape of one image's features, (C, h, w).
        dtype: Their type.
        entry: Number of the network layer they enter.
        device: Where to keep them in memory.
        folder: Where to keep them on disk, a folder a view; None for memory.
        origin: Everything the features depend on; what is there from another origin is written anew.
    """

    def __init__(
        self,
        images: int,
        own: Tensor,
        views: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        entry: int,
        device: torch.device = _CPU,
        folder: Path | None = None,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.entry = entry
        self.rows = torch.full((images,), -1)
        self.rows[own] = torch.arange(len(own))
        self.rows_there = self.rows.to(_CPU if folder else device)
        if folder is None:
            self.values = [torch.empty(len(own), *shape, dtype=dtype, device=device) for _ in range(views)]
            self.filled = [torch.zeros(len(own), dtype=torch.bool, device=device) for _ in range(views)]
        else:
            told = {"version": VERSION, "rows": digest([own]), "shape": list(shape), "dtype": str(dtype)}
            self.values, self.filled = _map_files(folder, views, (len(own), *shape), dtype, (origin or {}) | told)
        self.view = 0

    @property
    def view(self) -> int:
        """Number of the view that comes and goes.

        To set it, to the same one too, asks the device what is there by now; until then `get` knows of what was put
        only where features are kept on the CPU. So no step waits for the device.
        """
        return self._view

    @view.setter
    def view(self, view: int) -> None:
        self._view = view
        self._known = self.filled[view].cpu() if self.keeps_view else None

    @property
    def keeps_view(self) -> bool:
        """Whether the current view is one of those kept."""
        return self.view < len(self.filled)

    def get(self, indices: Tensor) -> Tensor | None:
        """Give the current view's features of these images, (N, C, h, w); None unless all of them are there.

        `indices`, (N,), are on the CPU, so that a look at what is there keeps no other device waiting.
        """
        if self._known is None:
            return None
        rows = self.rows[indices]
        if (rows < 0).any() or not self._known[rows].all():  # below 0: an image of another process
            return None
        values = self.values[self.view]
        return values.index_select(0, rows.to(values.device, non_blocking=True))

    def put(self, indices: Tensor, features: Tensor) -> None:
        """Keep the current view's features of these images, if that view is kept at all."""
        if self.keeps_view:
            values = self.values[self.view]
            rows = self.rows_there[indices.to(values.device)]
            if values.device == _CPU:  # elsewhere the check would have to be waited for
                assert rows.min() >= 0, "an image of another process"
            values[rows] = features.detach().to(values.device)
            self.filled[self.view][rows] = True  # only now, so that a killed process leaves no hole marked full


def digest(tensors: Iterable[Tensor]) -> str:
    """Reduce the bits of tensors to a short text that differs where they do."""
    found = blake2b(digest_size=16)
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _map_files(
    folder: Path, views: int, shape: Sequence[int], dtype: torch.dtype, origin: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """Map each view's files into memory: its features, of the shape (N, C, h, w), and which of the N are there.

    Raises:
        UserError: There is no room or no permission; what was made until then is removed.
    """
    size = math.prod(shape)
    values: list[Tensor] = []
    filled: list[Tensor] = []
    made: list[Path] = []
    for view in range(views):
        path = folder / f"view-{view}"
        try:
            if _prepare(path, origin, {VALUES: size * dtype.itemsize, FILLED: shape[0]}):
                made.append(path)
        except UserError:
            for path in made:
                shutil.rmtree(path, ignore_errors=True)
            raise
        values.append(torch.from_file(str(path / VALUES), shared=True, size=size, dtype=dtype).view(*shape))
        filled.append(torch.from_file(str(path / FILLED), shared=True, size=shape[0], dtype=torch.bool))
    return values, filled


def _prepare(folder: Path, origin: dict[str, Any], sizes: dict[str, int]) -> bool:
    """Make a folder of empty files, in bytes, unless there is one from the same origin.

    It appears with all that belongs to it, so that two runs which begin at once share the same files.

    Returns:
        Whether it was not there.

    Raises:
        UserError: There is no room for it, or no permission.
    """
    text = json.dumps(origin, sort_keys=True, default=str)
    made = None
    try:
        if folder.exists():
            # A copy that was cut short lacks files, or parts of them; filled up they would pass for features of zeros.
            whole = all((folder / name).is_file() and (folder / name).stat().st_size == sizes[name] for name in sizes)
            if whole and (folder / ORIGIN).is_file() and (folder / ORIGIN).read_text() == text:
                for name in sizes:
                    (folder / name).open("r+b").close()  # as torch is about to, whose message says less
                return False
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        made.chmod(0o777 & ~umask())  # mkdtemp's are private
        for name, size in sizes.items():
            _reserve(made / name, size)
        (made / ORIGIN).write_text(text)
        try:
            made.rename(folder)
        except OSError:
            return False  # another run was first
        return True
    except OSError as error:
        raise UserError(
            f"features cannot be kept in '{folder.parent}': {error.strerror}, and a view takes "
            f"{sum(sizes.values()) / 2**30:.2g} GiB. Choose another feature_cache.folder, or fewer views."
        ) from error
    finally:
        if made is not None:
            shutil.rmtree(made, ignore_errors=True)


def _reserve(path: Path, size: int) -> None:
    """Make a file of so many zero bytes, with room for all of them.

    Without room the first write to a file in memory would end the process (SIGBUS), and leave no message.
    """
    with path.open("w+b") as file:  # where a file system cannot reserve, glibc reads and writes instead
        if size and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
