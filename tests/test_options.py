"""What else a training can be told, in every stage: optimizers, accumulation, clipping, averaging, determinism."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support import needs_int8, on_sample

from src.callbacks.history import read_history
from src.cli import main

pytestmark = pytest.mark.slow  # three stages each; test_configs.py takes a step with those that recipes use

STAGES = {0: 0, 1: 4, 2: 18}


def fit(root: Path, *more: str) -> dict[str, torch.Tensor]:
    """Train one epoch a stage, and give the last checkpoint's weights."""
    options = {
        "unfreezing.stages": json.dumps(STAGES), "trainer.max_epochs": len(STAGES), "data.source.size": 50,
        "run.root": root, "run.name": "run", "run.test_after_fit": False,
    }  # fmt: skip
    main(["fit", *on_sample("last4", options, *more)])
    return torch.load(root / "run" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def moved(weights: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in weights if name.endswith("weight") and not torch.equal(weights[name], reference[name])}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return fit(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "words",
    [
        ["--model.optimizer=AdamW", "--model.optimizer.weight_decay=0.5"],
        ["--model.optimizer=SGD", "--model.optimizer.momentum=0.9"],
        ["--model.optimizer=src.model.muon.Muon"],
        ["--trainer.accumulate_grad_batches=2"],
        ["--trainer.gradient_clip_val=0.01"],
        ["--model.label_smoothing=0.1"],
        ["--data.cutmix=0.5"],
    ],
    ids=lambda words: words[0].removeprefix("--"),
)
def test_option_changes_what_every_layer_learns(
    tmp_path: Path, plain: dict[str, torch.Tensor], words: list[str]
) -> None:
    weights = fit(tmp_path, *words)
    assert moved(weights, plain) == {name for name in plain if name.endswith("weight")}
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_early_stopping(tmp_path: Path) -> None:
    early = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor=val/loss"]
    fit(
        tmp_path,
        *early,
        "--trainer.callbacks.min_delta=100",
        "--trainer.callbacks.patience=1",
        "--trainer.max_epochs=9",
    )
    assert [row["epoch"] for row in read_history(tmp_path / "run" / "version_0" / "history.csv")] == [0, 1]


def test_deterministic_algorithms_suffice(tmp_path: Path, plain: dict[str, torch.Tensor]) -> None:
    try:
        assert moved(fit(tmp_path, "--trainer.deterministic=true"), plain) == set()
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "averaging",
    [
        ["--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay=0.9"],
        ["--trainer.callbacks+=src.callbacks.averaging.PolynomialAveraging", "--trainer.callbacks.eta=1"],
    ],
)
def test_average_of_weights_is_what_is_evaluated_and_saved(
    tmp_path: Path, plain: dict[str, torch.Tensor], averaging: list[str]
) -> None:
    weights = fit(tmp_path, *averaging, "--run.test_after_fit=true")
    assert moved(weights, plain) == {name for name in plain if name.endswith("weight")}
    checkpoint = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    files = [f"--config={checkpoint.parents[1] / 'config.yaml'}", f"--ckpt_path={checkpoint.parent / 'best.ckpt'}"]
    after_fit = (checkpoint.parents[1] / "test_report.json").read_text()
    main(["test", *files])
    assert (checkpoint.parents[1] / "test_report.json").read_text() == after_fit
    own = torch.load(checkpoint, weights_only=True)["current_model_state"]
    assert moved({name.removeprefix("module."): value for name, value in own.items()}, plain) == set()


@needs_int8
def test_eight_bits_go_with_averaged_weights_and_test_time_views(tmp_path: Path) -> None:
    more = ["--model.frozen_precision=int8", "--model.test_time_augmentation=flip_shift", "--run.test_after_fit=true"]
    more += ["--trainer.callbacks+=lightning.pytorch.callbacks.EMAWeightAveraging", "--trainer.callbacks.decay=0.9"]
    fit(tmp_path, *more, "--unfreezing.stages={0: 0, 1: 4}")
    version = tmp_path / "run" / "version_0"
    report = json.loads((version / "test_report.json").read_text())
    files = [f"--config={version / 'config.yaml'}", f"--ckpt_path={version / 'checkpoints' / 'best.ckpt'}"]
    main(["test", *files])
    again = json.loads((version / "test_report.json").read_text())
    assert "test_time_augmentation" in report
    assert again == report
