"""Pictures of any number of classes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from src.callbacks import figures
from src.callbacks.figures import confusion_figure, grid_figure, write_png
from src.data.datamodule import ImageDataModule
from src.data.sources import Sample

pytestmark = pytest.mark.pictures


@pytest.mark.parametrize(("classes", "inches", "names"), [(2, 5, 2), (10, 7.5, 10), (1000, 25, 100)])
def test_confusion_matrix_stays_of_a_size_that_can_be_drawn(classes: int, inches: float, names: int) -> None:
    figure = confusion_figure(np.eye(classes, dtype=int).tolist(), [f"class {number}" for number in range(classes)])
    assert figure.get_size_inches() == pytest.approx((inches, inches))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"class {number}" for number in range(0, classes, classes // names)]


def test_confusion_matrix_has_true_classes_in_rows() -> None:
    axes = confusion_figure([[3, 1], [0, 2]], ["cat", "dog"]).axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true", "predicted")
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25], [0, 1]]
    assert [(*text.get_position(), text.get_text()) for text in axes.texts] == [
        (0, 0, "3"), (1, 0, "1"), (0, 1, "0"), (1, 1, "2"),
    ]  # fmt: skip


def test_images_stand_in_rows_of_eight_under_their_titles() -> None:
    pixels = np.broadcast_to(np.arange(10)[:, None, None, None], (10, 4, 4, 3))
    axes = grid_figure(pixels, [str(number) for number in range(10)], "ten").axes[0]
    places = [(image.get_extent()[0], image.get_extent()[3], image.get_array()[0, 0, 0]) for image in axes.images]
    assert [number for *_, number in sorted(places, key=lambda place: (round(place[1], 3), place[0]))] == list(
        range(10)
    )
    for text, image in zip(axes.texts[1:], axes.images, strict=True):
        left, right, _, top = image.get_extent()
        x, y = text.get_position()
        assert left < x < right
        assert top - 0.25 < y < top


def test_long_names_leave_the_matrix_its_room_and_the_images_theirs() -> None:
    names = ["a", "Gewöhnliche Rosskastanie (Aesculus hippocastanum)"]
    matrix, short = confusion_figure([[1, 0], [0, 1]], names), confusion_figure([[1, 0], [0, 1]], ["automobile"] * 2)
    assert [text.get_text() for text in matrix.axes[0].get_yticklabels()] == ["a", "Gewöhnliche Rosskasta…"]
    grid = grid_figure(np.zeros((16, 4, 4, 3)), [f"{names[1]} + 45% {names[1]}"] * 16, "images")
    for figure in (matrix, short, grid):
        figure.canvas.draw()
    assert matrix.axes[0].get_window_extent().width > 0.95 * short.axes[0].get_window_extent().width
    heading, *titles = (text.get_window_extent() for text in grid.axes[0].texts)
    everything = [heading, *titles, *(image.get_window_extent() for image in grid.axes[0].images)]
    for box in titles:
        assert Bbox.intersection(box, grid.bbox).bounds == box.bounds
        assert box.count_overlaps(everything) == 1  # itself


def test_classes_may_have_a_dollar_in_their_names() -> None:
    names = ["US$ + 40% HK$", "a$b_$"]
    for figure in (
        confusion_figure([[1, 0], [0, 1]], names),
        grid_figure(np.zeros((2, 4, 4, 3)), names, "prices"),
    ):
        figure.canvas.draw()
        shown = {text.get_text() for text in figure.findobj(Text)}
        assert set(names) <= shown


def test_classes_may_have_names_that_no_font_has(tmp_path: Path) -> None:
    write_png(confusion_figure([[1, 0], [0, 1]], ["猫", "犬"]), tmp_path / "matrix.png")  # warnings are errors here
    assert (tmp_path / "matrix.png").is_file()


def test_first_batch_shows_pixels_and_what_was_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures, "grid_figure", lambda pixels, titles, _: drawn.update(pixels=pixels, titles=titles))
    monkeypatch.setattr(figures, "save_and_log", lambda *_: None)
    data = ImageDataModule(Sample(50), standardize="dataset")
    data.setup("fit")
    raw, callback = data.datasets["train"][[0, 1]], figures.FirstBatch()
    mixed = {"other_labels": torch.tensor([3, 3]), "other_shares": torch.tensor([0.0, 0.25])}
    callback.directory = tmp_path
    trainer: Any = SimpleNamespace(global_step=0, datamodule=data)
    callback.on_train_batch_start(trainer, None, raw._replace(inputs=data.standardized(raw.inputs), **mixed), 0)
    np.testing.assert_allclose(drawn["pixels"], raw.inputs.permute(0, 2, 3, 1), atol=1e-3)
    first, second = (data.classes[label] for label in raw.labels)
    assert drawn["titles"] == [first, f"{second} + 25% {data.classes[3]}"]
