"""A folder of images, one subfolder per class, decoded once into an array."""

import hashlib
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import gettempdir
from types import SimpleNamespace
from unicodedata import normalize

import numpy as np
from lightning.pytorch.utilities import rank_zero_only

from src.data.sources.base import OR_UNLABELLED, Images, Source
from src.data.sources.image_files import (
    TAKEN,
    ImageFile,
    checked_side,
    decode_all,
    in_memory,
    is_image,
    list_images,
    say_what_is_left_out,
)
from src.errors import FEW, UserError, say, shorten
from src.files import one_at_a_time, replacing, user_path

SPLITS = ("train", "val", "test")
CACHE = ".thaw-cache"
_LONG = 24 * 3600  # seconds, more than decoding takes
CACHE_VERSION = 2  # raise it when the same files would decode to other pixels


class ImageFolder(Source):
    """Provide the images under `root/train/<class>/`, and `val/` and `test/` where they exist.

    PNG, JPEG, WebP and BMP files count, in nested and linked folders too, each folder once; hidden ones do not.
    Every image becomes RGB, turned upright by its EXIF tag, transparency laid over white; of 16 bits a colour the upper
    eight count. An image of another size is resized to a square (bicubic, antialiased), which does not keep its aspect
    ratio; one of that size keeps its pixels.

    Decoded arrays are cached in `root/.thaw-cache`, or in the user's cache folder if `root` is read-only, and
    made again when a file changes.

    Args:
        root: Folder that holds `train` and, optionally, `val` and `test`, each with one subfolder per class. To
            validate or test a checkpoint, `val` or `test` alone will do.
        image_size: Side of the square images, in pixels.
        classes: Names of the classes in label order; null for those of `train` or, where there is no such folder, of
            the checkpoint.

    Raises:
        UserError: The side is none.
    """

    def __init__(self, root: str, image_size: int = 32, classes: Sequence[str] | None = None) -> None:
        self.root = user_path(root)
        self.image_size = checked_side(image_size)
        self._classes = classes

    @property
    def classes(self) -> tuple[str, ...]:
        """Name the classes as they were given, else the subfolders of `train`, sorted.

        Raises:
            UserError: The folder does not have the layout above; the message says where.
        """
        return self._listing.classes

    def prepare(self) -> None:
        lock = Path(gettempdir(), f"thaw-{Path.home().name}-{_digest(self.root)}.lock")
        with one_at_a_time(lock, f"decoding the images of '{self.root}'"):
            self._prepare()  # by one of the processes of a machine, the others find it done

    def _prepare(self) -> None:
        for split in self._listing.files:
            say_what_is_left_out(self.root / split)
            if loose := [path.name for path in (self.root / split).iterdir() if is_image(path.name)]:
                rank_zero_only(say)(
                    f"{len(loose):,} images in {self.root / split} itself are not used, for they are in no class "
                    f"folder: {shorten(sorted(loose))}"
                )
        with suppress(OSError):  # what is not used need not be readable
            if unused := [name for name in _subfolders(self.root) if name not in SPLITS]:
                rank_zero_only(say)(f"not used in {self.root}: {shorten(unused)} (only {', '.join(SPLITS)} are)")
        unreadable: list[str] = []
        for split, files in self._listing.files.items():
            if self._cached(split) is None:
                paths = [self.root / file.name for file in files]
                pixels, failed = decode_all(paths, self.image_size, title=split)
                unreadable += [files[index].name for index in failed]
                if not failed:
                    self._store(split, pixels)
        if len(unreadable) > FEW:  # the message names the first
            rank_zero_only(say)("\n".join(["unreadable:", *unreadable]))
        if unreadable:
            raise UserError(f"{self.root} has unreadable images; mend or remove {shorten(unreadable)}")

    def load(self) -> dict[str, Images]:
        images = {}
        for split, files in self._listing.files.items():
            cached = self._cached(split)
            if cached is None:
                raise UserError(f"{self.root / split} has not been decoded or has changed since; run again")
            with in_memory(len(files), self.image_size):
                pixels = np.load(cached)
            images[split] = Images(pixels, self._listing.labels[split], [file.name for file in files])
        return images

    @cached_property
    def _listing(self) -> "_Listing":
        try:
            return _list(self.root, self._classes)
        except OSError as error:
            where = error.filename or self.root
            raise UserError(f"{where} cannot be read: {error.strerror}; mend that, or set another root") from error

    def _cached(self, split: str) -> Path | None:
        """Return the file with the decoded split, if there is one."""
        paths = [folder / self._cache_name(split) for folder in _cache_folders(self.root)]
        readable = (path for path in paths if os.access(path, os.R_OK))  # another user's may be private
        return next(filter(_is_whole, readable), None)

    def _cache_name(self, split: str) -> str:
        key = hashlib.sha256(f"{CACHE_VERSION}".encode())
        for file in self._listing.files[split]:
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
            for older in folder.glob(f"{split}-{self.image_size}-*.npy"):
                if older != folder / name:
                    older.unlink(missing_ok=True)
            for begun in folder.glob(f".{split}-{self.image_size}-*"):  # by a run that was killed
                with suppress(FileNotFoundError):
                    if time.time() - begun.stat().st_mtime > _LONG:  # another machine may just be at it
                        begun.unlink()
            return
        raise UserError(
            f"the decoded images cannot be stored in {' or '.join(refusals)}; make one writable, or free some room"
        )


def lacks_train(root: Path) -> bool:
    """Tell whether a folder holds no images to train, so that its classes are a checkpoint's."""
    return not (root / "train").is_dir()


@dataclass(frozen=True)
class _Listing:
    classes: tuple[str, ...]
    files: dict[str, list[ImageFile]]  # by split
    labels: dict[str, np.ndarray]


def _list(root: Path, known: Sequence[str] | None) -> _Listing:
    """List every split's images by class and path, and check the layout."""
    if not root.is_dir():
        raise UserError(f"there is no folder {root}; set root to the folder that holds train/")
    _check_links(root, [root / split for split in SPLITS])
    if known is None and not (root / "train").is_dir():
        raise UserError(f"{root} has no folder train/; put the training images in {root}/train/<class>/{OR_UNLABELLED}")
    if not _is_text(str(root)):
        raise UserError(f"the path {root} is not UTF-8; rename its folders")
    classes = _train_classes(root / "train") if known is None else list(known)
    if not 2 <= len(classes) == len(set(classes)):
        raise UserError(f"the classes are {shorten(classes)}; name at least two, each once")
    listing = _Listing(tuple(classes), {}, {})
    splits = [split for split in SPLITS if (root / split).is_dir()]
    if not splits:
        raise UserError(
            f"{root} has none of the folders {', '.join(SPLITS)}; put images in {root}/test/<class>/{OR_UNLABELLED}"
        )
    for split in splits:
        by_class = _list_split(root, split, classes, "train" if known is None else f"the list {shorten(classes)}")
        listing.files[split] = [file for name in classes for file in by_class.get(name, ())]
        counts = [len(by_class.get(name, ())) for name in classes]
        listing.labels[split] = np.repeat(np.arange(len(classes)), counts)
    return listing


def _train_classes(train: Path) -> list[str]:
    classes = _class_folders(train)
    if odd := [name for name in classes if not _is_text(name)]:
        raise UserError(f"{train} has class folders whose names are not UTF-8: {shorten(odd)}; rename them")
    if len(classes) < 2:
        found = f"only the class folder {classes[0]!r}" if classes else "no class folders"
        raise UserError(f"{train} has {found}; make one folder for each of at least two classes")
    return classes


def _list_split(root: Path, split: str, classes: list[str], whose: str) -> dict[str, list[ImageFile]]:
    present = _class_folders(root / split)
    if unknown := sorted(set(present) - set(classes)):
        alike = {normalize("NFC", name) for name in unknown} & {normalize("NFC", name) for name in classes}
        advice = "; rename or remove"
        if alike:  # as archives of other systems have them
            advice = (
                f"; rename {shorten(sorted(alike))} as in {whose}, where the same letters are other Unicode characters"
                + ", and rename or remove the others" * (len(alike) < len(unknown))
            )
        raise UserError(f"{root / split} has classes that are not in {whose}: {shorten(unknown)}{advice}")
    by_class = {name: list_images(root / split / name, root) for name in present}
    if empty := [name for name, files in by_class.items() if not files]:
        raise UserError(
            f"{root / split} has class folders without images: {shorten(empty)}; fill or remove (taken are {TAKEN})"
        )
    if not by_class:
        raise UserError(f"{root / split} has no class folders; fill or remove it{OR_UNLABELLED}")
    return by_class


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _class_folders(split: Path) -> list[str]:
    _check_links(split, [path for path in split.iterdir() if not path.name.startswith(".")])
    return _subfolders(split)


def _check_links(folder: Path, paths: Iterable[Path]) -> None:
    """Refuse those of a folder's entries that lead nowhere, as to a disk that is not mounted: they are not absent."""
    if lost := sorted(path.name for path in paths if path.is_symlink() and not path.exists()):
        raise UserError(f"{folder} has links that lead nowhere: {shorten(lost)}; mend or remove them")


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _cache_folders(root: Path) -> tuple[Path, Path]:
    """Return where decoded images may lie, in order of preference."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / CACHE, user / "thaw" / _digest(root)


def _digest(root: Path) -> str:
    return hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]


def _is_whole(path: Path) -> bool:
    try:
        np.load(path, mmap_mode="r")
    except (ValueError, EOFError):  # a copy that was cut short
        return False
    except OSError:  # a file system that maps no files
        return True
    return True


def _save(array: np.ndarray, path: Path) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.save(SimpleNamespace(write=file.write), array)  # into a file itself, it would not say that a disk is full
