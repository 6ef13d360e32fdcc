"""`ImageDataModule` on a made-up source: the split, what the network sees, and when."""

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.model_selection import train_test_split
from support import needs_gpu
from torch import Tensor, nn

from src.batch import Batch
from src.data.augment import Augmentation
from src.data.datamodule import ImageDataModule
from src.data.loading import ArrayDataset, _pin
from src.data.sources import Images, Sample, Source
from src.errors import UserError
from src.saved_training import SavedTraining

N, N_TEST, SIDE = 40, 9, 8  # 28 images to train on, 12 to validate
INPUT = ((100.0, 110.0, 120.0), (50.0, 60.0, 70.0))  # some weights' mean and deviation


class Noise(Source):
    """Give random images, unlike in every split, and unlike in every channel."""

    image_size = SIDE

    def __init__(
        self, splits: tuple[str, ...] = ("train", "test"), classes: tuple[str, ...] = ("cat", "dog"), seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        sizes = {"train": N, "val": 7, "test": N_TEST}
        self.names = classes
        self.prepared = 0
        self.images = {}
        for number, split in enumerate(splits):
            shape = (sizes[split], 3, SIDE, SIDE)
            scale = np.array([60, 120, 180])[:, None, None]
            pixels = (rng.random(shape) * scale + 20 * number).astype(np.uint8)
            files = [f"{split}/{index}.png" for index in range(len(pixels))]
            self.images[split] = Images(pixels, np.arange(len(pixels)) % len(classes), files)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.names

    def prepare(self) -> None:
        self.prepared += 1

    def load(self) -> dict[str, Images]:
        return self.images


class Recorder(LightningModule):
    """Write down every batch that reaches the network."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.train_seen: dict[tuple[int, int], Tensor] = {}
        self.eval_seen: dict[tuple[str, int], Tensor] = {}

    def training_step(self, batch: Batch) -> Tensor:
        for index, image in zip(batch.indices.tolist(), batch.inputs, strict=True):
            self.train_seen[self.current_epoch, index] = image
        return self.weight.sum()

    def _evaluate(self, stage: str, batch: Batch) -> None:
        for index, image in zip(batch.indices.tolist(), batch.inputs, strict=True):
            self.eval_seen["sanity" if self.trainer.sanity_checking else stage, index] = image

    def validation_step(self, batch: Batch) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: Batch) -> None:
        self._evaluate("test", batch)

    def predict_step(self, batch: Batch) -> Tensor:
        self._evaluate("predict", batch)
        return batch.labels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make(source: Source | None = None, **options: Any) -> ImageDataModule:
    return ImageDataModule(source or Noise(), **{"batch_size": 4, "standardize": "dataset", **options})


def set_up(source: Source | None = None, **options: Any) -> ImageDataModule:
    data = make(source, **options)
    data.setup("fit")
    return data


def trainer(folder: Path, max_epochs: int = 1, accelerator: str = "cpu") -> Trainer:
    return Trainer(
        accelerator=accelerator, devices=1, max_epochs=max_epochs, num_sanity_val_steps=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, default_root_dir=folder,
    )  # fmt: skip


def fit(data: ImageDataModule, folder: Path, max_epochs: int = 1) -> Recorder:
    recorder = Recorder()
    trainer(folder, max_epochs).fit(recorder, data)
    return recorder


def split_by_hand() -> tuple[list[int], list[int]]:
    train, val = train_test_split(range(N), test_size=0.3, random_state=777)
    return train, val


def test_split_is_the_tutorials() -> None:
    data = set_up()
    train, val = split_by_hand()
    assert data.datasets["train"].chosen.tolist() == train
    assert data.datasets["val"].chosen.tolist() == val
    images = data.source.load()["train"]
    batch = data.datasets["val"][[3, 0]]
    assert batch.indices.tolist() == [val[3], val[0]]
    assert torch.equal(batch.inputs, torch.from_numpy(images.pixels[[val[3], val[0]]]))
    assert batch.labels.tolist() == [val[3] % 2, val[0] % 2]
    assert batch.entry == 0
    assert data.datasets["val"].name_of(val[3]) == f"train/{val[3]}.png"


def test_split_follows_its_options() -> None:
    data = set_up(val_fraction=0.5, split_seed=1)
    assert data.datasets["train"].chosen.tolist() == train_test_split(range(N), test_size=0.5, random_state=1)[0]


def test_image_without_file_is_named_by_its_number() -> None:
    images = Noise().images["train"]
    assert ArrayDataset(Images(images.pixels, images.labels), np.arange(3)).name_of(2) == "2"


def test_own_validation_images_are_used_and_none_taken_from_training() -> None:
    source = Noise(("train", "val"))
    data = set_up(source)
    assert data.datasets["train"].chosen.tolist() == list(range(N))
    batch = data.datasets["val"][list(range(7))]
    assert torch.equal(batch.inputs, torch.from_numpy(source.images["val"].pixels))
    assert data.datasets["val"].name_of(6) == "val/6.png"


def test_all_test_images_are_used() -> None:
    data = set_up()
    batches = list(data.test_dataloader())
    assert torch.equal(torch.cat([batch.indices for batch in batches]), torch.arange(N_TEST))
    pixels = torch.cat([batch.inputs for batch in batches])
    assert torch.equal(pixels, torch.from_numpy(data.source.load()["test"].pixels))


def test_every_training_epoch_has_another_order() -> None:
    loader = set_up().train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append(torch.cat([batch.indices for batch in loader]).tolist())
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == sorted(split_by_hand()[0])


def standardized(images: Tensor, mean: Any, std: Any) -> Tensor:
    return (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_dataset_standardization_has_mean_0_and_deviation_1_over_training_images_only() -> None:
    data = set_up()
    pixels = torch.from_numpy(data.source.load()["train"].pixels)
    train, val = split_by_hand()
    inputs = data.standardized(pixels[train]).double()
    torch.testing.assert_close(inputs.mean((0, 2, 3)), torch.zeros(3).double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(inputs.std((0, 2, 3), correction=0), torch.ones(3).double(), atol=1e-6, rtol=0)
    assert data.standardized(pixels).double().mean((0, 2, 3)).abs().min() > 1e-4  # so validation had no part in it
    assert data.standardized(pixels[val]).dtype == torch.float32


def test_own_validation_images_do_not_enter_the_statistics() -> None:
    with_val, without = set_up(Noise(("train", "val"))), set_up(Noise(("train",)), val_fraction=1e-9)
    expected = Noise().images["train"].pixels.mean((0, 2, 3))
    np.testing.assert_allclose(with_val.state_dict()["mean"], expected, rtol=1e-6)
    assert with_val.state_dict()["mean"] != without.state_dict()["mean"]  # which lacks the one image it validates


def test_weights_standardization_is_the_weights() -> None:
    data = set_up(standardize="weights", weights_input=INPUT)
    pixels = torch.from_numpy(data.source.load()["test"].pixels)
    torch.testing.assert_close(data.standardized(pixels), standardized(pixels, *INPUT))
    torch.testing.assert_close(data.pixels(data.standardized(pixels)), pixels.float(), atol=1e-4, rtol=0)


def test_dataset_standardization_does_not_ask_the_weights() -> None:
    given, not_given = set_up(weights_input=INPUT), set_up()
    assert given.state_dict() == not_given.state_dict()


def test_weights_that_expect_nothing_known_are_refused() -> None:
    with pytest.raises(UserError, match=r"--model\.weights_input.*--data\.standardize dataset"):
        ImageDataModule(Noise(), standardize="weights")


def test_batch_of_one_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.batch_size is 1"):
        make(batch_size=1)


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_batches_are_fetched_by_one_indexing(monkeypatch: pytest.MonkeyPatch, split: str) -> None:
    fetched: list[int] = []
    fetch = ArrayDataset.__getitem__

    def count(self: ArrayDataset, positions: Any) -> Batch:
        fetched.append(len(positions))
        return fetch(self, positions)

    monkeypatch.setattr(ArrayDataset, "__getitem__", count)
    data = set_up(batch_size=5)
    loader = getattr(data, f"{split}_dataloader")()
    batches = list(loader)
    assert len(fetched) == len(batches) == len(loader)
    assert fetched == [len(batch.labels) for batch in batches]
    assert sum(fetched) == {"train": 28, "val": 12, "test": N_TEST}[split]


def test_batches_are_bytes_until_they_are_on_the_device(tmp_path: Path) -> None:
    moved: list[torch.dtype] = []

    class Watched(ImageDataModule):
        def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
            moved.append(batch.inputs.dtype)
            return super().transfer_batch_to_device(batch, device, dataloader_idx)

    seen = fit(Watched(Noise(), batch_size=4, standardize="dataset"), tmp_path)
    assert set(moved) == {torch.uint8}
    assert {image.dtype for image in [*seen.train_seen.values(), *seen.eval_seen.values()]} == {torch.float32}


def test_training_images_are_augmented_by_epoch_and_index(tmp_path: Path) -> None:
    augmentation = Augmentation(rotation=20, crop=1)
    data = make(standardize="weights", weights_input=INPUT, augmentation=augmentation, seed=5)
    seen = fit(data, tmp_path, max_epochs=3).train_seen
    train, _ = split_by_hand()
    assert sorted(seen) == [(epoch, index) for epoch in range(3) for index in sorted(train)]
    pixels = torch.from_numpy(data.source.load()["train"].pixels)
    for epoch in range(3):
        indices = torch.tensor(train)
        augmented = augmentation(pixels[indices], seed=5, view=epoch, indices=indices)
        for index, image in zip(train, standardized(augmented, *INPUT), strict=True):
            torch.testing.assert_close(seen[epoch, index], image)
    assert not torch.equal(seen[0, train[0]], seen[1, train[0]])


def test_views_come_again_where_there_are_only_so_many(tmp_path: Path) -> None:
    data = make()
    data.views = 2
    seen = fit(data, tmp_path, max_epochs=4).train_seen
    for index in split_by_hand()[0]:
        assert torch.equal(seen[0, index], seen[2, index])
        assert torch.equal(seen[1, index], seen[3, index])
        assert not torch.equal(seen[0, index], seen[1, index])


def test_without_augmentation_every_epoch_shows_the_images_as_they_are(tmp_path: Path) -> None:
    data = make(augmentation=None)
    seen = fit(data, tmp_path, max_epochs=2).train_seen
    pixels = torch.from_numpy(data.source.load()["train"].pixels)
    assert all(torch.equal(image, data.standardized(pixels[index, None])[0]) for (_, index), image in seen.items())


def test_images_are_not_augmented_outside_training(tmp_path: Path) -> None:
    data = make()
    recorder, once = Recorder(), trainer(tmp_path, max_epochs=2)
    once.fit(recorder, data)
    once.validate(recorder, data, verbose=False)
    once.test(recorder, data, verbose=False)
    once.predict(recorder, data, return_predictions=False)
    images = data.source.load()
    _, val = split_by_hand()
    expected = {
        **{("sanity", index): images["train"].pixels[index] for index in val[:8]},  # two batches
        **{("val", index): images["train"].pixels[index] for index in val},
        **{(stage, index): images["test"].pixels[index] for stage in ("test", "predict") for index in range(N_TEST)},
    }
    assert recorder.eval_seen.keys() == expected.keys()
    for place, pixels in expected.items():
        shown = data.standardized(torch.from_numpy(pixels)[None])[0]
        assert torch.equal(recorder.eval_seen[place], shown), place


def test_picture_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    seen = [fit(make(batch_size=size), tmp_path, max_epochs=2).train_seen for size in (2, 7, 28)]
    assert seen[0].keys() == seen[1].keys() == seen[2].keys()
    for other in seen[1:]:
        assert all(torch.equal(image, other[place]) for place, image in seen[0].items())


@pytest.mark.parametrize("limit", [2, 0.3])
def test_an_epoch_cut_short_is_a_whole_one_for_a_checkpoint(tmp_path: Path, limit: float) -> None:
    """Else a run that goes on from there would leave out the batches that this one took."""
    data = set_up()
    data.trainer = trainer(tmp_path)
    data.trainer.limit_train_batches = limit
    loader = data.train_dataloader()
    served = []
    for _ in zip(loader, range(2), strict=False):
        served.append(loader.state_dict()["served"])
    assert len(loader) == 7
    assert served == [1, 0]


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_are_pinned_for_a_gpu_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, pinned: bool
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    data = set_up()
    data.trainer = trainer(tmp_path)
    monkeypatch.setattr(type(data.trainer.strategy), "root_device", torch.device(device))
    shapes: list[torch.Size] = []
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: shapes.append(tensor.shape) or tensor)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert shapes == ([part.shape for part in batch[:3]] if pinned else [])
        shapes.clear()


def test_a_pinned_batch_enters_the_network_where_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.Tensor.pin_memory", lambda tensor: tensor)
    features = Batch(torch.rand(2, 512, 2, 2), torch.tensor([1, 2]), torch.tensor([3, 4]), entry=14)
    assert _pin(features).entry == 14


def test_seed_changes_order_and_pictures(tmp_path: Path) -> None:
    first, second = (fit(make(seed=seed), tmp_path).train_seen for seed in (1, 2))
    assert list(first) != list(second)
    assert not any(torch.equal(image, second[place]) for place, image in first.items())


def test_a_batch_is_sent_only_where_it_is_not() -> None:
    data = set_up()
    batch = data.datasets["train"][[0, 1]]
    assert data.transfer_batch_to_device(batch, torch.device("cpu"), 0) is batch
    sent = data.transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert all(part.device.type == "meta" for part in (sent.inputs, sent.labels, sent.indices))


def test_features_pass_unchanged() -> None:
    features = Batch(torch.randn(2, 512, 2, 2), torch.zeros(2).long(), torch.arange(2), entry=14)
    assert set_up().on_after_batch_transfer(features, 0) is features


def test_enlarged_input_is_bilinear() -> None:
    data = set_up(Noise(), input_size=24, standardize="weights", weights_input=INPUT)
    assert data.image_size == 24
    pixels = torch.from_numpy(data.source.load()["test"].pixels)
    inputs = data.standardized(pixels)
    assert inputs.shape == (N_TEST, 3, 24, 24)
    # Three output pixels fall on each input pixel; the middle one falls on its centre.
    torch.testing.assert_close(inputs[:, :, 1::3, 1::3], standardized(pixels, *INPUT))
    between = (2 * inputs[:, :, 1, 1] + inputs[:, :, 1, 4]) / 3
    torch.testing.assert_close(inputs[:, :, 1, 2], between)


def test_image_size_is_the_sources_by_default() -> None:
    data = set_up()
    assert data.image_size == SIDE
    assert data.num_classes == 2
    assert data.standardized(torch.zeros(1, 3, SIDE, SIDE)).shape[-2:] == (SIDE, SIDE)


@pytest.mark.parametrize("command", [Trainer.test, Trainer.predict])
def test_source_without_test_images_says_so(tmp_path: Path, command: Callable[..., object]) -> None:
    with pytest.raises(UserError, match="no test images; add a 'test' folder"):
        command(trainer(tmp_path), Recorder(), make(Noise(("train",))))


def test_training_needs_no_test_images(tmp_path: Path) -> None:
    assert len(fit(make(Noise(("train",))), tmp_path).train_seen) == 28


def test_source_is_prepared(tmp_path: Path) -> None:
    data = make()
    fit(data, tmp_path)
    assert data.source.prepared == 1


def test_images_that_are_there_are_not_prepared_again(tmp_path: Path) -> None:
    """A test after hours of training does not care what became of the files."""
    data, once, recorder = make(), trainer(tmp_path), Recorder()
    once.fit(recorder, data)
    data.source.prepare = None
    once.test(recorder, data, verbose=False)


def test_kept_features_know_their_images_and_how_these_are_shown() -> None:
    fixed = {"standardize": "weights", "weights_input": INPUT}  # statistics that do not follow the images
    plain = set_up(**fixed).view_origin("train")
    assert set_up(**fixed).view_origin("train") == plain
    for source, changed in (
        (None, {"augmentation": None}), (None, {"seed": 5}), (None, {"input_size": 12}), (None, {"cutmix": 0.5}),
        (None, {"weights_input": INPUT[::-1]}), (Noise(seed=1), {}), (None, {"augmentation": Augmentation(crop=1)}),
    ):  # fmt: skip
        assert set_up(source, **{**fixed, **changed}).view_origin("train") != plain


def test_processes_must_have_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def gather(found: list[Any], mine: Any) -> None:
        told.append(mine)
        found[:] = [told[0], mine]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    set_up()
    set_up()
    source = Noise()
    train = source.images["train"]
    source.images["train"] = Images(train.pixels, train.labels, [*train.names[1:], "train/new.png"])
    with pytest.raises(UserError, match="the processes have found different images"):
        set_up(source)


def test_checkpoint_brings_its_statistics(tmp_path: Path) -> None:
    """Predict on other images: they must be standardized as the training images were."""
    trained = make(Noise(seed=0))
    once, recorder = trainer(tmp_path), Recorder()
    once.fit(recorder, trained)
    once.save_checkpoint(tmp_path / "last.ckpt")
    other = make(Noise(seed=1), split_seed=5)
    trainer(tmp_path).test(recorder, other, ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    pixels = torch.from_numpy(other.source.load()["test"].pixels)
    assert torch.equal(other.statistics, trained.statistics)
    assert not torch.equal(other.statistics, set_up(Noise(seed=1), split_seed=5).statistics)
    shown = torch.stack([recorder.eval_seen["test", index] for index in range(N_TEST)])
    assert torch.equal(shown, trained.standardized(pixels))


def test_identity_changes_where_one_file_takes_the_place_of_another() -> None:
    """A file fewer at the beginning of a class, and one more at its end: numbers and labels are the same."""
    source = Noise()
    before, same = set_up(source).identity(1, False), set_up(Noise()).identity(1, False)
    assert before == same
    train = source.images["train"]
    source.images["train"] = Images(train.pixels, train.labels, [*train.names[1:], "train/new.png"])
    after = set_up(source).identity(1, False)
    assert {name for name in before if before[name] != after[name]} == {"files"}
    with pytest.raises(UserError, match="was trained on other images"):
        SavedTraining(Path("last.ckpt"), {"ImageDataModule": {"identity": before}}).check_data(after)


def test_identity_knows_whether_processes_keep_their_images() -> None:
    data = set_up(Noise())
    assert data.identity(2, True) != data.identity(2, False)
    assert data.identity(1, True) == data.identity(1, False)  # one process has them all


@pytest.mark.parametrize("classes", [("cat", "dog", "cow"), ("dog", "cat"), ("cat",)])
def test_checkpoint_of_other_classes_is_refused(classes: tuple[str, ...]) -> None:
    saved = set_up(Noise(classes=classes)).state_dict()
    with pytest.raises(UserError, match=f"classes {', '.join(classes)}; the data have cat, dog"):
        set_up().load_state_dict(saved)


def test_of_many_other_classes_those_that_differ_are_named() -> None:
    many = tuple(f"class {number}" for number in range(100))
    saved = set_up(Noise(classes=(*many[:-1], "cow"))).state_dict()
    with pytest.raises(UserError, match=r"classes cow; the data have class 99\. Choose"):
        set_up(Noise(classes=many)).load_state_dict(saved)


def test_state_is_plain() -> None:
    state = set_up().state_dict()
    assert state["classes"] == ["cat", "dog"]
    assert [len(state[name]) for name in ("mean", "std")] == [3, 3]
    assert {type(value) for name in ("mean", "std") for value in state[name]} == {float}


def test_images_can_be_kept_on_another_device(tmp_path: Path) -> None:
    """A device without contents stands in for a GPU: what reaches the loader's batches must come from there."""
    data = set_up(on_device=True)
    data.trainer = types.SimpleNamespace(  # type: ignore[assignment]
        strategy=types.SimpleNamespace(root_device=torch.device("meta")), global_rank=0, world_size=1,
        limit_train_batches=1.0,
    )  # fmt: skip
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batch = next(iter(loader))
        assert {part.device.type for part in (batch.inputs, batch.labels, batch.indices)} == {"meta"}
        assert (batch.inputs.shape, batch.inputs.dtype) == ((4, 3, SIDE, SIDE), torch.uint8)
    assert data.datasets["train"].pixels is data.datasets["val"].pixels


@needs_gpu
def test_images_kept_on_the_device_are_the_same(tmp_path: Path) -> None:
    seen = []
    for on_device in (False, True):
        recorder = Recorder()
        trainer(tmp_path, accelerator="gpu").fit(recorder, make(on_device=on_device))
        seen.append({**recorder.train_seen, **recorder.eval_seen})
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(seen[0][key], seen[1][key]) for key in seen[0])


def test_samples_are_of_all_classes() -> None:
    """Folders hold one class after the other."""
    data = ImageDataModule(Sample(size=1000), standardize="dataset")
    data.setup("fit")
    train = data.datasets["train"]
    train.chosen = train.chosen[train.labels[train.chosen].argsort()]
    of_class = {
        image.numpy().tobytes(): int(label)
        for image, label in zip(data.standardized(train.pixels[train.chosen]), train.labels[train.chosen], strict=True)
    }
    samples = data.sample_images()
    assert len(samples) == 256
    assert {of_class[image.numpy().tobytes()] for image in samples} == set(range(10))
