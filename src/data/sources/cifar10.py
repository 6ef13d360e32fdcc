"""CIFAR-10 (Krizhevsky, 2009), in the files that torchvision reads."""

import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from torchvision.datasets import CIFAR10 as Archive
from torchvision.datasets.utils import check_integrity, extract_archive

from src.data.sources.base import Images, Source
from src.data.sources.folder import SPLITS
from src.data.sources.image_files import is_image
from src.download import fetch
from src.errors import UserError
from src.files import user_path

_ROOT = "data"
OFFLINE_HINT = (
    "add `--config configs/with/sample.yaml` (the built-in sample) "
    "or `--config configs/with/folder.yaml` (your own images)"
)


class CIFAR10(Source):
    """Provide CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels in ten classes.

    Every file is compared with torchvision's MD5 before it is unpickled: a pickle is a program.

    Args:
        root: Folder that holds, or will hold, the archive and `cifar-10-batches-py`.
        url: Where to download the archive from, for example a mirror; None means the authors' page.
    """

    def __init__(self, root: str = _ROOT, url: str | None = None) -> None:
        self.root = user_path(root)
        self.url = url

    @property
    def classes(self) -> tuple[str, ...]:
        return ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

    def prepare(self) -> None:
        damaged = _damaged_files(self.root)
        if not damaged:
            return
        begun = [*self.root.glob(f"{Archive.filename}*"), *self.root.glob(f"{Archive.base_folder}*")]
        if not begun and _holds_images(self.root):
            raise UserError(
                f"{self.root} holds images, and CIFAR-10 would be downloaded to it: for images of your own add "
                "--config configs/with/folder.yaml, to predict unlabelled ones --data.source Unlabelled; for CIFAR-10 "
                "give another folder as data.source.init_args.root"
            )
        try:
            archive = fetch(
                self.url or Archive.url,
                self.root / Archive.filename,
                algorithm="md5",
                digest=Archive.tgz_md5,
                offline_hint=OFFLINE_HINT,
            )
        except UserError as error:
            if not damaged[0].exists():
                raise
            raise UserError(f"{damaged[0]} is damaged (wrong MD5) and cannot be replaced: {error}") from error
        try:
            _extract(archive, self.root)
        except OSError as error:
            raise UserError(
                f"{archive} cannot be unpacked there: {error.strerror}. Choose another folder with "
                "data.source.init_args.root, or unpack it yourself."
            ) from error

    def load(self) -> dict[str, Images]:
        splits = {}
        for split in ("train", "test"):
            with warnings.catch_warnings():
                # The files were pickled by a NumPy of 2009; NumPy 2.4.0 to 2.4.4 complain (numpy#31177).
                warnings.filterwarnings("ignore", message=r"dtype\(\): align should be passed")
                try:
                    archive = Archive(self.root, train=split == "train")
                except RuntimeError as error:
                    raise UserError(_missing(self.root)) from error
            pixels = np.ascontiguousarray(archive.data.transpose(0, 3, 1, 2))
            splits[split] = Images(pixels, np.asarray(archive.targets, dtype=np.int64))
        return splits


def _holds_images(root: Path) -> bool:
    """Tell whether a folder is of somebody's own images: in it, in its subfolders, or in one folder for each split.

    Images in subfolders of the default folder may be of anything.
    """
    if not root.is_dir():
        return False
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    inner = folders if root != user_path(_ROOT) else []
    readable = [root, *(folder for folder in inner if os.access(folder, os.R_OK | os.X_OK))]
    splits = any(folder.name in SPLITS for folder in folders)
    return splits or any(is_image(path.name) for folder in readable for path in folder.iterdir())


def _damaged_files(root: Path) -> list[Path]:
    """List the files of the extracted archive that are damaged or missing, damaged ones first."""
    checksums = [*Archive.train_list, *Archive.test_list, (Archive.meta["filename"], Archive.meta["md5"])]
    folder = root / Archive.base_folder
    damaged = [folder / name for name, md5 in checksums if not check_integrity(folder / name, md5)]
    return sorted(damaged, key=lambda path: not path.exists())


def _missing(root: Path) -> str:
    damaged = _damaged_files(root)
    where = damaged[0] if damaged else root
    return f"CIFAR-10 is incomplete: {where} is damaged or missing; run again to get it afresh"


def _extract(archive: Path, root: Path) -> None:
    """Unpack beside the final folder and move only files whose MD5 is right, each in one step."""
    with TemporaryDirectory(dir=root, prefix=".cifar10-") as scratch:
        extract_archive(archive, scratch)
        if damaged := _damaged_files(Path(scratch)):
            raise UserError(f"{archive} holds a damaged {damaged[0].name}; delete the archive and run again")
        target = root / Archive.base_folder
        target.mkdir(exist_ok=True)
        for file in (Path(scratch) / Archive.base_folder).iterdir():
            os.replace(file, target / file.name)
