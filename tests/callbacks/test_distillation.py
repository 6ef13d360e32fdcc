"""Learning from a teacher: what it is shown, what its word counts, and what it may not be."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from support import needs_int8, on_sample
from torch import Tensor

from src.callbacks.distillation import Distillation, divergence
from src.callbacks.history import read_history
from src.cli import main
from src.data.datamodule import ImageDataModule
from src.data.sources import Sample
from src.errors import UserError
from src.export import inference_model
from src.model.classifier import TransferClassifier
from src.saved_training import SavedTraining

ENLARGED = 48

pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a linear head on enlarged images until its answers differ."""
    root = tmp_path_factory.mktemp("teacher")
    options = {
        "data.source.size": 50, "data.input_size": ENLARGED, "model.hidden": 0, "trainer.max_epochs": 1,
        "data.batch_size": 10, "run.root": root, "run.test_after_fit": False, "model.optimizer.lr": 1e-2,
    }  # fmt: skip
    main(["fit", *on_sample("head", options)])
    return root / "head" / "version_0" / "checkpoints" / "last.ckpt"


def learning(teacher: Path) -> list[str]:
    callback = "--trainer.callbacks+=src.callbacks.distillation.Distillation"
    return [callback, f"--trainer.callbacks.teacher={teacher}", "--feature_cache.views=null"]


@pytest.fixture
def data() -> ImageDataModule:
    """Have the images standardized otherwise than the teacher's were."""
    data = ImageDataModule(Sample(50), standardize="dataset", split_seed=1, val_fraction=0.5)
    data.prepare_data()
    data.setup("fit")
    return data


def begin(distillation: Distillation, data: ImageDataModule, **options: Any) -> TransferClassifier:
    """Let a network of random weights begin to learn."""
    model = TransferClassifier(weights=None, **options)
    distillation.load(model, data)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), datamodule=data)
    distillation.on_fit_start(trainer, model)
    return model


def asked(model: TransferClassifier, data: ImageDataModule, logits: Tensor) -> Tensor:
    """Give the loss of logits on the first training images."""
    assert model.loss_on_images is not None
    return model.loss_on_images(logits, data.standardized(data.datasets["train"].pixels[: len(logits)]))


def test_the_teacher_sees_the_images_as_it_was_trained_on_them(teacher: Path, data: ImageDataModule) -> None:
    saved = SavedTraining.read(teacher)
    assert not torch.allclose(data.statistics, torch.tensor([saved.data["mean"], saved.data["std"]]), atol=0.1)
    bytes_of = data.datasets["train"].pixels[:8].permute(0, 2, 3, 1)
    answers = inference_model(saved)(bytes_of).log().detach()
    distillation = Distillation(str(teacher), temperature=1)
    model = begin(distillation, data)
    assert distillation.teacher is not None
    assert not distillation.teacher.training  # else it would drop activations
    assert asked(model, data, answers) == pytest.approx(0, abs=1e-6)
    assert asked(model, data, answers.roll(1, dims=0)) > 1e-3  # or any answers would do


def test_divergence() -> None:
    logits, taught = torch.tensor([[0.0, 2.0], [1.0, 1.0]]), torch.tensor([[2.0, 0.0], [3.0, 1.0]])
    ours, theirs = (each.div(2).softmax(dim=1) for each in (logits, taught))
    wanted = (theirs * (theirs / ours).log()).sum() / 2 * 4
    assert divergence(logits, taught, temperature=2) == pytest.approx(wanted.item())
    assert divergence(taught + 5, taught, temperature=2) == pytest.approx(0, abs=1e-6)


def test_gradients_keep_their_size_at_any_temperature() -> None:
    """High ones draw each logit towards the teacher's, as Hinton and others derive."""
    generator = torch.Generator().manual_seed(0)
    logits, taught = (torch.randn(6, 10, generator=generator) for _ in range(2))
    logits, taught = (each - each.mean(dim=1, keepdim=True) for each in (logits, taught))
    logits.requires_grad_()
    divergence(logits, taught, temperature=1000).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (logits - taught).detach() / 10 / 6, atol=1e-4, rtol=1e-2)


def test_who_knows_what_the_teacher_knows_has_nothing_to_learn(teacher: Path, tmp_path: Path) -> None:
    """Of labels it would have: the teacher is far from right."""
    options = {
        "data.source.size": 50, "data.input_size": ENLARGED, "model.hidden": 0, "trainer.max_epochs": 1,
        "data.cutmix": 0.5, "run.root": tmp_path, "run.name": "run", "run.warm_start": teacher,
        "model.optimizer": "SGD", "model.optimizer.lr": 0.1,
    }  # fmt: skip
    main(["fit", *on_sample("head", options, *learning(teacher))])
    run = tmp_path / "run" / "version_0"
    (row,) = read_history(run / "history.csv")
    assert row["train/loss"] == pytest.approx(0, abs=1e-6)
    assert row["val/loss"] > 0.5
    weights = [torch.load(path, weights_only=True)["state_dict"] for path in (teacher, run / "checkpoints/last.ckpt")]
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)


def test_who_has_learnt_needs_no_teacher(teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lent = tmp_path / "lent"
    shutil.copytree(teacher.parents[1], lent)
    options = {"data.source.size": 50, "trainer.max_epochs": 1, "run.root": tmp_path, "run.test_after_fit": False}
    main(["fit", *on_sample("head", options, *learning(lent))])
    assert f"learns from '{lent / 'checkpoints' / 'best.ckpt'}', and from no labels" in capsys.readouterr().out
    shutil.rmtree(lent)
    run = tmp_path / "head" / "version_0"
    main(["test", f"--config={run / 'config.yaml'}", f"--ckpt_path={run / 'checkpoints' / 'best.ckpt'}"])
    assert (run / "test_report.json").is_file()
    (callback,) = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["callbacks"]
    assert callback["init_args"]["teacher"] == str(lent / "checkpoints" / "best.ckpt")  # not another one's another time
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *on_sample("head", {**options, "trainer.max_epochs": 2}, "--ckpt_path=last")])
    assert "learns from a teacher, and no callback Distillation goes on with it" in capsys.readouterr().err


@needs_int8
def test_the_teacher_computes_as_frozen_layers_do(teacher: Path, data: ImageDataModule) -> None:
    distillation = Distillation(str(teacher), temperature=1)
    model = begin(distillation, data, frozen_precision="int8")
    assert distillation.teacher is not None
    assert distillation.teacher.ranges is not None
    answers = inference_model(SavedTraining.read(teacher))(data.datasets["train"].pixels[:8].permute(0, 2, 3, 1)).log()
    rounded, others = asked(model, data, answers), asked(model, data, answers.roll(1, dims=0))
    assert rounded < others / 10
    assert distillation.teacher._int8 is not None  # what it put out was that of eight bits


def test_what_is_trained_afterwards_has_labels_again(teacher: Path, data: ImageDataModule) -> None:
    distillation = Distillation(str(teacher))
    model = begin(distillation, data)
    distillation.on_fit_end(None, model)  # type: ignore[arg-type]
    assert model.loss_on_images is None


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf, 1e200])
def test_temperature_that_is_none(temperature: float) -> None:
    with pytest.raises(UserError, match="Distillation's temperature is"):
        Distillation("teacher.ckpt", temperature)


@pytest.fixture
def other(teacher: Path, tmp_path: Path) -> Callable[..., Distillation]:
    """Make a teacher whose checkpoint says otherwise of its data; None for nothing."""

    def make(**data: Any) -> Distillation:
        content = torch.load(teacher, weights_only=True)
        said = content["ImageDataModule"] | data
        content["ImageDataModule"] = {name: value for name, value in said.items() if value is not None}
        torch.save(content, tmp_path / "other.ckpt")
        return Distillation(str(tmp_path / "other.ckpt"))

    return make


def test_teacher_of_other_classes(other: Callable[..., Distillation], data: ImageDataModule) -> None:
    with pytest.raises(UserError, match="tells other classes apart, or in another order: "):
        begin(other(classes=list(reversed(data.classes))), data)


def test_teacher_of_larger_images(other: Callable[..., Distillation], data: ImageDataModule) -> None:
    with pytest.raises(UserError, match=f"was trained on images of {ENLARGED} pixels, and these have 32"):
        begin(other(image_size=ENLARGED), data)


def test_teacher_of_an_earlier_version(other: Callable[..., Distillation], data: ImageDataModule) -> None:
    """It does not say how large its images were before they were enlarged."""
    assert begin(other(image_size=None), data).loss_on_images is not None


@pytest.mark.parametrize(("enlarged", "fits"), [(ENLARGED, True), (64, False)])
def test_images_are_enlarged_once(teacher: Path, data: ImageDataModule, enlarged: int, fits: bool) -> None:
    data.input_size = enlarged
    distillation = Distillation(str(teacher))
    with nullcontext() if fits else pytest.raises(UserError, match=f"give --data.input_size null or {ENLARGED}"):
        distillation.load(TransferClassifier(weights=None, image_size=enlarged), data)


def test_a_training_goes_on_with_the_same_teacher(
    other: Callable[..., Distillation], teacher: Path, data: ImageDataModule
) -> None:
    distillation = Distillation(str(teacher.parents[1]))  # its run, whose best checkpoint is of the same epoch
    model = TransferClassifier(weights=None)
    distillation.load(model, data)
    begun = {"callbacks": {distillation.state_key: distillation.state_dict()}}
    distillation.load(model, data, SavedTraining(Path("last.ckpt"), begun))
    with pytest.raises(UserError, match=r"^'last.ckpt' learnt from '.*best.ckpt' as it was then, and '.*other.ckpt'"):
        other(mean=[0.0, 0.0, 0.0]).load(model, data, SavedTraining(Path("last.ckpt"), begun))
    distillation.load(model, data, SavedTraining(Path("last.ckpt"), {"callbacks": {}}))  # it learnt from labels


def test_a_teacher_that_knows_what_validates_is_named(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "data.source.size": 50, "trainer.max_epochs": 1, "trainer.limit_train_batches": 1, "run.root": tmp_path,
        "run.test_after_fit": False,
    }  # fmt: skip
    for seed in (777, 1):
        main(["fit", *on_sample("head", {**options, "data.split_seed": seed}, *learning(teacher))])
        said = f"'{teacher}' was trained and validated on other images" in capsys.readouterr().out
        assert said == (seed == 1)
