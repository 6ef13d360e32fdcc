"""Frozen is frozen, thawed moves: eager and compiled, in single and half precision, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from support import on_sample, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from src.callbacks.unfreezing import StagedUnfreezing, _wrap_again
from src.cli import main
from src.model.classifier import TransferClassifier
from src.model.vgg import LAYERS

STAGES = {0: 0, 1: 4, 2: 18, 3: 3}  # the last one freezes again
CONVOLUTIONS = [name for name in LAYERS if "conv" in name]


def train(root: Path, processes: int, precision: str, compiled: bool) -> list[dict[str, Any]]:
    """Train one epoch a stage, and give what a witness saw at the end of each."""
    options = {
        "unfreezing.stages": json.dumps(STAGES), "data.source.size": 60, "data.batch_size": 16 // processes,
        "trainer.max_epochs": len(STAGES), "trainer.precision": precision, "model.compile": compiled,
        "model.optimizer": "AdamW", "run.root": root, "run.test_after_fit": False,
        "trainer.callbacks+": "tests.support.Witness", "trainer.callbacks.folder": root / "seen",
    }  # fmt: skip
    command = ["fit", *on_sample("last4", options, processes=processes)]
    if processes == 1 and not compiled:
        main(command)
    else:
        run(*command)
    return [json.loads((root / "seen" / f"epoch{epoch}-rank{processes - 1}.json").read_text()) for epoch in STAGES]


def test_curves_in_tensorboard_are_the_schedule(tmp_path: Path) -> None:
    """What is drawn at each epoch is the rate in its middle, which the table below works out by hand."""
    options = {
        "unfreezing.stages": "{0: 0, 2: 4}", "unfreezing.rates": "{0: 1e-3, 2: 4e-4}", "unfreezing.block_factor": 0.5,
        "unfreezing.decay": "linear", "unfreezing.warmup_epochs": 0.75, "data.source.size": 50, "data.batch_size": 18,
        "trainer.max_epochs": 4, "run.root": tmp_path, "run.name": "run", "run.test_after_fit": False,
    }  # fmt: skip
    main(["fit", *on_sample("last4", options)])
    events = EventAccumulator(str(tmp_path / "run" / "version_0")).Reload()
    # Two steps an epoch, so a warm-up of three quarters of one is over with the second. Then the head's rate falls
    # over 3.25 epochs from epoch 0.75 to 4, block5's over 1.25 epochs from epoch 2.75 to 4.
    head = [1e-3, 1e-3 * (1 - 0.75 / 3.25), 4e-4 * (1 - 1.75 / 3.25), 4e-4 * (1 - 2.75 / 3.25)]
    block5 = [0, 0, 2e-4, 2e-4 * (1 - 0.75 / 1.25)]
    trained = [134_410, 134_410, 134_410 + 7_079_424, 134_410 + 7_079_424]
    drawn = {"lr/head": head, "lr/block5_conv1": block5, "lr/block4_conv3": [0] * 4, "trainable_parameters": trained}
    for name, expected in drawn.items():
        scalars = events.Scalars(name)
        assert [scalar.step for scalar in scalars] == [0, 1, 2, 3]
        assert [scalar.value for scalar in scalars] == pytest.approx(expected, rel=1e-6)
    last = torch.load(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    used = {group["layer"]: group["lr"] for group in last["optimizer_states"][0]["param_groups"]}  # in the last step
    assert used["head"] == pytest.approx(head[-1])
    assert used["block5_conv1"] == pytest.approx(block5[-1])
    assert used["block4_conv3"] == 0


@pytest.mark.parametrize(
    ("processes", "precision", "compiled"),
    [
        (1, "32-true", False),
        pytest.param(1, "bf16-mixed", False, marks=pytest.mark.slow),
        pytest.param(1, "32-true", True, marks=pytest.mark.slow),
        pytest.param(1, "bf16-mixed", True, marks=pytest.mark.slow),
        pytest.param(2, "32-true", False, marks=pytest.mark.slow),
        pytest.param(2, "bf16-mixed", False, marks=pytest.mark.slow),
        pytest.param(2, "32-true", True, marks=pytest.mark.slow),
        pytest.param(2, "bf16-mixed", True, marks=pytest.mark.slow),
    ],
)
def test_frozen_is_frozen_and_thawed_moves(tmp_path: Path, processes: int, precision: str, compiled: bool) -> None:
    epochs = train(tmp_path, processes, precision, compiled)
    for epoch in range(1, len(STAGES)):
        trained = {name for name in CONVOLUTIONS if LAYERS.index(name) >= len(LAYERS) - STAGES[epoch]} | {"head"}
        before, after = epochs[epoch - 1]["layers"], epochs[epoch]["layers"]
        moved = {name for name in (*CONVOLUTIONS, "head") if before[name] != after[name]}
        assert moved == trained
        assert set(epochs[epoch]["with_gradient"]) == trained
        assert set(epochs[epoch]["with_state"]) == trained


def test_what_should_train_and_gets_no_gradient_is_named() -> None:
    """As a graph compiled for an earlier stage would leave it."""
    model = TransferClassifier(weights=None, hidden=0)
    model.trainable_layers = 0
    with pytest.raises(RuntimeError, match=r"got no gradient: head\.linear\.weight, head\.linear\.bias"):
        StagedUnfreezing({0: 0}).on_before_optimizer_step(None, model, None)  # type: ignore[arg-type]


def test_each_stage_is_looked_at_anew() -> None:
    model, schedule = TransferClassifier(weights=None, hidden=0), StagedUnfreezing({0: 0, 1: 4})
    for epoch in (0, 1):
        schedule.verified = True
        trainer: Any = SimpleNamespace(current_epoch=epoch, optimizers=[], strategy=None)
        schedule._apply(trainer, model)
        assert not schedule.verified


def test_a_layer_that_should_train_is_thawed_whatever_a_checkpoint_says() -> None:
    """From Python, a second training of the same network may begin with a later stage."""
    model, schedule = TransferClassifier(weights=None, hidden=0), StagedUnfreezing({0: 0, 1: 4})
    trainer: Any = SimpleNamespace(current_epoch=0, optimizers=[], strategy=None)
    schedule._apply(trainer, model)
    model.depth = 14  # as a checkpoint of epoch 1 has it
    trainer.current_epoch = 1
    schedule._apply(trainer, model)
    assert all(parameter.requires_grad for parameter in model.backbone.block5_conv1.parameters())  # type: ignore[union-attr]
    assert not any(parameter.requires_grad for parameter in model.backbone.prefix_parameters(14))


def test_ddp_is_made_anew_between_two_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr("src.callbacks.unfreezing.wait_for", lambda device: done.append("waited"))
    monkeypatch.setattr(DDPStrategy, "configure_ddp", lambda strategy: done.append("made"))
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device("cpu"))
    _wrap_again(SimpleNamespace(strategy=DDPStrategy(), lightning_module=torch.nn.Linear(1, 1)))  # type: ignore[arg-type]
    assert done == ["waited", "made", "waited"]
