"""Which images train, and which validate."""

import math

import numpy as np

from src.errors import UserError


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
