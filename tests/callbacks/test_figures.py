"""Pictures of any number of classes, and the calendar without an end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from src.callbacks import figures
from src.callbacks.figures import confusion_figure, grid_figure, write_png
from src.callbacks.schedule import parse_stages
from src.callbacks.summary import image_line, stage_table
from src.data.datamodule import ImageDataModule
from src.data.sources import Sample
from src.model.classifier import TransferClassifier


@pytest.mark.parametrize(("classes", "inches", "names"), [(2, 5, 2), (10, 7.5, 10), (1000, 25, 100)])
def test_confusion_matrix_stays_of_a_size_that_can_be_drawn(classes: int, inches: float, names: int) -> None:
    figure = confusion_figure(np.eye(classes, dtype=int).tolist(), [f"class {number}" for number in range(classes)])
    assert figure.get_size_inches() == pytest.approx((inches, inches))
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [f"class {number}" for number in range(0, classes, classes // names)]


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
    monkeypatch.setattr(figures, "show", lambda *_: None)
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


def test_images_of_the_rarest_and_the_commonest_class_are_counted() -> None:
    data = ImageDataModule(Sample(size=50), standardize="dataset", val_fraction=0.5, split_seed=1)
    data.setup("fit")
    labels = data.datasets["train"].labels[data.datasets["train"].chosen].tolist()
    counts = sorted((labels.count(number), name) for number, name in enumerate(data.classes))
    (few, rare), (many, common) = counts[0], counts[-1]
    assert few < many
    assert image_line(data) == f"25 training images ({few} of {rare} to {many} of {common}), 25 to validate, 10 to test"


def test_calendar_without_an_end() -> None:
    model = TransferClassifier(weights=None)
    lines = stage_table(model, parse_stages({0: 0, 3: 4}), lambda number, epoch: 1e-3, -1).splitlines()[2:]
    assert [line.split("  ")[0] for line in lines] == ["0 to 2", "3 on"]
