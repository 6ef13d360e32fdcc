"""Frozen layers in eight bits are nearly those in full precision, and the same ones everywhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from support import needs_int8, on_sample, untimed
from torch import Tensor, nn
from torch.nn import functional as F

from src.cli import main
from src.errors import UserError
from src.machine import check_int8
from src.model import int8
from src.model.classifier import TransferClassifier
from src.model.int8 import LEVELS, Int8Layers, Ranges, measure
from src.model.vgg import ConvReLU
from src.saved_training import SavedTraining


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 60


def network(depth: int, images: Tensor, precision: str = "int8") -> TransferClassifier:
    torch.manual_seed(0)
    model = TransferClassifier(weights=None, frozen_precision=precision, image_size=images.shape[-1]).eval()
    model.trainable_layers = 18 - depth
    assert model.needs_calibration == (precision == "int8")
    if model.needs_calibration:
        model.calibrate(images)
    return model


@needs_int8
@pytest.mark.parametrize("size", [32, 47])
@pytest.mark.parametrize("depth", [1, 3, 14, 18])
def test_features_are_nearly_those_of_full_precision(depth: int, size: int) -> None:
    images = noise(8, 3, size, size)
    model = network(depth, images)
    found, exact = model.prefix(images), network(depth, images, "same").prefix(images)
    assert found.dtype == torch.uint8
    assert found.shape == exact.shape
    error = found * model.ranges.scale - exact
    assert error.norm() < 0.05 * exact.norm()
    assert error[..., 0].norm() < 0.05 * exact[..., 0].norm()  # at the padding too


@needs_int8
@pytest.mark.parametrize("entered", [14, 18])
def test_logits_are_nearly_those_of_full_precision(entered: int) -> None:
    images = noise(8, 3, 32, 32)
    for mixed in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed), torch.no_grad():
            found, exact = (network(entered, images, precision)(images).float() for precision in ("int8", "same"))
        assert (found - exact).norm() < 0.1 * exact.norm()


@needs_int8
def test_a_convolution_counts_in_levels() -> None:
    """Worked out in whole numbers, rounding at the end only."""
    layer = ConvReLU(3, 4)
    nn.init.uniform_(layer.bias)
    low, high, limit = -50.0, 205.0, 90.0
    levels = torch.randint(0, 256, (2, 3, 6, 6)).double()
    scale, zero = (high - low) / LEVELS, 50
    largest = layer.weight.detach().abs().amax((1, 2, 3), keepdim=True)
    weights = (layer.weight.detach() / (largest / 127)).round()
    sums = F.conv2d(levels - zero, weights.double(), padding=1) * scale * (largest / 127).view(1, 4, 1, 1)
    expected = (F.relu(sums + layer.bias.detach().view(1, 4, 1, 1)) / (limit / LEVELS)).round().clamp(max=LEVELS)
    found = Int8Layers([layer], Ranges(low, high, [limit]))((levels.float() - zero) * scale)
    assert (found - expected).abs().max() <= 1  # a sum halfway between two levels may go either way
    assert (found == expected).float().mean() > 0.98


@needs_int8
def test_poolings_are_exact() -> None:
    images, layer = noise(2, 3, 45, 45), ConvReLU(3, 8)
    ranges = measure([layer], images)
    pooled = Int8Layers([layer, nn.MaxPool2d(2)], ranges)(images)
    assert torch.equal(pooled.float(), F.max_pool2d(Int8Layers([layer], ranges)(images).float(), 2))


@needs_int8
def test_layers_that_put_out_nothing_do_no_harm() -> None:
    layer = ConvReLU(3, 4)
    nn.init.zeros_(layer.weight)
    images = torch.zeros(1, 3, 4, 4)
    assert Int8Layers([layer], measure([layer], images))(images).sum() == 0


@needs_int8
def test_ranges_belong_to_a_stage() -> None:
    images = noise(2, 3, 32, 32)
    model = network(14, images)
    model.prefix(images)
    ranges = model.ranges
    model.trainable_layers = 4  # no other stage
    assert model.ranges == ranges
    model.trainable_layers = 8
    assert model.needs_calibration
    model.trainable_layers = 18
    assert not model.needs_calibration


def test_measuring_takes_as_many_layers_as_are_frozen() -> None:
    images = noise(2, 3, 32, 32)
    assert [len(network(depth, images).ranges.limits) for depth in (1, 3, 14, 18)] == [1, 2, 10, 13]


@needs_int8
@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_images_need_not_surround_zero(shift: float) -> None:
    images = noise(4, 3, 8, 8) + shift
    layer = ConvReLU(3, 16)
    ranges = measure([layer], images)
    found = Int8Layers([layer], ranges)(images) * ranges.scale
    assert (found - layer(images)).norm() < 0.05 * layer(images).norm()


def test_where_it_cannot_be_computed_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="is for CPUs"):
        check_int8(torch.device("cuda"))
    monkeypatch.setattr(int8, "supported", lambda: True)
    check_int8(torch.device("cpu"))
    with pytest.raises(UserError, match=r"'x.ckpt' was not trained"):
        SavedTraining(Path("x.ckpt"), {}).check_ranges()
    monkeypatch.setattr(int8, "supported", lambda: False)
    with pytest.raises(UserError, match="VNNI"):
        check_int8(torch.device("cpu"))


def test_the_command_line_refuses_it_before_there_is_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(int8, "supported", lambda: False)
    with pytest.raises(SystemExit):
        main(words("fit", tmp_path))
    assert "frozen_precision int8 needs" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def words(command: str, root: Path, *more: str) -> list[str]:
    options = {"data.source.size": 60, "run.root": root, "run.name": "run", "model.frozen_precision": "int8"}
    return [command, *on_sample("last4", options, *more)]


@pytest.mark.slow
@needs_int8
def test_other_commands_compute_as_training_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Frozen layers in eight bits, thawed ones not, although nothing thaws outside of training."""
    sanity = "--trainer.num_sanity_val_steps=1"  # frozen layers are needed before the first epoch begins
    main(words("fit", tmp_path, "--trainer.max_epochs=3", "--unfreezing.stages={0: 0, 1: 4}", sanity))
    losses = [row["val/loss"] for row in untimed(tmp_path / "run" / "version_0")]
    capsys.readouterr()
    main(words("validate", tmp_path, "--ckpt_path=last"))
    shown = re.search(r"val/loss ([0-9.]+)", capsys.readouterr().out)
    assert shown is not None
    assert float(shown[1]) == pytest.approx(losses[-1], abs=1e-4)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    path = tmp_path / "other" / "version_0" / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["frozen"]["ranges"] = None
    torch.save(content, path)
    with pytest.raises(SystemExit):
        main(words("validate", tmp_path, f"--ckpt_path={path}"))
    assert "was not trained with frozen layers in eight bits" in capsys.readouterr().err
