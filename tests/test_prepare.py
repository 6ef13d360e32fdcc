"""The folders of images that the studies use."""

from pathlib import Path

import pytest

from benchmarks import prepare
from src.data.sources import ImageFolder, Sample


def test_images_and_their_quarter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Sample(size=50)
    prepare.export(source, tmp_path / "whole")
    folder = ImageFolder(tmp_path / "whole")
    folder.prepare()
    splits = folder.load()
    assert {split: len(images) for split, images in splits.items()} == {
        split: len(images) for split, images in source.load().items()
    }
    monkeypatch.setattr(prepare, "TRAIN", slice(0, 2))
    monkeypatch.setattr(prepare, "VAL", slice(3, 5))
    for _ in range(2):  # a second time finds everything there
        prepare.quarter(tmp_path / "whole", tmp_path / "part")
    names = {
        split: sorted(path.name for path in (tmp_path / "part" / split / "arrow").iterdir())
        for split in ("train", "val")
    }
    assert names == {"train": ["0000.jpg", "0001.jpg"], "val": ["0003.jpg", "0004.jpg"]}
    assert (tmp_path / "part" / "val" / "star" / "0004.jpg").resolve().is_file()
