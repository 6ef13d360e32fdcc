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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.callbacks.figures import new_figure, write_png
from src.endings import plain_endings
from src.errors import OneLineParser, UserError
from src.files import replacing, user_path
from src.run_record import Run, Unfinished, read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "recipe", "runs", "settings", "layers", "trainable parameters", "epochs", "best val/acc", "test/acc",
    "test/acc_tta", "macro F1", "calibration error", "training minutes", "images/s",
)  # fmt: skip


_MARKERS = (".", "x", "^", "s", "+")
_SHOWN = 4  # settings that a table has room for


def recipes(runs: Iterable[Run]) -> list[list[Run]]:
    """Put runs that differ only in their seed together, in the order of their first ones; of other images none.

    An unfinished one is no further seed: what it reached would stand for a recipe that it did not complete.
    """
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.recipe, run.unfinished, run.images), []).append(run)
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
            if 0 < len(values) < len(group):  # some were not tested
                row[name] += f" ({len(values)} of {len(group)})"
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
    with plain_endings():
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
