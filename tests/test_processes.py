"""Two processes are one: the same images, the same weights, the same metrics."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from support import needs_int8, on_sample, run, signal_at

from src.callbacks.history import HISTORY, read_history
from src.cli import main

EPOCHS = 3
TOLERANCE = 0.01  # of the change of each parameter


def words(root: Path, name: str, processes: int, *more: str) -> list[str]:
    options = {
        "data.source.size": 92, "data.batch_size": 32 // processes, "run.root": root, "run.name": name,
        "feature_cache.views": "null",  # else images stay with their process, which makes batches of its own
        "model.hidden": 0,  # without BatchNorm, whose statistics are a process's own on CPUs
        # Adam and Muon hide a gradient of the wrong size, and make much of the last digits of a small one.
        "model.optimizer": "torch.optim.SGD", "model.optimizer.lr": 1.0, "unfreezing.rates": "null",
    }  # fmt: skip
    return on_sample("staged", options, *more, processes=processes)


def fit(root: Path, name: str, processes: int, *more: str) -> None:
    witness = ["--trainer.callbacks+=tests.support.Witness", "--trainer.callbacks.folder", str(root / f"{name}-seen")]
    stages = ["--unfreezing.stages", "{0: 0, 1: 4, 2: 18}", "--trainer.max_epochs", str(EPOCHS)]
    stages += ["--run.test_after_fit", "false"]
    command = ["fit", *words(root, name, processes, *stages, *witness, *more)]
    if processes == 1:
        main(command)
    else:
        run(*command, threads=1)  # as many in all as the single process has: more would only wait for each other


def seen(root: Path, name: str, epoch: int, rank: int) -> dict[str, Any]:
    return json.loads((root / f"{name}-seen" / f"epoch{epoch}-rank{rank}.json").read_text())


def assert_alike(ours: list[list[float]], theirs: list[list[float]]) -> None:
    """Compare what an epoch changed, parameter by parameter."""
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True)):
        size = math.hypot(*their)
        assert math.dist(our, their) <= TOLERANCE * size, number


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    fit(root, "one", 1)
    fit(root, "two", 2)
    return root


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_replicas_are_identical_after_every_stage(runs: Path, epoch: int) -> None:
    first, second = (seen(runs, "two", epoch, rank) for rank in (0, 1))
    assert first["bits"] == second["bits"]
    assert epoch == 0 or first["bits"] != seen(runs, "two", epoch - 1, 0)["bits"]


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_processes_share_the_augmented_images_of_an_epoch(runs: Path, epoch: int) -> None:
    both = [tuple(image) for rank in (0, 1) for image in seen(runs, "two", epoch, rank)["images"]]
    assert sorted(both) == sorted(tuple(image) for image in seen(runs, "one", epoch, 0)["images"])
    assert len(both) == 64


@pytest.mark.parametrize("epoch", range(EPOCHS))
def test_training_follows_that_of_one_process(runs: Path, epoch: int) -> None:
    ours, theirs = (seen(runs, name, epoch, 0)["changes"] for name in ("two", "one"))
    assert_alike(ours, theirs)


def test_measures_count_the_images_of_all_processes(runs: Path) -> None:
    one, two = (read_history(runs / name / "version_0" / HISTORY)[0] for name in ("one", "two"))
    for metric in ("train/loss", "train/acc", "val/loss", "val/acc", "val/f1"):
        assert two[metric] == pytest.approx(one[metric], rel=1e-3), metric


def test_only_what_trains_is_communicated(runs: Path) -> None:
    assert [seen(runs, "two", epoch, 0)["communicated"] for epoch in range(EPOCHS)] == [5_130, 7_084_554, 14_719_818]


@pytest.mark.slow
def test_every_image_counts_once_where_numbers_do_not_divide(runs: Path, tmp_path: Path) -> None:
    """325 images give 65 for the test, in batches of 32 and of 2 × 16."""
    checkpoint = runs / "one" / "version_0" / "checkpoints" / "best.ckpt"
    reports = []
    for processes in (1, 2):
        copy = tmp_path / f"{processes}.ckpt"  # outside of a run directory, so that each test has its own
        copy.write_bytes(checkpoint.read_bytes())
        run(
            "test",
            *words(tmp_path, str(processes), processes, "--data.source.size", "325", "--ckpt_path", str(copy)),
            threads=2 // processes,
        )
        reports.append(json.loads((tmp_path / str(processes) / "version_0" / "test_report.json").read_text()))
    one, two = reports
    assert one["images"] == two["images"] == 65
    assert sum(map(sum, two["confusion_matrix"])) == 65
    for field in ("accuracy", "macro_f1", "confusion_matrix", "classes"):
        assert one[field] == two[field]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.slow
@needs_int8
def test_eight_bits_are_the_same_in_every_process(tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        fit(tmp_path, name, processes, "--model.frozen_precision", "int8")
    for epoch in range(EPOCHS):
        one, first, second = (seen(tmp_path, name, epoch, rank) for name, rank in (("one", 0), ("two", 0), ("two", 1)))
        assert first["bits"] == second["bits"]
        assert_alike(first["changes"], one["changes"])


@pytest.mark.slow
def test_each_process_keeps_the_images_it_sees(tmp_path: Path) -> None:
    """Epoch 0 fills the cache of the only view, epoch 1 starts from it, epoch 2 thaws everything and cannot."""
    stages = ["--unfreezing.stages", "{0: 4, 2: 18}", "--feature_cache.views", "1"]
    fit(tmp_path, "cached", 2, *stages)
    images = [
        [{i for i, _ in seen(tmp_path, "cached", epoch, rank)["images"]} for rank in (0, 1)] for epoch in range(3)
    ]
    assert images[0] == images[1]
    assert len(images[0][0]) == len(images[0][1]) == 32
    assert images[0][0].isdisjoint(images[0][1])
    assert [seen(tmp_path, "cached", epoch, 0)["entries"] for epoch in range(3)] == [[0, 0], [14, 14], [0, 0]]
    for epoch in range(3):
        first, second = (seen(tmp_path, "cached", epoch, rank) for rank in (0, 1))
        assert first["bits"] == second["bits"]


@pytest.mark.slow
def test_an_error_of_the_first_leaves_no_other_behind(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    alone = ["--trainer.callbacks+=tests.support.FailsAlone", "--trainer.callbacks.file", str(file)]
    failed = run("fit", *words(tmp_path, "run", 2, "--trainer.max_epochs", "1", *alone), threads=1, check=False)
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: the disk is full")
    for _ in range(50):
        if not Path("/proc", file.read_text()).exists():
            return
        time.sleep(0.1)
    pytest.fail("the second process is still there")


@pytest.mark.slow
def test_stopped_within_an_epoch_they_report_the_whole_of_it(tmp_path: Path) -> None:
    options = ["--unfreezing.stages", "{0: 0}", "--trainer.max_epochs", "1", "--run.test_after_fit", "false"]
    options += ["--data.batch_size", "2"]  # 16 steps, of which the tenth is the first that looks for signals
    stop = [*signal_at(0, 1, "SIGTERM"), "--trainer.callbacks.rank", "1"]
    run("fit", *words(tmp_path, "straight", 2, *options), threads=1)
    assert run("fit", *words(tmp_path, "stopped", 2, *options, *stop), threads=1, check=False).returncode == 143
    last = torch.load(tmp_path / "stopped" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 10
    run("fit", *words(tmp_path, "stopped", 2, *options, "--ckpt_path", "last"), threads=1)
    straight, stopped = (read_history(tmp_path / name / "version_0" / HISTORY)[0] for name in ("straight", "stopped"))
    for metric in ("train/loss", "train/acc", "val/acc"):
        assert stopped[metric] == pytest.approx(straight[metric], rel=1e-6), metric


@pytest.mark.slow
def test_all_validate_with_the_same_statistics(tmp_path: Path) -> None:
    """Also after a batch whose gradient was only kept: DDP sends nothing round then."""
    options = ["--unfreezing.stages", "{0: 0}", "--trainer.max_epochs", "1", "--run.test_after_fit", "false"]
    options += ["--model.hidden", "8", "--data.batch_size", "3", "--trainer.accumulate_grad_batches", "2"]
    options += ["--trainer.val_check_interval", "3", "--trainer.callbacks+=tests.support.Statistics"]
    options += ["--trainer.callbacks.folder", str(tmp_path / "seen")]
    done = run("fit", *words(tmp_path, "run", 2, *options), threads=1, warnings=True)
    assert "sync_dist" not in done.stderr  # Lightning's advice for metrics that are the same in each
    first, second = ((tmp_path / "seen" / f"rank{rank}.txt").read_text().splitlines() for rank in (0, 1))
    assert len(first) > 2
    assert first == second


@pytest.mark.slow
def test_both_start_from_the_same_earlier_run(tmp_path: Path) -> None:
    """The second process looks for it when the first has long begun."""
    options = ["--unfreezing.stages", "{0: 0}", "--trainer.max_epochs", "1", "--run.test_after_fit", "false"]
    for more in ([], ["--run.warm_start", "last"]):
        run("fit", *words(tmp_path, "run", 2, *options, *more), threads=1)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"version_0", "version_1"}
    config = yaml.safe_load((tmp_path / "run" / "version_1" / "config.yaml").read_text())
    assert config["run"]["warm_start"] == str(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt")
