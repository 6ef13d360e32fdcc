"""Images whose classes nobody has told, to be predicted."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from src.data.sources.base import UNKNOWN, Images, Source
from src.data.sources.image_files import TAKEN, checked_side, decode_all, list_images, say_what_is_left_out
from src.errors import UserError, say, shorten
from src.files import user_path

FOR_PREDICT_ONLY = "Unlabelled images are for predict only: fit, validate and test need their classes."


class Unlabelled(Source):
    """Provide an image, or those in a folder and below it, to `predict` and to no other command.

    They are found, decoded and resized as `ImageFolder` does it, but not cached: every process decodes all of them.
    Unreadable ones are named and left out.

    Args:
        root: The file or the folder.
        image_size: Side of the square images, in pixels: that of the training.
        classes: Names of the classes in label order; null for those of the checkpoint.

    Raises:
        UserError: The side is none.
    """

    def __init__(self, root: str, image_size: int = 32, classes: Sequence[str] | None = None) -> None:
        self.root = user_path(root)
        self.image_size = checked_side(image_size)
        self._classes = classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Name the classes of the checkpoint that predicts.

        Raises:
            UserError: There is none.
        """
        if self._classes is None:
            raise UserError(FOR_PREDICT_ONLY)
        return tuple(self._classes)

    def prepare(self) -> None:
        if not self._names:
            raise UserError(f"there are no images in {self.root}; set root to an image, or to a folder that holds some")

    def load(self) -> dict[str, Images]:
        names = self._names
        folder = self.root if self.root.is_dir() else self.root.parent
        pixels, failed = decode_all([folder / name for name in names], self.image_size, title="images")
        unreadable = shorten([names[index] for index in failed])
        if len(failed) == len(names):
            raise UserError(f"{folder} has unreadable images; mend or remove {unreadable} (taken are {TAKEN})")
        if failed:  # the disk may be one that cannot be written to
            rank_zero_only(say)(f"left out of {folder}, for they are unreadable: {unreadable}")
            pixels = np.delete(pixels, failed, axis=0)
            lost = set(failed)
            names = [name for index, name in enumerate(names) if index not in lost]
        return {"predict": Images(pixels, np.full(len(names), UNKNOWN), names)}

    @cached_property
    def _names(self) -> list[str]:
        """List the images relative to their folder."""
        try:
            if self.root.is_file():
                return [self.root.name]
            if self.root.is_dir():
                say_what_is_left_out(self.root)
                return [file.name for file in list_images(self.root, self.root)]
        except OSError as error:
            raise UserError(f"{error.filename or self.root} cannot be read: {error.strerror}; mend that") from error
        raise UserError(f"there is no {self.root}; set root to an image, or to a folder that holds some")
