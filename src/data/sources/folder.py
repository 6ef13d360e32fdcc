"""A folder of images, one subfolder per class, decoded once into an array."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir

import numpy as np
from filelock import FileLock
from PIL import ExifTags, Image
from tqdm import tqdm

from src.data.sources.base import Images, Source
from src.errors import UserError
from src.files import replacing, user_path

SPLITS = ("train", "val", "test")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
CACHE = ".thaw-cache"
CACHE_VERSION = 1  # raise it when the same files would decode to other pixels
CHUNK = 64  # images a thread decodes at a time

Image.MAX_IMAGE_PIXELS = 2**29  # Pillow refuses twice as many; as it comes, also those that telephones take
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


class ImageFolder(Source):
    """Provide the images under `root/train/<class>/`, and `val/` and `test/` where they exist.

    PNG, JPEG, WebP and BMP files count, in nested and linked folders too, each folder once; hidden ones do not.
    Every image becomes RGB, turned upright by its EXIF tag, transparency laid over white. An image of another size
    is resized to a square (bicubic, antialiased), which does not keep its aspect ratio; one of that size keeps its
    pixels.

    Decoded arrays are cached in `root/.thaw-cache`, or in the user's cache folder if `root` is read-only, and
    made again when a file changes.

    Args:
        root: Folder that holds `train` and, optionally, `val` and `test`, each with one subfolder per class.
        image_size: Side of the square images, in pixels.
    """

    def __init__(self, root: str, image_size: int = 32) -> None:
        if image_size < 1:
            raise UserError(f"image_size is {image_size}; choose a positive number of pixels")
        self.root = user_path(root)
        self.image_size = image_size

    @property
    def classes(self) -> tuple[str, ...]:
        """Name the subfolders of `train`, sorted.

        Raises:
            UserError: The folder does not have the layout above; the message says where.
        """
        return self._listing.classes

    def prepare(self) -> None:
        with FileLock(Path(gettempdir(), f"thaw-{Path.home().name}-{_digest(self.root)}.lock")):
            self._prepare()  # by one of the processes of a machine, the others find it done

    def _prepare(self) -> None:
        unreadable: list[str] = []
        for split, files in self._listing.splits.items():
            if self._cached(split) is None:
                paths = [self.root / file.name for file in files]
                pixels, failed = _decode_all(paths, self.image_size, title=split)
                unreadable += [files[index].name for index in failed]
                if not failed:
                    self._store(split, pixels)
        if unreadable:
            raise UserError(f"{self.root} has unreadable images; mend or remove {_shorten(unreadable)}")

    def load(self) -> dict[str, Images]:
        images = {}
        for split, files in self._listing.splits.items():
            cached = self._cached(split)
            if cached is None:
                raise UserError(f"{self.root / split} has not been decoded or has changed since; run again")
            labels = np.array([file.label for file in files], dtype=np.int64)
            images[split] = Images(np.load(cached), labels, [file.name for file in files])
        return images

    @cached_property
    def _listing(self) -> "_Listing":
        try:
            return _list(self.root)
        except OSError as error:
            where = error.filename or self.root
            raise UserError(f"{where} cannot be read: {error.strerror}; mend that, or set another root") from error

    def _cached(self, split: str) -> Path | None:
        """Return the file with the decoded split, if there is one."""
        paths = [folder / self._cache_name(split) for folder in _cache_folders(self.root)]
        return next((path for path in paths if os.access(path, os.R_OK)), None)  # another user's may be private

    def _cache_name(self, split: str) -> str:
        key = hashlib.sha256(f"{CACHE_VERSION}".encode())
        for file in self._listing.splits[split]:
            key.update(os.fsencode(f"{file.name}\0{file.size}\0{file.mtime_ns}\n"))
        return f"{split}-{self.image_size}-{key.hexdigest()[:16]}.npy"

    def _store(self, split: str, pixels: np.ndarray) -> None:
        """Keep the array in the first cache folder that can be written to, and drop what it replaces."""
        name = self._cache_name(split)
        refusals = []
        for folder in _cache_folders(self.root):
            try:
                _save(pixels, folder / name)
            except OSError as error:
                refusals.append(f"{folder} ({error.strerror or error})")
                continue
            for older in set(folder.glob(f"{split}-{self.image_size}-*.npy")) - {folder / name}:
                older.unlink(missing_ok=True)
            return
        raise UserError(f"the decoded images cannot be stored in {' or '.join(refusals)}; make one writable")


@dataclass(frozen=True)
class _File:
    name: str  # path relative to the root, with forward slashes
    label: int
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class _Listing:
    classes: tuple[str, ...]
    splits: dict[str, list[_File]]


def _list(root: Path) -> _Listing:
    """List every split's images by class and path, and check the layout."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; set root to the folder that holds train/")
    if not (root / "train").is_dir():
        raise UserError(f"{root} has no folder train/; put the training images in {root}/train/<class>/")
    classes = _subfolders(root / "train")
    if odd := [name for name in classes if not _is_text(name)]:
        raise UserError(f"{root / 'train'} has class folders whose names are not UTF-8: {_shorten(odd)}; rename them")
    if len(classes) < 2:
        found = f"only the class folder {classes[0]!r}" if classes else "no class folders"
        raise UserError(f"{root / 'train'} has {found}; make one folder for each of at least two classes")
    splits = {}
    for split in SPLITS:
        if (root / split).is_dir():
            splits[split] = _list_split(root, split, classes)
    return _Listing(tuple(classes), splits)


def _list_split(root: Path, split: str, classes: list[str]) -> list[_File]:
    present = _subfolders(root / split)
    if unknown := sorted(set(present) - set(classes)):
        raise UserError(f"{root / split} has classes unknown to train: {_shorten(unknown)}; rename or remove")
    by_class = {name: _list_class(root, split, name, classes.index(name)) for name in present}
    if empty := [name for name, files in by_class.items() if not files]:
        raise UserError(f"{root / split} has class folders without images: {_shorten(empty)}; fill or remove")
    if not by_class:
        raise UserError(f"{root / split} has no class folders; fill or remove it")
    return [file for files in by_class.values() for file in files]


def _list_class(root: Path, split: str, name: str, label: int) -> list[_File]:
    files = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root / split / name, onerror=_raise, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:  # a link to a folder above it, or a second one to the same
            subfolders.clear()
            continue
        seen.add(place)
        inner = Path(folder).relative_to(root).as_posix()
        subfolders[:] = sorted(sub for sub in subfolders if not sub.startswith("."))
        for file in names:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in SUFFIXES:
                status = _status(os.path.join(folder, file))
                files.append(_File(f"{inner}/{file}", label, status.st_size, status.st_mtime_ns))
    return sorted(files, key=lambda file: file.name)


def _status(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError:  # a broken link, which decoding will name
        return os.lstat(path)


def _raise(error: OSError) -> None:
    raise error


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _cache_folders(root: Path) -> tuple[Path, Path]:
    """Return where decoded images may lie, in order of preference."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / CACHE, user / "thaw" / _digest(root)


def _digest(root: Path) -> str:
    return hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]


def _save(array: np.ndarray, path: Path) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def _decode_all(paths: Sequence[Path], size: int, title: str) -> tuple[np.ndarray, list[int]]:
    """Decode to (N, 3, size, size); also return the indices of files that could not be read.

    Threads, because Pillow decodes and resizes outside the interpreter lock. Processes gain on thumbnails
    only, and lose it again: each one has to import the whole program.
    """
    pixels = np.empty((len(paths), 3, size, size), dtype=np.uint8)

    def decode(start: int) -> list[int]:
        failed = []
        for index in range(start, min(start + CHUNK, len(paths))):
            try:
                pixels[index] = _decode(paths[index], size)
            except MemoryError as error:
                raise UserError(f"{paths[index]} takes more memory than there is; make it smaller") from error
            except Exception:  # broken bytes surface as errors of many types
                failed.append(index)
        return failed

    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(paths), unit=" images", desc=f"decoding {title}", disable=None) as bar,
    ):
        failed = []
        for chunk in pool.map(decode, range(0, len(paths), CHUNK)):
            failed += chunk
            bar.update(min(CHUNK, len(paths) - bar.n))
    return pixels, failed


def _decode(path: Path, size: int) -> np.ndarray:
    """Return one image as RGB, uint8, (3, size, size)."""
    with Image.open(path) as image:
        upright = _to_rgb(_upright(image))
    if upright.size != (size, size):
        upright = upright.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(upright).transpose(2, 0, 1)


def _upright(image: Image.Image) -> Image.Image:
    # Pillow's own way writes all the other tags anew, and fails where one of them has a type that it should not have.
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken bytes surface as errors of many types
        turn = None
    return image if turn is None else image.transpose(turn)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scale
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode.endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _shorten(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
