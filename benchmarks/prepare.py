"""Make the folders of images that the studies use.

    python -m benchmarks.prepare [--source data] [--output data]

Writes cifar10-jpeg/, CIFAR-10's images compressed as JPEG, and quarter/, links to a quarter of its training images and
to others for validation. A cifar10-jpeg/ that is there is taken as it is: the one that was measured came from
elsewhere, and another JPEG library may round otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from PIL import Image

from benchmarks.jpeg import CHROMA_4_2_0, QUALITY
from src.data.sources import CIFAR10, Source
from src.errors import UserError

TRAIN = slice(0, 875)  # of each class's training files, in the order of their names
VAL = slice(4_000, 5_000)


def export(source: Source, folder: Path) -> None:
    """Write every image to <split>/<class>/<number in its class>.jpg, the folder as a whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    for split, images in source.load().items():
        counts = dict.fromkeys(source.classes, 0)
        for pixels, label in zip(images.pixels, images.labels, strict=True):
            name = source.classes[label]
            place = unfinished / split / name / f"{counts[name]:04}.jpg"
            place.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.fromarray(pixels.transpose(1, 2, 0))
            picture.save(place, quality=QUALITY, subsampling=CHROMA_4_2_0)
            counts[name] += 1
    unfinished.rename(folder)


def quarter(whole: Path, folder: Path) -> None:
    """Link a quarter of the training images, and others to validate with."""
    for images in sorted(path for path in (whole / "train").iterdir() if path.is_dir()):
        files = sorted(images.iterdir())
        for split, part in (("train", TRAIN), ("val", VAL)):
            place = folder / split / images.name
            place.mkdir(parents=True, exist_ok=True)
            for file in files[part]:
                link = place / file.name
                if not link.exists():
                    link.unlink(missing_ok=True)  # one that leads nowhere
                    link.symlink_to(os.path.relpath(file, place))  # so that both folders may be moved together


def main() -> None:
    """Make both folders, where they are not there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", default="data", help="folder that holds, or will hold, CIFAR-10's archive")
    parser.add_argument("--output", type=Path, default=Path("data"))
    options = parser.parse_args()
    whole = options.output / "cifar10-jpeg"
    if not whole.exists():
        source = CIFAR10(options.source)
        try:
            source.prepare()
        except UserError as error:
            raise SystemExit(f"error: {error}") from None
        export(source, whole)
    quarter(whole, options.output / "quarter")
    print(f"{whole} and {options.output / 'quarter'} are there")


if __name__ == "__main__":
    main()
