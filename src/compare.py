"""Compare runs: `python -m src.compare runs/head runs/last4`.

Runs that differ only in their seed share a row, as mean ± standard deviation; one that was cut off has its own.
"""

from __future__ import annotations

import csv
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from src.callbacks.checkpoints import BEST, FOLDER
from src.callbacks.figures import new_figure, write_png
from src.callbacks.history import CSV as HISTORY
from src.callbacks.history import Row, best_of, read_history
from src.callbacks.predictions import REPORT
from src.errors import OneLineParser, UserError, told_in_one_line
from src.files import replacing, user_path
from src.run_directory import CONFIG, run_at
from src.run_settings import settings
from src.tensor_files import Unreadable, load_tensors

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "recipe", "runs", "settings", "layers", "trainable parameters", "epochs", "best val/acc", "test/acc",
    "test/acc_tta", "macro F1", "calibration error", "training minutes", "images/s",
)  # fmt: skip


_MARKERS = (".", "x", "^", "s", "+")
_SHOWN = 4  # settings that a table has room for


@dataclass(frozen=True)
class Run:
    """What a run directory tells of its run."""

    folder: Path
    name: str
    config: dict[str, Any]
    history: list[Row]
    report: dict[str, Any]
    """Empty where the run was not tested, or was trained on since and has another best epoch."""

    @property
    def recipe(self) -> str:
        """Everything that was configured, except for the seed and for where the run is kept, as text."""
        return json.dumps(self.settings, sort_keys=True)

    @property
    def settings(self) -> dict[str, Any]:
        """What makes the recipe, setting by setting."""
        apart = ("seed_everything", "run", "ckpt_path")
        told = settings({key: value for key, value in self.config.items() if key not in apart})
        return told | {"run.warm_start": self.config["run"].get("warm_start")}

    @property
    def unfinished(self) -> str:
        """How far a training came that neither trained all of its epochs nor was told to end sooner; else nothing."""
        trainer = self.config["trainer"]
        epochs, done = trainer["max_epochs"] or -1, int(self.history[-1]["epoch"]) + 1
        steps = trainer["max_steps"] not in (None, -1)
        sooner = steps or trainer["max_time"] or "EarlyStopping" in json.dumps(trainer["callbacks"])
        return f"{done} of {epochs} epochs" if done < epochs and not sooner else ""

    @property
    def outgrown(self) -> bool:
        """Whether a better epoch's checkpoint has taken the place of the best one that was tested."""
        tested, best = self.report.get("epoch"), self.folder / FOLDER / BEST
        if self.report.get("checkpoint") != BEST or tested is None or not best.is_file():
            return False
        with suppress(Unreadable):
            return load_tensors(best, mmap=True).get("epoch", tested) != tested
        return False

    @property
    def layers(self) -> str:
        """How many train, stage by stage."""
        return " → ".join(map(str, self.config["unfreezing"]["stages"].values()))

    @property
    def minutes(self) -> list[float]:
        """Minutes of training up to the end of each epoch, validation not counted."""
        # Runs of earlier versions lack it where they were continued at the end of an epoch.
        return [seconds / 60 for seconds in accumulate(row.get("train_seconds", 0.0) for row in self.history)]

    def curve(self, metric: str) -> list[tuple[float, float, float]]:
        """Give the minutes, the epoch (the first is 1) and the value, wherever there is one."""
        rows = zip(self.minutes, self.history, strict=True)
        return [(minutes, row["epoch"] + 1, row[metric]) for minutes, row in rows if metric in row]

    def metrics(self) -> dict[str, float]:
        """Give the figures of the table that can be averaged, as far as this run has them."""
        validated = [best for row in self.history if (best := best_of(row)) is not None]
        rates = [row["images_per_second"] for row in self.history if "images_per_second" in row]
        found = {
            "trainable parameters": self.history[-1]["trainable_parameters"],
            "epochs": float(len(self.history)),
            "best val/acc": max(validated) if validated else None,
            "test/acc": self.report.get("accuracy"),
            "test/acc_tta": self.report.get("test_time_augmentation", {}).get("accuracy"),
            "macro F1": self.report.get("macro_f1"),
            "calibration error": self.report.get("calibration_error"),
            "training minutes": self.minutes[-1],
            "images/s": statistics.median(rates) if rates else None,
        }
        return {name: value for name, value in found.items() if value is not None}


class Unfinished(UserError):
    """A folder without a training of at least one epoch."""


def read_run(path: Path) -> Run:
    """Read a run directory, or the newest one of a recipe's folder.

    Raises:
        Unfinished: It has no finished epoch, or none at all, as that of a test alone.
        UserError: There is no such folder, or the run is damaged.
    """
    try:
        return _read_run(path)
    except OSError as error:
        raise UserError(f"the run '{path}' cannot be read: {error.strerror}: '{error.filename}'.") from error


def _read_run(path: Path) -> Run:
    folder = run_at(path)
    if folder is None:
        kind = Unfinished if path.is_dir() else UserError
        raise kind(f"'{path}' is no run: give folders such as runs/last4 or runs/last4/version_0.")
    if not (folder / HISTORY).is_file():
        raise Unfinished(f"the run '{folder}' has no {HISTORY}: it ended before its first epoch did.")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        report = json.loads((folder / REPORT).read_text(encoding="utf-8")) if (folder / REPORT).is_file() else {}
        run = Run(folder, f"{folder.parent.name}/{folder.name}", config, read_history(folder / HISTORY), report)
        if run.outgrown:
            print(
                f"the test of '{folder}' is left out: its best epoch is another one now; test it again", file=sys.stderr
            )
            run = replace(run, report={})
        # All that will be asked of it, while it is known which run it is about.
        _ = run.layers, run.recipe, run.unfinished, run.metrics(), [row["epoch"] for row in run.history]
    except (yaml.YAMLError, ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise UserError(f"the run '{folder}' has a damaged {CONFIG}, {HISTORY} or {REPORT}: {error!r}.") from error
    return run


def recipes(runs: Iterable[Run]) -> list[list[Run]]:
    """Put runs that differ only in their seed together, in the order of their first ones.

    An unfinished one is no further seed: what it reached would stand for a recipe that it did not complete.
    """
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.recipe, run.unfinished), []).append(run)
    return list(groups.values())


def distinct(runs: Iterable[Run]) -> list[Run]:
    """Leave out runs that were given twice, and name by their whole path those whose names are alike."""
    found = list({run.folder.resolve(): run for run in runs}.values())
    names = Counter(run.name for run in found)
    return [replace(run, name=str(run.folder)) if names[run.name] > 1 else run for run in found]


def label(group: Sequence[Run]) -> str:
    """Name a recipe after its first run."""
    name = group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more"
    return f"{name} ({group[0].unfinished})" if group[0].unfinished else name


def _count(group: Sequence[Run]) -> str:
    """Count runs, and their seeds if they are fewer: a seed's second run is no second try."""
    seeds = len({run.config["seed_everything"] for run in group})
    return str(len(group)) if seeds == len(group) else f"{len(group)} ({seeds} seed{'s' * (seeds > 1)})"


def table(groups: Sequence[Sequence[Run]]) -> list[dict[str, str]]:
    """Lay out one row a recipe: mean, and standard deviation where there are several runs."""
    rows = []
    for group, differing in zip(groups, _differing([group[0].settings for group in groups]), strict=True):
        row = {"recipe": label(group), "runs": _count(group), "settings": differing, "layers": group[0].layers}
        every = [run.metrics() for run in group]
        for name in COLUMNS[4:]:
            values = [figures[name] for figures in every if name in figures]
            row[name] = _write(name, values) if values else ""
        rows.append(row)
    return rows


def _differing(recipes: Sequence[dict[str, Any]]) -> list[str]:
    """Say of each recipe which settings differ among them, if they are as alike as tries of one option are."""
    names = dict.fromkeys(name for recipe in recipes for name in recipe)
    texts = {name: [json.dumps(recipe.get(name)) for recipe in recipes] for name in names}
    stages = "unfreezing.stages"  # which have a column of their own
    texts = {name: values for name, values in texts.items() if len(set(values)) > 1 and not name.startswith(stages)}
    if len(texts) > _SHOWN:
        return [""] * len(recipes)
    return [", ".join(f"{name} {values[i]}" for name, values in texts.items()) for i in range(len(recipes))]


def _write(name: str, values: Sequence[float]) -> str:
    share = "acc" in name or name in ("macro F1", "calibration error")
    scaled = [100 * value for value in values] if share else values
    digits = 1 if share or name == "training minutes" else 0
    text = f"{statistics.mean(scaled):,.{digits}f}" + (" %" if share else "")
    spread = statistics.stdev(scaled) if len(scaled) > 1 else 0.0
    return text if len(scaled) == 1 or not (share or spread) else f"{text} ± {spread:.{max(digits, 1)}f}"


def markdown(rows: Sequence[dict[str, str]]) -> str:
    """Write the table in Markdown, which a terminal shows as well, without columns that are empty everywhere."""
    columns = [name for name in COLUMNS if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in columns}
    lines = [[name.ljust(widths[name]) for name in columns], ["-" * widths[name] for name in columns]]
    lines += [[row[name].ljust(widths[name]) for name in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def picture(groups: Sequence[Sequence[Run]]) -> Figure:
    """Draw validation accuracy against training time, and both accuracies against the epoch."""
    figure = new_figure(12, 4.5)
    by_time, by_epoch = figure.subplots(1, 2, sharey=True)
    for number, group in enumerate(groups):
        for run in group:
            style: dict[str, Any] = {"color": f"C{number}", "label": label(group) if run is group[0] else None}
            style["marker"] = _MARKERS[number // 10 % len(_MARKERS)]  # there are ten colours
            minutes, epochs, accuracies = _columns(run.curve("val/acc"))
            by_time.plot(minutes, accuracies, **style)
            by_epoch.plot(epochs, accuracies, **style)
            _, epochs, accuracies = _columns(run.curve("train/acc"))
            by_epoch.plot(epochs, accuracies, color=f"C{number}", linestyle=":", linewidth=1)
    by_time.set(title="validation accuracy by time", xlabel="minutes of training", ylabel="accuracy")
    by_epoch.set(title="by epoch (dotted: training)", xlabel="epoch")
    by_epoch.xaxis.get_major_locator().set_params(integer=True)
    for axes in (by_time, by_epoch):
        axes.grid(alpha=0.3)
    for text in by_time.legend(fontsize=8).get_texts():
        text.set_parse_math(False)  # names may hold dollars
    return figure


def _columns(points: Sequence[tuple[float, ...]]) -> Iterable[Sequence[float]]:
    return zip(*points, strict=True) if points else ((), (), ())


def main(args: Sequence[str] | None = None) -> None:
    """Print the table, and write it with the picture.

    Args:
        args: Words of the command line; None for the process's own.

    Raises:
        SystemExit: With code 1, after one line on standard error, if the user can mend what went wrong.
    """
    parser = OneLineParser(
        prog="python -m src.compare",
        description="Compare runs in a table and a picture.",
        example="python -m src.compare runs/head runs/last4",
    )
    parser.add_argument(
        "runs", nargs="+", type=user_path, help="run directories, or recipes' folders for their newest runs"
    )
    parser.add_argument(
        "--output", type=user_path, default=Path("runs/comparison"), help="folder to write to (%(default)s)"
    )
    with told_in_one_line():
        options = parser.parse_args(args)
        groups = recipes(distinct(_asked(options.runs, options.output)))
        rows = table(groups)
        print(markdown(rows))
        try:
            _write_all(rows, picture(groups), options.output)
        except OSError as error:
            raise UserError(f"cannot write to '{options.output}': {error.strerror}.") from error
        print(f"comparison.md, comparison.csv and comparison.png are in {options.output}")


def _asked(paths: Sequence[Path], output: Path) -> list[Run]:
    asked = [path for path in paths if path.resolve() != output.resolve()]  # as runs/* names it too
    if not asked:
        raise UserError(f"'{output}' is where the comparison goes: give runs, for example runs/last4.")
    found, unfinished = [], []
    for path in asked:
        try:
            found.append(read_run(path))
        except Unfinished as error:
            unfinished.append(error)
    if not found:
        raise unfinished[0]
    for reason in unfinished:
        print(f"left out: {reason}", file=sys.stderr)
    return found


def _write_all(rows: Sequence[dict[str, str]], figure: Figure, output: Path) -> None:
    with replacing(output / "comparison.md") as temporary:
        temporary.write_text(markdown(rows), encoding="utf-8")
    with (
        replacing(output / "comparison.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    write_png(figure, output / "comparison.png")


if __name__ == "__main__":
    main()
