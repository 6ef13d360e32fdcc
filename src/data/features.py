"""What the frozen layers make of each image, kept for the next time."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VALUES, FILLED, ORIGIN = "values.bin", "filled.bin", "origin.json"


class FeatureStore:
    """Keep one array of features for each image and view.

    Memory is reserved for every image but only taken by those put in, so several processes can each keep their own.

    Args:
        images: How many images the source's split has; an image's row is its number.
        views: How many views of each to keep.
        shape: Shape of one image's features, (C, h, w).
        dtype: Their type.
        entry: Number of the network layer they enter.
        folder: Where to keep them on disk; None for memory.
        origin: Everything the features depend on; a folder with another origin is written anew.
    """

    def __init__(
        self,
        images: int,
        views: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        entry: int,
        folder: Path | None = None,
        origin: dict[str, Any] | None = None,
    ) -> None:
        self.entry = entry
        self.view = 0
        places = (views, images)
        if folder is None:
            self.values = torch.empty(*places, *shape, dtype=dtype)
            self.filled = torch.zeros(*places, dtype=torch.bool)
            return
        _prepare(folder, {**(origin or {}), "places": places, "shape": list(shape), "dtype": str(dtype)})
        size = math.prod(places) * math.prod(shape)
        values = torch.from_file(str(folder / VALUES), shared=True, size=size, dtype=dtype)
        filled = torch.from_file(str(folder / FILLED), shared=True, size=math.prod(places), dtype=torch.bool)
        self.values, self.filled = values.view(*places, *shape), filled.view(*places)

    @property
    def keeps_view(self) -> bool:
        """Whether the current view is one of those kept."""
        return self.view < len(self.filled)

    def get(self, indices: Tensor) -> Tensor | None:
        """Give the current view's features of these images, (N, C, h, w); None unless all of them are there."""
        if not self.keeps_view or not self.filled[self.view, indices].all():
            return None
        return self.values[self.view].index_select(0, indices)

    def put(self, indices: Tensor, features: Tensor) -> None:
        """Keep the current view's features of these images, if that view is kept at all."""
        if self.keeps_view:
            indices = indices.cpu()
            self.values[self.view, indices] = features.detach().to("cpu")
            self.filled[self.view, indices] = True  # only now, so that a killed process leaves no hole marked full


def _prepare(folder: Path, origin: dict[str, Any]) -> None:
    """Empty the folder unless what it keeps comes from the same origin."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(origin, sort_keys=True, default=str)
    known = folder / ORIGIN
    if known.exists() and known.read_text() == text:
        return
    for name in (ORIGIN, FILLED, VALUES):
        (folder / name).unlink(missing_ok=True)
    known.write_text(text)
