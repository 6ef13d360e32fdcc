"""Network input from pixels: mean 0 and deviation 1 a channel, at the side that the network sees."""

from __future__ import annotations

import math

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from src.errors import UserError

_CHUNK_PIXELS = 2**20
"""Pixels counted at a time: `bincount` turns each into eight bytes."""

_MIN_STD = 1.0
"""One grey level: dividing by less would only magnify rounding."""


def standardized(pixels: Tensor, mean: Tensor, std: Tensor, side: int) -> Tensor:
    """Standardize pixels, and enlarge them bilinearly where the network sees more of them than there are.

    Args:
        pixels: From 0 to 255, (N, 3, H, H), in floating point.
        mean: Of each channel, in pixels, to be broadcast.
        std: The same for the deviation.
        side: Height and width of what the network sees.
    """
    inputs = (pixels - mean) / std
    return inputs if side == inputs.shape[-1] else F.interpolate(inputs, size=(side, side), mode="bilinear")


def channel_statistics(images: np.ndarray, indices: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and population standard deviation of each channel, on the 0-255 scale.

    `images` is uint8 of shape (N, 3, H, W); only those at `indices`, of shape (n,), count. The sums are
    whole numbers and so exact. A deviation below one grey level is returned as 1, to be safe to divide by.

    Raises:
        UserError: If there is no image to count.
    """
    if len(indices) == 0:
        raise UserError("The mean and deviation of the training images are wanted, but there are none.")
    chunk = max(1, _CHUNK_PIXELS // images[0, 0].size)
    histograms = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(indices), chunk):
        for channel, histogram in enumerate(histograms):
            pixels = images[indices[start : start + chunk], channel]
            histogram += np.bincount(pixels.ravel(), minlength=256)
    means, stds = zip(*(_mean_and_std(histogram.tolist()) for histogram in histograms), strict=True)
    return means, tuple(max(std, _MIN_STD) for std in stds)


def _mean_and_std(counts: list[int]) -> tuple[float, float]:
    """Return mean and population standard deviation of levels 0, 1, 2, ... that occur `counts` times."""
    total = sum(counts)
    first = sum(level * count for level, count in enumerate(counts))
    second = sum(level**2 * count for level, count in enumerate(counts))
    # In Python's unbounded integers the difference of large numbers loses nothing.
    return first / total, math.sqrt((total * second - first**2) / total**2)
