"""Recorded steps, without a GPU: what a CUDA graph does is played by the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from support import needs_gpu, on_sample, untimed
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from src import replay
from src.batch import Batch
from src.callbacks.history import Row
from src.cli import main
from src.data.datamodule import ImageDataModule
from src.data.features import FeatureStore
from src.data.sources import Sample
from src.model.classifier import TransferClassifier
from src.model.loss_and_accuracy import LossAndAccuracy
from src.model.muon import Muon, _orthogonal_steps
from src.replay import Replay

R = TypeVar("R")
BLOCK4 = (16, 2, 2)  # what it puts out of an image

pytestmark = pytest.mark.usefixtures("thin")
names: list[str] = []
"""Of the functions that were recorded."""
_models: list[TransferClassifier] = []
"""Those that there were when the latest recording was made: to look for them takes a tenth of a second."""


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the CPU record and repeat as a GPU would, and list what it does."""
    done: list[str] = []
    names.clear()

    def capture(work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        _models[:] = [thing for thing in gc.get_objects() if type(thing) is TransferClassifier]
        with _unchanged():  # a recording computes nothing
            result = work()
        done.append("recorded")
        models = list(_models)
        places = _places(models)

        def again() -> None:
            done.append("repeated")
            assert _places(models) == places, "a recording knows where in memory things were"
            with _unseen():
                found = work()
            for kept, new in zip(tree_leaves(result), tree_leaves(found), strict=True):
                if isinstance(kept, Tensor) and not isinstance(kept, nn.Parameter):
                    kept.copy_(new)

        return again, result

    keep = FeatureStore.put

    def put(store: FeatureStore, indices: Tensor, features: Tensor) -> None:
        assert not _unseen.now, "a recording keeps no features"
        keep(store, indices, features)

    class Named(replay._Recording):
        def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
            super().__init__(function, arguments)
            names.append(function.__name__)

    monkeypatch.setattr(replay, "_Recording", Named)
    monkeypatch.setattr(replay, "capture", capture)
    monkeypatch.setattr(FeatureStore, "put", put)
    monkeypatch.setattr(ImageDataModule, "_replays", lambda data, batch: data.cuda_graphs)
    monkeypatch.setattr("src.machine.check_graphs", lambda device: None)
    return done


class _unseen:
    """Take back what Python notices of an update: a repetition changes tensors alone."""

    now = False

    def __enter__(self) -> None:
        self.metrics = [metric for model in _models for metric in _metrics(model)]
        self.updates = [metric._update_count for metric in self.metrics]
        _unseen.now = True

    def __exit__(self, *_: object) -> None:
        _unseen.now = False
        for metric, updates in zip(self.metrics, self.updates, strict=True):
            metric._update_count = updates


class _unchanged(_unseen):
    """Take back what is done to networks, their metrics and random numbers, too."""

    def __enter__(self) -> None:
        super().__enter__()
        self.tensors = [tensor for model in _models for tensor in _state(model)]
        self.before, self.random = [tensor.clone() for tensor in self.tensors], torch.get_rng_state()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        torch.set_rng_state(self.random)
        with torch.no_grad():
            for tensor, before in zip(self.tensors, self.before, strict=True):
                tensor.copy_(before)


def _state(model: TransferClassifier) -> list[Tensor]:
    states: list[Any] = [value for metric in _metrics(model) for value in metric.metric_state.values()]
    return [*model.buffers(), *states]


def _places(models: list[TransferClassifier]) -> list[int]:
    return [tensor.data_ptr() for model in models for tensor in (*model.parameters(), *_state(model))]


def _metrics(model: TransferClassifier) -> list[Any]:
    return [model.train_metrics, *(each["loss_and_accuracy"] for each in (model.val_metrics, model.test_metrics))]


@pytest.fixture
def model() -> TransferClassifier:
    made = TransferClassifier(weights=None, cuda_graphs=True)
    made.trainable_layers = 0  # whose steps take least
    return made


def trainer(**settings: Any) -> Any:
    usual = {"strategy": None, "accumulate_grad_batches": 1, "precision": "bf16-mixed", "_detect_anomaly": False}
    return SimpleNamespace(**usual | settings)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"strategy": DDPStrategy()}, "strategy ddp shares gradients between processes"),
        ({"accumulate_grad_batches": 2}, "gradients of several batches are added up"),
        ({"precision": "16-mixed"}, "16-mixed scales the loss"),
        ({"_detect_anomaly": True}, "trainer.detect_anomaly looks at every gradient"),
    ],
)
def test_what_keeps_steps_from_being_recorded_is_told(
    model: TransferClassifier, settings: dict[str, Any], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model._trainer = trainer(**settings)
    model.on_fit_start()
    assert capsys.readouterr().out == f"model.cuda_graphs: steps are not recorded, for {told}\n"
    assert not model.replays
    model._trainer = trainer()
    model.on_fit_start()
    assert model.replays
    assert not capsys.readouterr().out
    model.on_fit_end()
    assert not model.replays


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda model: model.to(torch.float32), marks=pytest.mark.slow),
        lambda model: setattr(model, "trainable_layers", 4),
        pytest.param("on_fit_end", marks=pytest.mark.slow),
    ],
    ids=["moved", "thawed", "ended"],
)
def test_networks_that_change_are_recorded_anew(
    model: TransferClassifier, recorded: list[str], change: Callable[[TransferClassifier], object] | str
) -> None:
    model.replays = True
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1]))
    for _ in range(3):
        model.training_step(batch)
        model.validation_step(batch)
    assert recorded.count("recorded") == 2
    getattr(model, change)() if isinstance(change, str) else change(model)
    model.replays = True
    for _ in range(3):
        model.training_step(batch)
        model.validation_step(batch)
    assert recorded.count("recorded") == 4


def test_a_cache_gets_what_it_wants_to_keep(model: TransferClassifier, recorded: list[str]) -> None:
    model.trainable_layers = 4
    kept: list[str] = []
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1]))
    expected = model.prefix(batch.inputs)

    def keep(split: str, indices: Tensor, features: Tensor) -> None:
        assert torch.equal(indices, batch.indices)
        torch.testing.assert_close(features, expected)
        kept.append(split)

    model.keep_features = {split: partial(keep, split) for split in ("train", "val")}
    model.replays = True
    for _ in range(4):
        model.training_step(batch)
        model.validation_step(batch)
    assert kept == ["train", "val"] * 4
    assert names == ["prefix", "_forward_and_backward", "_evaluated"]  # the frozen layers serve both
    features = batch._replace(inputs=torch.rand(2, *BLOCK4), entry=model.depth)
    model.training_step(features)
    assert len(names) == 3
    assert kept == ["train", "val"] * 4
    del model.keep_features["train"]  # this view does not fit
    for _ in range(3):
        model.training_step(batch)
    assert names[3:] == ["_forward_and_backward"]
    model.trainable_layers = 8  # another stage, whose frozen layers are others
    expected = model.prefix(batch.inputs)
    model.keep_features["train"] = partial(keep, "train")
    for _ in range(4):
        model.training_step(batch)
    assert names[4:] == ["prefix", "_forward_and_backward"]


def test_metrics_know_of_repeated_updates(model: TransferClassifier, recorded: list[str]) -> None:
    model.replays = True
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1]))
    for _ in range(3):
        for metric in _metrics(model):
            metric.reset()
        for step in (model.training_step, model.validation_step, model.test_step):
            step(batch)
    for metric in _metrics(model):
        assert metric.compute()["loss"] > 0  # else torchmetrics warns, which is an error here


def test_training_batches_are_the_callers_to_keep_and_follow_settings(recorded: list[str]) -> None:
    data = ImageDataModule(Sample(size=50), standardize="dataset", cuda_graphs=True, on_device=True)
    data.setup("fit")
    data.trainer = SimpleNamespace(training=True, current_epoch=0)  # type: ignore[assignment]
    train = data.datasets["train"]
    batches = [data.on_after_batch_transfer(train[range(first, first + 4)], 0) for first in range(0, 20, 4)]
    assert recorded.count("repeated") == 3
    for number, batch in enumerate(batches):
        chosen = train.chosen[4 * number :][:4]
        assert torch.equal(batch.indices, chosen)
        assert torch.equal(batch.labels, train.labels[chosen])
    data.augmentation = None  # by a callback, say
    for _ in range(3):
        changed = data.on_after_batch_transfer(train[range(4)], 0)
        assert torch.equal(changed.inputs, data.standardized(train[range(4)].inputs))
    assert recorded.count("recorded") == 2


@pytest.mark.parametrize("cutmix", [0.0, 0.5])
def test_only_changes_are_recorded(recorded: list[str], cutmix: float) -> None:
    """Features from a cache have had theirs; an empty recording would be warned of."""
    data = ImageDataModule(Sample(size=50), standardize="dataset", cuda_graphs=True, on_device=True, cutmix=cutmix)
    data.setup("fit")
    data.trainer = SimpleNamespace(training=True, current_epoch=0)  # type: ignore[assignment]
    features = data.datasets["train"][range(4)]._replace(inputs=torch.rand(4, *BLOCK4), entry=14)
    for _ in range(4):
        assert torch.equal(data.on_after_batch_transfer(features, 0).inputs, features.inputs)
    assert recorded.count("recorded") == (1 if cutmix else 0)


def test_steps_follow_label_smoothing(model: TransferClassifier, recorded: list[str]) -> None:
    model.replays = True
    batch = Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1]))
    for smoothing in (0.0, 0.5):
        model.label_smoothing = smoothing
        for _ in range(3):
            model.training_step(batch)
    assert recorded.count("recorded") == 2


@pytest.mark.parametrize("asked", [False, True])
def test_muon_records_if_steps_are_recorded(asked: bool) -> None:
    made = TransferClassifier(weights=None, cuda_graphs=asked, optimizer=lambda groups: Muon(groups))
    optimizer = made.configure_optimizers()
    assert isinstance(optimizer, Muon)
    assert optimizer.cuda_graphs == asked


def test_muon_forgets_the_steps_of_a_stage_that_is_over() -> None:
    weights = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    muon = Muon([{"params": [weight]} for weight in weights])
    settings = []
    for trained in (1, 2):
        for weight in weights[:trained]:
            weight.grad = torch.randn(4, 6)
        muon.step()
        settings.append(muon._steps_replay._settings())
    assert settings[0] != settings[1]


def test_what_is_recorded_in_a_validation_can_be_written_to(recorded: list[str]) -> None:
    modes: list[tuple[bool, bool]] = []

    def work(values: Tensor) -> Tensor:
        modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
        return values * 2

    again = Replay(work)
    with torch.inference_mode():
        for _ in range(3):
            again(torch.ones(2))
    assert modes[:3] == [(True, False), (True, False), (False, False)]
    (recording,) = again._recordings.values()
    recording._result.add_(1)
    recording._copied[0][1][0].add_(1)


def test_only_the_current_settings_recordings_are_kept(recorded: list[str]) -> None:
    settings = [0]
    double = Replay(lambda values: values * 2, lambda: settings[0])
    for settings[0] in (0, 1, 0):
        for _ in range(3):
            double(torch.ones(2))
        assert len(double._recordings) == 1
    assert recorded.count("recorded") == 3


def test_a_full_memory_is_told_though_a_recording_could_not_be_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recording:
        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            raise RuntimeError("capture is unjoined")

    def full() -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(replay, "streams", lambda device: SimpleNamespace(recording=None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *arguments, **options: Recording())
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        replay.capture(full)
    with pytest.raises(RuntimeError, match="unjoined"):
        replay.capture(lambda: None)

    def wrong() -> None:
        raise RuntimeError("not while recording")

    with pytest.raises(RuntimeError, match="unjoined") as error:
        replay.capture(wrong)
    assert not error.value.__suppress_context__  # which says what went wrong


@pytest.mark.parametrize("lacks", [None, "cuda_graphs", "on_device", "gpu"])
def test_changes_of_images_are_recorded_where_a_gpu_holds_them(lacks: str | None) -> None:
    """Images on the CPU come into a batch from there, which a recording would not repeat."""
    settings = {name: name != lacks for name in ("cuda_graphs", "on_device")}
    data = ImageDataModule(Sample(size=50), standardize="dataset", **settings)
    batch: Any = SimpleNamespace(labels=SimpleNamespace(is_cuda=lacks != "gpu"))
    assert data._replays(batch) == (lacks is None)


def test_evaluations_are_the_callers_to_keep(model: TransferClassifier, recorded: list[str]) -> None:
    model.replays = True
    model.eval()
    batches = [Batch(torch.randn(2, 3, 32, 32), torch.tensor([n, 1]), torch.tensor([0, 1])) for n in range(5)]
    found = [model.validation_step(batch)["plain"] for batch in batches]
    assert recorded.count("repeated") == 3
    model.replays = False
    for batch, probabilities in zip(batches, found, strict=True):
        torch.testing.assert_close(probabilities, model.validation_step(batch)["plain"])
    assert [guesses[1].tolist() for guesses in model._guesses] == [[n, 1] for n in range(5)] * 2


def test_evaluations_that_are_compiled_are_not_recorded(model: TransferClassifier, recorded: list[str]) -> None:
    """Inference mode is part of what they were compiled for, and a recording is made without it."""
    model.replays = model.compiled = True
    model.eval()
    for _ in range(4):
        model.validation_step(Batch(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]), torch.tensor([0, 1])))
    assert not recorded


def test_what_is_recorded_stays_where_it_is() -> None:
    """A recording writes to memory, whatever Python calls it by then."""
    metric = LossAndAccuracy()
    metric.update(torch.eye(3), torch.arange(3), torch.tensor(1.0))
    places = [value.data_ptr() for value in metric.metric_state.values()]
    metric.reset()
    assert [value.data_ptr() for value in metric.metric_state.values()] == places
    assert [value.item() for value in metric.metric_state.values()] == [0, 0, 0]
    metric.seen += 2
    metric.note_update()
    assert metric.compute()["acc"] == 0

    data = ImageDataModule(Sample(size=50), standardize="dataset")
    data.setup("fit")
    images = data.datasets["train"].pixels[:2]
    first, place = data.standardized(images), data._statistics_on(torch.device("cpu")).data_ptr()
    data.statistics = torch.tensor([[0.0] * 3, [2.0] * 3])
    assert torch.equal(data.standardized(images), images / 2)
    assert data._statistics_on(torch.device("cpu")).data_ptr() == place
    with torch.inference_mode():  # of a validation
        data._statistics_there.clear()
        data.standardized(images)
    data.statistics = torch.tensor([[0.0] * 3, [4.0] * 3])
    assert torch.equal(data.standardized(images), images / 4)
    place = data._statistics_on(torch.device("cpu")).data_ptr()
    assert not torch.equal(first, images / 2)
    data._statistics_on(torch.device("meta"))
    assert data._statistics_on(torch.device("cpu")).data_ptr() == place


@needs_gpu
def test_a_gpu_repeats_what_it_did() -> None:
    total = torch.zeros((), device="cuda")
    add = Replay(lambda values: (total.add_(values.sum()), values * 2)[1])
    for number in range(6):
        assert add(torch.full((3,), float(number), device="cuda")).tolist() == [2 * number] * 3
    assert total.item() == 3 * sum(range(6))


@needs_gpu
def test_a_gpu_makes_the_same_steps_side_by_side() -> None:
    updates = [torch.randn(64, columns, device="cuda") for columns in (64, 128, 576)]
    orthogonal_steps = Replay(_orthogonal_steps)
    for _ in range(4):
        found = [step.clone() for step in orthogonal_steps(3, *updates)]
    for step, expected in zip(found, _orthogonal_steps(3, *updates), strict=True):
        assert torch.equal(step, expected)


def test_calls_are_repeated_with_new_content(recorded: list[str]) -> None:
    double = Replay(lambda values, times: values * times)
    found = [double(torch.full((2,), float(number)), 2).clone() for number in range(5)]
    assert [each.tolist() for each in found] == [[0, 0], [2, 2], [4, 4], [6, 6], [8, 8]]
    assert recorded == ["recorded", "repeated", "repeated", "repeated"]
    assert double(torch.ones(2), 3).tolist() == [3, 3]  # another argument is another recording
    assert double(torch.ones(3), 2).tolist() == [2, 2, 2]
    assert recorded.count("recorded") == 1


def test_other_settings_are_another_recording(recorded: list[str]) -> None:
    factors = [2]
    times = Replay(lambda values: values * factors[0], lambda: factors[0])
    for factor in (2, 2, 2, 3, 3, 3, 2):
        factors[0] = factor
        assert times(torch.ones(2)).tolist() == [factor, factor]
    assert recorded.count("recorded") == 2


def test_arguments_are_left_alone(recorded: list[str]) -> None:
    first = torch.ones(2)
    plain = Replay(lambda values: values + 1)
    for content in (first, first, first, torch.zeros(2)):
        plain(content)
    assert first.tolist() == [1, 1]


def test_forgotten_recordings_are_made_anew(recorded: list[str]) -> None:
    plain = Replay(lambda values: values + 1)
    for _ in range(3):
        plain(torch.ones(2))
    plain.forget()
    for _ in range(3):
        plain(torch.ones(2))
    assert recorded.count("recorded") == 2


def train(root: Path, name: str, options: dict[str, Any]) -> list[Row]:
    """Train four epochs of five batches, the last of which is smaller, and give their metrics."""
    options = {
        "data.source.size": 50, "data.batch_size": 8, "trainer.max_epochs": 4, "run.root": root, "run.name": name,
        "run.test_after_fit": False, "feature_cache.views": "null", **options,
    }  # fmt: skip
    main(["fit", *on_sample("last4", options)])
    return untimed(root / name / "version_0")


@pytest.mark.parametrize(
    "options",
    [
        {"unfreezing.stages": "{0: 0, 3: 4}", "data.cutmix": 0.5, "model.dropout": 0.5},
        pytest.param(
            {"unfreezing.stages": "{0: 4, 1: 8}", "model.optimizer": "SGD", "trainer.gradient_clip_val": 0.5},
            marks=pytest.mark.slow,
        ),
        pytest.param({"feature_cache.views": 1}, marks=pytest.mark.slow),
        pytest.param(
            {"trainer.callbacks+": "src.callbacks.distillation.Distillation", "trainer.callbacks.teacher": "teacher"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mixed", "clipped", "cached", "taught"],
)
def test_recorded_steps_are_steps(
    tmp_path: Path, recorded: list[str], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if "trainer.callbacks.teacher" in options:
        train(Path(), "teacher", {"unfreezing.stages": "{0: 0}", "data.input_size": 48})
    ordinary = train(tmp_path, "ordinary", options)
    assert not recorded
    assert train(tmp_path, "recorded", {**options, "model.cuda_graphs": True}) == ordinary
    assert {"_forward_and_backward", "_evaluated", "_augmented_and_standardized"} <= set(names)
