"""The frozen layers run once a view, and nothing else changes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support import needs_int8, on_sample, run, signal_at

from src.callbacks.feature_cache import FrozenFeatureCache, _features, views_that_fit
from src.callbacks.history import read_history
from src.callbacks.schedule import stage_begin
from src.callbacks.unfreezing import StagedUnfreezing
from src.cli import main
from src.data.features import FILLED, VALUES, FeatureStore
from src.errors import UserError
from src.model.classifier import TransferClassifier

TRAIN, VAL = 35, 15  # images of a sample of 50


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the images of each batch that runs through frozen layers."""
    counts: list[int] = []
    run = TransferClassifier.prefix

    def counting(self: TransferClassifier, inputs: torch.Tensor, entry: int = 0) -> torch.Tensor:
        if entry < self.depth:
            counts.append(len(inputs))
        return run(self, inputs, entry)

    monkeypatch.setattr(TransferClassifier, "prefix", counting)
    return counts


def fit(root: Path, views: str, epochs: int = 4, stages: dict[int, int] | None = None, *more: str) -> list[float]:
    options = {
        "feature_cache.views": views, "trainer.max_epochs": epochs, "unfreezing.stages": json.dumps(stages or {0: 4}),
        "data.source.size": TRAIN + VAL, "run.root": root, "run.name": "run", "run.test_after_fit": False,
    }  # fmt: skip
    words = ["fit", *on_sample("last4", options, *more)]
    if "--model.compile=true" in more:
        run(*words)  # in a process of its own: the compiler keeps state, and warns of its own code
    else:
        main(words)
    return losses(root / "run" / "version_0")


def losses(run_directory: Path) -> list[float]:
    """Give the losses of all epochs: they feel what entered the network and what was learnt before."""
    return [row[name] for row in read_history(run_directory / "history.csv") for name in ("train/loss", "val/loss")]


@pytest.mark.parametrize("precision", ["same", pytest.param("int8", marks=[needs_int8, pytest.mark.slow])])
def test_each_view_passes_the_frozen_layers_once(tmp_path: Path, passed: list[int], precision: str) -> None:
    fit(tmp_path, "2", 4, None, f"--model.frozen_precision={precision}")
    assert sum(passed) == 2 * TRAIN + VAL


@pytest.mark.parametrize(
    ("option", "kept"), [("train", ["val"]), pytest.param("val", ["train"], marks=pytest.mark.slow)]
)
def test_nothing_is_kept_that_is_of_no_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str, kept: list[str]
) -> None:
    """Where epochs end early each has other images; and nothing may validate."""
    stored, store = [], FrozenFeatureCache._store

    def note(self: FrozenFeatureCache, trainer: Any, model: Any, split: str, *more: Any) -> Any:
        stored.append(split)
        return store(self, trainer, model, split, *more)

    monkeypatch.setattr(FrozenFeatureCache, "_store", note)
    options = {
        "feature_cache.views": 1, "trainer.max_epochs": 2, "data.source.size": TRAIN + VAL, "data.batch_size": 16,
        "run.root": tmp_path, f"trainer.limit_{option}_batches": 2 if option == "train" else 0,
    }  # fmt: skip
    main(["fit", *on_sample("last4", options, "--run.test_after_fit=false")])
    assert stored == kept
    said = "limit_train_batches gives every epoch other images, so no training view is kept"
    assert (said in capsys.readouterr().out) == (option == "train")


@pytest.mark.slow
def test_cache_learns_in_time_what_a_device_holds(
    tmp_path: Path, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where features are kept elsewhere, what is known of them is a copy."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor.clone())
    fit(tmp_path, "1", 3)
    assert sum(passed) == TRAIN + VAL


@pytest.mark.slow
def test_without_views_every_epoch_passes_them(tmp_path: Path, passed: list[int]) -> None:
    fit(tmp_path, "null", 2)
    assert sum(passed) == 2 * (TRAIN + VAL)


@pytest.mark.slow
def test_a_new_stage_starts_anew_and_an_open_one_keeps_nothing(
    tmp_path: Path, passed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    views, begin = [], FrozenFeatureCache._begin_stage

    def record(self: FrozenFeatureCache, trainer: Any, model: TransferClassifier) -> None:
        begin(self, trainer, model)
        views.append(trainer.datamodule.views)

    monkeypatch.setattr(FrozenFeatureCache, "_begin_stage", record)
    fit(tmp_path, "1", 5, {0: 0, 2: 4, 4: 18})
    assert sum(passed) == 2 * (TRAIN + VAL)
    assert views == [1, 1, None]  # with nothing to keep, every epoch has a view of its own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        (["--feature_cache.place=memory"], 1e-4),
        (["--feature_cache.place=disk"], 1e-4),
        (["--data.input_size=64"], 1e-4),
        (["--trainer.precision=bf16-mixed"], 2e-2),
        (["--model.compile=true"], 1e-4),
        (["--model.frozen_precision=bf16"], 1e-3),
        (["--model.frozen_precision=bf16", "--trainer.precision=bf16-mixed"], 2e-2),
        pytest.param(["--model.frozen_precision=int8"], 0, marks=needs_int8),
        pytest.param(["--model.frozen_precision=int8", "--model.compile=true"], 1e-4, marks=needs_int8),
    ],
)
def test_cached_training_is_uncached_training(tmp_path: Path, options: list[str], tolerance: float) -> None:
    """Without augmentation all views are alike, so that only the cache differs."""
    same = [*options, "--data.augmentation=null", "--data.batch_size=8"]
    same += ["--model.optimizer=SGD", "--model.optimizer.lr=0.03"]
    cached = fit(tmp_path / "cached", "1", 3, None, *same)
    fresh = fit(tmp_path / "fresh", "null", 3, None, *same)
    assert cached == pytest.approx(fresh, rel=tolerance)
    assert len(fresh) == 6
    assert fresh[-2] < 0.95 * fresh[0]  # something was learnt
    assert not (tmp_path / "cached" / "run" / "version_0" / "features").exists()


@pytest.mark.slow
def test_kept_folder_serves_other_runs(tmp_path: Path, passed: list[int]) -> None:
    """Another head and other rates change nothing below; another seed changes the views, not the validation images."""
    kept = ["--feature_cache.place=disk", f"--feature_cache.folder={tmp_path / 'kept'}"]
    fit(tmp_path / "first", "2", 2, None, *kept)
    assert sum(passed) == 2 * TRAIN + VAL
    passed.clear()
    fit(tmp_path / "second", "2", 2, None, *kept, "--model.hidden=0", "--model.optimizer.lr=1e-3")
    assert passed == []
    same = f"--model.weights={tmp_path / 'first' / 'run' / 'version_0' / 'checkpoints' / 'last.ckpt'}"
    fit(tmp_path / "third", "1", 1, None, *kept, same, "--seed_everything=1")
    assert sum(passed) == TRAIN


def test_what_is_kept_belongs_to_frozen_weights_and_their_precision() -> None:
    """Frozen layers in bfloat16 compute what they compute in bf16-mixed."""
    cache, model = FrozenFeatureCache(1), TransferClassifier(weights=None)
    model.trainable_layers = 4

    def told(precision: str = "32-true", frozen: str = "same") -> Any:
        trainer: Any = SimpleNamespace(precision=precision)
        model.frozen_precision = frozen
        return cache._network(trainer, model), _features(trainer, model)

    plain = told()
    assert told("bf16-mixed") == told("32-true", "bf16") != plain
    with torch.no_grad():
        model.backbone.block5_conv1.bias.add_(1)  # which trains
        assert told() == plain
        model.backbone.block1_conv1.bias.add_(1)
    assert told() != plain
    model.trainable_layers = 3
    assert told()[0]["depth"] == 15


@pytest.mark.slow
@needs_int8
def test_kept_folder_serves_the_same_eight_bits(tmp_path: Path, passed: list[int]) -> None:
    kept = ["--feature_cache.place=disk", f"--feature_cache.folder={tmp_path / 'kept'}"]
    kept += ["--model.frozen_precision=int8"]
    for trial in range(2):
        fit(tmp_path / f"{trial}", "1", 1, None, *kept)
        assert sum(passed) == TRAIN + VAL
    fit(tmp_path / "bright", "1", 1, None, *kept, "--data.source.seed=1")
    assert sum(passed) == 2 * (TRAIN + VAL)


def test_frozen_layers_in_bfloat16_are_those_of_mixed_precision() -> None:
    model, images = TransferClassifier(weights=None), torch.randn(4, 3, 32, 32)
    model.trainable_layers = 4
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.prefix(images)
    model.frozen_precision = "bf16"
    assert torch.equal(model.prefix(images), mixed)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.prefix(images), mixed)


@pytest.mark.slow
def test_views_that_do_not_fit_are_computed_anew(
    tmp_path: Path, passed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    row = 512 * 2 * 2 * 4
    limit = (VAL + TRAIN + 1) * row / 2**30  # the validation images and one view
    limited = fit(tmp_path / "limited", "2", 4, None, f"--feature_cache.limit_gib={limit}")
    assert sum(passed) == 3 * TRAIN + VAL
    assert "1 of 2 train view(s) fit" in capsys.readouterr().out
    assert limited == pytest.approx(fit(tmp_path / "roomy", "2"), rel=1e-4)


def store(folder: Path | None, seed: int = 0) -> FeatureStore:
    """Keep two views of the images 0, 2, 4, 5 and 1 of seven."""
    own, origin = torch.tensor([0, 2, 4, 5, 1]), {"seed": seed}
    return FeatureStore(7, own, 2, (4, 1, 1), torch.float32, entry=14, folder=folder, origin=origin)


@pytest.mark.parametrize("name", [VALUES, FILLED])
@pytest.mark.parametrize("size", [None, 3])
def test_features_of_which_a_copy_lacks_something_are_made_anew(tmp_path: Path, name: str, size: int | None) -> None:
    store(tmp_path).put(torch.tensor([4, 0]), torch.randn(2, 4, 1, 1))
    assert store(tmp_path).get(torch.tensor([4, 0])) is not None
    path = tmp_path / "view-0" / name
    path.unlink() if size is None else os.truncate(path, size)
    assert store(tmp_path).get(torch.tensor([4, 0])) is None


def test_room_is_reserved_where_the_file_system_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """glibc then reads and writes instead, for which it needs a file that is open for both and not for appending."""

    def reserve(file: int, start: int, size: int) -> None:
        assert fcntl.fcntl(file, fcntl.F_GETFL) & (os.O_RDWR | os.O_APPEND) == os.O_RDWR
        os.truncate(file, size)

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    assert store(tmp_path).get(torch.tensor([4, 0])) is None


@pytest.mark.parametrize("on_disk", [False, True])
def test_store_gives_back_what_it_was_given(tmp_path: Path, on_disk: bool) -> None:
    kept = store(tmp_path / "features" if on_disk else None)
    features = torch.randn(3, 4, 1, 1)
    kept.put(torch.tensor([4, 0, 2]), features)
    assert torch.equal(kept.get(torch.tensor([2, 4])), features[[2, 0]])
    assert kept.get(torch.tensor([2, 5])) is None
    assert {values.shape for values in kept.values} == {(5, 4, 1, 1)}  # no room for others'
    with pytest.raises(AssertionError, match="another process"):
        kept.put(torch.tensor([3]), features[:1])
    kept.put(torch.tensor([5, 1]), features[:2])
    assert kept.get(torch.tensor([1, 3])) is None
    kept.view = 1
    assert kept.get(torch.tensor([2])) is None
    kept.view = 2
    kept.put(torch.tensor([1]), features[:1])
    assert kept.get(torch.tensor([1])) is None


def test_what_was_not_written_is_not_there() -> None:
    kept = store(None)
    with pytest.raises(RuntimeError, match="shape"):
        kept.put(torch.tensor([4]), torch.randn(1, 4, 2, 2))
    assert kept.get(torch.tensor([4])) is None


@pytest.mark.parametrize("on_disk", [False, True])
def test_process_without_images_keeps_none(tmp_path: Path, on_disk: bool) -> None:
    none = torch.tensor([], dtype=torch.int64)
    kept = FeatureStore(7, none, 1, (4, 1, 1), torch.float32, entry=14, folder=tmp_path if on_disk else None)
    assert len(kept.get(none)) == 0
    assert kept.get(torch.tensor([3])) is None


@pytest.mark.slow
def test_views_of_an_earlier_stage_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block5 leaves a quarter as many numbers as block4: fewer views fit when block5 thaws."""
    there, begin = [], FrozenFeatureCache._begin_stage

    def record(self: FrozenFeatureCache, *arguments: Any) -> None:
        begin(self, *arguments)
        there.append([path.name for path in sorted(self.directory.glob("train/process-0/*"))])

    monkeypatch.setattr(FrozenFeatureCache, "_begin_stage", record)
    limit = (VAL + 2.5 * TRAIN) * 512 * 2 * 2 * 4 / 2**30
    fit(tmp_path, "3", 9, {0: 0, 4: 4, 8: 18}, "--feature_cache.place=disk", f"--feature_cache.limit_gib={limit}")
    assert there == [["view-0", "view-1", "view-2"], ["view-0", "view-1"], []]


@pytest.mark.parametrize(("views", "said"), [(None, "feature cache: off, for feature_cache.views is null"), (2, "")])
def test_a_place_for_features_without_views_says_that_it_has_none(
    views: int | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer: Any = SimpleNamespace(fast_dev_run=False, log_dir="runs/mine", datamodule=SimpleNamespace())
    FrozenFeatureCache(views, place="disk").setup(trainer, None, "fit")  # type: ignore[arg-type]
    printed = capsys.readouterr().out
    assert printed.startswith(said)
    assert bool(printed) == bool(said)


@pytest.mark.parametrize(
    ("stages", "epochs", "folder", "kept"),
    [
        ({0: 0, 2: 4}, 5, False, {0: 0, 2: 2}),  # two epochs show two views; three show the first one again
        ({0: 0, 2: 4}, 5, True, {0: 2, 2: 2}),  # other runs may want them
        ({0: 4, 1: 4}, 3, False, {0: 2, 1: 2}),  # one stage
        ({0: 4}, -1, False, {0: 2}),
        ({0: 4, 9: 18}, 2, False, {0: 0}),
    ],
)
def test_views_are_kept_if_a_stage_shows_one_again(
    tmp_path: Path, stages: dict[int, int | str], epochs: int, folder: bool, kept: dict[int, int]
) -> None:
    place = {"place": "disk", "folder": str(tmp_path)} if folder else {}
    cache = FrozenFeatureCache(views=2, **place)  # type: ignore[arg-type]
    trainer: Any = SimpleNamespace(callbacks=[StagedUnfreezing(stages)], max_epochs=epochs)
    for epoch, views in kept.items():
        cache.stage = stage_begin(StagedUnfreezing(stages).stages, epoch)
        assert cache._wanted(trainer) == views


@pytest.mark.slow
def test_a_stages_features_are_gone_before_the_next_ones_take_their_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, weakref.ref[FeatureStore]]] = []
    make = FeatureStore.__init__

    def remember(store: FeatureStore, *arguments: Any) -> None:
        entry = arguments[5]
        assert not [old for layers, old in made if layers != entry and old() is not None]
        made.append((entry, weakref.ref(store)))
        make(store, *arguments)

    monkeypatch.setattr(FeatureStore, "__init__", remember)
    fit(tmp_path, "1", 4, {0: 4, 2: 8})
    assert [entry for entry, _ in made] == [14, 14, 10, 10]


@pytest.mark.slow
@pytest.mark.parametrize("now", [["--feature_cache.views=null"], ["--feature_cache.place=memory"]])
def test_features_do_not_stay_where_a_run_goes_on_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, now: list[str]
) -> None:
    stop = [*signal_at(1, 0, "SIGTERM"), "--data.batch_size=8", "--feature_cache.place=disk"]
    with pytest.raises(SystemExit):
        fit(tmp_path, "1", 3, None, *stop)
    features = tmp_path / "run" / "version_0" / "features"
    assert (features / "train" / "process-0" / "view-0").exists()
    last = str(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt")
    there, begin = [], FrozenFeatureCache._begin_stage

    def record(self: FrozenFeatureCache, *arguments: Any) -> None:
        begin(self, *arguments)
        there.append((features / "train" / "process-0" / "view-0").exists())

    monkeypatch.setattr(FrozenFeatureCache, "_begin_stage", record)
    fit(tmp_path, "1", 3, None, "--data.batch_size=8", "--feature_cache.place=disk", f"--ckpt_path={last}", *now)
    assert not any(there)  # at once, for what is in memory instead
    assert not features.exists()


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True])
def test_what_was_kept_before_the_machine_was_started_anew_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passed: list[int], again: bool
) -> None:
    """Marks that features are there may have reached the disk before the features did."""
    words = ["--data.batch_size=8", "--feature_cache.place=disk"]
    with pytest.raises(SystemExit):
        fit(tmp_path, "1", 3, None, *words, *signal_at(1, 0, "SIGTERM"))
    before = sum(passed)
    if again:
        monkeypatch.setattr("src.callbacks.feature_cache._boot", lambda: "another")
    last = str(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt")
    fit(tmp_path, "1", 3, None, *words, f"--ckpt_path={last}")
    assert (sum(passed) > before) == again


def test_only_what_the_cache_has_made_is_removed(tmp_path: Path) -> None:
    """A trainer of one's own may keep a run where features of all runs are."""
    cache = FrozenFeatureCache()
    cache.directory = tmp_path / "features"
    for name in ("train", "val", "train-0123"):
        (cache.directory / name).mkdir(parents=True)
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(datasets={}), local_rank=0)
    cache.on_fit_end(trainer, SimpleNamespace())  # type: ignore[arg-type]
    assert [path.name for path in cache.directory.iterdir()] == ["train-0123"]


def test_features_of_another_user_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(tmp_path)
    opened = Path.open

    def refuse(path: Path, mode: str = "r", **more: Any) -> Any:
        if mode == "r+b":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, mode, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"cannot be kept in .*Permission denied.*feature_cache.folder"):
        store(tmp_path)
    monkeypatch.undo()
    assert store(tmp_path).get(torch.tensor([5])) is None  # they are still there


def test_a_disk_without_room_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    room, reserve = iter(range(3)), os.posix_fallocate

    def full(file: int, start: int, size: int) -> None:
        if next(room, None) is None:  # in the second view
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"cannot be kept in .*No space left on device.*feature_cache.folder"):
        store(tmp_path / "features")
    assert next(room, None) is None
    assert list((tmp_path / "features").iterdir()) == []


def test_room_is_taken_at_once(tmp_path: Path) -> None:
    store(tmp_path)
    values = (tmp_path / "view-0" / "values.bin").stat()
    assert values.st_size == 5 * 4 * 4
    assert values.st_blocks > 0


def test_stores_that_begin_at_once_share_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename, others = Path.rename, []

    def late(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        others.append(store(tmp_path))  # another run is first
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    ours, features = store(tmp_path), torch.randn(1, 4, 1, 1)
    others[0].put(torch.tensor([5]), features)
    assert torch.equal(ours.get(torch.tensor([5])), features)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["view-0", "view-1"]


def test_store_on_disk_outlives_its_process_unless_its_origin_differs(tmp_path: Path) -> None:
    features = torch.randn(1, 4, 1, 1)
    store(tmp_path).put(torch.tensor([5]), features)
    assert torch.equal(store(tmp_path).get(torch.tensor([5])), features)
    assert store(tmp_path, seed=1).get(torch.tensor([5])) is None
    assert store(tmp_path).get(torch.tensor([5])) is None


@pytest.mark.parametrize(
    ("limit", "wanted", "fitting"),
    [
        (100, {"val": 1, "train": 3}, {"val": 1, "train": 3}),
        (99, {"val": 1, "train": 3}, {"val": 1, "train": 2}),
        (39, {"val": 1, "train": 3}, {"val": 1, "train": 0}),
        (9, {"val": 1, "train": 3}, {"val": 0, "train": 0}),
        (35, {"train": 3, "val": 1}, {"train": 1, "val": 0}),
    ],
)
def test_views_that_fit(limit: int, wanted: dict[str, int], fitting: dict[str, int]) -> None:
    assert views_that_fit(limit, wanted, {"val": 10, "train": 30}) == fitting
