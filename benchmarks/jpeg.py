"""Estimate what JPEG cost the images: compress the test images a second time, as hard as the first.

    python -m benchmarks.jpeg --root data/cifar10-jpeg --output data/twice
    mkdir runs/twice; cp -r runs/staged/version_0 runs/twice/version_0     # the test replaces a run's report
    python -m src.cli test --config configs/staged.yaml --config configs/with/folder.yaml \\
        --data.source.init_args.root data/twice --ckpt_path runs/twice/version_0/checkpoints/best.ckpt

The blocks of the second compression lie between those of the first, which it would otherwise nearly repeat.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from PIL import Image

QUALITY = 75
CHROMA_4_2_0 = 2  # Pillow's number for it
HALF_BLOCK = 4


def compress(image: Image.Image) -> Image.Image:
    """Compress an image with blocks half a block aside."""
    border = (HALF_BLOCK, HALF_BLOCK)
    wide = Image.fromarray(np.pad(np.asarray(image.convert("RGB")), (border, border, (0, 0)), mode="edge"))
    file = io.BytesIO()
    wide.save(file, "JPEG", quality=QUALITY, subsampling=CHROMA_4_2_0)
    return Image.open(file).crop((HALF_BLOCK, HALF_BLOCK, HALF_BLOCK + image.width, HALF_BLOCK + image.height))


def main() -> None:
    """Compress every test image into a folder that holds nothing else."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder with test/")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, with test/")
    options = parser.parse_args()
    paths = sorted((options.root / "test").glob("*/*.jpg"))
    if not paths:
        raise SystemExit(f"error: there are no images {options.root}/test/<class>/*.jpg; set --root to their folder")
    for path in paths:
        place = options.output / "test" / path.parent.name / f"{path.stem}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        compress(Image.open(path)).save(place)


if __name__ == "__main__":
    main()
