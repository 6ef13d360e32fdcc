"""Pictures: curves, confusion matrix, grids of images; each is a matplotlib figure without global state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from src.batch import Batch
from src.data.datamodule import ImageDataModule
from src.files import replacing

if TYPE_CHECKING:  # matplotlib takes a while to import, and most commands fail or finish without a picture
    from matplotlib.figure import Figure

FIRST_BATCH = "first_batch.png"
_LARGEST = 25.0  # inches; a matrix of a thousand classes would take gigabytes at the size of ten
_NAMES = 100  # names that fit beside it
_LONG = 22  # characters of a name, or of a line above an image, that there is room for


class FirstBatch(Callback):
    """Show the first training batch as the network sees it, augmented."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.directory = Path(trainer.log_dir or ".")

    @rank_zero_only
    def on_train_batch_start(self, trainer: Trainer, pl_module: object, batch: Batch, batch_idx: int) -> None:
        if trainer.global_step > 0 or batch_idx > 0 or batch.entry > 0:
            return
        data = ImageDataModule.of(trainer)
        pixels = data.pixels(batch.inputs[:32]).permute(0, 2, 3, 1).cpu().numpy()
        titles = [data.classes[label] for label in batch.labels[:32].tolist()]
        if batch.other_labels is not None and batch.other_shares is not None:
            pasted = zip(titles, batch.other_labels.tolist(), batch.other_shares.tolist(), strict=False)
            titles = [f"{own} + {share:.0%} {data.classes[other]}" if share else own for own, other, share in pasted]
        figure = grid_figure(pixels, titles, "first training batch, augmented")
        save_and_log(trainer, "first_batch", figure, self.directory / FIRST_BATCH)


def save_and_log(trainer: Trainer, tag: str, figure: Figure, path: Path) -> None:
    """Put a figure into the run directory and into TensorBoard."""
    write_png(figure, path)
    logger: Any = trainer.logger
    if logger is not None:
        with Image.open(path) as image:  # as it was drawn: drawing once more takes longer
            logger.experiment.add_image(tag, np.asarray(image.convert("RGB")), trainer.current_epoch, dataformats="HWC")


def new_figure(width: float, height: float) -> Figure:
    """Make a figure that no global registry holds on to; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure; a file of that name is replaced as a whole."""
    with replacing(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # a box stands for each, which tells enough
        figure.savefig(temporary, format="png", dpi=110)


def history_figure(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Draw loss and accuracy by epoch, training and validation, in two panels."""
    figure = new_figure(10, 4)
    for axes, metric, title in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss", "accuracy"), strict=True):
        for split, label in (("train", "training"), ("val", "validation")):
            points = [(row["epoch"] + 1, row[f"{split}/{metric}"]) for row in rows if f"{split}/{metric}" in row]
            axes.plot(*np.array(points).reshape(-1, 2).T, marker=".", label=label)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def confusion_figure(matrix: Sequence[Sequence[int]], classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix, (true class, predicted class), coloured by the share of each true class."""
    counts = np.asarray(matrix)
    shares = counts / np.maximum(1, counts.sum(axis=1, keepdims=True))
    names = [name if len(name) <= _LONG else f"{name[: _LONG - 1]}…" for name in classes]
    beside = 0.08 * max(0, max(map(len, names)) - 10)  # inches that longer names than usual take from the matrix
    side = min(max(5.0, 0.55 * len(classes) + 2) + beside, _LARGEST)
    figure = new_figure(side, side)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    named = range(0, len(classes), -(-len(classes) // _NAMES))
    axes.set(xlabel="predicted", ylabel="true", xticks=named, yticks=named)
    axes.set_xticklabels([names[number] for number in named], rotation=60, ha="right", parse_math=False)
    axes.set_yticklabels([names[number] for number in named], parse_math=False)
    if len(classes) <= 25:  # beyond that numbers are too small to read
        for (true, predicted), count in np.ndenumerate(counts):
            dark = shares[true, predicted] > 0.5
            axes.text(predicted, true, str(count), ha="center", va="center", fontsize=7, color="w" if dark else "k")
    return figure


def grid_figure(
    pixels: np.ndarray, titles: Sequence[str], heading: str, colours: Sequence[str] | None = None
) -> Figure:
    """Draw square images, (N, H, W, 3) from 0 to 255, eight in a row, each below up to two lines in its colour."""
    rows = -(-len(pixels) // 8)
    width, height, top = 1.25, 1.45, 0.35  # inches: of an image with its title and margin, and of the heading
    figure = new_figure(8 * width, rows * height + top)
    # All in one plot, measured in inches from its upper left corner: a plot for each image takes eight times as long.
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.text(4 * width, top / 2, heading, ha="center", va="center", fontsize=12)
    colours = colours or ["black"] * len(titles)
    for number, (image, title, colour) in enumerate(zip(pixels, titles, colours, strict=True)):
        row, column = divmod(number, 8)
        left, below = column * width + 0.05, top + (row + 1) * height - 0.05
        text: dict[str, Any] = {"fontsize": 7, "color": colour, "parse_math": False}  # names may hold dollars
        axes.text(left + 0.575, below - 1.27, _two_lines(title), ha="center", va="center", linespacing=1.0, **text)
        axes.imshow(np.clip(image, 0, 255).astype(np.uint8), extent=(left, left + 1.15, below, below - 1.15))
    axes.set(xlim=(0, 8 * width), ylim=(rows * height + top, 0), aspect="auto")
    return figure


def _two_lines(title: str) -> str:
    """Break a title into lines that have room above an image; of more than two the first and the last."""
    lines = wrap(title, _LONG)
    return "\n".join(lines if len(lines) <= 2 else [f"{lines[0][: _LONG - 2]} …", lines[-1]])
