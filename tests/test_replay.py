"""Recorded steps, without a GPU: what a CUDA graph does is played by the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from support import REPOSITORY
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from src import replay
from src.callbacks.history import Row, read_history
from src.cli import main
from src.data.datamodule import ImageDataModule
from src.model.classifier import TransferClassifier
from src.replay import Replay

R = TypeVar("R")


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the CPU record and repeat as a GPU would, and list what it does."""
    done: list[str] = []

    def capture(work: Callable[[], R]) -> tuple[Callable[[], None], R]:
        with _unchanged():  # a recording computes nothing
            result = work()
        done.append("recorded")

        def again() -> None:
            done.append("repeated")
            for kept, new in zip(tree_leaves(result), tree_leaves(work()), strict=True):
                if isinstance(kept, Tensor) and not isinstance(kept, nn.Parameter):
                    kept.copy_(new)

        return again, result

    monkeypatch.setattr(replay, "capture", capture)
    monkeypatch.setattr(ImageDataModule, "_replays", lambda data, batch: data.cuda_graphs)
    monkeypatch.setattr("src.cli.check_graphs", lambda device: None)
    return done


class _unchanged:
    """Take back what is done to networks, their metrics and random numbers."""

    def __enter__(self) -> None:
        models = [thing for thing in gc.get_objects() if type(thing) is TransferClassifier]
        self.tensors = [tensor for model in models for tensor in _state(model)]
        self.before, self.random = [tensor.clone() for tensor in self.tensors], torch.get_rng_state()

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.random)
        with torch.no_grad():
            for tensor, before in zip(self.tensors, self.before, strict=True):
                tensor.copy_(before)


def _state(model: TransferClassifier) -> list[Tensor]:
    metrics = [model.train_metrics, model.val_metrics["loss_and_accuracy"], model.test_metrics["loss_and_accuracy"]]
    states: list[Any] = [value for metric in metrics for value in metric.metric_state.values()]
    return [*model.buffers(), *states]


def test_calls_are_repeated_with_new_content(recorded: list[str]) -> None:
    double = Replay(lambda values, times: values * times)
    found = [double(torch.full((2,), float(number)), 2).clone() for number in range(5)]
    assert [each.tolist() for each in found] == [[0, 0], [2, 2], [4, 4], [6, 6], [8, 8]]
    assert recorded == ["recorded", "repeated", "repeated", "repeated"]
    assert double(torch.ones(2), 3).tolist() == [3, 3]  # another argument is another recording
    assert double(torch.ones(3), 2).tolist() == [2, 2, 2]
    assert recorded.count("recorded") == 1


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
    """Train four epochs of seven batches, the last of which is smaller, and give their metrics."""
    options = {
        "data.source.size": 150, "data.batch_size": 16, "trainer.max_epochs": 4, "run.root": root, "run.name": name,
        "run.test_after_fit": False, "feature_cache.views": "null", **options,
    }  # fmt: skip
    configs = [f"--config={REPOSITORY / 'configs' / file}" for file in ("last4.yaml", "with/sample.yaml")]
    main(["fit", *configs, *(f"--{option}={value}" for option, value in options.items())])
    history = read_history(root / name / "version_0" / "history.csv")
    timed = ("images_per_second", "train_seconds")
    return [{metric: value for metric, value in row.items() if metric not in timed} for row in history]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"unfreezing.stages": "{0: 4, 2: 8}", "model.optimizer": "SGD", "model.optimizer.init_args.lr": 1e-2},
        {"data.cutmix": 0.5, "model.dropout": 0.5, "trainer.gradient_clip_val": 0.5},
        {"feature_cache.views": 2},
    ],
    ids=["plain", "stages", "mixed", "cached"],
)
def test_recorded_steps_are_steps(tmp_path: Path, recorded: list[str], options: dict[str, Any]) -> None:
    ordinary = train(tmp_path, "ordinary", options)
    assert not recorded
    assert train(tmp_path, "recorded", {**options, "model.cuda_graphs": True}) == ordinary
    assert recorded.count("repeated") > 20
