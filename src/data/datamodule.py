"""From a source's arrays to standardized, augmented batches on the device."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jsonargparse import lazy_instance
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor

from src.batch import Batch
from src.data.augment import Augmentation
from src.data.cutmix import draw_patches, paste, shares
from src.data.features import digest
from src.data.loading import ArrayDataset, BatchLoader
from src.data.sampling import EvalBatches, TrainBatches
from src.data.sources import CIFAR10, FOR_PREDICT_ONLY, Source
from src.data.sources.base import OR_UNLABELLED
from src.data.split import train_val_split
from src.data.standardization import channel_statistics, standardized
from src.errors import FEW, UserError, shorten
from src.replay import Replay

_SAMPLE = 256  # images


class ImageDataModule(LightningDataModule):
    """Split, standardize, augment and batch a source's images.

    Args:
        source: Where images come from: CIFAR10, ImageFolder or Sample; for `predict` also Unlabelled.
        batch_size: Images per process and step.
        val_fraction: Share of the training images kept for validation, where the source has no validation split.
        split_seed: Seed of that split.
        standardize: What the network sees: `weights`, what its pretrained weights or those of `run.warm_start` were
            trained on; `dataset`, mean 0 and deviation 1 per channel over the training images.
        augmentation: Random changes of training images; null for none.
        cutmix: Share of the training images, 0 to 1, that get a rectangle of another one pasted in, labels mixed by
            area. On a GPU combine it with `on_device`: else every step waits until those images are sent.
        input_size: Side in pixels to which images are enlarged bilinearly on the device; null to leave them.
        on_device: Whether to keep all images in the training device's memory, as bytes, instead of sending each batch.
        cuda_graphs: Whether to record how images kept on a GPU are changed, and to replay it; set from the model.
        seed: Seed of order and augmentation; set from `seed_everything`.
        weights_input: Mean and deviation that the weights expect, pixels 0 to 255; set from the model's weights.

    Raises:
        UserError: An option is outside its range, or the source cannot tell its classes.
    """

    def __init__(
        self,
        source: Source = lazy_instance(CIFAR10),  # noqa: B008 - made anew for every use, so that options show in --help
        batch_size: int = 32,
        val_fraction: float = 0.3,
        split_seed: int = 777,
        standardize: Literal["weights", "dataset"] = "weights",
        augmentation: Augmentation | None = Augmentation(),  # noqa: B008 - never changed
        cutmix: float = 0.0,
        input_size: int | None = None,
        on_device: bool = False,
        cuda_graphs: bool = False,
        seed: int = 777,
        weights_input: Any = None,
    ) -> None:
        super().__init__()
        if batch_size < 2:
            raise UserError(f"data.batch_size is {batch_size}: BatchNorm in the head needs at least 2.")
        if not 0 <= cutmix <= 1:
            raise UserError(f"data.cutmix is {cutmix}: give a share of the images, from 0 to 1.")
        if input_size is not None and input_size < 1:
            raise UserError(
                f"data.input_size is {input_size}: give a side in pixels, or null to leave images as they are."
            )
        if standardize == "weights" and weights_input is None:
            raise UserError(
                "data.standardize is 'weights', but the model's weights do not say what input they expect: give "
                "--model.weights_input IMAGENET1K_FEATURES or IMAGENET1K_V1, or use --data.standardize dataset."
            )
        if input_size is not None and input_size < source.image_size:
            raise UserError(
                f"data.input_size is {input_size}, and enlarges only: the images have {source.image_size} pixels. "
                "Leave them so, --data.input_size null, or make a folder's smaller: data.source.init_args.image_size."
            )
        self.source = source
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.standardize = standardize
        self.augmentation = augmentation
        self.cutmix = cutmix
        self.input_size = input_size
        self.on_device = on_device
        self.cuda_graphs = cuda_graphs
        self._change_replay = Replay(self._augmented_and_standardized, self._change_settings)
        self._view_there = -1, torch.tensor(-1)
        self.seed = seed
        self.weights_input = weights_input
        self.classes = source.classes  # reads names only: a wrong folder is found before anything is made
        self.datasets: dict[str, ArrayDataset] = {}
        self.views: int | None = None  # how many different views there are; None: no end of them
        self.images_stay = False  # whether every epoch gives a process the same images
        self.statistics = torch.empty(2, 3)
        self._statistics_there: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._digests: tuple[str, str] | None = None

    @classmethod
    def of(cls, trainer: Trainer) -> ImageDataModule:
        """Find the data module of a trainer."""
        return trainer.datamodule  # type: ignore[attr-defined]

    @property
    def num_classes(self) -> int:
        """How many classes the source has."""
        return len(self.classes)

    @property
    def image_size(self) -> int:
        """Height and width, in pixels, of what enters the network."""
        return self.input_size or self.source.image_size

    def prepare_data(self) -> None:
        if not self.datasets:  # a training has its images; what became of the files meanwhile does not concern its test
            self.source.prepare()

    def setup(self, stage: str) -> None:
        if not self.datasets:
            self._load(stage)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            self._compare_processes()

    def _load(self, stage: str) -> None:
        splits = self.source.load()
        if "predict" in splits and stage != "predict":
            raise UserError(FOR_PREDICT_ONLY)
        if "train" not in splits:  # the checkpoint knows mean and deviation
            if stage == "fit":
                raise UserError("the data source has no training images; add a 'train' folder beside its others")
            self.datasets = {split: ArrayDataset(images, np.arange(len(images))) for split, images in splits.items()}
            return
        train = splits["train"]
        if "val" in splits:
            chosen = {"train": np.arange(len(train)), "val": np.arange(len(splits["val"]))}
        else:
            positions = train_val_split(len(train), self.val_fraction, self.split_seed)
            chosen = dict(zip(("train", "val"), positions, strict=True))
        self.datasets = {
            "train": ArrayDataset(train, chosen["train"]),
            "val": ArrayDataset(splits.get("val", train), chosen["val"]),
        }
        if "test" in splits:
            self.datasets["test"] = ArrayDataset(splits["test"], np.arange(len(splits["test"])))
        if self.standardize == "weights":
            self.statistics = torch.tensor(self.weights_input)
        else:
            self.statistics = torch.tensor(channel_statistics(train.pixels, chosen["train"]))

    def teardown(self, stage: str) -> None:
        self._change_replay.forget()  # memory that a test may need

    def _compare_processes(self) -> None:
        """Refuse images that differ between processes: what one of them trains on, another might validate."""
        mine = digest(
            part for dataset in self.datasets.values() for part in (*dataset.identity(), dataset.file_names())
        )
        found: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
        if len(set(found)) > 1:
            raise UserError(
                "the processes have found different images: give every machine the same files, and change none while "
                "a training begins. Then run again."
            )

    def state_dict(self) -> dict[str, Any]:
        """Save what predictions depend on, class names, the images' side, mean and deviation, and the identity."""
        mean, std = self.statistics.tolist()
        identity = self.identity(self._place()[1], self.images_stay)
        input_is = {"image_size": self.source.image_size, "mean": mean, "std": std}
        return {"classes": list(self.classes), **input_is, "identity": identity}

    def identity(self, processes: int, stay: bool) -> dict[str, Any]:
        """Tell what a training that goes on must find again: the images, and how they form batches.

        Args:
            processes: How many share the images; before a training begins only its trainer knows.
            stay: Whether every epoch gives a process the same images; before that only its feature cache knows.
        """
        if self._digests is None:  # every checkpoint asks, and the images stay
            datasets = [self.datasets[split] for split in ("train", "val")]
            images = digest(part for dataset in datasets for part in dataset.identity())
            # Where one file takes another one's place, numbers and labels stay, and the split falls elsewhere.
            self._digests = images, digest(dataset.file_names() for dataset in datasets)
        images, files = self._digests
        batches = {"batch_size": self.batch_size, "seed": self.seed, "processes": processes}
        return {"images": images, "files": files, **batches, "stay": stay and processes > 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        trained = state_dict["classes"]
        if tuple(trained) != tuple(self.classes):
            raise UserError(
                f"the checkpoint was trained on the classes {_differing(trained, self.classes)}; the data have "
                f"{_differing(self.classes, trained)}. Choose the data source that the checkpoint was trained on, or "
                "begin a new training with its backbone alone: --model.weights."
            )
        self.statistics = torch.tensor([state_dict["mean"], state_dict["std"]])

    def expect(self, state_dict: Mapping[str, Any]) -> None:
        """Standardize as a checkpoint's images were, unless the data set's own mean and deviation are wanted.

        Args:
            state_dict: What `state_dict` gave the checkpoint.
        """
        if self.standardize == "weights" and "mean" in state_dict:
            self.statistics = torch.tensor([state_dict["mean"], state_dict["std"]])

    def train_dataloader(self) -> BatchLoader:
        return self._loader("train", 1.0 if self.trainer is None else self.trainer.limit_train_batches)

    def val_dataloader(self) -> BatchLoader:
        return self._loader("val")

    def test_dataloader(self) -> BatchLoader:
        return self._loader("test")

    def predict_dataloader(self) -> BatchLoader:
        return self._loader(self.predicted)

    @property
    def predicted(self) -> str:
        """Which split `predict` takes: images without labels if there are any."""
        return "predict" if "predict" in self.datasets else "test"

    def require(self, split: str) -> None:
        """Ask for the images of a split.

        Raises:
            UserError: The source has none.
        """
        if split not in self.datasets:
            raise UserError(
                f"the data source has no {split} images; add a '{split}' folder beside 'train'{OR_UNLABELLED}"
            )

    def _loader(self, split: str, limit: int | float = 1.0) -> BatchLoader:
        self.require(split)
        self._move()
        dataset = self.datasets[split]
        return BatchLoader(dataset, self.batches(split, *self._place()), self._pinned(dataset), limit)

    def batches(self, split: str, rank: int, processes: int) -> TrainBatches | EvalBatches:
        """Divide a split into batches, and give those of one of several processes."""
        images = len(self.datasets[split])
        if split == "train":
            return TrainBatches(images, self.batch_size, self.seed, rank, processes, stay=self.images_stay)
        return EvalBatches(images, self.batch_size, rank, processes)

    def own_images(self, split: str) -> Tensor:
        """List the numbers of the images that this process gets in an epoch, int64; in every epoch if they stay."""
        return self.datasets[split].chosen[torch.from_numpy(self.batches(split, *self._place()).positions)]

    def _move(self) -> None:
        """Put the images where they are used; splits that share an array go on sharing it."""
        if not self.on_device or self.trainer is None:
            return
        device = self.trainer.strategy.root_device
        moved: dict[int, Tensor] = {}
        for dataset in self.datasets.values():
            for name in ("pixels", "labels", "chosen_there"):
                here: Tensor = getattr(dataset, name)
                if here.device == device:
                    continue
                if here.data_ptr() not in moved:
                    moved[here.data_ptr()] = here.to(device)
                setattr(dataset, name, moved[here.data_ptr()])

    def _pinned(self, dataset: ArrayDataset) -> bool:
        """Tell whether batches go from here to a GPU."""
        here = dataset.labels.device.type == "cpu"
        return here and self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"

    def _place(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        if batch.inputs.device == device:
            return batch
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment (training only) and standardize on the device, in float32; features pass unchanged."""
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return self._standardized(batch)
        view = self.view_of(trainer.current_epoch)
        changes = batch.entry == 0 or self.cutmix > 0  # an empty recording would be warned of
        if changes and self._replays(batch):
            if self._view_there[0] != view:
                self._view_there = view, torch.tensor(view, device=batch.labels.device)
            self._statistics_on(batch.labels.device)  # in case they have changed, of which a recording sees nothing
            changed = self._change_replay(self._view_there[1], *batch)
            return changed._replace(labels=batch.labels, indices=batch.indices)  # the next batch's change only the rest
        return self._augmented_and_standardized(view, *batch)

    def _change_settings(self) -> Hashable:
        return self.augmentation, self.cutmix  # which a callback may change

    def _replays(self, batch: Batch) -> bool:
        """Tell whether changes are recorded; other images come from the CPU, which a GPU cannot ask for them."""
        return self.cuda_graphs and self.on_device and batch.labels.is_cuda

    def _augmented_and_standardized(self, view: int | Tensor, *parts: Any) -> Batch:
        return self._standardized(self._augmented(Batch(*parts), view))

    def _standardized(self, batch: Batch) -> Batch:
        return batch if batch.entry > 0 else batch._replace(inputs=self.standardized(batch.inputs))

    def view_of(self, epoch: int) -> int:
        """Tell which view of the training images an epoch shows."""
        return epoch if self.views is None else epoch % self.views

    def _augmented(self, batch: Batch, view: int | Tensor) -> Batch:
        images = batch.entry == 0
        if images:
            batch = batch._replace(inputs=self._changed(batch.inputs, view, batch.indices))
        if not self.cutmix:
            return batch
        train, side = self.datasets["train"], self.source.image_size
        patches = draw_patches(self.cutmix, self.seed, view, batch.indices, len(train), side)
        others = train.chosen_there[patches.others.to(train.labels.device)]
        if images:
            pixels = train.pixels[others].to(batch.inputs.device)
            pixels = self._changed(pixels, view, others.to(batch.inputs.device))
            batch = batch._replace(inputs=paste(batch.inputs, pixels, patches))
        labels = train.labels[others].to(batch.labels.device)
        return batch._replace(other_labels=labels, other_shares=shares(patches, side))

    def _changed(self, pixels: Tensor, view: int | Tensor, indices: Tensor) -> Tensor:
        if self.augmentation is None:
            return pixels
        return self.augmentation(pixels, seed=self.seed, view=view, indices=indices)

    def view_origin(self, split: str) -> dict[str, Any]:
        """Tell what, beside the network and the number of the view, the features of a split's views depend on."""
        random: dict[str, Any] = {}
        if split == "train":
            random = {"seed": self.seed, "augmentation": repr(self.augmentation)}
            if self.cutmix:
                random |= {"cutmix": self.cutmix, "others": digest([self.datasets["train"].chosen])}
        return random | {
            "images": digest([self.datasets[split].pixels]),
            "statistics": self.statistics.tolist(),
            "input_size": self.input_size,
        }

    def standardized(self, pixels: Tensor) -> Tensor:
        """Turn pixels from 0 to 255, (N, 3, H, W), into network input at `image_size`, float32."""
        mean, std = self._statistics_on(pixels.device).view(2, 1, 3, 1, 1)
        return standardized(pixels.to(torch.float32), mean, std, self.image_size)

    def _statistics_on(self, device: torch.device) -> Tensor:
        """Give mean and deviation where they are needed, in the same memory even if they have become others."""
        known, there = self._statistics_there.get(device, (None, None))
        if there is None:
            with torch.inference_mode(False):  # a training may write to them after a validation
                there = self.statistics.to(device, copy=True)
        elif known is not self.statistics:
            there.copy_(self.statistics)
        self._statistics_there[device] = self.statistics, there
        return there

    def sample_images(self) -> Tensor:
        """Give up to 256 training images of all classes as network input, the same in every process."""
        train = self.datasets["train"]
        count = min(len(train), _SAMPLE)
        spread = torch.arange(count) * len(train) // count  # folders hold one class after the other
        return self.standardized(train.pixels[train.chosen[spread]])

    def pixels(self, inputs: Tensor) -> Tensor:
        """Turn network input back into pixels from 0 to 255, at the size that the network sees."""
        mean, std = self._statistics_on(inputs.device).view(2, 1, 3, 1, 1)
        return inputs * std + mean


def _differing(classes: Sequence[str], others: Sequence[str]) -> str:
    """Name classes; of many those which the others lack, if there are any."""
    lacking = [name for name in classes if name not in others] if len(classes) > FEW else []
    return shorten(lacking or classes)
