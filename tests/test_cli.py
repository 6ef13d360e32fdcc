"""One small training through the real entry point, and what its run directory holds afterwards."""

from __future__ import annotations

import csv
import errno
import inspect
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from filelock import FileLock
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from support import REPOSITORY, documented_code, on_sample, signal_at, untimed
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from src.callbacks.feature_cache import FrozenFeatureCache
from src.callbacks.history import read_history
from src.callbacks.predictions import PredictionWriter
from src.callbacks.summary import Summary
from src.callbacks.unfreezing import StagedUnfreezing
from src.cli import ThawCLI, ThawParser, main
from src.data.datamodule import ImageDataModule
from src.data.sources import Sample
from src.lean_loop import Unprofiled
from src.model.classifier import TransferClassifier
from src.preflight import METRICS
from src.run_directory import RunOptions

TRAIN, VAL, TEST, BATCH = 35, 15, 10, 12
STEPS = math.ceil(TRAIN / BATCH)
CLASSES = ["arrow", "circle", "crescent", "cross", "heart", "hourglass", "ring", "square", "star", "triangle"]
HEAD_PARAMETERS = 32 * 256 + 256 + 2 * 256 + 256 * 10 + 10  # hidden layer, norm, linear layer

pytestmark = pytest.mark.usefixtures("thin")


class Run(NamedTuple):
    directory: Path
    printed: str

    @property
    def root(self) -> Path:
        return self.directory.parent.parent

    @property
    def history(self) -> list[dict[str, float]]:
        with (self.directory / "history.csv").open(newline="") as file:
            return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]

    @property
    def config(self) -> dict[str, Any]:
        return yaml.safe_load((self.directory / "config.yaml").read_text())

    def checkpoint(self, name: str) -> dict[str, Any]:
        return torch.load(self.directory / "checkpoints" / name, weights_only=True, map_location="cpu")


def execute(*words: str) -> str:
    """Run a command as if from the command line, and return what it prints."""
    printed = StringIO()
    with redirect_stdout(printed):
        main(words)
    return printed.getvalue()


def sample(*words: str) -> list[str]:
    """Give the words for 50 images: 35 to train and 15 to validate; and 10 to test."""
    options = {
        "data.source.init_args.size": 50, "data.batch_size": BATCH, "model.optimizer.init_args.lr": 1e-3,
        "seed_everything": 1, "trainer.log_every_n_steps": 2,
    }  # fmt: skip
    return on_sample("head", options, *words)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Work in an empty folder, as a user does, with the default run root."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        yield home


@pytest.fixture(scope="module")
def run(home: Path) -> Run:
    printed = execute("fit", *sample("--trainer.max_epochs", "2"))
    return Run(home / "runs" / "head" / "version_0", printed)


@pytest.fixture(scope="module")
def second(run: Run) -> Run:
    """Repeat the run with nothing but its own config.yaml, for one epoch and without a test."""
    config = str(run.directory / "config.yaml")
    printed = execute("fit", "--config", config, "--trainer.max_epochs", "1", "--run.test_after_fit", "false")
    return Run(run.directory.parent / "version_1", printed)


@pytest.fixture
def borrowed(second: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Copy the second run for a test that changes it, and go there. TensorBoard may still write to the original."""
    copy = Run(tmp_path / "runs" / "head" / "version_1", second.printed)
    shutil.copytree(second.directory, copy.directory)
    (copy.directory.parent / "version_0").mkdir()
    monkeypatch.chdir(tmp_path)
    return copy


@pytest.fixture(scope="module")
def events(run: Run) -> EventAccumulator:
    return EventAccumulator(str(run.directory)).Reload()


def test_run_directory_holds_everything_in_one_place(run: Run) -> None:
    assert [path.name for path in run.directory.parent.iterdir()] == ["version_0"]
    names = {path.name for path in run.directory.iterdir() if not path.name.startswith("events.out.tfevents")}
    assert names == {
        "checkpoints", "config.yaml", "confusion_matrix.png", "first_batch.png", "history.csv", "history.png",
        "mistakes.png", "predictions.csv", "predictions.png", "test_report.json",
    }  # fmt: skip
    assert {path.name for path in (run.directory / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def test_what_is_printed(run: Run) -> None:
    assert re.search(
        r"^10 classes: 35 training images \(\d of \w+ to \d of \w+\), 15 to validate, 10 to test$", run.printed, re.M
    )
    assert "block5_conv3" in run.printed
    assert re.search(rf"^0 to 1 +0  head +{HEAD_PARAMETERS:,}  0\.001$", run.printed, re.MULTILINE)
    assert len(re.findall(r"^epoch +\d+ .*train loss .*val acc", run.printed, re.MULTILINE)) == 2
    report = json.loads((run.directory / "test_report.json").read_text())
    assert f"test/acc {report['accuracy']:.4f}" in run.printed
    assert "everything of this run is in runs/head/version_0" in run.printed


def test_config_is_resolved(run: Run) -> None:
    config = run.config
    assert {int(epoch): layers for epoch, layers in config["unfreezing"]["stages"].items()} == {0: 0}
    assert config["trainer"]["max_epochs"] == 2
    assert config["data"]["batch_size"] == BATCH
    assert config["data"]["source"] == {"class_path": "src.data.sources.Sample", "init_args": {"size": 50, "seed": 777}}
    # Defaults of the signatures too, so that the file says everything.
    assert config["model"]["hidden"] == 256
    assert config["data"]["val_fraction"] == 0.3
    assert config["unfreezing"]["decay"] == "constant"
    assert config["seed_everything"] == 1


@pytest.mark.parametrize(("words", "commands"), [(["fit", "--run.name", "test", "--print_config"], 1), (["--help"], 4)])
def test_only_the_command_that_is_named_gathers_its_options(
    monkeypatch: pytest.MonkeyPatch, words: list[str], commands: int
) -> None:
    parsers: list[object] = []
    gather = ThawCLI.add_arguments_to_parser
    monkeypatch.setattr(ThawCLI, "add_arguments_to_parser", lambda cli, to: (parsers.append(to), gather(cli, to)))
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code in (None, 0)
    assert len(parsers) == commands


def test_config_repeats_the_run_in_a_new_version(run: Run, second: Run) -> None:
    assert {path.name for path in run.directory.parent.iterdir()} == {"version_0", "version_1"}
    expected = run.config
    expected["trainer"]["max_epochs"] = 1
    expected["run"]["test_after_fit"] = False
    assert second.config == expected
    for name in ("train/loss", "val/loss", "val/acc"):
        assert second.history[0][name] == run.history[0][name]


def test_checkpoints(run: Run) -> None:
    best, last = run.checkpoint("best.ckpt"), run.checkpoint("last.ckpt")
    assert last["epoch"] == 1
    assert last["global_step"] == 2 * STEPS
    scores = [row["val/acc"] for row in run.history]
    assert best["epoch"] == scores.index(max(scores))
    for checkpoint in (best, last):
        assert checkpoint["state_dict"].keys() == TransferClassifier().state_dict().keys()
        assert checkpoint["ImageDataModule"]["classes"] == CLASSES
        assert len(checkpoint["ImageDataModule"]["mean"]) == len(checkpoint["ImageDataModule"]["std"]) == 3


def test_history(run: Run) -> None:
    rows = run.history
    assert [row["epoch"] for row in rows] == [0, 1]
    measured = {f"{split}/{name}" for split in ("train", "val") for name in ("loss", "acc")}
    assert {
        "epoch",
        "val/f1",
        "lr/head",
        "lr/block1_conv1",
        "trainable_parameters",
        "images_per_second",
    } | measured <= (rows[0].keys())
    assert {name for name in rows[0] if name.startswith(("train/", "val/"))} == set(METRICS)
    for row in rows:
        assert row["lr/head"] == pytest.approx(1e-3)
        assert row["lr/block5_conv3"] == 0
        assert row["trainable_parameters"] == HEAD_PARAMETERS
        assert row["images_per_second"] > 0
        assert row["train/loss"] > 0
        assert row["train/acc"] * TRAIN == pytest.approx(round(row["train/acc"] * TRAIN), abs=1e-4)
        assert row["val/acc"] * VAL == pytest.approx(round(row["val/acc"] * VAL), abs=1e-4)


@pytest.mark.parametrize("name", ["confusion_matrix", "first_batch", "history", "predictions"])
def test_pictures(run: Run, name: str) -> None:
    with Image.open(run.directory / f"{name}.png") as image:
        assert image.format == "PNG"
        image.load()
        assert min(image.size) >= 300
        assert any(low != high for low, high in image.convert("RGB").getextrema())


def read_predictions(directory: Path, name: str = "predictions.csv") -> list[dict[str, str]]:
    with (directory / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_report_agrees_with_predictions(run: Run) -> None:
    rows = read_predictions(run.directory)
    report = json.loads((run.directory / "test_report.json").read_text())
    assert [row["image"] for row in rows] == [str(number) for number in range(TEST)]
    matrix = [[0] * len(CLASSES) for _ in CLASSES]
    nats = 0.0
    for row in rows:
        probabilities = [float(row[f"p({name})"]) for name in CLASSES]
        assert sum(probabilities) == pytest.approx(1, abs=1e-4)
        assert row["predicted"] == CLASSES[probabilities.index(max(probabilities))]
        matrix[CLASSES.index(row["true"])][CLASSES.index(row["predicted"])] += 1
        nats -= math.log(float(row[f"p({row['true']})"]))
    hits = sum(matrix[i][i] for i in range(len(CLASSES)))
    assert report["images"] == TEST
    assert hits > 0  # or the rest would hold for zeros
    assert report["accuracy"] == pytest.approx(hits / TEST)
    assert report["loss"] == pytest.approx(nats / TEST, abs=1e-4)
    assert report["confusion_matrix"] == matrix
    assert list(report["classes"]) == CLASSES
    assert 0 <= report["macro_f1"] <= 1
    assert 0 <= report["calibration_error"] <= 1
    for i, measures in enumerate(report["classes"].values()):
        answers = sum(row[i] for row in matrix)
        assert measures["images"] == sum(matrix[i])
        assert measures["recall"] == pytest.approx(matrix[i][i] / sum(matrix[i]))
        assert measures["precision"] == (pytest.approx(matrix[i][i] / answers) if answers else None)


@pytest.mark.parametrize(
    "tag",
    [
        "train/loss", "train/acc", "val/loss", "val/acc", "lr/head", "trainable_parameters", "images_per_second",
    ],
)  # fmt: skip
def test_curves_are_drawn_against_the_epoch(run: Run, events: EventAccumulator, tag: str) -> None:
    points = events.Scalars(tag)
    assert [point.step for point in points] == [0, 1]
    assert [point.value for point in points] == pytest.approx([row[tag] for row in run.history])


def test_batches_are_drawn_against_the_step(run: Run, events: EventAccumulator) -> None:
    steps = [point.step for point in events.Scalars("train/batch_loss")]
    assert steps == list(range(1, 2 * STEPS, 2))  # every second one, counted through both epochs


def test_pictures_in_tensorboard(events: EventAccumulator) -> None:
    assert {"first_batch", "confusion_matrix", "predictions"} <= set(events.Tags()["images"])
    (image,) = events.Images("first_batch")  # of two epochs
    assert image.encoded_image_string.startswith(b"\x89PNG")


def test_hyperparameters_in_tensorboard(run: Run, events: EventAccumulator) -> None:
    content = events.PluginTagToContent("hparams")
    session = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert session["data/batch_size"].number_value == BATCH
    assert session["trainer/max_epochs"].number_value == 2
    assert session["model/optimizer/init_args/lr"].number_value == pytest.approx(1e-3)
    report = json.loads((run.directory / "test_report.json").read_text())
    final = {
        "best/val_acc": max(row["val/acc"] for row in run.history),
        "final/test_acc": report["accuracy"],
        "final/test_loss": report["loss"],
    }
    assert {metric.name.tag for metric in experiment.metric_infos} == final.keys()
    for tag, value in final.items():
        assert events.Scalars(tag)[-1].value == pytest.approx(value, abs=1e-5)


def test_without_test_after_fit(second: Run) -> None:
    assert "test/acc" not in second.printed
    assert "val/acc" in second.printed
    names = {path.name for path in second.directory.iterdir()}
    assert "history.csv" in names
    assert not names & {"predictions.csv", "test_report.json", "confusion_matrix.png"}


def evaluate(run: Run, command: str) -> tuple[str, set[str]]:
    """Run a command where only the best checkpoint can be read; also tell which files it made."""
    (run.directory / "checkpoints" / "last.ckpt").write_text("junk")
    before = set(run.directory.iterdir())
    printed = execute(command, *sample())
    assert {path.name for path in run.directory.parent.iterdir()} == {"version_0", "version_1"}
    new = {path.name for path in set(run.directory.iterdir()) - before}
    return printed, {name for name in new if not name.startswith("events.")}


def test_test_uses_the_best_checkpoint_of_the_newest_run(borrowed: Run) -> None:
    config = borrowed.config
    printed, files = evaluate(borrowed, "test")
    made = {"predictions.csv", "predictions.png", "test_report.json", "confusion_matrix.png", "mistakes.png"}
    assert files == made
    accuracy = json.loads((borrowed.directory / "test_report.json").read_text())["accuracy"]
    assert f"test/acc {accuracy:.4f}" in printed
    assert "runs/head/version_1" in printed
    assert borrowed.config == config


def test_what_was_trained_with_recorded_steps_can_be_tested_on_a_cpu(borrowed: Run) -> None:
    config = borrowed.directory / "config.yaml"
    content = yaml.safe_load(config.read_text())
    content["model"]["cuda_graphs"] = True
    config.write_text(yaml.safe_dump(content))
    execute("test", "--config", str(config))
    assert (borrowed.directory / "test_report.json").is_file()


def test_test_after_fit_and_test_agree(run: Run) -> None:
    path = run.directory / "test_report.json"
    report = path.read_bytes()
    path.unlink()
    execute("test", *sample("--ckpt_path", str(run.directory / "checkpoints" / "best.ckpt")))
    assert path.read_bytes() == report


def test_validate_uses_the_best_checkpoint_of_the_newest_run(borrowed: Run) -> None:
    printed, files = evaluate(borrowed, "validate")
    assert "another split" not in printed
    assert "Validate metric" in printed
    pictures = {f"val_{name}.png" for name in ("predictions", "confusion_matrix", "mistakes")}
    assert files == {"val_predictions.csv", "val_report.json"} | pictures
    assert f"val/acc {borrowed.history[0]['val/acc']:.4f}" in printed
    report = json.loads((borrowed.directory / "val_report.json").read_text())
    assert report["accuracy"] == pytest.approx(borrowed.history[0]["val/acc"], abs=1e-4)
    assert (report["checkpoint"], report["epoch"]) == ("best.ckpt", borrowed.checkpoint("best.ckpt")["epoch"])
    with (borrowed.directory / "val_predictions.csv").open(newline="") as file:
        right = [row["true"] == row["predicted"] for row in csv.DictReader(file)]
    assert len(right) == 15
    assert sum(right) / 15 == pytest.approx(report["accuracy"])


def test_a_runs_own_configuration_means_that_run(borrowed: Run) -> None:
    shutil.copytree(borrowed.directory, borrowed.directory.with_name("version_2"))
    execute("validate", "--config", str(borrowed.directory / "config.yaml"))
    reports = [path.parent.name for path in borrowed.root.glob("*/*/val_report.json")]
    assert reports == ["version_1"]


def test_a_job_that_repeats_a_run_goes_on_with_its_own(borrowed: Run) -> None:
    """Though the run whose configuration it was given has no checkpoint to go on from."""
    shutil.copytree(borrowed.directory, borrowed.directory.with_name("version_2"))
    shutil.rmtree(borrowed.directory / "checkpoints")
    config = str(borrowed.directory / "config.yaml")
    execute("fit", "--config", config, "--ckpt_path", "last_if_any", "--trainer.max_epochs", "2")
    assert not (borrowed.root / "head" / "version_3").exists()
    assert len(read_history(borrowed.root / "head" / "version_2" / "history.csv")) == 2


def test_predict_uses_the_best_checkpoint_of_the_newest_run(borrowed: Run) -> None:
    _, files = evaluate(borrowed, "predict")
    assert files == {"predictions.csv"}
    assert len(read_predictions(borrowed.directory)) == TEST


def probabilities(row: dict[str, str]) -> list[float]:
    return [float(row[f"p({name})"]) for name in CLASSES]


@pytest.mark.parametrize(
    ("command", "split"),
    [
        ("test", "test"),
        pytest.param("validate", "val", marks=pytest.mark.slow),
        pytest.param("predict", "test", marks=pytest.mark.slow),
    ],
)
def test_a_folder_of_other_images_needs_none_to_train(borrowed: Run, tmp_path: Path, command: str, split: str) -> None:
    """Its classes are the checkpoint's: these lack some of them, so that their own would have other numbers."""
    images = Sample(size=50).load()["test"]
    for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        folder = tmp_path / "others" / split / CLASSES[label]
        if label > 4:
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / f"{number}.png")
    execute(command, *sample("--run.root", str(borrowed.root)))
    name = ("val_" if command == "validate" else "") + "predictions.csv"
    expected = {row["image"]: row for row in read_predictions(borrowed.directory, name)}
    other = ("--data.source", "ImageFolder", "--data.source.root", str(tmp_path / "others"))
    execute(command, *sample("--run.root", str(borrowed.root)), *other)
    rows = read_predictions(borrowed.directory, name)
    assert len(rows) == sum(label > 4 for label in images.labels)
    for row in rows:
        assert row["image"].startswith(f"{split}/{row['true']}/")
        if command != "validate":
            same = expected[Path(row["image"]).stem]
            assert (row["true"], row["predicted"]) == (same["true"], same["predicted"])
            assert probabilities(row) == pytest.approx(probabilities(same), abs=1e-5)


def test_a_source_of_ones_own_may_have_no_options(borrowed: Run) -> None:
    execute("test", *sample("--run.root", str(borrowed.root)))
    expected = read_predictions(borrowed.directory)
    (borrowed.directory / "predictions.csv").unlink()
    options = {"data.batch_size": BATCH, "run.root": borrowed.root}
    execute("test", *on_sample("head", options, "--data.source", "tests.support.OfMine"))
    assert read_predictions(borrowed.directory) == expected


def test_images_to_test_are_none_that_a_training_needs(tmp_path: Path) -> None:
    images = Sample(size=50).load()["train"]
    for number, (pixels, label) in enumerate(zip(images.pixels, images.labels, strict=True)):
        path = tmp_path / "mine" / "train" / str(label % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    source = ["--data.source", "ImageFolder", "--data.source.root", str(tmp_path / "mine")]
    printed = execute("fit", *sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1", *source))
    assert "everything of this run is in" in printed
    assert not (tmp_path / "head" / "version_0" / "test_report.json").exists()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Save the sample's test images as files, two folders deep."""
    test = Sample(size=50).load()["test"]
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for number, pixels in enumerate(test.pixels):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / ("more" if number % 2 else "") / f"{number}.png")
    return folder


def predict(borrowed: Run, root: Path, *words: str) -> list[dict[str, str]]:
    unlabelled = ("--data.source", "Unlabelled", "--data.source.root", str(root))
    print(execute("predict", *sample("--run.root", str(borrowed.root)), *unlabelled, *words), end="")
    with (borrowed.directory / "unlabelled.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.pictures
def test_images_without_labels_are_predicted_as_those_with(borrowed: Run, photos: Path) -> None:
    execute("predict", *sample("--run.root", str(borrowed.root)))
    expected = {f"{row['image']}.png": row for row in read_predictions(borrowed.directory)}
    rows = predict(borrowed, photos)
    assert [row["image"] for row in rows] == ["0.png", "2.png", "4.png", "6.png", "8.png"] + [
        f"more/{number}.png" for number in (1, 3, 5, 7, 9)
    ]
    assert list(rows[0]) == ["image", "predicted", *(f"p({name})" for name in CLASSES)]
    for row in rows:
        same = expected[Path(row["image"]).name]
        assert probabilities(row) == pytest.approx(probabilities(same), abs=1e-5)
    assert {f"{row['image']}.png": row for row in read_predictions(borrowed.directory)} == expected
    with Image.open(borrowed.directory / "unlabelled.png") as image:
        assert len(image.getcolors(2**20) or []) > 100


def test_unreadable_images_without_labels_are_left_out(
    borrowed: Run, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken(photos)
    rows = predict(borrowed, photos)
    assert [row["image"] for row in rows][4:6] == ["8.png", "more/1.png"]
    assert len(rows) == 10
    assert f"left out of {photos}, for they are unreadable: broken.png" in capsys.readouterr().out


def test_a_single_image_is_predicted(borrowed: Run, photos: Path) -> None:
    (row,) = predict(borrowed, photos / "4.png")
    assert row["image"] == "4.png"
    assert row["predicted"] == CLASSES[probabilities(row).index(max(probabilities(row)))]


def test_answers_are_printed_too(borrowed: Run, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = predict(borrowed, photos)
    answers = [f"{row['image']}  {row['predicted']} {max(probabilities(row)):.0%}" for row in rows]
    assert capsys.readouterr().out.splitlines()[: len(rows)] == answers
    for number in (10, 11):
        shutil.copy(photos / "0.png", photos / "more" / f"{number}.png")
    predict(borrowed, photos)
    assert capsys.readouterr().out.splitlines()[10] == "and 2 more"


@pytest.mark.parametrize("standardize", ["weights", pytest.param("dataset", marks=pytest.mark.slow)])
def test_predicting_needs_no_training_images(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, standardize: str
) -> None:
    """Mean, deviation, classes and size are the training's; the folder it learned from may be gone."""
    train = Sample(size=50).load()["train"]
    for number, (pixels, label) in enumerate(zip(train.pixels, train.labels, strict=True)):
        path = tmp_path / "root" / "train" / CLASSES[label] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.transpose(1, 2, 0)).save(path)
    shutil.copytree(photos, tmp_path / "root" / "test" / "heart")
    monkeypatch.chdir(tmp_path)
    options = f"--model.weights_input IMAGENET1K_FEATURES --data.standardize {standardize} --trainer.max_epochs 1"
    options += " --data.source ImageFolder --data.source.root root --data.source.image_size 36"
    execute("fit", *sample(*options.split()))
    run = Run(tmp_path / "runs" / "head" / "version_0", "")
    expected = [probabilities(row) for row in read_predictions(run.directory)]
    shutil.rmtree(tmp_path / "root")
    words = f"--config {run.directory}/config.yaml --ckpt_path {run.directory}/checkpoints/best.ckpt"
    execute("predict", *words.split(), "--data.source", "Unlabelled", "--data.source.root", str(photos))
    with (run.directory / "unlabelled.csv").open(newline="") as file:
        found = [probabilities(row) for row in csv.DictReader(file)]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("classes", ["null", "[a, b, c, d, e, f, g, h, i, j]"])
@pytest.mark.parametrize("command", ["fit", "validate", "test"])
def test_images_without_labels_are_for_predict_only(
    borrowed: Run, photos: Path, capsys: pytest.CaptureFixture[str], command: str, classes: str
) -> None:
    file = borrowed.directory / "checkpoints" / "best.ckpt"
    content = torch.load(file, weights_only=True)
    content["ImageDataModule"]["classes"] = list("abcdefghij")
    torch.save(content, file)
    unlabelled = ("--data.source", "Unlabelled", "--data.source.root", str(photos), "--data.source.classes", classes)
    with pytest.raises(SystemExit) as stopped:
        execute(command, *sample("--run.root", str(borrowed.root)), *unlabelled)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == (
        "error: Unlabelled images are for predict only: fit, validate and test need their classes.\n"
    )


def test_images_without_labels_need_to_know_what_the_network_expects(
    borrowed: Run, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = borrowed.directory / "checkpoints" / "best.ckpt"
    content = torch.load(file, weights_only=True)
    del content["ImageDataModule"]
    torch.save(content, file)
    with pytest.raises(SystemExit):
        predict(borrowed, photos)
    assert "best.ckpt' does not say what its classes and its input are." in capsys.readouterr().err


def test_a_checkpoint_that_does_not_tell_its_input_needs_the_file_of_weights(
    borrowed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    file = borrowed.directory / "checkpoints" / "best.ckpt"
    content = torch.load(file, weights_only=True)
    del content["ImageDataModule"]
    torch.save(content, file)
    with pytest.raises(SystemExit) as stopped:
        execute("test", *sample("--data.standardize", "weights", "--model.weights", "gone.pth"))
    assert stopped.value.code == 1
    assert "no weights file 'gone.pth'" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_images_of_another_size_than_in_training_are_refused(
    borrowed: Run, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    checkpoint = str(borrowed.directory / "checkpoints" / "last.ckpt")
    words = sample("--run.root", str(borrowed.root), "--ckpt_path", checkpoint, "--trainer.max_epochs", "3")
    with pytest.raises(SystemExit):
        execute(command, *words, "--data.input_size", "64")  # with another head
    assert "was trained on images of 32 pixels, and these have 32 pixels, enlarged to 64" in capsys.readouterr().err


def test_a_network_of_which_nothing_is_left_is_not_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither as the best, after a validation within the epoch, nor as the last at its end."""
    too_fast = ("--model.optimizer.init_args.lr", "1e38", "--trainer.val_check_interval", "2")
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *sample("--trainer.max_epochs", "3", *too_fast, "--run.root", str(tmp_path)))
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith(
        "error: in epoch 0, counted from 0, weights became infinite or no numbers"
    )
    assert not list(tmp_path.glob("**/*.ckpt"))


@pytest.mark.slow
def test_weights_that_become_infinite_leave_the_checkpoints_of_before(
    borrowed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [borrowed.directory / "checkpoints" / name for name in ("best.ckpt", "last.ckpt")]
    before = [file.read_bytes() for file in files]
    with pytest.raises(SystemExit):
        execute("fit", *sample("--ckpt_path", "last", "--trainer.max_epochs=3", "--model.optimizer.init_args.lr=1e38"))
    assert "error: in epoch 1, counted from 0, weights became infinite" in capsys.readouterr().err
    assert [file.read_bytes() for file in files] == before


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["run", "best"])
def test_a_best_checkpoint_that_is_elsewhere_or_gone_is_made_anew(borrowed: Run, tmp_path: Path, lost: str) -> None:
    """However good it was: the run that goes on would else test nothing, or what is another run's."""
    last, wanted, directory = borrowed.directory / "checkpoints" / "last.ckpt", "last", borrowed.directory
    execute("fit", *sample("--ckpt_path", "last", "--trainer.max_epochs", "2"))  # which knows where it is
    content = torch.load(last, weights_only=True)
    (best,) = (state for name, state in content["callbacks"].items() if "val/acc" in name)
    best["best_model_score"] = best["kth_value"] = torch.tensor(2.0)
    best["best_k_models"] = dict.fromkeys(best["best_k_models"], torch.tensor(2.0))
    torch.save(content, last)
    if lost == "run":
        wanted, directory = str(shutil.copy(last, tmp_path / "copy.ckpt")), directory.parent / "version_2"
    else:
        (directory / "checkpoints" / "best.ckpt").unlink()
    execute("fit", *sample("--ckpt_path", wanted, "--trainer.max_epochs", "3"))
    assert Run(directory, "").checkpoint("best.ckpt")["epoch"] == 2
    assert json.loads((directory / "test_report.json").read_text())["epoch"] == 2


@pytest.mark.parametrize("command", ["fit", "test"])
def test_weights_that_are_no_numbers_are_refused(
    borrowed: Run, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    file = borrowed.directory / "checkpoints" / "best.ckpt"
    content = torch.load(file, weights_only=True)
    content["state_dict"]["head.linear.bias"][0] = torch.nan
    torch.save(content, file)
    with pytest.raises(SystemExit):
        execute(command, *sample("--ckpt_path", "best", "--trainer.max_epochs", "3"))
    assert "best.ckpt' holds weights that are infinite or no numbers, in head.linear.bias" in capsys.readouterr().err


def test_two_trainings_do_not_share_a_run(borrowed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    words = sample("--trainer.max_epochs", "2", "--run.test_after_fit", "false")
    with FileLock(borrowed.directory / ".lock"), pytest.raises(SystemExit) as stopped:
        execute("fit", *words, "--ckpt_path", "last")
    assert stopped.value.code == 1
    assert "runs/head/version_1': wait for its end" in capsys.readouterr().err
    assert len(borrowed.history) == 1
    execute("fit", *words, "--ckpt_path", "last")
    assert len(borrowed.history) == 2
    assert not (borrowed.directory / ".lock").exists()


def test_the_configuration_of_a_continued_run_is_never_half_written(
    borrowed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = borrowed.config

    def fail(self: ThawParser, config: Any, path: str, **_: Any) -> None:
        Path(path).write_text("")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ThawParser, "save", fail)
    with pytest.raises(SystemExit):
        execute("fit", *sample("--ckpt_path", "last", "--trainer.max_epochs", "2"))
    assert borrowed.config == before
    assert not list(borrowed.directory.glob(".*"))


def nothing(folder: Path) -> Path:
    return folder / "nothing"


def too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


def empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


def broken(folder: Path) -> Path:
    (folder / "broken.png").write_text("junk")
    return folder / "broken.png"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (too_long, "{} cannot be read: File name too long; mend that"),
        (nothing, "there is no {}; set root to an image, or to a folder that holds some"),
        (empty, "there are no images in {}; set root to an image, or to a folder that holds some"),
        (broken, "{} has unreadable images; mend or remove broken.png (taken are .bmp, .jpeg, .jpg, .png, .webp)"),
    ],
)
def test_mistakes_with_images_without_labels(
    borrowed: Run, photos: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], Path], message: str
) -> None:
    root = make(photos)
    with pytest.raises(SystemExit) as stopped:
        predict(borrowed, root)
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"error: {message.format(photos if make is broken else root)}\n"


def test_a_checkpoint_in_python_as_the_docs_say(run: Run, tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 40, 3), np.uint8)).save(photo)
    code = next(code for code in documented_code("python") if "load_from_checkpoint" in code)
    path = str(run.directory / "checkpoints" / "best.ckpt")
    found: dict[str, Any] = {}
    printed = StringIO()
    with redirect_stdout(printed):
        exec(code.replace("runs/last4/version_0/checkpoints/best.ckpt", path).replace("photo.jpg", str(photo)), found)
    assert found["saved"]["classes"] == CLASSES
    assert printed.getvalue().split()[0] in CLASSES
    assert not found["network"].training
    own = torch.load(path, weights_only=True)["state_dict"]
    assert all(torch.equal(value, own[name]) for name, value in found["network"].state_dict().items())


@pytest.mark.slow
def test_runs_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    execute("fit", *sample("--run.root=~/kept", "--trainer.max_epochs", "1", "--run.test_after_fit", "false"))
    assert [path.name for path in (tmp_path / "kept" / "head").iterdir()] == ["version_0"]
    execute("validate", *sample("--run.root=~/kept"))


def test_resuming_continues_in_the_same_directory(run: Run, borrowed: Run) -> None:
    first = borrowed.history
    execute("fit", *sample("--ckpt_path", "last", "--trainer.max_epochs", "3", "--run.test_after_fit", "false"))
    assert {path.name for path in borrowed.directory.parent.iterdir()} == {"version_0", "version_1"}
    assert [row["epoch"] for row in borrowed.history] == [0, 1, 2]
    assert borrowed.history[:1] == first
    assert borrowed.history[1]["train/loss"] == run.history[1]["train/loss"]
    assert borrowed.checkpoint("last.ckpt")["epoch"] == 2
    assert borrowed.config["trainer"]["max_epochs"] == 3
    assert borrowed.config["ckpt_path"] is None
    steps = [point.step for point in EventAccumulator(str(borrowed.directory)).Reload().Scalars("val/acc")]
    assert steps == [0, 1, 2]


@pytest.mark.slow
def test_a_job_that_is_started_again_goes_on(tmp_path: Path) -> None:
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--ckpt_path", "last_if_any")
    run = Run(tmp_path / "head" / "version_0", "")
    for epochs in (1, 2):
        execute("fit", *words, "--trainer.max_epochs", str(epochs))
        assert [row["epoch"] for row in run.history] == list(range(epochs))
    (run.directory / "checkpoints" / "last.ckpt").unlink()  # as if it had been killed before its first
    execute("fit", *words, "--trainer.max_epochs", "1")
    assert {path.name for path in run.directory.parent.iterdir()} == {"version_0", "version_1"}


@pytest.mark.slow
def test_what_a_continued_run_has_otherwise_is_said(borrowed: Run) -> None:
    before = borrowed.config | {"run": borrowed.config["run"] | {"warm_start": "where/it/came/from.ckpt"}}
    (borrowed.directory / "config.yaml").write_text(yaml.safe_dump(before))
    words = sample("--ckpt_path", "last", "--run.root", str(borrowed.root), "--run.test_after_fit", "false")
    printed = execute("fit", *words, "--trainer.max_epochs", "2", "--model.optimizer.init_args.lr", "0.01")
    said = [line for line in printed.splitlines() if line.startswith("goes on with")]
    assert [line.removeprefix("goes on with ") for line in said] == [
        "model.optimizer.lr 0.01, which was 0.001",
        f'run.root "{borrowed.root}", which was "runs"',
        "trainer.max_epochs 2, which was 1",
    ]
    assert borrowed.config["run"]["warm_start"] == "where/it/came/from.ckpt"
    input_of_weights = ["--data.standardize", "weights", "--model.weights_input", "IMAGENET1K_V1"]
    printed = execute("fit", *words, "--trainer.max_epochs", "2", *input_of_weights)
    assert 'data.standardize stays "dataset", as the training began' in printed
    assert "model.weights_input stays null, as the training began" in printed
    assert "goes on with data" not in printed
    assert borrowed.config["data"]["standardize"] == "dataset"
    more = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "val/loss"]
    for epochs, said in ((3, True), (4, False)):  # what is null in a callback is no change
        printed = execute("fit", *words, *more, "--trainer.max_epochs", str(epochs))
        assert ("goes on with trainer.callbacks" in printed) == said
    (borrowed.directory / "config.yaml").write_text("")  # cut short by a full disk
    assert "goes on with" not in execute("fit", *words, *more, "--trainer.max_epochs", "5")


@pytest.mark.slow
def test_epochs_that_will_be_replaced_are_counted(borrowed: Run) -> None:
    words = sample("--run.root", str(borrowed.root), "--run.test_after_fit", "false", "--trainer.max_epochs", "3")
    folder = borrowed.directory / "checkpoints"
    first = str(shutil.copy(folder / "last.ckpt", folder / "first.ckpt"))
    assert "will be replaced" not in execute("fit", *words, "--ckpt_path", first)
    printed = execute("fit", *words, "--ckpt_path", first)
    assert "first.ckpt' is of epoch 0, counted from 0: the 2 that came after will be replaced" in printed


def test_rate_that_is_not_used_is_named(tmp_path: Path) -> None:
    words = sample("--run.root", str(tmp_path), "--trainer.fast_dev_run", "true")
    for rate, said in (("1e-3", False), ("2e-3", True)):
        printed = execute("fit", *words, "--unfreezing.rates", f"{{0: {rate}}}")
        assert ("the optimizer's rate of 0.001 is not used: unfreezing.rates has 0.002" in printed) == said


def test_curves_of_training_and_validation_share_a_chart(events: EventAccumulator) -> None:
    layout = Layout()
    (tensor,) = events.Tensors("custom_scalars__config__")
    layout.ParseFromString(tensor.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in layout.category[0].chart}
    assert charts == {name: [f"^train/{name}$", f"^val/{name}$"] for name in ("loss", "acc")}


def test_resuming_with_another_optimizer_is_refused(borrowed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *sample("--ckpt_path", "last", "--run.root", str(borrowed.root)), "--model.optimizer", "SGD")
    assert stopped.value.code == 1
    assert "was trained with Adam and cannot go on with SGD" in capsys.readouterr().err


def test_resuming_with_a_number_of_steps_is_refused(borrowed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning takes an epoch that has ended for one that has not, if max_steps is set."""
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *sample("--ckpt_path", "last", "--run.root", str(borrowed.root)), "--trainer.max_steps", "5")
    assert stopped.value.code == 1
    assert "a run with trainer.max_steps cannot be continued" in capsys.readouterr().err


@pytest.mark.parametrize(
    "end",
    [
        pytest.param(["--trainer.max_steps", "4"], marks=pytest.mark.slow),
        ["--trainer.callbacks+=tests.support.EndAfter"],
    ],
)
def test_resuming_after_an_end_within_an_epoch_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], end: list[str]
) -> None:
    """Lightning counts that epoch as trained, and would go on with the next one."""
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--trainer.max_epochs", "3")
    execute("fit", *words, *end)
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *words, "--ckpt_path", "last")
    assert stopped.value.code == 1
    assert "ended within an epoch, and the rest of that epoch would be left out" in capsys.readouterr().err


def test_resuming_when_the_time_is_over_is_refused(borrowed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = borrowed.directory / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["callbacks"]["Timer"] = {"time_elapsed": {"train": 3600.0}}
    torch.save(content, path)
    words = sample("--ckpt_path", "last", "--run.root", str(borrowed.root), "--trainer.max_time")
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *words, "00:01:00:00")
    assert stopped.value.code == 1
    assert "trainer.max_time is 1:00:00, and counts the 1:00:00 that" in capsys.readouterr().err


def test_resuming_to_an_earlier_end_changes_nothing(borrowed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = borrowed.directory / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"] = 5
    torch.save(content, path)
    before = (borrowed.directory / "config.yaml").read_bytes()
    words = sample("--ckpt_path", "last", "--run.root", str(borrowed.root))
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *words, "--trainer.max_epochs", "4")
    assert stopped.value.code == 1
    assert "trainer.max_epochs is 4" in (message := capsys.readouterr().err)
    assert "has trained 5 already: give more" in message
    assert (borrowed.directory / "config.yaml").read_bytes() == before


def test_finished_run_is_only_tested_again(borrowed: Run) -> None:
    """After whatever ended it in its test."""
    path = borrowed.directory / "checkpoints" / "last.ckpt"
    words = sample("--ckpt_path", "last", "--run.root", str(borrowed.root), "--trainer.max_epochs", "1")
    words += ["--trainer.max_time", "00:00:00:01", "--run.warm_start", "another.ckpt"]
    content = torch.load(path, weights_only=True)
    content["callbacks"]["Timer"] = {"time_elapsed": {"train": 3600.0, "validate": 0.0, "test": 0.0}}
    torch.save(content, path)  # the time was over in the last validation
    before = path.read_bytes()
    printed = execute("fit", *words, "--model.weights", "gone.pth", "--data.standardize", "weights")
    assert "has trained all of its 1 epochs" in printed
    assert "goes on from" not in printed
    assert "run.warm_start stays null, as the training began" in printed
    assert "test/acc" in printed
    assert path.read_bytes() == before


def test_resuming_within_a_step_of_several_batches_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--trainer.max_epochs", "1")
    words += ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "1", "--data.batch_size", "7"]
    printed = execute("fit", *words, "--model.hidden", "0", "--model.dropout", "0.5")
    assert "model.dropout is not used: the head has no hidden layer" in printed
    run = Run(tmp_path / "head" / "version_0", "")
    path = run.directory / "checkpoints" / "best.ckpt"
    content = run.checkpoint("best.ckpt")
    content["loops"]["fit_loop"]["state_dict"]["combined_loader"] = [{"served": 3}]
    content["loops"]["fit_loop"]["epoch_progress"]["current"] |= {"started": 1, "processed": 0, "completed": 0}
    torch.save(content, path)
    with pytest.raises(SystemExit):
        execute("fit", *words, "--model.hidden", "0", "--ckpt_path", "best")
    assert "was saved after 3 batches of an epoch, within a step of 2" in capsys.readouterr().err


def test_resuming_from_weights_alone_is_refused(borrowed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    path = borrowed.directory / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    for part in ("optimizer_states", "loops", "callbacks"):
        content.pop(part)
    torch.save(content, path)
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *sample("--ckpt_path", "last", "--run.root", str(borrowed.root)))
    assert stopped.value.code == 1
    assert "holds weights only" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["fit --ckpt_path last --trainer.max_epochs 3", "validate", "test", "predict"])
def test_a_run_that_cannot_be_written_to_is_named(
    borrowed: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "version_1" and access(path, mode))
    with pytest.raises(SystemExit) as stopped:
        execute(*command.split(), *sample("--run.root", str(borrowed.root)))
    assert stopped.value.code == 1
    assert re.search(r"version_1' cannot be written to: copy the checkpoint", capsys.readouterr().err)


@pytest.mark.slow
def test_evaluating_needs_no_file_of_weights(borrowed: Run) -> None:
    """What a checkpoint's network wants as input stands in the checkpoint."""
    words = sample("--run.root", str(borrowed.root))
    execute("test", *words)
    expected = (borrowed.directory / "predictions.csv").read_bytes()
    (borrowed.directory / "predictions.csv").unlink()
    execute("test", *words, "--model.weights", "gone.pth", "--data.standardize", "weights")
    assert (borrowed.directory / "predictions.csv").read_bytes() == expected


def test_other_commands_leave_the_curves_and_tell_where_the_checkpoint_stands(borrowed: Run) -> None:
    def points(tag: str) -> list[int]:
        return [point.step for point in EventAccumulator(str(borrowed.directory)).Reload().Scalars(tag)]

    path = borrowed.directory / "checkpoints" / "best.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save({name: part for name, part in content.items() if name != "callbacks"} | {"epoch": 6}, path)
    assert points("val/acc") == [0]
    for command in ("validate", "test"):
        execute(command, *sample("--run.root", str(borrowed.root)))
    assert points("val/acc") == [0]  # TensorBoard would leave out all points after a new one
    assert points("test/acc") == [6]
    for split in ("val", "test"):
        report = json.loads((borrowed.directory / f"{split}_report.json").read_text())
        assert (report["checkpoint"], report["epoch"]) == ("best.ckpt", 6)


def test_a_training_without_validation_says_that_it_was_not_tested(tmp_path: Path) -> None:
    words = sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "2")
    printed = execute("fit", *words)
    assert "no epoch was validated, so there is no best checkpoint, and no test" in printed


def test_callbacks_of_every_run_are_not_taken_for_the_users(tmp_path: Path) -> None:
    """Lightning puts them into the user's list, where one monitors what such a training does without."""
    words = sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0")
    own = "--trainer.callbacks+=src.callbacks.averaging.PolynomialAveraging"
    assert "no epoch was validated" in execute("fit", *words, "--trainer.limit_train_batches", "1", own)


def test_a_limit_that_may_end_a_training_before_its_rates_have_fallen_is_named(tmp_path: Path) -> None:
    words = sample("--unfreezing.decay", "cosine", "--trainer.max_epochs", "9", "--trainer.max_steps", "1")
    said = "unfreezing.decay cosine falls towards epoch 9, where trainer.max_steps may end the training long before"
    assert said in execute("fit", *words, "--run.root", str(tmp_path), "--run.test_after_fit", "false")
    assert said not in execute("fit", *words, "--trainer.fast_dev_run", "true", "--trainer.max_steps", "-1")


def test_a_callback_that_keeps_what_cannot_be_read_again_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        execute("fit", *sample("--run.root", str(tmp_path), "--trainer.callbacks+=tests.support.KeepsAPath"))
    assert re.search(r"^error: the callback KeepsAPath would save .* state_dict", capsys.readouterr().err, re.MULTILINE)
    assert not list((tmp_path / "head" / "version_0" / "checkpoints").glob("*.ckpt"))


def test_a_thread_may_train(tmp_path: Path) -> None:
    """Only a process's main thread may listen to signals."""
    words = sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1", "--run.test_after_fit", "false")
    thread = threading.Thread(target=execute, args=("fit", *words))
    thread.start()
    thread.join()
    assert len(read_history(tmp_path / "head" / "version_0" / "history.csv")) == 1


@pytest.mark.slow
def test_validation_within_an_epoch_stands_in_the_history_of_a_run_that_was_stopped_after_it(tmp_path: Path) -> None:
    """Of five batches the third is followed by one, the fourth by the stop."""
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--trainer.max_epochs", "1")
    words += ["--data.batch_size", "7", "--trainer.val_check_interval", "3"]
    execute("fit", *words, "--run.name", "straight")
    with pytest.raises(SystemExit):
        execute("fit", *words, "--run.name", "stopped", *signal_at(0, 3, "SIGTERM"))
    execute("fit", *words, "--run.name", "stopped", "--ckpt_path", "last")
    straight, stopped = (untimed(tmp_path / name / "version_0") for name in ("straight", "stopped"))
    assert stopped == straight
    assert "val/acc" in straight[0]


def test_a_progress_bar_of_the_users_own_takes_the_place_of_ours(tmp_path: Path) -> None:
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--trainer.max_epochs", "1")
    printed = execute("fit", *words, "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar")
    assert "epoch   0" not in printed


@pytest.mark.parametrize(
    ("command", "name"),  # of a prediction SIGTERM waits for the end
    [("validate", "SIGTERM"), ("test", "SIGTERM"), ("validate", "SIGINT"), ("test", "SIGINT"), ("predict", "SIGINT")],
)
def test_a_signal_outside_of_a_training_is_no_success(
    borrowed: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    step = getattr(TransferClassifier, f"{'validation' if command == 'validate' else command}_step")
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(self: TransferClassifier, batch: Any) -> Any:
        signal.raise_signal(getattr(signal, name))
        return step(self, batch)

    monkeypatch.setattr(TransferClassifier, step.__name__, interrupted)
    try:
        with pytest.raises(SystemExit) as stopped:
            execute(command, *sample("--run.root", str(borrowed.root)), "--data.batch_size", "4")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from then on
    assert stopped.value.code == {"SIGTERM": 143, "SIGINT": 130}[name]
    assert capsys.readouterr().err == f"stopped by {name}\n"


def test_ctrl_c_before_anything_runs_ends_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sample, "load", lambda self: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *sample("--run.root", str(tmp_path)))
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "stopped by SIGINT\n"
    assert not any(tmp_path.iterdir())


def test_predicting_keeps_no_second_copy_of_its_answers(borrowed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(
        PredictionWriter, "on_predict_end", lambda self, trainer, *_: kept.append(trainer.predict_loop.predictions)
    )
    execute("predict", *sample("--run.root", str(borrowed.root)))
    assert kept == [[]]
    with pytest.raises(SystemExit):
        execute("predict", *sample("--run.root", str(borrowed.root), "--return_predictions", "true"))


def test_summary_and_early_stopping_tell_what_they_were_asked_to(tmp_path: Path) -> None:
    told = StringIO()
    handler, logger = logging.StreamHandler(told), logging.getLogger("lightning.pytorch.callbacks")
    logger.addHandler(handler)
    try:
        asked = ["--trainer.enable_model_summary", "true", "--run.root", str(tmp_path), "--trainer.max_epochs", "1"]
        asked += ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping"]
        asked += ["--trainer.callbacks.monitor", "val/loss", "--trainer.callbacks.verbose", "true"]
        execute("fit", *sample("--run.test_after_fit", "false", *asked))
    finally:
        logger.removeHandler(handler)
    assert "Trainable params" in told.getvalue()
    assert "Metric val/loss improved. New best score" in told.getvalue()


@pytest.mark.slow
def test_a_profiler_reports_and_without_one_none_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--trainer.max_epochs", "1")
    reports = StringIO()
    handler, logger = logging.StreamHandler(reports), logging.getLogger("lightning.pytorch.profilers")
    logger.addHandler(handler)
    try:
        execute("fit", *words, "--trainer.profiler", "simple")
        assert "FIT Profiler Report" in reports.getvalue()
        monkeypatch.setattr(Profiler, "profile", lambda self, action: pytest.fail(f"asked for {action}"))
        execute("fit", *words)
    finally:
        logger.removeHandler(handler)


def test_a_step_asks_for_few_contexts_and_leaves_the_callbacks_of_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    profile = Unprofiled.profile

    def noted(self: Unprofiled, action: str) -> AbstractContextManager[Any]:
        asked.append(action)
        return profile(self, action)

    monkeypatch.setattr(Unprofiled, "profile", noted)
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--trainer.max_epochs", "1")
    execute("fit", *words, "--trainer.callbacks+=tests.support.CallsItsOwn")
    steps = asked.count("run_training_batch")
    hooks = [action for action in asked if action.startswith("[Callback]") and "train_batch" in action]
    # CallsItsOwn twice, rates, clock, seed, first picture, history; and images counted, a look for a signal
    assert len(hooks) == 9 * steps > 9, sorted(set(hooks))


def test_a_stop_in_the_last_step_is_one(tmp_path: Path) -> None:
    words = sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1")
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *words, *signal_at(0, STEPS - 1, "SIGTERM"))
    assert stopped.value.code == 143
    stopped_run = Run(tmp_path / "head" / "version_0", "")
    assert not (stopped_run.directory / "test_report.json").exists()
    assert [row["epoch"] for row in stopped_run.history] == [0]
    assert stopped_run.checkpoint("last.ckpt")["global_step"] == STEPS


def test_a_stop_comes_though_every_step_is_followed_by_a_validation(tmp_path: Path) -> None:
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--trainer.max_epochs", "1")
    words += ["--data.batch_size", "7", "--trainer.val_check_interval", "1"]
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *words, *signal_at(0, 1, "SIGTERM"))
    assert stopped.value.code == 143
    last = torch.load(tmp_path / "head" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("counted", ["1", "null"])  # batches of an epoch, or of the training
def test_a_stop_does_not_leave_out_a_validation_within_the_epoch(tmp_path: Path, counted: str) -> None:
    """Of five batches the second and the fourth are followed by one; the signal comes within the second."""
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--trainer.max_epochs", "1")
    words += ["--data.batch_size", "7", "--trainer.val_check_interval", "2"]
    words += ["--trainer.check_val_every_n_epoch", counted]
    witness = "--trainer.callbacks+=tests.support.Validations --trainer.callbacks.file"
    seen = {}
    for name, more in (("straight", []), ("stopped", signal_at(0, 1, "SIGTERM"))):
        file = tmp_path / f"{name}.txt"
        run = [*words, "--run.name", name, *witness.split(), str(file)]
        if more:
            with pytest.raises(SystemExit):
                execute("fit", *run, *more)
            more = ["--ckpt_path", "last"]
        execute("fit", *run, *more)
        seen[name] = file.read_text().split()
    assert seen["straight"] == ["2", "4"]
    assert seen["stopped"] == seen["straight"]


def test_resuming_takes_the_optimizers_settings_from_the_configuration(borrowed: Run) -> None:
    more = ["--ckpt_path", "last", "--run.root", str(borrowed.root), "--run.test_after_fit", "false"]
    more += ["--model.optimizer.init_args.weight_decay", "0.25", "--trainer.max_epochs", "3"]
    execute("fit", *sample(*more))
    groups = borrowed.checkpoint("last.ckpt")["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.25, 0.0}


@pytest.mark.slow
def test_resuming_from_the_best_checkpoint_keeps_its_epochs_measures(tmp_path: Path) -> None:
    """It was saved when its epoch had been trained and validated; nothing of that is done again."""
    words = sample("--run.root", str(tmp_path), "--run.test_after_fit", "false", "--trainer.limit_train_batches", "1")
    words += ["--trainer.check_val_every_n_epoch", "2", "--trainer.max_epochs"]
    execute("fit", *words, "2")
    path = tmp_path / "head" / "version_0" / "history.csv"
    before = read_history(path)
    execute("fit", *words, "3", "--ckpt_path", "best")
    after = read_history(path)
    assert [row["epoch"] for row in after] == [0, 1, 2]
    assert after[:2] == before
    assert "val/acc" in before[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["best_f1", "{epoch}-{val/f1:.3f}"],  # the second makes a folder
)
def test_a_checkpoint_callback_of_ones_own_goes_on_with_its_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Though a run's folder is given from here at first, and in full when it goes on."""
    monkeypatch.chdir(tmp_path)
    words = sample("--run.test_after_fit", "false", "--trainer.limit_train_batches", "1")
    words += [
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.monitor",
        "val/f1",
    ]
    words += ["--trainer.callbacks.mode", "max", "--trainer.callbacks.filename", name, "--trainer.max_epochs"]
    execute("fit", *words, "1")
    execute("fit", *words, "2", "--ckpt_path", "last")
    run = Path("runs/head/version_0")
    assert len(list((run / "checkpoints").rglob("*.ckpt"))) == 3
    scores = [row["val/f1"] for row in read_history(run / "history.csv")]
    last = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = [state for state in last["callbacks"].values() if state.get("monitor") == "val/f1"]
    assert [float(state["best_model_score"]) for state in kept] == [pytest.approx(max(scores))]


def test_a_run_whose_history_was_changed_says_so_instead_of_going_on(
    borrowed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    history = borrowed.directory / "history.csv"
    for old, new in ((",", ";"), ("0.", "0,1.2."), ("epoch", "era")):
        whole = history.read_text()
        history.write_text(whole.replace(old, new))
        with pytest.raises(SystemExit) as stopped:
            execute("fit", *sample("--ckpt_path", "last", "--trainer.max_epochs", "5"))
        assert stopped.value.code == 1
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert "history.csv' is damaged" in message
        history.write_text(whole)


@pytest.mark.slow
def test_stopping_early_is_told_and_only_then(tmp_path: Path) -> None:
    """Though the test after it loads a checkpoint from before, and a training that goes on one from after it."""
    stop = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping --trainer.callbacks.monitor val/loss"
    stop += " --trainer.callbacks.patience 1 --trainer.callbacks.min_delta"
    words = sample("--run.root", str(tmp_path), *stop.split())
    printed = execute("fit", *words, "10", "--trainer.max_epochs", "5")
    assert re.search(r"^stopped early: .*did not improve", printed, re.M)
    assert "test/acc" in printed
    more = ["10", "--trainer.callbacks.patience", "3", "--trainer.max_epochs", "3"]
    printed = execute("fit", *words, *more, "--ckpt_path", "last")
    assert "epoch   2" in printed
    assert "stopped early" not in printed
    more = ["10", "--trainer.callbacks.patience", "9999", "--trainer.max_epochs", "-1"]
    more += ["--trainer.max_time", "00:00:00:01"]
    printed = execute("fit", *words, *more, "--ckpt_path", "last")
    assert re.findall("stopped early: .*", printed) == ["stopped early: the time of trainer.max_time was over"]


def test_validating_on_another_split_says_that_it_may_have_been_trained_on(borrowed: Run) -> None:
    assert re.search(r"ckpt' was trained .* on another split", execute("validate", *sample("--data.split_seed", "1")))


@pytest.mark.parametrize("option", ["--data.split_seed", "--data.source.size"])
def test_resuming_on_other_images_is_refused(borrowed: Run, capsys: pytest.CaptureFixture[str], option: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *sample("--ckpt_path", "last", "--run.root", str(borrowed.root)), option, "80")
    assert stopped.value.code == 1
    assert "was trained on other images, or on another split" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "refused"),
    [
        (["--data.batch_size", "7"], "data.batch_size was 12 and is 7. Finish the epoch with the same."),
        pytest.param(
            ["--seed_everything", "2"],
            "seed_everything was 1 and is 2. Finish the epoch with the same.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--trainer.devices", "2"],
            "number of processes was 1 and is 2. Finish the epoch with as many devices.",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["--trainer.limit_train_batches", "2"],
            "saved after 2 batches of an epoch, and trainer.limit_train_batches leaves 2 to it: finish the epoch",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_batches_of_an_epoch_that_was_begun_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], refused: str
) -> None:
    words = sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1", "--run.test_after_fit", "false")
    with pytest.raises(SystemExit):
        execute("fit", *words, *signal_at(0, 1, "SIGTERM"))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        execute("fit", *words, "--ckpt_path", "last", *changed)
    assert refused in capsys.readouterr().err
    execute("fit", *words, "--ckpt_path", "last", "--trainer.fast_dev_run", "true")  # which takes one batch
    execute("fit", *words, "--ckpt_path", "last")


@pytest.mark.slow
def test_a_fused_optimizer_clips_as_others_do(tmp_path: Path) -> None:
    words = sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1", "--run.test_after_fit", "false")
    words += ["--trainer.precision", "bf16-mixed", "--trainer.gradient_clip_val", "0.1"]
    words += ["--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "1"]  # which feels a gradient's size
    for fused in ("true", "false"):
        execute("fit", *words, "--model.optimizer.fused", fused)
    asked, chosen = (Run(tmp_path / "head" / f"version_{number}", "").history for number in (0, 1))
    for name in ("train/loss", "val/loss"):
        assert asked[0][name] == pytest.approx(chosen[0][name], rel=1e-3)


def test_averaged_weights_are_not_continued_without_averaging(
    borrowed: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    path = borrowed.directory / "checkpoints" / "last.ckpt"
    torch.save({**torch.load(path, weights_only=True), "averaging_state": {}}, path)
    with pytest.raises(SystemExit) as stopped:
        execute("fit", *sample("--ckpt_path", "last", "--run.root", str(borrowed.root)))
    assert stopped.value.code == 1
    assert "holds averaged weights, and no callback goes on averaging" in capsys.readouterr().err


def test_resuming_clears_what_a_kill_while_saving_left_and_may_change_batches(borrowed: Run) -> None:
    folder = borrowed.directory / "checkpoints"
    for name in (".last.ckpt.abc", ".best.ckpt.xyz"):
        (folder / name).touch()
    more = ["--ckpt_path", "last", "--run.root", str(borrowed.root), "--run.test_after_fit", "false"]
    execute("fit", *sample(*more, "--trainer.max_epochs", "2"), "--data.batch_size", "7")
    assert len(borrowed.history) == 2
    assert {path.name for path in folder.iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.parametrize(
    "option", ["--trainer.limit_val_batches", pytest.param("--trainer.limit_test_batches", marks=pytest.mark.slow)]
)
def test_a_run_may_do_without_validation_or_test(tmp_path: Path, option: str) -> None:
    words = sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "1")
    assert "everything of this run" in execute("fit", *words, option, "0")


def test_a_part_of_images_that_lie_by_class_is_no_hindrance_to_a_training_without_a_test(tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2), ("test", 8)):
        for number in range(2 * count):
            path = tmp_path / "mine" / split / str(number % 2) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number, 0, 0)).save(path)
    source = ["--data.source", "ImageFolder", "--data.source.root", str(tmp_path / "mine")]
    words = sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1", "--run.test_after_fit", "false", *source)
    assert "everything of this run" in execute("fit", *words, "--trainer.limit_test_batches", "0.5")


@pytest.mark.parametrize(("precision", "knows"), [("bf16-mixed", False), ("bf16-mixed", True), ("32-true", False)])
def test_a_precision_that_the_processor_does_not_know_is_named(
    monkeypatch: pytest.MonkeyPatch, precision: str, knows: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: knows)
    said = execute("fit", *sample("--trainer.fast_dev_run", "true", "--trainer.precision", precision))
    slow = precision == "bf16-mixed" and not knows
    assert ("lacks avx512_bf16: give --trainer.precision 32-true" in said) == slow


@pytest.mark.slow
@pytest.mark.parametrize("last", [None, "epoch   0"])
def test_a_reader_that_leaves_before_the_end_ends_nothing(tmp_path: Path, last: str | None) -> None:
    """After a line, or before the first one."""
    words = sample("--run.root", str(tmp_path), "--trainer.max_epochs", "1")
    command = [sys.executable, "-W", "ignore", "-m", "src.cli", "fit", *words]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as fit:
        assert fit.stdout is not None
        assert fit.stderr is not None
        assert last is None or any(line.startswith(last) for line in fit.stdout)
        fit.stdout.close()
        assert (fit.stderr.read(), fit.wait()) == ("", 0)


def test_fast_dev_run_leaves_nothing(borrowed: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "elsewhere"
    (folder / "features").mkdir(parents=True)
    (folder / "features" / "mine").touch()
    monkeypatch.chdir(folder)
    options = ["--trainer.fast_dev_run", "true", "--feature_cache.views", "2", "--feature_cache.place", "disk"]
    before = {path: path.read_bytes() for path in borrowed.directory.rglob("*") if path.is_file()}
    execute("fit", *sample(*options))
    execute("test", *sample("--trainer.fast_dev_run", "true", "--run.root", str(borrowed.root)))
    execute("fit", *sample(*options, "--run.root", str(borrowed.root), "--ckpt_path", "last"))
    assert [path.name for path in folder.rglob("*")] == ["features", "mine"]
    assert {path: path.read_bytes() for path in borrowed.directory.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "plugins", [[], ["--trainer.plugins", "lightning.pytorch.plugins.precision.Precision"]], ids=["none", "another"]
)
def test_slurm_jobs_are_not_requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plugins: list[str]) -> None:
    """Else Lightning would take SIGUSR1 and save a checkpoint from which a later run in this folder would continue."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"NTASKS": 1, "JOB_ID": 7, "JOB_NAME": "train", "PROCID": 0, "LOCALID": 0, "NODEID": 0}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    seen: list[Any] = []

    def look(self: Summary, trainer: Trainer, *_: Any) -> None:
        seen.extend((trainer._accelerator_connector.cluster_environment, signal.getsignal(signal.SIGUSR1)))

    monkeypatch.setattr(Summary, "on_train_start", look)
    execute("fit", *sample("--trainer.fast_dev_run", "true", *plugins))
    environment, handler = seen
    assert isinstance(environment, SLURMEnvironment)
    assert handler is signal.SIG_DFL


def test_processes_of_torchrun_in_a_slurm_job_are_torchruns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    slurm = {f"SLURM_{name}": "1" for name in ("NTASKS", "JOB_ID")} | {"SLURM_JOB_NAME": "train"}
    launched = {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0", "WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in (slurm | launched).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)
    seen: list[Any] = []
    monkeypatch.setattr(
        Summary, "on_train_start", lambda self, trainer, *_: seen.append(trainer._accelerator_connector)
    )
    execute("fit", *sample("--trainer.fast_dev_run", "true"))
    assert isinstance(seen[0].cluster_environment, TorchElasticEnvironment)


def test_moved_run_remembers_its_best_checkpoint(run: Run, tmp_path: Path) -> None:
    """Else the first epoch after a move would overwrite the best checkpoint, however bad it is."""
    moved = Run(tmp_path / "elsewhere" / "version_7", "")
    shutil.copytree(run.directory, moved.directory)
    path = moved.directory / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    (best,) = (state for name, state in checkpoint["callbacks"].items() if "val/acc" in name)
    best["best_model_score"] = best["kth_value"] = torch.tensor(2.0)  # nothing that follows can be better
    best["best_k_models"] = dict.fromkeys(best["best_k_models"], torch.tensor(2.0))
    torch.save(checkpoint, path)
    before = (moved.directory / "checkpoints" / "best.ckpt").read_bytes()
    execute("fit", *sample("--ckpt_path", str(path), "--trainer.max_epochs", "3", "--run.test_after_fit", "false"))
    assert moved.checkpoint("last.ckpt")["epoch"] == 2
    assert (moved.directory / "checkpoints" / "best.ckpt").read_bytes() == before


def test_warm_start_takes_over_the_weights(run: Run, tmp_path: Path) -> None:
    start = run.directory / "checkpoints" / "last.ckpt"
    words = sample("--run.warm_start", str(start), "--run.root", str(tmp_path), "--run.test_after_fit", "false")
    words += ["--model.optimizer.init_args.lr", "0", "--trainer.max_epochs", "1", "--model.weights", "gone.pth"]
    words += ["--seed_everything", "2"]  # whose random weights are others
    execute("fit", *words, "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1")
    warm = Run(tmp_path / "head" / "version_0", "")
    ours, theirs = warm.checkpoint("last.ckpt")["state_dict"], run.checkpoint("last.ckpt")["state_dict"]
    for name in ("backbone.block1_conv1.weight", "backbone.block5_conv3.weight", "head.hidden.weight"):
        assert torch.equal(ours[name], theirs[name])
    assert [row["epoch"] for row in warm.history] == [0]


def test_warm_start_that_does_not_say_what_its_weights_expect_needs_their_file(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = torch.load(run.directory / "checkpoints" / "best.ckpt", weights_only=True)
    del content["ImageDataModule"]["mean"]
    torch.save(content, tmp_path / "silent.ckpt")
    words = sample("--run.warm_start", str(tmp_path / "silent.ckpt"), "--trainer.fast_dev_run", "true")
    with pytest.raises(SystemExit):
        execute("fit", *words, "--model.weights", "gone.pth", "--data.standardize", "weights")
    assert "gone.pth" in capsys.readouterr().err


def test_warm_start_from_other_classes_says_so(run: Run, tmp_path: Path) -> None:
    content = torch.load(run.directory / "checkpoints" / "best.ckpt", weights_only=True)
    content["ImageDataModule"]["classes"][0] = "teapot"
    torch.save(content, tmp_path / "teapots.ckpt")
    words = sample("--run.warm_start", str(tmp_path / "teapots.ckpt"), "--trainer.fast_dev_run", "true")
    assert re.search(r"teapots\.ckpt' tells other classes apart.*teapot.*--model\.weights", execute("fit", *words))


def test_warm_start_on_another_split_says_that_validation_images_may_be_known(run: Run, tmp_path: Path) -> None:
    start = str(run.directory / "checkpoints" / "last.ckpt")
    words = sample("--run.warm_start", start, "--trainer.fast_dev_run", "true")
    assert "another split" not in execute("fit", *words)
    assert f"'{start}' was trained and validated on other images, or on another split" in execute(
        "fit", *words, "--data.split_seed", "1"
    )


def test_weights_of_a_training_on_another_split_say_so_too(run: Run) -> None:
    start = run.directory / "checkpoints" / "last.ckpt"
    words = sample("--model.weights", str(start), "--trainer.fast_dev_run", "true")
    assert "another split" not in execute("fit", *words)
    assert f"'{start}' was trained and validated on other images" in execute("fit", *words, "--data.split_seed", "1")


@pytest.mark.parametrize("standardize", ["weights", pytest.param("dataset", marks=pytest.mark.slow)])
def test_warm_start_takes_over_what_the_weights_expect(run: Run, tmp_path: Path, standardize: str) -> None:
    start, changed = run.directory / "checkpoints" / "last.ckpt", tmp_path / "other.ckpt"
    content = torch.load(start, weights_only=True)
    content["ImageDataModule"]["mean"] = [1.0, 2.0, 3.0]
    torch.save(content, changed)
    words = sample("--run.warm_start", str(changed), "--run.root", str(tmp_path), "--run.test_after_fit", "false")
    words += ["--data.standardize", standardize, "--model.weights_input", "IMAGENET1K_FEATURES"]
    words += ["--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1", "--trainer.max_epochs", "1"]
    execute("fit", *words)
    warm = Run(tmp_path / "head" / "version_0", "").checkpoint("last.ckpt")
    assert (warm["ImageDataModule"]["mean"] == [1.0, 2.0, 3.0]) == (standardize == "weights")


Help = Callable[..., str]


@pytest.fixture
def help_text(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Help:
    monkeypatch.setenv("COLUMNS", "10000")  # one line a sentence

    def ask(*words: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 0
        return capsys.readouterr().out

    return ask


def parameters(kind: type, linked: set[str]) -> set[str]:
    return inspect.signature(kind).parameters.keys() - linked


def test_help_explains_every_option_of_ours(help_text: Help) -> None:
    printed = help_text("fit", "--help")
    sentences = {}
    for block in re.split(r"\n(?= *--)", printed)[1:]:
        name = block.split()[0].rstrip(",").removeprefix("--")
        words = re.split(r"\s{2,}", block.strip(), maxsplit=1)
        sentences[name] = re.split(r"\(type:|\(required", words[1] if len(words) > 1 else "")[0].strip()
    ours = {
        "model": parameters(TransferClassifier, {"num_classes", "image_size"}),
        "data": parameters(ImageDataModule, {"seed", "weights_input", "cuda_graphs"}),
        "unfreezing": parameters(StagedUnfreezing, set()),
        "feature_cache": parameters(FrozenFeatureCache, set()),
        "run": parameters(RunOptions, set()),
    }
    for room, names in ours.items():
        assert names
        for name in names:
            assert len(sentences[f"{room}.{name}"].split()) >= 3, f"{room}.{name}"


def test_help_lists_the_commands(help_text: Help) -> None:
    printed = help_text("--help")
    for command in ("fit", "validate", "test", "predict"):
        assert re.search(rf"^ +{command} +\w+ \w+", printed, re.MULTILINE)


def test_every_command_prepares_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    monkeypatch.setattr("src.cli.prepare_process", lambda: calls.append(True))
    with pytest.raises(SystemExit):
        main([])
    assert calls == [True]
