"""Frozen is frozen, thawed moves: eager and compiled, in single and half precision, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY, run

from src.model.vgg import LAYERS

STAGES = {0: 0, 1: 4, 2: 18, 3: 3}  # the last one freezes again
CONVOLUTIONS = [name for name in LAYERS if "conv" in name]


def train(root: Path, processes: int, precision: str, compiled: bool) -> list[dict[str, Any]]:
    """Train one epoch a stage, and give what a witness saw at the end of each."""
    files = ["last4.yaml", "with/sample.yaml"] + ["with/ddp.yaml"] * (processes > 1)
    options = {
        "unfreezing.stages": json.dumps(STAGES), "data.source.size": 60, "data.batch_size": 16 // processes,
        "trainer.max_epochs": len(STAGES), "trainer.accelerator": "cpu", "trainer.devices": processes,
        "trainer.precision": precision, "model.compile": compiled, "model.optimizer": "AdamW",
        "run.root": root, "run.test_after_fit": False,
        "trainer.callbacks+": "tests.support.Witness", "trainer.callbacks.folder": root / "seen",
    }  # fmt: skip
    words = [word for file in files for word in ("--config", str(REPOSITORY / "configs" / file))]
    run("fit", *words, *(f"--{option}={value}" for option, value in options.items()))
    return [json.loads((root / "seen" / f"epoch{epoch}-rank{processes - 1}.json").read_text()) for epoch in STAGES]


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
