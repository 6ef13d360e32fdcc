"""Which images form which batch in which process.

The samplers place images on processes themselves: Lightning needs `use_distributed_sampler: false`.
"""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from src.errors import UserError

_MIN_TRAIN_BATCH = 2
"""BatchNorm has no variance from one image."""


class TrainBatches(Sampler[np.ndarray]):
    """Shuffle `n` images into batches (int64 arrays) by seed and epoch alone.

    The processes take equal, consecutive slices of a global batch of `batch_size * world_size` images: 2
    processes with 16 images each see the global batches of 1 process with 32. The last, incomplete one is
    trimmed until its slices are equal, and dropped if they then hold fewer than two images. Other images are
    left out in each epoch.

    Args:
        n: Number of images.
        batch_size: Images per batch and process.
        seed: Seed of the order.
        rank: This process, from 0.
        world_size: Number of processes.
        stay: Whether a process gets the same images in every epoch, as a cache of its own needs; the global batches
            then depend on the number of processes.

    Raises:
        UserError: If the images or the batch size are too few for one batch of two images per process.
    """

    def __init__(
        self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, stay: bool = False
    ) -> None:
        _check_place(rank, world_size)
        if batch_size < _MIN_TRAIN_BATCH:
            raise UserError(f"batch_size={batch_size}: BatchNorm needs at least {_MIN_TRAIN_BATCH}.")
        if n < _MIN_TRAIN_BATCH * world_size:
            raise UserError(
                f"{n} training images are too few for {world_size} process(es): "
                f"each needs at least {_MIN_TRAIN_BATCH} for one batch. Add images or use fewer processes."
            )
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.stay = stay and world_size > 1
        self._n = n
        self._seed = seed
        self.skipping = 0

    @property
    def positions(self) -> np.ndarray:
        """List the images, 0 to n - 1, that this process may get in any epoch."""
        return np.arange(self.rank, self._n, self.world_size) if self.stay else np.arange(self._n)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration takes."""
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the next iteration, and of that one only, to resume within an epoch.

        Raises:
            ValueError: If an epoch does not have so many batches.
        """
        if not 0 <= batches <= len(self):
            raise ValueError(f"cannot skip {batches} of {len(self)} batches")
        self.skipping = batches

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch, whatever is skipped."""
        whole, rest = divmod(self._n, self.batch_size * self.world_size)
        return whole + (rest // self.world_size >= _MIN_TRAIN_BATCH)

    def __iter__(self) -> Iterator[np.ndarray]:
        first, self.skipping = self.skipping, 0
        order = _shuffled(self._n, self._seed, self.epoch)
        if self.stay:
            order = order[order % self.world_size == self.rank]
        for batch in range(first, len(self)):
            yield self._slice(order, batch)

    def _slice(self, order: np.ndarray, batch: int) -> np.ndarray:
        """Return this process's part of one global batch."""
        start = batch * self.batch_size * self.world_size
        size = min(self.batch_size, (self._n - start) // self.world_size)
        if self.stay:
            return order[batch * self.batch_size :][:size]
        return order[start + self.rank * size :][:size]


class EvalBatches(Sampler[np.ndarray]):
    """Hand out each of `n` images exactly once over all processes, in equally many batches (int64 arrays).

    Process r takes the r-th of `world_size` consecutive shares, whose sizes differ by at most one. Its
    batches are full as long as one image is left for each batch to come: of 65 images in batches of 32, the
    first of two processes gets 32 + 1 and the second 31 + 1. So no batch is empty except where nothing else
    is possible: with fewer images than processes, or with `batch_size` 1 and an `n` that `world_size` does
    not divide.

    Args:
        n: Number of images.
        batch_size: Most images per batch and process.
        rank: This process, from 0.
        world_size: Number of processes.

    Raises:
        UserError: If there are no images, or batches of none.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        _check_place(rank, world_size)
        if n < 1:
            raise UserError("There are no images to evaluate.")
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: choose at least 1.")
        self.batch_size = batch_size
        self.positions = np.array_split(np.arange(n), world_size)[rank]
        """The images, 0 to n - 1, that this process gets."""
        largest_share = -(-n // world_size)
        self._batches = -(-largest_share // batch_size)

    def __len__(self) -> int:
        """Return the number of batches, which is the same in every process."""
        return self._batches

    def __iter__(self) -> Iterator[np.ndarray]:
        left = self.positions
        for still_to_come in reversed(range(self._batches)):
            size = min(self.batch_size, len(left) - still_to_come)
            yield left[:size]
            left = left[size:]


def taken_batches(batches: int, limit: int | float) -> int:
    """Tell how many of its batches an epoch takes under a limit as Lightning has them: a number, or a part."""
    return min(limit, batches) if isinstance(limit, int) else int(limit * batches)


def _shuffled(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return 0 to n - 1 in an order that is a pure function of seed and epoch.

    Sorting raw bits, because NumPy promises those to stay the same in later versions, but not
    `Generator.permutation` (NEP 19).
    """
    bits = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(n)
    return np.argsort(bits, kind="stable")


def _check_place(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank {rank} is not one of {world_size} processes")
