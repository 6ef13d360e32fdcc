"""The benchmarks run. What they measure is for them to say."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

from benchmarks.training import train


@pytest.mark.parametrize(
    ("name", "words", "printed"),
    [
        ("input_pipeline", ["--rounds", "2"], r"share of the forward pass: \d"),
        ("step", ["--rounds", "2", "--batch-size", "4", "--half"], r"\d ms .* images/s"),
    ],
)
def test_benchmark_runs(
    name: str, words: list[str], printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *words])
    importlib.import_module(f"benchmarks.{name}").main()
    assert re.search(printed, capsys.readouterr().out)


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
    words = ["--config=configs/head.yaml", "--config=configs/with/sample.yaml", "--data.source.size=50"]
    first = train(tmp_path, "run", 1, words)
    (folder,) = tmp_path.glob("run-*")
    (folder / "version_0" / "history.csv").unlink()
    (folder / "version_0" / "checkpoints" / "last.ckpt").unlink()
    again = train(tmp_path, "run", 1, words)
    assert [row["train/loss"] for row in again] == [row["train/loss"] for row in first]
    assert train(tmp_path, "run", 1, words) == again
