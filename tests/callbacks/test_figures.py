"""Pictures of any number of classes."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from src.callbacks import figures
from src.callbacks.figures import confusion_figure, grid_figure, write_png
from src.data.datamodule import ImageDataModule
from src.data.sources import Sample


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
