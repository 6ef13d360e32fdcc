"""Image files: which of them lie in a folder, and their pixels as one array."""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from PIL import ExifTags, Image, PngImagePlugin
from tqdm import tqdm

from src.errors import UserError, say
from src.process import cores

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
TAKEN = ", ".join(sorted(SUFFIXES))
OTHER_SUFFIXES = frozenset(
    {".arw", ".avif", ".cr2", ".cr3", ".dng", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".nef", ".orf", ".raf"}
    | {".rw2", ".tga", ".tif", ".tiff"}
)
"""Of images that are not taken."""
CHUNK = 64  # images a thread decodes at a time, at most
_MOST_THREADS = 16  # each holds a photograph, of which a large one takes hundreds of megabytes
_SMALL = 4096  # bytes of a file up to which one thread is faster than two, which would wait for each other

Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses twice as many; as it comes, also those that phones take
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # one text may take what all together may
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image upright, by EXIF's number of its orientation."""


@dataclass(frozen=True)
class ImageFile:
    """A file, and what tells whether it has changed."""

    name: str
    """Path with forward slashes, relative to where the search began."""
    size: int
    """Bytes."""
    mtime_ns: int
    """Time of the last change, in nanoseconds."""


def checked_side(image_size: int) -> int:
    """Give the side of images in pixels as it is, if it is one.

    Raises:
        UserError: It is not positive.
    """
    if image_size < 1:
        raise UserError(f"image_size is {image_size}; choose a positive number of pixels")
    return image_size


def is_image(name: str, suffixes: Collection[str] = SUFFIXES) -> bool:
    """Tell by its name whether a file is an image of one of these kinds, and not hidden."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes


def list_images(folder: Path, root: Path) -> list[ImageFile]:
    """List the images in a folder and those below it, linked ones too, each folder once; hidden ones do not count.

    Args:
        folder: Where to look.
        root: What their names are relative to.

    Returns:
        The files in the order of their names.

    Raises:
        OSError: A folder cannot be read.
    """
    files = []
    for place, names in _walk(folder):
        inner = Path(place).relative_to(root).as_posix()
        prefix = "" if inner == "." else f"{inner}/"
        for file in filter(is_image, names):
            status = _status(os.path.join(place, file))
            files.append(ImageFile(prefix + file, status.st_size, status.st_mtime_ns))
    return sorted(files, key=lambda file: file.name)


@rank_zero_only
def say_what_is_left_out(folder: Path) -> None:
    """Print how many images of kinds that are not taken lie in a folder and below it, if any do."""
    kinds = Counter(
        os.path.splitext(name)[1].lower()
        for _, names in _walk(folder)
        for name in names
        if is_image(name, OTHER_SUFFIXES)
    )
    if kinds:
        say(
            f"{kinds.total():,} images in {folder} are left out, for they are {', '.join(sorted(kinds))}: "
            f"taken are {TAKEN}"
        )


def _walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Give each visible folder, from this one downwards, and the names of its files."""
    seen: set[str] = set()
    for place, subfolders, names in os.walk(folder, onerror=_raise, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:  # a link to a folder above it, or a second one to the same
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        yield place, names


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError:  # a broken link, which decoding will name
        return os.lstat(path)


def _raise(error: OSError) -> None:
    raise error


@contextmanager
def in_memory(images: int, size: int) -> Iterator[None]:
    """Say in one line that so many images of this height and width do not fit in memory.

    Raises:
        UserError: They do not.
    """
    try:
        yield
    except MemoryError as error:
        raise UserError(
            f"{images} images of {size} × {size} pixels take {images * 3 * size**2 / 2**30:.1f} GiB, and there is "
            "less memory: choose a smaller image_size, or fewer images"
        ) from error


def decode_all(paths: Sequence[Path], size: int, title: str) -> tuple[np.ndarray, list[int]]:
    """Decode files to RGB, uint8, (N, 3, size, size); also return the indices of those that could not be read.

    Photographs by several threads, because Pillow decodes and resizes outside the interpreter lock. Thumbnails by one:
    with two they took twice as long, for most of the work is Python's, and the lock goes back and forth.

    Args:
        paths: The files.
        size: Height and width of the images in pixels.
        title: What they are, for the progress bar.

    Raises:
        UserError: An image is larger than the memory, or all of them together are.
    """
    with in_memory(len(paths), size):
        pixels = np.empty((len(paths), 3, size, size), dtype=np.uint8)
    chunk = min(CHUNK, len(paths) // (4 * cores()) + 1)  # of a few large ones, too, each thread has some

    def decode(start: int) -> list[int]:
        failed = []
        for index in range(start, min(start + chunk, len(paths))):
            try:
                pixels[index] = _decode(paths[index], size)
            except MemoryError as error:
                raise UserError(f"{paths[index]} takes more memory than there is; make it smaller") from error
            except Exception:  # broken bytes surface as errors of many types
                failed.append(index)
        return failed

    threads = 1 if _mean_size(paths) < _SMALL else min(_MOST_THREADS, cores())
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(total=len(paths), unit=" images", desc=f"decoding {title}", disable=None) as bar,
    ):
        failed = []
        for more in pool.map(decode, range(0, len(paths), chunk)):
            failed += more
            bar.update(min(chunk, len(paths) - bar.n))
    return pixels, failed


def _mean_size(paths: Sequence[Path]) -> float:
    """Average the bytes of up to a hundred of the files, spread over all."""
    sizes = []
    for path in paths[:: len(paths) // 100 + 1]:
        with suppress(OSError):  # decoding will name it
            sizes.append(path.stat().st_size)
    return sum(sizes) / max(1, len(sizes))


def _decode(path: Path, size: int) -> np.ndarray:
    """Return one image as RGB, uint8, (3, size, size)."""
    image = _open(path)
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def _open(path: Path) -> Image.Image:
    """Return one image upright, as RGB; of a large one there is no copy more than it takes, and none left behind."""
    with Image.open(path) as image:
        image.load()  # once, for a second attempt would take what a first one left of damaged pixels for the image
        return _to_rgb(_upright(image))


def _upright(image: Image.Image) -> Image.Image:
    # Pillow's own way writes all the other tags anew, and fails where one of them has a type that it should not have.
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken bytes surface as errors of many types
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scale
        grey = np.asarray(image)
        grey = np.where(grey == image.info.get("transparency"), 0xFFFF, grey)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.mode.endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
