"""The folders of images that the studies use."""

import sys
from pathlib import Path

import pytest

from benchmarks import jpeg, prepare
from src.data.sources import CIFAR10, ImageFolder, Sample
from src.errors import UserError


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
    prepare.quarter(tmp_path / "whole", tmp_path / "part")
    lost = tmp_path / "part" / "val" / "star" / "0004.jpg"
    lost.unlink()
    lost.symlink_to("nowhere")
    prepare.quarter(tmp_path / "whole", tmp_path / "part")  # finds everything else there
    names = {
        split: sorted(path.name for path in (tmp_path / "part" / split / "arrow").iterdir())
        for split in ("train", "val")
    }
    assert names == {"train": ["0000.jpg", "0001.jpg"], "val": ["0003.jpg", "0004.jpg"]}
    assert lost.is_file()
    assert not lost.readlink().is_absolute()  # so that both folders may be moved together


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: CIFAR10) -> None:
        raise UserError("data/cifar-10-python.tar.gz is not there")

    monkeypatch.setattr(CIFAR10, "prepare", refuse)
    monkeypatch.setattr(sys, "argv", ["prepare", "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="error: data/cifar-10"):
        prepare.main()
    monkeypatch.setattr(sys, "argv", ["jpeg", "--root", str(tmp_path / "none"), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=r"error: there are no images .*none/test"):
        jpeg.main()
    assert not (tmp_path / "out").exists()
