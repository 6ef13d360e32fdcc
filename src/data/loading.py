"""Images in memory, handed out as whole batches."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from src.batch import Batch
from src.data.features import FeatureStore
from src.data.sampling import EvalBatches, TrainBatches, taken_batches
from src.data.sources import Images


class ArrayDataset(Dataset):
    """Hand out whole batches of images held in memory; no Python runs per image.

    Args:
        images: All images of a source's split.
        chosen: Which of them belong to this data set, int64, (n,); position i is image `chosen[i]`.
    """

    def __init__(self, images: Images, chosen: np.ndarray) -> None:
        self.pixels = torch.from_numpy(images.pixels)
        self.labels = torch.from_numpy(images.labels)
        self.names = images.names
        self.chosen = torch.from_numpy(chosen)
        self.chosen_there = self.chosen  # the same, on the device where the images are
        self.features: FeatureStore | None = None

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, positions: Sequence[int] | np.ndarray) -> Batch:
        indices = self.chosen[torch.as_tensor(positions)]
        there = indices.to(self.labels.device, non_blocking=True)
        if self.features is not None and (features := self.features.get(indices)) is not None:
            return Batch(features, self.labels[there], there, self.features.entry)
        return Batch(self.pixels[there], self.labels[there], there)

    @property
    def lie_by_class(self) -> bool:
        """Whether images come class by class, as those of folders do."""
        return bool((self.labels[self.chosen_there].diff() >= 0).all())

    def identity(self) -> tuple[Tensor, Tensor]:
        """Give what differs where images were added, left out or split otherwise: their numbers and their labels."""
        return self.chosen, self.labels[self.chosen_there]

    def file_names(self) -> Tensor:
        """Give the images' names in one array of bytes; none where the source has no files."""
        names = "\0".join(self.names[index] for index in self.chosen.tolist()) if self.names else ""
        return torch.from_numpy(np.frombuffer(os.fsencode(names), np.uint8).copy())

    def name_of(self, index: int) -> str:
        """Name an image: its file, or its number where the source has no files."""
        return str(index) if self.names is None else self.names[index]


class BatchLoader:
    """Load whole batches, and continue a training epoch at the batch where a checkpoint left it.

    Lightning keeps the state of any loader that has one, and sets the epoch of its `sampler`. It is no
    DataLoader: Lightning would take one apart for prediction and put it together differently, and here one would have
    nothing to do, for a batch is one indexing.

    Args:
        dataset: What to load from.
        batches: Which images form a batch.
        pinned: Whether to put batches into memory that a GPU can fetch from.
        limit: How many of the batches an epoch takes, or which part: `trainer.limit_train_batches`.
    """

    def __init__(
        self, dataset: ArrayDataset, batches: TrainBatches | EvalBatches, pinned: bool = False, limit: int | float = 1.0
    ) -> None:
        self.dataset = dataset
        self.sampler = batches
        self.batch_sampler = None  # Lightning looks for one on whatever has a sampler
        self.pinned = pinned
        self.taken = taken_batches(len(batches), limit)
        self.served = 0

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        self.served = self.sampler.skipping if isinstance(self.sampler, TrainBatches) else 0
        for positions in self.sampler:
            batch = self.dataset[positions]
            self.served += 1
            yield _pin(batch) if self.pinned else batch

    def state_dict(self) -> dict[str, int]:
        """Tell how many batches of the current epoch have been handed out, 0 if all."""
        return {"served": self.served % max(1, self.taken)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        assert isinstance(self.sampler, TrainBatches)
        self.sampler.skip(state_dict["served"])


def _pin(batch: Batch) -> Batch:
    inputs, labels, indices, entry, *_ = batch  # others are mixed in on the device
    return Batch(inputs.pin_memory(), labels.pin_memory(), indices.pin_memory(), entry)
