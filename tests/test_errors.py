"""Every user's mistake ends in one clear line on standard error, exit code 1, and no run directory."""

from __future__ import annotations

import errno
import logging
import os
import pty
import re
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from support import REPOSITORY, Lacking, run

from src.cli import main
from src.data.datamodule import ImageDataModule
from src.endings import plain_endings, threads_that_tell_once
from src.errors import UserError, replace_unknown_characters, say
from src.files import make_folder
from src.machine import check_compiler, check_device
from src.model.classifier import TransferClassifier
from src.plain_errors import either, plain, plain_trainer, suggestion
from src.preflight import check_monitors

pytestmark = pytest.mark.usefixtures("thin")

CONFIGS = REPOSITORY / "configs"
RECIPE = f"--config {CONFIGS}/head.yaml"
SAMPLE = f"{RECIPE} --config {CONFIGS}/with/sample.yaml --data.source.init_args.size 50 --trainer.accelerator cpu"

Fail = Callable[[str], str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make what a user may give by mistake."""
    folder = tmp_path_factory.mktemp("files")
    stages = "unfreezing:\n  stages: {0: 0}\n"
    (folder / "malformed.yaml").write_text("trainer:\n  max_epochs: [1\nfoo: }\n")
    (folder / "list.yaml").write_text("- 1\n- 2\n")
    (folder / "empty.yaml").write_text("# stages: {0: 0}\n")
    (folder / "indented.yaml").write_text("unfreezing:\n  stages:\n  0: 4\n")
    (folder / "bare.yaml").write_text(f"{stages}model:\n  # hidden: 8\n")
    (folder / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    (folder / "key.yaml").write_text(f"{stages}model:\n  hiden: 1\n")
    (folder / "room.yaml").write_text(f"{stages}trainr:\n  max_epochs: 1\n")
    (folder / "value.yaml").write_text(f"{stages}trainer:\n  max_epochs: abc\n")
    (folder / "source.yaml").write_text(f"{stages}data:\n  source: {{class_path: Sample, init_args: {{sise: 60}}}}\n")
    (folder / "linked.yaml").write_text(f"{stages}model:\n  image_size: 96\n")
    (folder / "refers.yaml").write_text(f"{stages}data: seed.yaml\n")
    (folder / "seed.yaml").write_text("seed: 3\n")
    (folder / "far.yaml").write_text(f"{stages}data:\n  image_size: 96\n")
    (folder / "junk.ckpt").write_text("not a checkpoint\n")
    torch.save({"a": 1}, folder / "dict.ckpt")
    (folder / "nothing").mkdir()
    for name in ("cat", "dog"):
        (folder / "images" / "train" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (32, 32)).save(folder / "images" / "train" / name / f"{number}.png")
    shutil.copytree(folder / "images", folder / "sorted")
    shutil.copytree(folder / "images" / "train", folder / "sorted" / "val")
    return folder


@pytest.fixture
def fail(tmp_path: Path, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Fail:
    """Run a command line that must fail, in an empty folder, and return its one line."""
    monkeypatch.chdir(tmp_path)
    for draw in ("normal_", "uniform_"):  # nobody looks at the weights, and they take longest
        monkeypatch.setattr(torch.Tensor, draw, lambda tensor, *_, **__: tensor.zero_())

    def run_main(line: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(shlex.split(line.replace("FILES", str(files))))
        printed = capsys.readouterr()
        assert stopped.value.code == 1
        assert printed.out == ""
        lines = printed.err.splitlines()
        assert len(lines) == 1, printed.err
        assert lines[0].startswith("error: ")
        assert not list(tmp_path.rglob("version_*"))
        assert not (tmp_path / "runs").exists()
        # Words that only somebody who reads the libraries' sources understands.
        assert not re.search(r"Union subtypes|<class '|typing\.|Parser key|Namespace\(|object at 0x", lines[0])
        return lines[0].removeprefix("error: ")

    return run_main


FIT = f"fit {RECIPE} --model.weights null"
PARSED = {
    "": ["say what to do", "fit, validate, test", "--config configs/last4.yaml"],
    RECIPE: ["say what to do"],
    f"{RECIPE} --run.name test": ["say what to do"],
    f"{RECIPE} --run.name test fit": ["the command comes first", f"python -m src.cli fit {RECIPE} --run.name test"],
    f"{RECIPE} --run.name 'of mine' fit": [f"python -m src.cli fit {RECIPE} --run.name 'of mine'"],
    f"{RECIPE} fit": ["the command comes first", f"python -m src.cli fit {RECIPE}"],
    "fit": ["unfreezing.stages is missing", "--config configs/last4.yaml"],
    "test": ["unfreezing.stages is missing", "--config configs/last4.yaml"],
    f"fitt {RECIPE}": ["unknown command 'fitt'; did you mean fit?"],
    f"nothing {RECIPE}": ["unknown command 'nothing'", "fit, validate, test or predict"],
    "fit --config": ["--config has no value"],
    "fit --config nope.yaml": ["no configuration file 'nope.yaml'"],
    "fit --config FILES": ["is a folder"],
    "fit --config FILES/malformed.yaml": ["malformed.yaml' is not valid YAML at line 3, column"],
    "fit --config=FILES/malformed.yaml": ["malformed.yaml' is not valid YAML at line 3, column"],
    "fit --config FILES/list.yaml": ["list.yaml' holds no options"],
    "test --config '{unfreezing: {stages: {0: 0}}}'": ["no run in 'runs/default'"],
    "fit --config FILES/empty.yaml": ["empty.yaml' holds no options"],
    "fit --config FILES/indented.yaml": ["indented.yaml' has 0 where an option's name should be", "indentation"],
    "fit --config FILES/bare.yaml": ["bare.yaml' has nothing below 'model:'"],
    "fit --config FILES/binary.yaml": ["binary.yaml' cannot be read as YAML"],
    "fit --config FILES/key.yaml": ["unknown key model.hiden", "did you mean model.hidden?"],
    "fit --config FILES/room.yaml": ["unknown key trainr.max_epochs", "did you mean trainer.max_epochs?"],
    "fit --config FILES/value.yaml": ["trainer.max_epochs is 'abc': expected int or null."],
    "fit --config FILES/linked.yaml": [
        "linked.yaml' sets model.image_size, which cannot",
        "data.source.init_args.image",
    ],
    f"{FIT} --data FILES/seed.yaml": ["seed.yaml' sets data.seed, which cannot be set", "--seed_everything"],
    f"{FIT} --data=FILES/seed.yaml": ["seed.yaml' sets data.seed, which cannot be set", "--seed_everything"],
    f"{FIT} --data FILES/list.yaml": ["list.yaml' holds no options", "'option: value'"],
    f"{FIT} --config FILES/refers.yaml": ["seed.yaml' sets data.seed, which cannot be set", "--seed_everything"],
    f"{FIT} --trainer '{{max_epochs: 1, {' ' * 300}max_steps: 0.5}}'": ["trainer.max_steps is '0.5': expected int"],
    "fit --config FILES/far.yaml": ["unknown key data.image_size", "did you mean data.source.init_args.image_size?"],
    f"{FIT} --data.source.init_args.root FILES/images": ["images holds images", "--config configs/with/folder"],
    f"{FIT} --data.source.init_args.root FILES/images/train/cat": [
        "cat holds images",
        "--data.source Unlabelled",
    ],
    f"{FIT} --data.source.init_args.image_size 96": [
        "CIFAR10 has no such option",
        "--config configs/with/folder",
    ],
    "fit --config FILES/source.yaml": ["unknown option data.source.sise", "Sample has no such option"],
}

STOP_BY = "--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping --trainer.callbacks.monitor"
LEARN_FROM = "--trainer.callbacks+=src.callbacks.distillation.Distillation --trainer.callbacks.teacher"
KEEP_BY = "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.monitor"
OPTIONS = {
    "--unfreezing.rates '{-1: 1e-3}'": ["unfreezing.rates has -1: 0.001; neither epochs nor rates can be negative"],
    "--unfreezing.rates '{0: -1e-3}'": ["unfreezing.rates has 0: -0.001; neither epochs nor rates can be negative"],
    "--unfreezing.warmup_epochs -1": ["unfreezing.warmup_epochs is -1", "cannot be negative"],
    "--feature_cache.views 0": ["feature_cache.views is 0: give 1 or more"],
    "--model.optimizer src.model.muon.Muon --model.optimizer.weight_decay -1": ["Invalid weight decay: -1"],
    "--model.optimizer src.model.muon.Muon --model.optimizer.momentum 1": ["Invalid momentum: 1"],
    "--model.optimizer src.model.muon.Muon --model.optimizer.betas '[0.9, 1.0]'": ["Invalid betas: (0.9, 1.0)"],
    "--unfreezing.decay cosine --trainer.max_time 00:01:00:00 --trainer.max_epochs null": [
        "unfreezing.decay cosine needs an end: set trainer.max_epochs",
    ],
    "--trainer.max_epochs abc": ["trainer.max_epochs is 'abc': expected int or null."],
    "--trainer.max_epoch 3": ["unknown option --trainer.max_epoch; did you mean --trainer.max_epochs?"],
    "--trainer.max_epochs -5": ["trainer.max_epochs", "-5"],
    "--trainer.deterministic foo": ["trainer.deterministic is 'foo': expected true, false, warn or null."],
    "--trainer.callbacks Foo": ["trainer.callbacks is 'Foo'"],
    "--trainer.callbacks+=EarlyStoping": ["trainer.callbacks is 'EarlyStoping': expected a callback's class path"],
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.filename best": [
        "ModelCheckpoint's filename is 'best'"
    ],
    f"{KEEP_BY} val_loss": ["ModelCheckpoint's monitor is 'val_loss'", "val/loss"],
    f"{KEEP_BY} val/loss --trainer.limit_val_batches 0": ["ModelCheckpoint's monitor is 'val/loss'", "limit_val"],
    "--trainer.callbacks+=lightning.pytorch.callbacks.LearningRateFinder": [
        "LearningRateFinder",
        "optimizer.init_args.lr",
    ],
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelPruning --trainer.callbacks.pruning_fn l1_unstructured": [
        "ModelPruning"
    ],
    "--trainer.callbacks+=lightning.pytorch.callbacks.StochasticWeightAveraging --trainer.callbacks.swa_lrs 0.01": [
        "StochasticWeightAveraging",
        "PolynomialAveraging",
    ],
    "--trainer.callbacks+=lightning.pytorch.callbacks.BatchSizeFinder": ["BatchSizeFinder", "--data.batch_size"],
    "--trainer.callbacks+=src.callbacks.averaging.PolynomialAveraging "
    f"{KEEP_BY} val/f1 --trainer.callbacks.mode max --trainer.callbacks.save_weights_only true": [
        "ModelCheckpoint's save_weights_only would keep weights not averaged"
    ],
    "--trainer.callbacks+=lightning.pytorch.callbacks.BackboneFinetuning": ["BackboneFinetuning", "unfreezing.stages"],
    "--trainer.callbacks+=lightning.pytorch.callbacks.GradientAccumulationScheduler "
    "--trainer.callbacks.scheduling '{0: 2}'": [
        "GradientAccumulationScheduler",
        "--trainer.accumulate_grad_batches",
    ],
    "--trainer.callbacks+=lightning.pytorch.callbacks.Timer": ["Timer", "--trainer.max_time"],
    "--trainer.callbacks+=lightning.pytorch.callbacks.WeightAveraging": [
        "WeightAveraging by itself would fail on a GPU"
    ],
    f"{KEEP_BY} val/f1 --trainer.callbacks.mode max --trainer.callbacks.save_on_exception true": [
        "save_on_exception would save within a step"
    ],
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.train_time_interval 0:0:5 "
    "--trainer.accumulate_grad_batches 2": ["train_time_interval would save within a step", "every_n_train_steps"],
    f"{STOP_BY} train/loss --trainer.callbacks.check_on_train_epoch_end false": [
        "EarlyStopping's monitor is 'train/loss', known when an epoch ends"
    ],
    "--trainer.callbacks+=tests.support.Lacking --trainer.callbacks.at init": [
        "Lacking needs an extra, which is not here"
    ],
    "--trainer nope.yaml": ["trainer is 'nope.yaml': no such YAML file"],
    "--model.hiden 3": ["unknown option --model.hiden; did you mean --model.hidden?"],
    "--model.image_size 96": ["model.image_size cannot be set", "data.source.init_args.image_size"],
    "--model.num_classes 3": ["model.num_classes cannot be set", "data's classes"],
    "--data.seed 3": ["data.seed cannot be set", "--seed_everything"],
    "--data.image_size 96": ["unknown option --data.image_size; did you mean --data.source.init_args.image_size?"],
    "--model.batch_size 96": ["unknown option --model.batch_size; did you mean --data.batch_size?"],
    "--root images": ["did you mean --data.source.init_args.root or --run.root?"],
    "--lr 1e-3": ["unknown option --lr; did you mean --model.optimizer.init_args.lr?"],
    "--hidden 3": ["unknown option --hidden; did you mean --model.hidden?"],
    "--frobnicate 3": ["unknown option --frobnicate. See: python -m src.cli fit --help"],
    "extra": ["'extra' belongs to no option"],
    "--model.hidden": ["--model.hidden has no value"],
    "--model.hidden x": ["model.hidden is 'x': expected int."],
    "--model.hidden -3": ["model.hidden is -3", "or 0 for none"],
    "--model.dropout 2": ["model.dropout is 2", "must be 0 or more, and below 1"],
    "--model.label_smoothing 2": ["model.label_smoothing is 2", "must be 0 or more, and below 1"],
    "--model.optimizer torch.optim.Adm": ["model.optimizer is 'torch.optim.Adm'", "torch.optim.Adam"],
    "--model.optimizer Adam --model.optimizer.lr abc": ["model.optimizer.lr is 'abc': expected float."],
    "--model.optimizer Adam --model.optimizer.momentum 0.9": ["unknown option model.optimizer.momentum"],
    "--model.optimizer Muon": ["model.optimizer is 'Muon'", "give src.model.muon.Muon or torch.optim.Muon."],
    "--model.optimizer Adam --model.optimizer.lr -1": ["model.optimizer", "learning rate", "-1"],
    "--model.optimizer src.model.muon.Muon --model.optimizer.lr -1": ["model.optimizer", "learning rate", "-1"],
    "--model.optimizer src.model.muon.Muon --model.optimizer.ns_steps 0": ["model.optimizer", "iterations", "0"],
    "--model.weights nope.pth": ["no weights file 'nope.pth'", "IMAGENET1K_FEATURES"],
    "--model.weights FILES/junk.ckpt": [
        "junk.ckpt' cannot be read as weights",
        "tensors",
        "published weights, remove it",
    ],
    "--model.weights_input FOO": ["model.weights_input is 'FOO'", "IMAGENET1K_V1"],
    "--data.standardize foo": ["data.standardize is 'foo': expected weights or dataset."],
    "--model.weights IMAGENET1K_V1 --model.weights_input IMAGENET1K_FEATURES": [
        "weights_input is IMAGENET1K_FEATURES, and IMAGENET1K_V1 expect their own input: leave it out",
    ],
    "--weights_only false": ["weights_only is not offered: checkpoints are read as data"],
    "--data.standardize weights": ["data.standardize is 'weights'", "--model.weights_input"],
    "--data.batch_size 1": ["data.batch_size is 1", "at least 2"],
    "--data.val_fraction 2": ["val_fraction", "2", "above 0 and below 1"],
    "--data.split_seed -1": ["split_seed", "-1", "4294967295"],
    "--data.input_size 0": ["data.input_size is 0"],
    "--data.input_size 16": ["data.input_size is 16, and enlarges only", "32 pixels"],
    "--data.source ImageFolder --data.source.root FILES/images --data.source.image_size 16": [
        "16 pixels",
        "at least 32",
    ],
    "--unfreezing.rates '{0: high}'": ["unfreezing.rates is", "high': expected a mapping"],
    "--data.augmentation.flip maybe": ["data.augmentation.flip is 'maybe': expected"],
    "--data.source CIFAR10 --data.source.url http://[bad": ["'http://[bad' is no http, https or file URL"],
    "--data.augmentation.rotation -5": ["rotation=-5", "0 to 180 degrees"],
    "--data.augmentation.rotatoin 5": ["unknown option data.augmentation.rotatoin"],
    "--data.augmentation foo": ["data.augmentation is 'foo'", "null"],
    "--data.source Foo": ["data.source is 'Foo'", "CIFAR10, ImageFolder, Sample"],
    "--data.source foo.Bar": ["data.source is 'foo.Bar'", "CIFAR10, ImageFolder, Sample"],
    "--data.source torch.nn.Linear": ["data.source is 'torch.nn.Linear'", "CIFAR10, ImageFolder, Sample"],
    "--data.source.init_args.size abc": ["data.source.size is 'abc': expected int."],
    "--data.source.init_args.sise 60": ["unknown option data.source.sise", "Sample has no such option", "help Sample"],
    "--data.source.init_args.size 7": ["sample size 7", "at least 50"],
    "--data.source.init_args.seed -1": ["sample seed -1 is negative"],
    "--data.source ImageFolder": ["data.source.root is missing", "--data.source.init_args.root path/to/images"],
    "--data.source ImageFolder --data.source.root FILES/nope": ["no folder", "nope"],
    "--data.source ImageFolder --data.source.root FILES/nothing": ["no folder train/", "--data.source Unlabelled"],
    "--data.source ImageFolder --data.source.root FILES/images --data.source.image_size 0": ["image_size is 0"],
    "--data.source ImageFolder --data.source.root FILES/images --data.val_fraction 0.9": [
        "val_fraction",
        "0.9",
        "6 images",
    ],
    "--unfreezing.stages {0:4}": ["unfreezing.stages", "a space after each colon"],
    "--unfreezing.stages '{0: 19}'": ["unfreezing.stages", "19", "18"],
    "--unfreezing.stages '{1: 4}'": ["unfreezing.stages has no stage at epoch 0"],
    "--unfreezing.stages '{0: block9}'": ["unfreezing.stages", "block9", "block5_conv1"],
    "--unfreezing.decay foo": ["unfreezing.decay is 'foo': expected constant, linear or cosine."],
    "--unfreezing.block_factor 0": ["unfreezing.block_factor is 0"],
    "--unfreezing.decay linear --trainer.max_epochs -1": ["unfreezing.decay linear needs an end", "max_epochs"],
    "--unfreezing.decay cosine --trainer.max_epochs null --trainer.max_steps 50": ["cosine needs an end", "max_epochs"],
    "--seed_everything abc": ["seed_everything is 'abc': expected a whole number from 0 to 4294967295"],
    "--trainer.check_val_every_n_epoch null --trainer.val_check_interval 0.25": [
        "trainer.check_val_every_n_epoch null counts batches",
        "a number of batches",
    ],
    "--trainer.check_val_every_n_epoch null": ["trainer.check_val_every_n_epoch null counts batches"],
    "--trainer.gradient_clip_val -1": ["trainer.gradient_clip_val is -1"],
    "--trainer.gradient_clip_algorithm value": ["has no effect without trainer.gradient_clip_val"],
    "--seed_everything true": ["seed_everything is true", "4294967295"],
    "--seed_everything -5": ["seed_everything is -5", "4294967295"],
    "--trainer.accelerator foo": ["trainer.accelerator is 'foo': expected auto, cpu, "],
    "--trainer.devices 0": ["trainer.devices", "cpu", "1 or more"],
    "--trainer.strategy foo": ["trainer.strategy is 'foo'", "ddp"],
    "--trainer.strategy ddp_spawn --trainer.devices 2": ["trainer.strategy is 'ddp_spawn': expected auto or ddp."],
    "--trainer.strategy lightning.pytorch.strategies.DDPStrategy --trainer.strategy.start_method fork": [
        "trainer.strategy DDPStrategy is not supported so",
        "ddp",
    ],
    "--trainer.strategy fsdp": ["trainer.strategy is 'fsdp': expected auto or ddp."],
    "--trainer.barebones true": ["trainer.barebones is not offered"],
    "--trainer.enable_checkpointing false": ["trainer.enable_checkpointing is not offered"],
    "--trainer.precision bf16-true": ["trainer.precision bf16-true is not supported", "bf16-mixed"],
    "--trainer.precision 64-true": ["trainer.precision 64-true is not supported", "bf16-mixed"],
    "--trainer.overfit_batches 2": ["trainer.overfit_batches is not offered", "folder.yaml"],
    "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging "
    "--trainer.callbacks.update_starting_at_epoch 1": [
        "EMAWeightAveraging's update_starting_at_epoch would have the untrained weights validated",
    ],
    "--unfreezing.stages '{0: 4, 1: 0}' --trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging": [
        "unfreezing.stages freezes layers again",
        "averages",
    ],
    "--trainer.callbacks+=src.callbacks.averaging.PolynomialAveraging "
    "--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging": [
        "PolynomialAveraging and EMAWeightAveraging would both average the weights",
        "--trainer.callbacks",
    ],
    "--trainer.callbacks+=src.callbacks.averaging.PolynomialAveraging "
    "--trainer.callbacks+=src.callbacks.averaging.PolynomialAveraging": ["PolynomialAveraging", "more than one"],
    LEARN_FROM.rpartition(" ")[0]: ["trainer.callbacks.teacher is missing"],
    f"{LEARN_FROM} FILES/absent.ckpt --feature_cache.views null": [
        "Distillation's teacher: '",
        "absent.ckpt' is no checkpoint and no run",
    ],
    f"{LEARN_FROM} FILES/dict.ckpt --feature_cache.views null": ["Distillation's teacher: '", "no checkpoint"],
    f"{LEARN_FROM} FILES/junk.ckpt {LEARN_FROM} FILES/junk.ckpt": ["Distillation", "more than one"],
    f"{LEARN_FROM} FILES/junk.ckpt": ["must see the images", "--feature_cache.views null"],
    f"{LEARN_FROM} FILES/junk.ckpt --feature_cache.views null": ["junk.ckpt' is damaged or no checkpoint"],
    f"{LEARN_FROM} FILES/junk.ckpt --feature_cache.views null --model.label_smoothing 0.1": [
        "learns from no labels",
        "--model.label_smoothing 0",
    ],
    "--trainer.logger false": ["trainer.logger is not offered"],
    "--trainer.default_root_dir FILES": ["trainer.default_root_dir is not offered", "--run.root"],
    f"{STOP_BY} val_acc": [
        "EarlyStopping's monitor is 'val_acc'",
        "val/acc",
    ],
    f"{STOP_BY} train/loss --trainer.val_check_interval 0.5": ["monitor is 'train/loss', known when", "val/loss"],
    f"{STOP_BY} train/loss --trainer.check_val_every_n_epoch 2": ["'train/loss'", "check_on_train_epoch_end: true"],
    f"{KEEP_BY} train/loss --trainer.check_val_every_n_epoch 2": ["'train/loss'", "save_on_train_epoch_end: true"],
    f"{STOP_BY} val/acc": ["monitor is 'val/acc', and its mode 'min' takes the worst for the best: give mode max."],
    f"{KEEP_BY} val/loss --trainer.callbacks.mode max": ["'val/loss', and its mode 'max'", "mode min"],
    f"{STOP_BY} val/loss --trainer.callbacks.check_on_train_epoch_end true --trainer.check_val_every_n_epoch 2": [
        "monitor is 'val/loss', and it looks at the end of every epoch",
        "check_val_every_n_epoch 1",
    ],
    "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint --trainer.callbacks.save_last true": [
        "ModelCheckpoint's save_last would write last.ckpt"
    ],
    "--trainer.callbacks+=lightning.pytorch.callbacks.OnExceptionCheckpoint --trainer.callbacks.dirpath FILES": [
        "OnExceptionCheckpoint does not fit",
        "--ckpt_path last",
    ],
    f"{STOP_BY} val/loss --trainer.limit_val_batches 0": ["monitor is 'val/loss'", "limit_val_batches"],
    "--feature_cache.views 1 --feature_cache.place disk --feature_cache.folder FILES/junk.ckpt": [
        "features cannot be kept in",
        "--feature_cache.folder",
    ],
    "--trainer.val_check_interval 0": ["trainer.val_check_interval is 0", "0.5"],
    "--trainer.val_check_interval 00:00:01:00": ["trainer.val_check_interval is", "0.5"],
    "--trainer.val_check_interval 2000": ["trainer.val_check_interval is 2000, but an epoch has", "0.5"],
    "--trainer.limit_train_batches 0.0001": ["trainer.limit_train_batches is 0.0001", "none"],
    "--trainer.limit_train_batches 0": ["trainer.limit_train_batches is 0", "none"],
    "--trainer.limit_val_batches 0.0001": ["limit_val_batches"],
    "--data.source ImageFolder --data.source.root FILES/sorted --trainer.limit_val_batches 0.4 --data.batch_size 2": [
        "limit_val_batches is 0.4, and the val images lie class by class",
        "val/",
    ],
    "--trainer.limit_test_batches 0.0001": ["limit_test_batches"],
    "--trainer.sync_batchnorm true": ["trainer.sync_batchnorm is for GPUs"],
    "--model.optimizer.init_args.fused true --model.optimizer.init_args.foreach true": [
        "model.optimizer cannot be made: `fused` and `foreach` cannot be `True` together.",
    ],
    "--feature_cache.views 1 --feature_cache.limit_gib .inf": ["feature_cache.limit_gib is inf"],
    "--feature_cache.views 1 --feature_cache.limit_gib .nan": ["feature_cache.limit_gib is nan"],
    "--trainer.accumulate_grad_batches 0": ["trainer.accumulate_grad_batches is 0: it must be at least 1"],
    "--trainer.check_val_every_n_epoch 0": ["trainer.check_val_every_n_epoch is 0: it must be at least 1"],
    "--trainer.precision 17": ["trainer.precision is '17'", "bf16-mixed"],
    "--feature_cache.views 2 --feature_cache.folder kept": ["feature_cache.folder", "feature_cache.place disk"],
    "--trainer.limit_train_batches 2.5": ["limit_train_batches", "2.5"],
    "--trainer.gradient_clip_algorithm foo": ["trainer.gradient_clip_algorithm", "foo", "norm"],
    "--run.test_after_fit maybe": ["run.test_after_fit is 'maybe': expected true or false."],
    "--run.root FILES/junk.ckpt": ["runs cannot be kept in", "junk.ckpt/head", "Not a directory", "--run.root"],
    f"--run.warm_start {300 * 'x'}": ["xxx' cannot be used: File name too long. Mend that, or give another path."],
    "--run.warm_start FILES/nope.ckpt": ["no checkpoint", "nope.ckpt"],
    "--run.warm_start FILES/junk.ckpt": ["junk.ckpt' is damaged or no checkpoint"],
    "--run.warm_start FILES/dict.ckpt": ["dict.ckpt' is no checkpoint of a training"],
    "--run.warm_start best": ["no run in 'runs/head'"],
    "--ckpt_path last": ["no run in 'runs/head'", "fit --config"],
    "--ckpt_path FILES/nope.ckpt": ["no checkpoint", "nope.ckpt"],
    "--ckpt_path FILES/junk.ckpt": ["junk.ckpt' is damaged or no checkpoint"],
    "--ckpt_path FILES/dict.ckpt": ["dict.ckpt' is no checkpoint of a training"],
    "--ckpt_path FILES": ["no checkpoint"],
}


@pytest.mark.parametrize("line", PARSED)
def test_mistake_in_the_command_line(fail: Fail, line: str) -> None:
    message = fail(line)
    for words in PARSED[line]:
        assert words in message


@pytest.mark.parametrize("options", OPTIONS)
def test_mistake_in_an_option(fail: Fail, options: str) -> None:
    message = fail(f"fit {SAMPLE} {options}")
    for words in OPTIONS[options]:
        assert words in message


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_no_run_to_evaluate(fail: Fail, command: str) -> None:
    message = fail(f"{command} {SAMPLE}")
    assert "no run in 'runs/head'" in message
    assert "fit --config" in message


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_checkpoint_to_evaluate_is_none(fail: Fail, command: str) -> None:
    assert "junk.ckpt' is damaged" in fail(f"{command} {SAMPLE} --ckpt_path FILES/junk.ckpt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu(fail: Fail) -> None:
    message = fail(f"fit {SAMPLE} --config {CONFIGS}/with/gpu.yaml")
    assert "finds none here" in message
    assert "--trainer.accelerator cpu --trainer.precision 32-true --model.cuda_graphs false" in message


def test_existing_configurations_are_listed(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "configs" / "with").mkdir(parents=True)
    (tmp_path / "configs" / "a.yaml").touch()
    (tmp_path / "configs" / "with" / "b.yaml").touch()
    message = fail("fit --config configs/nope.yaml")
    assert message == "no configuration file 'configs/nope.yaml'; there are configs/a.yaml, configs/with/b.yaml."


def test_neither_network_nor_images(fail: Fail, tmp_path: Path) -> None:
    message = fail(f"fit {RECIPE} --model.weights null --data.source.init_args.root {tmp_path}/images")
    assert f"{tmp_path}/images/cifar-10-python.tar.gz is not there" in message
    assert "--config configs/with/sample.yaml" in message


def test_neither_network_nor_weights(fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    message = fail(f"fit {SAMPLE} --model.weights IMAGENET1K_FEATURES")
    assert f"{tmp_path}/torch_home/hub/checkpoints/vgg16_features-amdegroot-88682ab5.pth is not there" in message
    assert "--config configs/with/sample.yaml" in message


def test_settings_are_looked_at_before_weights_are_loaded(
    fail: Fail, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    assert "monitor is 'val/los'" in fail(f"fit {RECIPE} {STOP_BY} val/los")


@pytest.mark.parametrize(
    ("options", "words"), [("", "vgg16_features"), ("--run.warm_start FILES/junk.ckpt", "junk.ckpt' is damaged")]
)
def test_weights_are_looked_for_before_images_are_decoded(
    fail: Fail, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: str, words: str
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    shutil.copytree(files / "images" / "train", tmp_path / "images" / "train")
    folder = f"--config {CONFIGS}/with/folder.yaml --data.source.init_args.root {tmp_path}/images"
    assert words in fail(f"fit {RECIPE} {folder} {options}")
    assert not (tmp_path / "images" / ".thaw-cache").exists()


@pytest.mark.parametrize("command", ["test", "predict"])
def test_images_that_are_not_there_are_asked_for_before_there_is_a_run(
    fail: Fail, two_classes: Path, command: str
) -> None:
    options = "--model.hidden 8 --data.source ImageFolder --data.source.root FILES/images"
    message = fail(f"{command} {SAMPLE} {options} --ckpt_path {two_classes}")
    assert "the data source has no test images; add a 'test' folder beside 'train'" in message
    assert "--data.source Unlabelled" in message


def test_a_thread_does_not_print_what_the_process_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", lambda failure: told.append(failure.exc_value))
    defect = ValueError("a defect")

    def fail_with(error: Exception) -> None:
        raise error

    with threads_that_tell_once():
        for error in (OSError(errno.ENOSPC, "No space left on device"), defect):
            thread = threading.Thread(target=fail_with, args=(error,))
            thread.start()
            thread.join()
    assert told == [defect]


@pytest.mark.parametrize("connect", [os.pipe, pty.openpty])
def test_a_reader_or_a_terminal_that_is_gone_ends_nothing(connect: Callable[[], tuple[int, int]]) -> None:
    reading, writing = connect()
    with os.fdopen(writing, "w") as stream:
        os.close(reading)
        for _ in range(2):
            say("nobody reads this", stream)


def test_a_disk_without_room_is_told_apart_from_a_reader_that_is_gone() -> None:
    class Full(StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        say("this is lost", Full())


def test_recorded_steps_without_a_gpu(fail: Fail) -> None:
    message = fail(f"fit {SAMPLE} --model.cuda_graphs true --trainer.accelerator cpu")
    assert "model.cuda_graphs is for GPUs, and this run is on cpu: add --model.cuda_graphs false" in message


def test_compile_without_a_compiler(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    message = fail(f"fit {SAMPLE} --model.compile true")
    assert "model.compile needs a C++ compiler, and no-such-compiler is not here" in message


def test_compile_for_a_gpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="needs a C compiler, and gcc or clang is not here"):
        check_compiler(torch.device("cuda"))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_processors_that_can_augment_are_taken(kind: str) -> None:
    check_device(torch.device(kind), sync_batchnorm=False)


def test_apples_gpus_are_refused(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    device = property(lambda strategy: torch.device("mps"))
    monkeypatch.setattr("lightning.pytorch.strategies.SingleDeviceStrategy.root_device", device)
    assert fail(f"fit {SAMPLE}") == "Apple's GPUs are not supported: add --trainer.accelerator cpu."


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a checkpoint whose head is narrower than the recipe's."""
    path = tmp_path_factory.mktemp("narrow") / "narrow.ckpt"
    torch.save({"state_dict": TransferClassifier(hidden=8).state_dict(), "pytorch-lightning_version": "2.6.0"}, path)
    return path


@pytest.fixture(scope="module")
def two_classes(narrow: Path) -> Path:
    """Save the same of two classes instead of ten."""
    content = torch.load(narrow, weights_only=True)
    content["state_dict"] |= {"head.linear.weight": torch.zeros(2, 8), "head.linear.bias": torch.zeros(2)}
    torch.save(content, narrow.with_name("two.ckpt"))
    return narrow.with_name("two.ckpt")


@pytest.mark.parametrize(
    ("option", "advice"), [("--ckpt_path", "config.yaml"), ("--run.warm_start", "backbone alone, instead of run.warm")]
)
def test_checkpoint_of_another_architecture(fail: Fail, narrow: Path, option: str, advice: str) -> None:
    message = fail(f"fit {SAMPLE} {option} {narrow}")
    assert f"'{narrow}' is of another network: its head.hidden.bias is 8 instead of 256" in message
    assert advice in message


@pytest.mark.parametrize(
    ("environment", "by"),
    [
        ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        (
            {
                "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_JOB_NAME": "train", "SLURM_PROCID": "1",
                "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_JOB_NODELIST": "here",
            },
            "srun",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("overlay", ["", "--config configs/with/ddp.yaml"])  # on a CPU that takes one device
def test_processes_that_were_started_must_be_asked_for(
    fail: Fail, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], by: str, overlay: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)  # which Lightning takes from there, for good
    message = fail(f"fit {SAMPLE} {overlay.replace('configs', str(REPOSITORY / 'configs'))}")
    assert f"{by} has started 2 process(es), and trainer.devices times trainer.num_nodes is 1" in message


def test_processes_that_were_asked_for_are_taken(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the second of two machines; the mistake is found later."""
    launched = {"RANK": "1", "LOCAL_RANK": "0", "GROUP_RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rank_zero_only, "rank", 0, raising=False)
    options = "--trainer.strategy ddp --trainer.num_nodes 2 --data.val_fraction 2"
    assert "above 0 and below 1" in fail(f"fit {SAMPLE} {options}")


def test_a_part_of_what_lies_by_class_is_refused_to_other_commands(fail: Fail, two_classes: Path) -> None:
    options = "--model.hidden 8 --data.source ImageFolder --data.source.root FILES/sorted --data.batch_size 2"
    message = fail(f"validate {SAMPLE} {options} --ckpt_path {two_classes} --trainer.limit_val_batches 0.4")
    assert "the val images lie class by class" in message


def test_processes_that_srun_should_start(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert "put srun in front of python" in fail(f"fit {SAMPLE} --trainer.strategy ddp --trainer.devices 2")


def test_what_slurm_does_not_tell_lightning_is_named(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    assert "--ntasks-per-node=2" in fail(f"fit {SAMPLE}")


def test_memory_of_a_gpu_that_is_full_is_named(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: ImageDataModule, stage: str) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(ImageDataModule, "setup", refuse)
    message = fail(f"fit {SAMPLE}")
    assert "the GPU's memory is full" in message
    assert "data.batch_size" in message


def test_memory_that_is_full_is_named(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageDataModule, "setup", lambda self, stage: torch.empty(2**60))
    assert "there is not enough memory. In a training give a smaller data.batch_size" in fail(f"fit {SAMPLE}")


def test_what_lightning_refuses_is_told_in_its_words(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), plain_endings():
        raise MisconfigurationException("`ModelCheckpoint(monitor='val/mine')`\ncould not find it")
    assert capsys.readouterr().err == "error: ModelCheckpoint(monitor='val/mine') could not find it\n"


def test_other_failures_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a defect"), plain_endings():
        raise RuntimeError("a defect")


def test_letters_that_a_terminal_lacks_end_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    replace_unknown_characters()
    print("0 → 4", flush=True)
    assert terminal.buffer.getvalue() == b"0 ? 4\n"


def test_checkpoint_without_a_hidden_layer(fail: Fail, narrow: Path) -> None:
    message = fail(f"test {SAMPLE} --model.hidden 0 --ckpt_path {narrow}")
    assert "its head.hidden.bias has no place" in message


def test_checkpoint_of_other_classes(fail: Fail, tmp_path: Path) -> None:
    path = tmp_path / "pets.ckpt"
    data = {"classes": ["cat", "dog"], "mean": [0.0] * 3, "std": [1.0] * 3}
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "ImageDataModule": data}, path)
    message = fail(f"test {SAMPLE} --ckpt_path {path}")
    assert "trained on the classes cat, dog" in message
    assert "arrow, circle" in message


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_run_root_without_permission(fail: Fail, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "Permission denied" in fail(f"fit {SAMPLE} --run.root closed")


def test_folder_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as above, for those who run the tests as root."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UserError, match=r"no permission to write.*--run\.root"):
        make_folder(tmp_path, "runs", "--run.root")


def test_a_full_disk_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of the system that refuses every byte stands in for the checkpoint's."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")

    @contextmanager
    def nowhere(path: Path) -> Iterator[Path]:
        yield Path("/dev/full")

    monkeypatch.setattr("src.callbacks.checkpoints.replacing", nowhere)
    with pytest.raises(SystemExit) as stopped:
        main(shlex.split(f"fit {SAMPLE} --trainer.max_epochs 1 --run.root {tmp_path}"))
    assert stopped.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error: the disk is full")
    assert message.count("\n") == 1


def test_a_bug_keeps_its_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: ImageDataModule, stage: str) -> None:
        raise ValueError("a bug")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageDataModule, "setup", load)
    with pytest.raises(ValueError, match="a bug"):
        main(shlex.split(f"fit {SAMPLE}"))


@pytest.mark.slow
def test_libraries_are_silent(tmp_path: Path) -> None:
    """In a process of its own: Lightning's logger writes to the stream that it found when it was imported."""
    done = run("fit", *shlex.split(SAMPLE), "--data.batch_size", "1", "--run.root", str(tmp_path / "runs"), check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines() == ["error: data.batch_size is 1: BatchNorm in the head needs at least 2."]
    assert list(tmp_path.iterdir()) == []
    words = [*shlex.split(SAMPLE), "--trainer.max_epochs", "1", "--run.root", str(tmp_path)]
    assert run("fit", *words, warnings=True).stderr == ""


def test_the_seed_is_not_announced(fail: Fail) -> None:
    fail("fit")
    assert not logging.getLogger("lightning.fabric.utilities.seed").isEnabledFor(logging.INFO)


KNOWN = ["--model.hidden", "--model.dropout", "--trainer.max_epochs", "--trainer.logger", "--data.batch_size"]


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Something\n  nobody   foresaw", "Something nobody foresaw"),
        ("unrecognized arguments: --model.droput 3 4", "unknown option --model.droput; did you mean --model.dropout?"),
        ("unrecognized arguments: --batch_size 3", "unknown option --batch_size; did you mean --data.batch_size?"),
        ("unrecognized arguments: --trainer.foo 3", "unknown option --trainer.foo. See: python -m src.cli fit --help"),
        (
            "Subcommand 'fit' does not accept nested key 'model.hiden'",  # older versions of jsonargparse
            "unknown key model.hiden in a configuration file; did you mean model.hidden?",
        ),
        (
            "Key 'model.hiden' is not expected",
            "unknown key model.hiden in a configuration file; did you mean model.hidden?",
        ),
        (
            'Key "fit.unfreezing.stages" is required but not included in config object or its value is None.',
            "unfreezing.stages is missing: give a recipe, e.g. --config configs/last4.yaml",
        ),
        (
            "argument subcommand: invalid choice: 'tset' (choose from fit, validate, test, predict)",  # Python 3.12's
            "unknown command 'tset'; did you mean test?",
        ),
        ('Parser key "a.b":\n Parser key "c": Expected a <class \'int\'>. Got value: x', "a.b.c is 'x': expected int."),
        ('Parser key "a.b":\n  Something nobody foresaw', "a.b: Something nobody foresaw"),
        ('Parser key "a": Expected a <class \'int\'>. Got value: ' + 99 * "x", f"a is '{60 * 'x'}…': expected int."),
    ],
)  # fmt: skip
def test_plain(message: str, line: str) -> None:
    assert plain(message, KNOWN) == line


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("Something `nobody`\nforesaw", "the trainer cannot be set up: Something nobody foresaw"),
        (
            "You selected an invalid accelerator name: `accelerator='foo'`. Available names are: cpu, auto, mps.",
            "trainer.accelerator is 'foo': expected auto, cpu or mps.",
        ),
        (
            "You selected an invalid strategy name: `strategy='x'`. It must be either a string or an instance of "
            "`Strategy`. Example choices: auto, ddp, ... Find a complete list of options in our documentation at here",
            "trainer.strategy is 'x': expected auto or ddp.",
        ),
    ],
)
def test_plain_trainer(message: str, line: str) -> None:
    assert plain_trainer(message) == line


def test_suggestion_needs_a_similar_last_part() -> None:
    assert suggestion("--trainer.loger", KNOWN) == "; did you mean --trainer.logger?"
    assert suggestion("--trainer.devices", KNOWN) == ""
    assert suggestion("--logger", KNOWN) == ""


@pytest.mark.parametrize(
    ("words", "joined"), [([], ""), (["a"], "a"), (["a", "b"], "a or b"), (["a", "b", "c"], "a, b or c")]
)
def test_either(words: list[str], joined: str) -> None:
    assert either(words) == joined


def test_metrics_of_ones_own_can_be_monitored() -> None:
    stopping = EarlyStopping("mine")
    trainer = SimpleNamespace(check_val_every_n_epoch=1, val_check_interval=1.0, limit_val_batches=1.0)
    with pytest.raises(UserError, match="monitor is 'mine'"):
        check_monitors([stopping], trainer)
    check_monitors([stopping, Lacking("never")], trainer)
    check_monitors([EarlyStopping("mine", strict=False)], trainer)
    with pytest.raises(UserError, match="mode 'min' takes the worst for the best"):
        check_monitors([EarlyStopping("val/acc", strict=False)], trainer)


def test_a_callback_that_misses_its_extra_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = "--trainer.callbacks+=tests.support.Lacking --trainer.callbacks.at setup"
    with pytest.raises(SystemExit) as stopped:
        main(f"fit {SAMPLE} --run.root {tmp_path} {lacking}".split())
    assert stopped.value.code == 1
    assert capsys.readouterr().err == "error: Lacking needs an extra, which is not here\n"
