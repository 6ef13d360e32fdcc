"""Which images train, which validate, and what the training images look like on average."""

import math

import numpy as np

from src.errors import UserError

_CHUNK_PIXELS = 2**20
"""Pixels counted at a time: `bincount` turns each into eight bytes."""

_MIN_STD = 1.0
"""One grey level: dividing by less would only magnify rounding."""


def train_val_split(n: int, val_fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split `n` images at random into training and validation indices, both int64.

    They are the same indices in the same order as those of scikit-learn's
    `train_test_split(range(n), test_size=val_fraction, random_state=seed)`.

    Raises:
        UserError: If the fraction is not between 0 and 1, a part would be empty, or the seed is not 32 bits.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"val_fraction={val_fraction}: choose a fraction above 0 and below 1.")
    if not 0 <= seed < 2**32:
        raise UserError(f"split_seed={seed}: choose a seed from 0 to {2**32 - 1}.")
    val_size = math.ceil(val_fraction * n)
    if not 0 < val_size < n:
        raise UserError(
            f"val_fraction={val_fraction} of {n} images leaves {n - val_size} for training, {val_size} for "
            "validation; each needs at least one. Choose another fraction or add images."
        )
    order = np.random.RandomState(seed).permutation(n).astype(np.int64)
    return order[val_size:], order[:val_size]


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
