"""Runs side by side, through the real entry point, from directories as `fit` leaves them."""

from __future__ import annotations

import csv
import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from matplotlib.colors import to_rgba

from src.callbacks.history import read_history, write_history
from src.compare import main, picture, recipes
from src.run_record import read_run

pytestmark = pytest.mark.pictures

STAGES = {"0": 0, "1": 4}  # as YAML has them
TRAINER = {"max_epochs": 2, "max_steps": -1, "max_time": None, "callbacks": None}
STOPPING = [{"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}]


def make_run(
    folder: Path,
    best: float,
    seed: int = 777,
    rate: float = 1e-3,
    tested: bool = True,
    warm_start: str | None = None,
    stages: dict[str, int] | None = None,
    trainer: dict[str, Any] | None = None,
) -> Path:
    folder.mkdir(parents=True)
    options = {"root": str(folder), "warm_start": warm_start}
    config = {"seed_everything": seed, "unfreezing": {"stages": stages or STAGES}, "run": options, "rate": rate}
    config |= {"trainer": TRAINER | (trainer or {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    common = {"trainable_parameters": 7e6, "train_seconds": 90.0, "images_per_second": 400.0}
    rows = [{"epoch": e, "train/acc": 0.5, "val/acc": acc, **common} for e, acc in enumerate((best, best - 0.1))]
    write_history(rows, folder / "history.csv")
    if tested:
        report = {"accuracy": best - 0.01, "macro_f1": best, "calibration_error": 0.05}
        (folder / "test_report.json").write_text(json.dumps(report))
    return folder


def compare(tmp_path: Path, *runs: Path) -> list[dict[str, str]]:
    main([*map(str, runs), "--output", str(tmp_path / "out")])
    with (tmp_path / "out" / "comparison.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "head" / "version_0", 0.1)
    newest = make_run(tmp_path / "head" / "version_10", 0.6)
    other = make_run(tmp_path / "last4" / "version_0", 0.7, rate=1e-4, tested=False)
    rows = compare(tmp_path, newest.parent, other)
    assert [row["recipe"] for row in rows] == ["head/version_10", "last4/version_0"]
    wanted = {
        "runs": "1", "layers": "0 → 4", "trainable parameters": "7,000,000", "epochs": "2", "best val/acc": "60.0 %",
        "test/acc": "59.0 %", "test/acc_tta": "", "macro F1": "60.0 %", "calibration error": "5.0 %",
        "training minutes": "3.0", "images/s": "400",
    }  # fmt: skip
    assert {name: rows[0][name] for name in wanted} == wanted
    assert (rows[1]["best val/acc"], rows[1]["test/acc"]) == ("70.0 %", "")
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert table in capsys.readouterr().out
    assert "| 60.0 %" in table
    assert "tta" not in table  # a column without values
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_an_option_that_only_newer_versions_write_down_as_unset_makes_no_other_recipe(tmp_path: Path) -> None:
    older = make_run(tmp_path / "last4" / "version_0", 0.5)
    newer = make_run(tmp_path / "last4" / "version_1", 0.6, seed=1)
    config = yaml.safe_load((newer / "config.yaml").read_text())
    (newer / "config.yaml").write_text(yaml.safe_dump(config | {"data": {"classes": None}}))
    assert [row["runs"] for row in compare(tmp_path, older, newer)] == ["2"]


def test_curves_are_of_validation_and_dotted_of_training(tmp_path: Path) -> None:
    figure = picture(recipes([read_run(make_run(tmp_path / "last4" / "version_0", 0.7))]))
    by_time, by_epoch = ([line.get_xydata().tolist() for line in axes.lines] for axes in figure.axes)
    assert by_time == [[[1.5, 0.7], [3, pytest.approx(0.6)]]]
    assert by_epoch == [[[1, 0.7], [2, pytest.approx(0.6)]], [[1, 0.5], [2, 0.5]]]


def test_no_two_recipes_look_alike(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / f"r{i}" / "version_0", 0.7, rate=i)) for i in range(21)]
    lines = picture(recipes(runs)).axes[0].lines
    assert len({(to_rgba(line.get_color()), line.get_marker()) for line in lines}) == 21


def test_runs_that_differ_in_their_seed_only_share_a_row(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "last4" / f"version_{i}", acc, seed=i) for i, acc in enumerate((0.70, 0.72, 0.74))]
    other = make_run(tmp_path / "last4" / "version_3", 0.8, rate=1e-2)
    first, second = compare(tmp_path, *runs, other)
    assert (first["recipe"], first["runs"], first["best val/acc"]) == (
        "last4/version_0 and 2 more",
        "3",
        "72.0 % ± 2.0",
    )
    assert (second["runs"], second["best val/acc"]) == ("1", "80.0 %")


def test_a_seed_that_ran_twice_is_no_second_seed(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "last4" / f"version_{i}", 0.7, seed=seed) for i, seed in enumerate((1, 1, 2))]
    assert [row["runs"] for row in compare(tmp_path, *runs)] == ["3 (2 seeds)"]
    assert [row["runs"] for row in compare(tmp_path, *runs[:2])] == ["2 (1 seed)"]


def test_a_training_that_was_killed_is_no_further_seed(tmp_path: Path) -> None:
    killed, whole = (make_run(tmp_path / "last4" / f"version_{i}", 0.7 + i / 10, seed=i) for i in range(2))
    write_history(read_history(killed / "history.csv")[:1], killed / "history.csv")
    rows = compare(tmp_path, killed, whole)
    assert [(row["recipe"], row["runs"], row["best val/acc"]) for row in rows] == [
        ("last4/version_0 (1 of 2 epochs)", "1", "70.0 %"),
        ("last4/version_1", "1", "80.0 %"),
    ]


def test_a_training_that_began_from_another_ones_checkpoint_counts_its_epochs_too(tmp_path: Path) -> None:
    run = make_run(tmp_path / "last4" / "version_0", 0.7)
    write_history(read_history(run / "history.csv")[1:], run / "history.csv")
    assert compare(tmp_path, run)[0]["recipe"] == "last4/version_0"


@pytest.mark.parametrize(
    "ends", [{"callbacks": STOPPING}, {"max_time": "00:08:00:00"}, {"max_steps": 9}, {"max_epochs": -1}]
)
def test_a_training_that_may_end_early_is_a_seed_wherever_it_ends(tmp_path: Path, ends: dict[str, Any]) -> None:
    runs = [
        make_run(tmp_path / "last4" / f"version_{i}", 0.7, seed=i, trainer={"max_epochs": 9} | ends) for i in range(2)
    ]
    write_history(read_history(runs[0] / "history.csv")[:1], runs[0] / "history.csv")
    assert [row["runs"] for row in compare(tmp_path, *runs)] == ["2"]


@pytest.mark.parametrize(
    ("report", "shown"),
    [
        ({"checkpoint": "best.ckpt", "epoch": None}, "69.0 %"),
        ({"checkpoint": "best.ckpt", "epoch": 0}, "69.0 %"),
        ({"checkpoint": "best.ckpt", "epoch": 1}, ""),
        ({"checkpoint": "best_f1.ckpt", "epoch": 1}, "69.0 %"),
        ({"checkpoint": "best.ckpt"}, "69.0 %"),  # of an earlier version
    ],
)
def test_a_test_before_a_better_epoch_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], report: dict[str, Any], shown: str
) -> None:
    run = make_run(tmp_path / "last4" / "version_0", 0.7)
    (run / "checkpoints").mkdir()
    torch.save({"epoch": 0}, run / "checkpoints" / "best.ckpt")
    whole = json.loads((run / "test_report.json").read_text()) | report
    (run / "test_report.json").write_text(json.dumps(whole))
    assert compare(tmp_path, run)[0]["test/acc"] == shown
    said = f"the test of '{run}' is left out: its best epoch is another one now; test it again\n"
    assert capsys.readouterr().err == ("" if shown else said)


@pytest.mark.parametrize(
    ("second", "rows"),
    [
        ({}, ["2"]),
        ({"classes": ["cat", "dog", "emu"]}, ["1", "1"]),
        ({"identity": {"images": "others", "files": "a"}}, ["1", "1"]),
        ({"identity": {"images": "these", "files": "b"}}, ["1", "1"]),
    ],
)
def test_runs_on_other_images_share_no_row(tmp_path: Path, second: dict[str, Any], rows: list[str]) -> None:
    """With more photographs in the same folder the split is another one, and so is what validates."""
    first = {"classes": ["cat", "dog"], "identity": {"images": "these", "files": "a"}}
    runs = [make_run(tmp_path / "last4" / f"version_{seed}", 0.7, seed=seed) for seed in range(2)]
    for run, data in zip(runs, (first, first | second), strict=True):
        (run / "checkpoints").mkdir()
        torch.save({"epoch": 0, "ImageDataModule": data}, run / "checkpoints" / "best.ckpt")
    assert [row["runs"] for row in compare(tmp_path, *runs)] == rows


def test_a_mean_of_fewer_runs_says_so(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "last4" / f"version_{seed}", 0.7, seed, tested=seed < 2) for seed in range(3)]
    (row,) = compare(tmp_path, *runs)
    assert (row["best val/acc"], row["test/acc"]) == ("70.0 % ± 0.0", "69.0 % ± 0.0 (2 of 3)")


def test_the_best_of_several_validations_in_an_epoch_counts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "last4" / "version_0", 0.7)
    first, second = read_history(run / "history.csv")
    write_history([first, second | {"val/acc_best": 0.75}], run / "history.csv")
    assert compare(tmp_path, run)[0]["best val/acc"] == "75.0 %"


def test_settings_that_differ_are_shown_while_they_are_few(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / "tries" / f"version_{i}", 0.7, rate=rate, stages=stages)
        for i, (rate, stages) in enumerate([(1e-3, {"0": 18}), (3e-4, None)])
    ]
    assert [row["settings"] for row in compare(tmp_path, *runs)] == ["rate 0.001", "rate 0.0003"]
    config = yaml.safe_load((runs[0] / "config.yaml").read_text())
    other = {"model": {"optimizer": {"class_path": "Adam", "init_args": {"lr": 1.0}}}}
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config | other))
    assert compare(tmp_path, *runs)[0]["settings"] == 'model.optimizer "Adam", model.optimizer.lr 1.0, rate 0.001'
    (runs[0] / "config.yaml").write_text(yaml.safe_dump(config | {"data": dict.fromkeys("abcde", 1)}))
    assert [row["settings"] for row in compare(tmp_path, *runs)] == ["", ""]


def test_a_warm_start_makes_a_row_of_its_own(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "full" / f"version_{i}", 0.7, warm_start=start) for i, start in enumerate((None, "a"))]
    assert [row["runs"] for row in compare(tmp_path, *runs)] == ["1", "1"]


def test_runs_of_one_name_in_two_places_are_two(tmp_path: Path) -> None:
    runs = [
        make_run(tmp_path / place / "full" / "version_0", best, rate=best) for place, best in (("a", 0.7), ("b", 0.8))
    ]
    found = compare(tmp_path, *runs)
    assert [(row["recipe"], row["best val/acc"]) for row in found] == [
        (str(runs[0]), "70.0 %"),
        (str(runs[1]), "80.0 %"),
    ]


def test_an_epoch_in_which_nothing_was_trained(tmp_path: Path) -> None:
    """As at the start of a run that went on from a copied checkpoint."""
    run = make_run(tmp_path / "last4" / "version_0", 0.7)
    first, second = read_history(run / "history.csv")
    for name in ("train_seconds", "images_per_second"):
        del first[name]
    write_history([first, second], run / "history.csv")
    (row,) = compare(tmp_path, run)
    assert (row["epochs"], row["training minutes"], row["images/s"]) == ("2", "1.5", "400")


def no_history(run: Path) -> None:
    (run / "history.csv").unlink()


def empty_history(run: Path) -> None:
    (run / "history.csv").write_text("epoch,val/acc\n")


def empty_config(run: Path) -> None:
    (run / "config.yaml").write_text("")


def config_without_run(run: Path) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump({"unfreezing": {"stages": STAGES}, "run": None}))


def history_without_epochs(run: Path) -> None:
    (run / "history.csv").write_text("val/acc,trainable_parameters\n0.5,1\n")


def broken_report(run: Path) -> None:
    (run / "test_report.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_history, "ended before its first epoch"),
        (empty_history, "damaged"),
        (broken_report, "damaged"),
        (empty_config, "damaged"),
        (config_without_run, "damaged"),
        (history_without_epochs, "damaged"),
        (lambda run: (run / "config.yaml").unlink(), "is no run"),
    ],
)
def test_mistakes_take_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil, words: str) -> None:  # type: ignore[no-untyped-def]
    run = make_run(tmp_path / "last4" / "version_0", 0.7)
    spoil(run)
    with pytest.raises(SystemExit) as ended:
        compare(tmp_path, run)
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_unfinished_runs_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [make_run(tmp_path / "last4" / f"version_{number}", 0.7) for number in range(2)]
    no_history(runs[0])
    tested = tmp_path / "last4" / "version_2"  # a checkpoint from elsewhere, without a training
    tested.mkdir()
    (row,) = compare(tmp_path, *runs, tested)
    assert row["recipe"] == "last4/version_1"
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["left out"] * 2
    assert "ended before its first epoch did" in lines[0]
    assert "version_2' is no run" in lines[1]


def test_names_may_hold_dollars(tmp_path: Path) -> None:
    compare(tmp_path, make_run(tmp_path / "a$b and c_$d" / "version_0", 0.7))
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "last4" / "version_0", 0.7)

    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    with pytest.raises(SystemExit):
        compare(tmp_path, run)
    assert f"the run '{run}' cannot be read: Permission denied" in capsys.readouterr().err


def test_a_run_given_twice_counts_once_and_the_output_is_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "last4" / "version_0", 0.7)
    for _ in range(2):  # the second time the output is there
        (row,) = compare(tmp_path, run, run.parent, tmp_path / "out")
        assert row["runs"] == "1"


@pytest.mark.parametrize("words", [["nowhere"], [], ["--wrong"]])
def test_wrong_words_take_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
