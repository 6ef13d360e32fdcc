"""The benchmarks run. What they measure is for them to say."""

from __future__ import annotations

import importlib
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support import on_sample

from benchmarks import ablation, input_pipeline, race
from benchmarks.arithmetic import step_gflop
from benchmarks.timing import quartiles
from benchmarks.training import train
from src.model import vgg
from src.model.classifier import TransferClassifier


@pytest.mark.parametrize(
    ("name", "words", "printed"),
    [
        ("input_pipeline", ["--rounds", "2", "--batch-size", "4"], r"share of the forward pass: \d"),
        ("step", ["--rounds", "2", "--batch-size", "4", "--half"], r"\d ms .* images/s\n\d+ GFLOP/s, \d+% of"),
    ],
)
def test_benchmark_runs(
    name: str, words: list[str], printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.setattr(input_pipeline, "IMAGES", 20)  # fewer batches than there are calls
    importlib.import_module(f"benchmarks.{name}").main()
    assert re.search(printed, capsys.readouterr().out)


@pytest.mark.parametrize("half", [False, True])
def test_a_step_is_counted_without_the_padding_of_small_maps(monkeypatch: pytest.MonkeyPatch, half: bool) -> None:
    """Three products for each of a convolution's forwards, but for the gradient of the images."""
    sides = [32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2]
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    pairs = [(3 * side - 2) ** 2 if side <= 4 else 9 * side**2 for side in sides]  # of a pixel with a tap of a kernel
    products = [pair * before * after for pair, (before, after) in zip(pairs, pairwise(channels), strict=True)]
    head = 512 * 256 + 256 * 10
    model = TransferClassifier(weights=None)
    model.trainable_layers = 18
    monkeypatch.setattr(vgg, "fused_for", lambda x, layers: pytest.fail("what it computes would not be counted"))
    found = step_gflop(model, torch.zeros(2, 3, 32, 32), half=half)
    assert found == pytest.approx(2 * (3 * (sum(products) + head) - products[0]) / 1e9)


def contestant(name: str, train: float, val: float, rest: float) -> race.Contestant:
    found = race.Contestant(name, [])
    found.rates, found.rest = {"train": [train] * 2, "val": [val] * 2}, [rest]
    return found


def test_thirty_epochs_are_added_up(tmp_path: Path) -> None:
    """35,000 and 15,000 images an epoch; views fill the cache at the rate of what is not cached."""
    racers = {
        each.name: each
        for each in (
            contestant(race.INT8, 100, 150, 1), contestant(race.INT8_CACHED, 700, 1500, 2),
            contestant(race.STOCK, 70, 100, 3), contestant(race.KERAS, 50, 60, 40),
        )
    }  # fmt: skip
    with_cache = 8 * 350 + 22 * 50 + 100 + 29 * 10 + 30 * 2
    assert race.thirty_epochs(racers, [8]) == pytest.approx(
        {
            f"{race.INT8}, 8 cached views": with_cache,
            race.INT8: 30 * (350 + 100 + 1),
            race.STOCK: 30 * (500 + 150 + 3),
            race.KERAS: 30 * (700 + 250),
        }
    )
    assert f"{30 * 653 / with_cache:.1f} times as long" in race.report("last4", racers, [8])


def test_spread_of_few_values_stays_within_them() -> None:
    assert quartiles([2.0]) == (2.0, 2.0, 2.0)
    assert quartiles([4.0, 2.0]) == (3.0, 2.0, 4.0)
    assert quartiles([9.0, 2.0, 4.0]) == (4.0, 2.0, 9.0)
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]) == (4.0, 2.0, 6.0)


def test_accuracies_of_the_ablation_are_of_validated_epochs() -> None:
    rows = [{"epoch": float(n), "train/acc": 0.1 * n, "train_seconds": 5.0} for n in range(4)]
    rows[1]["val/acc"], rows[2]["val/acc"] = 0.7, 0.6
    (line,) = [line for line in ablation.table({ablation.BASE: {777: rows}}).splitlines() if ablation.BASE in line]
    assert [column.strip() for column in line.split("|")[3:8]] == ["70.0", "", "60.0", "20.0", "20"]


@pytest.mark.slow
def test_race_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    monkeypatch.setenv("THAW_BENCH_IMAGES", "140")
    options = ["--jobs", "last4", "--rounds", "2", "--output", str(tmp_path), "--keras", str(tmp_path / "none")]
    monkeypatch.setattr(sys, "argv", ["race", *options, "--only", "thaw", "bare loop", "stock Lightning"])
    importlib.import_module("benchmarks.race").main()
    assert re.search(r"A step of thaw takes \d", capsys.readouterr().out)
    assert (tmp_path / "race.md").stat().st_size > 0
    assert (tmp_path / "race.png").stat().st_size > 0


@pytest.mark.slow
def test_a_training_that_was_cut_off_before_its_first_checkpoint_is_done_again(tmp_path: Path) -> None:
    words = on_sample("head", {"data.source.size": 50})
    first = train(tmp_path, "run", 1, words)
    (folder,) = tmp_path.glob("run-*")
    (folder / "version_0" / "history.csv").unlink()
    (folder / "version_0" / "checkpoints" / "last.ckpt").unlink()
    again = train(tmp_path, "run", 1, words)
    assert [row["train/loss"] for row in again] == [row["train/loss"] for row in first]
    assert train(tmp_path, "run", 1, words) == again
