"""Compute the frozen layers once a view instead of once an epoch."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from src.callbacks.schedule import stage_begin
from src.callbacks.unfreezing import StagedUnfreezing
from src.data.datamodule import ImageDataModule
from src.data.features import FeatureStore, digest
from src.errors import UserError, say
from src.files import user_path
from src.model.classifier import TransferClassifier
from src.model.vgg import output_shapes

FOLDER = "features"
_GIB = 2**30


class FrozenFeatureCache(Callback):
    """Keep what the frozen layers put out, so that later epochs start above them.

    With `views` set, epoch e shows view e mod views of each training image; each view passes the frozen layers once.
    Validation images pass them once a stage. A stage of another depth starts anew. Where nothing is frozen nothing is
    kept, and every epoch shows a new view.

    With several processes each keeps the images it sees, and images stay with their process: so each needs only its
    share of the memory, on one machine or on many, and nothing is sent.

    Args:
        views: How many augmented views of each training image there are; null for a new one each epoch and no cache.
            A stage that ends before a view is shown again keeps none of them (but in `folder`).
        limit_gib: Memory, or disk space, of a process in GiB; views that do not fit are computed anew.
        place: Keep features in memory (where the images are: `data.on_device`), or on disk in the run directory,
            where a resumed run finds them again, unless the machine was started anew meanwhile.
        folder: With place disk: a permanent folder, whose features other runs with the same frozen layers, images,
            augmentation and seed use too. Empty it after a power failure: entries marked complete may not have reached
            the disk.

    Raises:
        UserError: An option is outside its range.
    """

    def __init__(
        self,
        views: int | None = None,
        limit_gib: float = 4.0,
        place: Literal["memory", "disk"] = "memory",
        folder: str | None = None,
    ) -> None:
        if views is not None and views < 1:
            raise UserError(f"feature_cache.views is {views}: give 1 or more, or null for no cache.")
        if not 0 < limit_gib < math.inf:
            raise UserError(f"feature_cache.limit_gib is {limit_gib}: give a number above 0.")
        if folder is not None and place != "disk":
            raise UserError(f"feature_cache.folder is {folder}: it needs feature_cache.place disk.")
        self.views = views
        self.limit_gib = limit_gib
        self.place = place
        self.folder = None if folder is None else user_path(folder)
        self.directory: Path | None = None  # what a run keeps within itself; None if it keeps nothing at all
        self.stores: dict[str, FeatureStore] = {}
        self.stage: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            self.place = "memory"  # such a run has no directory
        if stage == "fit" and self.views is None and self.place == "disk":
            rank_zero_only(say)("feature cache: off, for feature_cache.views is null; its place has no effect")
        if stage == "fit":
            log_dir = trainer.log_dir  # asks all processes
            self.directory = None if log_dir is None else Path(log_dir) / FOLDER
            ImageDataModule.of(trainer).images_stay = self.views is not None

    def on_train_start(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        self._begin_epoch(trainer, pl_module)  # a run resumed within an epoch sees no epoch start

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        self._begin_epoch(trainer, pl_module)

    def _begin_epoch(self, trainer: Trainer, model: TransferClassifier) -> None:
        if self.views is None:
            return
        # Since then the frozen layers have not changed.
        stage = stage_begin(StagedUnfreezing.of(trainer).stages, trainer.current_epoch)
        if stage != self.stage:
            self.stage = stage
            self._begin_stage(trainer, model)
        if "train" in self.stores:
            self.stores["train"].view = ImageDataModule.of(trainer).view_of(trainer.current_epoch)
        model.keep_features = {split: store.put for split, store in self.stores.items() if store.keeps_view}

    def _begin_stage(self, trainer: Trainer, model: TransferClassifier) -> None:
        data = ImageDataModule.of(trainer)
        self._drop(trainer, model)
        data.views = self.views if model.depth else None
        if not model.depth:
            for split in ("val", "train"):
                self._remove(trainer, split)
            return
        train = self._wanted(trainer) if _shows_all(trainer) else 0
        wanted = {"val": 1 if trainer.limit_val_batches else 0, "train": train}
        # The largest share of a process, so that all of them keep as many views.
        shares = {split: -(-len(data.datasets[split]) // trainer.world_size) for split in wanted}
        shape, dtype = _features(trainer, model)
        sizes = {split: share * shape.numel() * dtype.itemsize for split, share in shares.items()}
        fitting = views_that_fit(int(self.limit_gib * _GIB), wanted, sizes)
        network = self._network(trainer, model) if self.place == "disk" else {}
        for split, kept in fitting.items():
            if kept < wanted[split]:
                rank_zero_only(say)(
                    f"feature cache: {kept} of {wanted[split]} {split} view(s) fit into {self.limit_gib:g} GiB "
                    f"({sizes[split] / _GIB:.2g} GiB each); the others are computed anew each time",
                )
            self._remove(trainer, split, kept if self.place == "disk" and self.folder is None else 0)
            if kept:
                store = self._store(trainer, model, split, kept, network)
                self.stores[split] = data.datasets[split].features = store

    def _store(
        self, trainer: Trainer, model: TransferClassifier, split: str, views: int, network: dict[str, Any]
    ) -> FeatureStore:
        data = ImageDataModule.of(trainer)
        dataset, (shape, dtype) = data.datasets[split], _features(trainer, model)
        origin, folder = {}, None
        if self.place == "disk":
            kept_rows = {"chosen": digest([dataset.chosen]), "processes": trainer.world_size}
            origin = network | data.view_origin(split) | kept_rows
            if self.folder is None:
                origin["boot"] = _boot()
            folder = self._folder(origin, split) / _part(trainer)
        images, own, device = len(dataset.labels), data.own_images(split), dataset.labels.device
        return FeatureStore(images, own, views, shape, dtype, model.depth, device, folder, origin)

    def _wanted(self, trainer: Trainer) -> int:
        """Count the views of training images worth keeping: none if the stage is over before one is shown again."""
        assert self.views is not None
        assert self.stage is not None
        stages, end = StagedUnfreezing.of(trainer).stages, trainer.max_epochs
        ends = [first for first in stages if stage_begin(stages, first) > self.stage]
        ends += [] if end in (None, -1) else [end]
        shown_again = not ends or min(ends) - self.stage > self.views
        return self.views if shown_again or self.folder is not None else 0  # other runs may want them

    def _network(self, trainer: Trainer, model: TransferClassifier) -> dict[str, Any]:
        """Tell what of the network features depend on."""
        weights = digest(model.backbone.prefix_parameters(model.depth))
        # bfloat16 of the frozen layers alone is what bf16-mixed does to them.
        precisions = {"bf16": "bf16-mixed", "same": str(trainer.precision), "int8": f"int8 {model.ranges}"}
        precision = precisions[model.frozen_precision]
        return {"depth": model.depth, "weights": weights, "precision": precision}

    def _folder(self, origin: dict[str, Any], split: str) -> Path:
        if self.folder is None:
            assert self.directory is not None, "a run without one keeps features in memory"
            return self.directory / split
        return self.folder / f"{split}-{blake2b(repr(origin).encode(), digest_size=8).hexdigest()}"

    def _remove(self, trainer: Trainer, split: str, first: int = 0) -> None:
        """Free the run directory of an earlier stage's views, from the first that will not be written anew."""
        for path in () if self.directory is None else (self.directory / split / _part(trainer)).glob("view-*"):
            if int(path.name.removeprefix("view-")) >= first:
                shutil.rmtree(path, ignore_errors=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "val" in self.stores:
            self.stores["val"].view = 0  # what has been put there is known from now on

    def on_fit_end(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        self._drop(trainer, pl_module)
        if trainer.local_rank == 0 and self.directory is not None:  # also what the run kept before it went on otherwise
            for split in ("train", "val"):
                shutil.rmtree(self.directory / split, ignore_errors=True)
            with suppress(OSError):  # no such folder, or one with other things
                self.directory.rmdir()

    def _drop(self, trainer: Trainer, model: TransferClassifier) -> None:
        self.stores, model.keep_features = {}, {}  # both hold what is in memory, and new ones may need the room
        for dataset in ImageDataModule.of(trainer).datasets.values():
            dataset.features = None


def _boot() -> str:
    """Tell since when the machine has been up: what it wrote before it lost power may not have reached the disk."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        return ""


def _shows_all(trainer: Trainer) -> bool:
    """Tell whether every epoch shows all images; else batches would find some of their features only, and say so."""
    batches = ImageDataModule.of(trainer).batches("train", trainer.global_rank, trainer.world_size)
    if trainer.num_training_batches >= len(batches):
        return True
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return False
    rank_zero_only(say)(
        "feature cache: trainer.limit_train_batches gives every epoch other images, so no training view is kept",
    )
    return False


def views_that_fit(limit: int, wanted: Mapping[str, int], sizes: Mapping[str, int]) -> dict[str, int]:
    """Give each split in turn as many of the views it wants as the rest of the limit holds.

    Args:
        limit: Bytes that there are.
        wanted: Views of each split, in the order in which they are served: validation first, for every epoch uses it.
        sizes: Bytes of a view of each split.
    """
    fitting = {}
    for split, views in wanted.items():
        fitting[split] = min(views, limit // sizes[split])
        limit -= fitting[split] * sizes[split]
    return fitting


def _part(trainer: Trainer) -> str:
    return f"process-{trainer.global_rank}"


def _features(trainer: Trainer, model: TransferClassifier) -> tuple[torch.Size, torch.dtype]:
    """Tell what the frozen layers make of an image: shape, (C, h, w), and kind of numbers."""
    shape = torch.Size(output_shapes(model.image_size)[model.depth - 1])
    if model.frozen_precision != "same":
        return shape, {"bf16": torch.bfloat16, "int8": torch.uint8}[model.frozen_precision]
    half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.half}
    return shape, half.get(str(trainer.precision), torch.float32)
