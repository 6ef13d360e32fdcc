"""A run that was killed, wherever, ends as if it had not been: bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import needs_int8, on_sample, run, signal_at, untimed

from src.cli import main

STAGES = "{0: 0, 2: 4, 4: 18}"


def words(root: Path, name: str, *more: str) -> list[str]:
    """Train through three stages with augmentation, dropout and cosine rates, on as few images as that takes.

    Epochs 0 and 2 fill a cache on disk, 1 and 3 are trained from it, 4 and 5 without: nothing is frozen there.
    """
    options = {
        "unfreezing.stages": STAGES, "trainer.max_epochs": 6, "data.source.size": 60, "data.batch_size": 14,
        "run.root": root, "run.name": name, "run.test_after_fit": False, "feature_cache.views": 1,
        "feature_cache.place": "disk",
    }  # fmt: skip
    return ["fit", *on_sample("staged", options, *more)]


def fit(root: Path, name: str, *more: str, check: bool = True) -> Any:
    return run(*words(root, name, *more), check=check)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("untouched")
    main(words(root, "run"))
    return root / "run" / "version_0"


def assert_same(run_directory: Path, reference: Path) -> None:
    assert [path.name for path in run_directory.parent.iterdir()] == ["version_0"]
    ours, theirs = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run_directory, reference)
    )
    for part in ("state_dict", "optimizer_states", "train_metrics", "global_step", "epoch"):
        assert differences(ours[part], theirs[part], part) == []
    assert untimed(run_directory) == untimed(reference)
    # More than one epoch, so that something could have gone wrong.
    assert len(untimed(reference)) == 6


def differences(ours: Any, theirs: Any, where: str) -> list[str]:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        if ours.keys() != theirs.keys():
            return [f"{where}: {ours.keys() ^ theirs.keys()}"]
        return [found for key in ours for found in differences(ours[key], theirs[key], f"{where}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [found for i, (a, b) in pairs for found in differences(a, b, f"{where}[{i}]")]
    same = torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs
    return [] if same else [where]


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param([(1, 1), (5, 2)], id="head and everything"),
        pytest.param([(1, 1), (2, 1), (5, 2)], id="every stage", marks=pytest.mark.slow),
    ],
)
def test_killed_in_stages_equals_never_killed(untouched: Path, tmp_path: Path, kills: list[tuple[int, int]]) -> None:
    assert fit(tmp_path, "run", *signal_at(*kills[0], "SIGKILL"), check=False).returncode == -9
    for epoch, batch in kills[1:]:
        killed = fit(tmp_path, "run", *signal_at(epoch, batch, "SIGKILL"), "--ckpt_path", "last", check=False)
        assert killed.returncode == -9
    main(words(tmp_path, "run", "--ckpt_path", "last"))
    assert_same(tmp_path / "run" / "version_0", untouched)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["same", pytest.param("int8", marks=needs_int8)])
def test_killed_without_a_cache_equals_never_killed(tmp_path: Path, precision: str) -> None:
    fresh = ["--feature_cache.views", "null", "--model.frozen_precision", precision]
    main(words(tmp_path, "untouched", *fresh))
    assert fit(tmp_path, "run", *fresh, *signal_at(1, 1, "SIGKILL"), check=False).returncode == -9
    again = [*fresh, "--ckpt_path", "last"]
    assert fit(tmp_path, "run", *again, *signal_at(3, 0, "SIGKILL"), check=False).returncode == -9
    fit(tmp_path, "run", *again)
    assert_same(tmp_path / "run" / "version_0", tmp_path / "untouched" / "version_0")


@pytest.mark.slow
def test_killed_while_learning_from_a_teacher_equals_never_killed(untouched: Path, tmp_path: Path) -> None:
    teacher = ["--trainer.callbacks.teacher", str(untouched / "checkpoints" / "last.ckpt")]
    learning = ["--trainer.callbacks+=src.callbacks.distillation.Distillation", *teacher]
    learning += ["--feature_cache.views", "null", "--model.label_smoothing", "0"]
    main(words(tmp_path, "untouched", *learning))
    assert fit(tmp_path, "run", *learning, *signal_at(3, 1, "SIGTERM"), check=False).returncode == 143
    fit(tmp_path, "run", *learning, "--ckpt_path", "last")
    assert_same(tmp_path / "run" / "version_0", tmp_path / "untouched" / "version_0")


@pytest.mark.slow
def test_killed_with_a_cache_in_memory_is_close_to_never_killed(untouched: Path, tmp_path: Path) -> None:
    """What was in memory is computed anew, in other batches, whose sums differ in their last digits."""
    memory = ["--feature_cache.place", "memory"]
    assert fit(tmp_path, "run", *memory, *signal_at(1, 1, "SIGKILL"), check=False).returncode == -9
    last = tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt"
    first = torch.load(last, weights_only=True)["state_dict"]  # of epoch 0: of the layers nothing has been trained yet
    again = [*memory, "--ckpt_path", "last"]
    assert fit(tmp_path, "run", *again, *signal_at(3, 1, "SIGKILL"), check=False).returncode == -9
    fit(tmp_path, "run", *again)
    ours, theirs = (
        torch.load(path, weights_only=True)["state_dict"] for path in (last, untouched / "checkpoints" / "last.ckpt")
    )
    for name, weights in theirs.items():
        change, difference = ((other - weights).double().norm() for other in (first[name], ours[name]))
        assert difference <= 0.01 * change, (name, float(difference / change))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_stopped_within_an_epoch_equals_never_stopped(untouched: Path, tmp_path: Path, name: str, code: int) -> None:
    stopped = fit(tmp_path, "run", *signal_at(3, 1, name), check=False)  # from cached features
    assert stopped.returncode == code
    assert f"stopped by {name}" in stopped.stderr
    assert stopped.stderr.count("once more ends at once") == 1
    assert "Traceback" not in stopped.stderr
    last = torch.load(tmp_path / "run" / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 2
    fit(tmp_path, "run", "--ckpt_path", "last")
    assert_same(tmp_path / "run" / "version_0", untouched)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_averaged_weights_go_on_where_they_were(tmp_path: Path, name: str) -> None:
    averaging = ["--trainer.callbacks+=src.callbacks.averaging.PolynomialAveraging"]
    main(words(tmp_path, "untouched", *averaging))
    assert fit(tmp_path, "run", *averaging, *signal_at(3, 1, name), check=False).returncode != 0
    fit(tmp_path, "run", *averaging, "--ckpt_path", "last")
    run_directory, reference = (tmp_path / run / "version_0" for run in ("run", "untouched"))
    assert_same(run_directory, reference)
    ours, theirs = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run_directory, reference)
    )
    for part in ("current_model_state", "averaging_state"):
        assert differences(ours[part], theirs[part], part) == []
