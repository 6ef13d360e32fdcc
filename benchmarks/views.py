"""Find out how many cached views are enough: last4 with 1, 2, 4, 8 and always new views, on the same seeds.

    python -m benchmarks.views --root data/quarter [--seeds 777 1 2] [--views 1 2 4 8] [--model.frozen_precision bf16]

Options of `fit` go to every run. Run again, it goes on with what is missing. All runs of a seed share one cache on
disk, which the run with always new views fills; so times are added up from the epochs of that run and of a run from
cached features.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from benchmarks.training import digest, mean_and_std, train
from src.callbacks.figures import new_figure, write_png
from src.callbacks.history import Row
from src.process import cores

EVERY = 5  # epochs from one validation to the next


def run(root: Path, folder: Path, seed: int, views: int, epochs: int, more: list[str]) -> list[Row]:
    """Train unless that is done, and give the history."""
    options = {
        "data.source.init_args.root": root, "seed_everything": seed, "trainer.check_val_every_n_epoch": EVERY,
        "feature_cache.views": views, "feature_cache.place": "disk",
        "feature_cache.folder": folder / f"features-{seed}-{digest([epochs, *more])}", "feature_cache.limit_gib": 64,
    }  # fmt: skip
    words = ["--config=configs/last4.yaml", "--config=configs/with/folder.yaml"]
    words += [f"--{option}={value}" for option, value in options.items()]
    return train(folder, f"seed{seed}-views{views}", epochs, [*words, *more])


def seconds(rows: list[Row]) -> float:
    """Give the median time of training an epoch."""
    return statistics.median(row["train_seconds"] for row in rows)


def main() -> None:
    """Run, and write the table and the picture."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--root", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[777, 1, 2])
    parser.add_argument("--views", type=int, nargs="*", default=[1, 2, 4, 8], help="beside always new ones")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, default=Path("runs/views"))
    options, more = parser.parse_known_args()
    epochs = options.epochs
    if epochs < EVERY:
        parser.error(f"--epochs must be at least {EVERY}, or none is validated")
    choices = [epochs, *reversed(options.views)]  # as many views as epochs: always new ones
    runs = {
        (views, seed): run(options.root, options.output, seed, views, epochs, more)
        for seed in options.seeds
        for views in choices
    }
    fresh, cached = (
        statistics.median(seconds(runs[views, seed]) for seed in options.seeds) for views in (epochs, choices[-1])
    )
    text = f"{cores()} CPU cores; mean ± standard deviation of {len(options.seeds)} seeds, {epochs} epochs, "
    text += f"validated every {EVERY}th. {fresh:.1f} s an epoch of new views, {cached:.1f} s from cached features.\n\n"
    text += "| views | best val/acc | last val/acc | last train/acc | training |\n|---|---|---|---|---|\n"
    figure = new_figure(9, 4)
    by_views, by_epoch = figure.subplots(1, 2, sharey=True)
    for place, views in enumerate(reversed(choices)):
        rows = [runs[views, seed] for seed in options.seeds]
        curves = [[(row["epoch"] + 1, row["val/acc"]) for row in history if "val/acc" in row] for history in rows]
        best = [max(accuracy for _, accuracy in curve) for curve in curves]
        columns = [best, [curve[-1][1] for curve in curves], [history[-1]["train/acc"] for history in rows]]
        name = "a new one each epoch" if views == epochs else str(views)
        total = min(views, epochs) * fresh + max(0, epochs - views) * cached
        text += f"| {name} | {' | '.join(map(mean_and_std, columns))} | {total:,.0f} s |\n"
        by_views.errorbar(
            place, 100 * statistics.mean(best), _deviation(best), marker="o", capsize=4, color=f"C{place}"
        )
        for number, curve in enumerate(curves):
            label = name if number == 0 else None
            by_epoch.plot([e for e, _ in curve], [100 * a for _, a in curve], color=f"C{place}", label=label, alpha=0.7)
    by_views.set(title="best epoch", xlabel="views", ylabel="validation accuracy, %")
    by_views.set_xticks(range(len(choices)), [*map(str, options.views), "new"])
    by_epoch.set(title="every seed", xlabel="epoch")
    by_epoch.legend(title="views", fontsize=8)
    for axes in (by_views, by_epoch):
        axes.grid(alpha=0.3)
    print(text)
    (options.output / "views.md").write_text(text)
    write_png(figure, options.output / "views.png")


def _deviation(values: list[float]) -> float:
    return 100 * statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    main()
