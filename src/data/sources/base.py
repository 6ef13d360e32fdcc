"""What every source of images gives: uint8 arrays, labels and class names."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

UNKNOWN = -1  # label of an image whose class nobody told
OR_UNLABELLED = ", or predict images without labels: --data.source Unlabelled"  # advice where labels are missed


@dataclass(frozen=True, eq=False)
class Images:
    """Hold one split in memory.

    Attributes:
        pixels: RGB values 0 to 255, uint8, shape (N, 3, H, W), C-contiguous.
        labels: Index into the source's `classes`, or UNKNOWN; int64, shape (N,).
        names: File paths relative to the source's root, or None where images have no files of their own.
    """

    pixels: np.ndarray
    labels: np.ndarray
    names: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)


class Source(ABC):
    """Provide the splits of a data set as arrays: `prepare`, then `load`.

    Every process does both, several at once.

    Attributes:
        image_size: Height and width of the images in pixels.
    """

    image_size: int = 32

    @property
    @abstractmethod
    def classes(self) -> tuple[str, ...]:
        """Name the classes in label order, without decoding an image.

        Raises:
            UserError: What can be known to be missing already, such as the folder.
        """

    @abstractmethod
    def prepare(self) -> None:
        """Download or decode what `load` needs; a second call finds everything done.

        Raises:
            UserError: The images cannot be had, or are damaged.
        """

    @abstractmethod
    def load(self) -> dict[str, Images]:
        """Return the splits "train", "val" and "test", as far as the source has them; without labels "predict" alone.

        Raises:
            UserError: What `prepare` left has been changed or removed.
        """
