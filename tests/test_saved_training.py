"""Whether a checkpoint fits what is asked of it; whole commands ask it in test_cli.py and test_errors.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from src.errors import UserError
from src.saved_training import SavedTraining


def trained(stored: int | None, enlarged: int) -> SavedTraining:
    data: dict[str, Any] = {} if stored is None else {"image_size": stored}
    return SavedTraining(Path("best.ckpt"), {"hyper_parameters": {"image_size": enlarged}, "ImageDataModule": data})


@pytest.mark.parametrize(
    ("saved", "stored", "enlarged"),
    [
        (trained(32, 32), 32, 32),
        (trained(32, 64), 32, 64),
        (trained(None, 64), 64, 64),  # of an earlier version, which did not tell
        (trained(None, 64), 32, 64),
    ],
)
def test_images_of_the_same_size(saved: SavedTraining, stored: int, enlarged: int) -> None:
    saved.check_size(stored, enlarged)


@pytest.mark.parametrize(
    ("saved", "stored", "enlarged", "message"),
    [
        (trained(32, 64), 64, 64, "images of 32 pixels, enlarged to 64, and these have 64 pixels:"),
        (trained(64, 64), 32, 64, "images of 64 pixels, and these have 32 pixels, enlarged to 64:"),
        (trained(32, 32), 48, 48, "images of 32 pixels, and these have 48 pixels:"),
        (trained(None, 64), 32, 32, "images of 64 pixels, and these have 32 pixels:"),
    ],
)
def test_images_of_another_size(saved: SavedTraining, stored: int, enlarged: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        saved.check_size(stored, enlarged)


def test_advice_can_be_pasted() -> None:
    with pytest.raises(UserError, match=r"--run\.warm_start 'my runs/last\.ckpt'\."):
        SavedTraining(Path("my runs/last.ckpt"), {}).check_whole()


def test_batches_within_an_epoch_depend_on_whether_images_stay() -> None:
    identity = {"images": "a", "files": "b", "batch_size": 8, "processes": 2, "seed": 1, "stay": True}
    progress = {"current": {"started": 1, "processed": 0}}
    loop = {"state_dict": {"combined_loader": [{"served": 3}]}, "epoch_progress": progress}
    content = {"ImageDataModule": {"identity": identity}, "loops": {"fit_loop": loop}}
    saved = SavedTraining(Path("last.ckpt"), content)
    saved.check_data(identity)
    saved.check_rest(4)
    with pytest.raises(UserError, match=r"was true and is false\. Finish the epoch with the same feature_cache\.views"):
        saved.check_data(identity | {"stay": False})
    with pytest.raises(UserError, match=r"after 3 batches .* leaves 3 to it: finish the epoch with more"):
        saved.check_rest(3)
