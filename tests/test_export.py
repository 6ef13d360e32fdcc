"""A trained network as one ONNX file, through the real entry point, and what another program finds in it."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from support import documented_code, on_sample

from src import cli
from src.data.sources import Sample
from src.data.sources.image_files import decode_all
from src.errors import UserError
from src.export import export, inference_model, main
from src.saved_training import SavedTraining

SIDE, ENLARGED = 32, 48


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train on images that are enlarged, until answers depend on what they show, and test."""
    root = tmp_path_factory.mktemp("runs")
    options = {
        "data.source.init_args.size": 50, "trainer.max_epochs": 1, "data.batch_size": 2, "run.root": root,
        "model.optimizer.init_args.lr": 1e-2, "data.input_size": ENLARGED,
    }  # fmt: skip
    cli.main(["fit", *on_sample("head", options)])
    return root / "head" / "version_0"


@pytest.fixture(scope="module")
def session(run: Path) -> onnxruntime.InferenceSession:
    main([str(run)])
    return onnxruntime.InferenceSession(run / "checkpoints" / "best.onnx")


def answers(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    return session.run(None, {"images": images})[0]


def test_it_answers_as_the_test_after_training_did(run: Path, session: onnxruntime.InferenceSession) -> None:
    with (run / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    classes = json.loads(session.get_modelmeta().custom_metadata_map["classes"])
    told = np.array([[float(row[f"p({name})"]) for name in classes] for row in rows])
    images = Sample(50).load()["test"].pixels.transpose(0, 2, 3, 1)
    order = [int(row["image"]) for row in rows]
    np.testing.assert_allclose(answers(session, images[order]), told, atol=1e-5)
    assert told.std(axis=0).max() > 1e-3  # or any answer would do


def test_it_resizes_photographs_as_a_folder_does(
    run: Path, session: onnxruntime.InferenceSession, tmp_path: Path
) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    photo[50:, :120, 0] = 255  # beyond which bicubic resizing would go at the edges
    Image.fromarray(photo).save(tmp_path / "photo.png")
    decoded, _ = decode_all([tmp_path / "photo.png"], SIDE, "photo")
    (small,) = decoded.transpose(0, 2, 3, 1)
    saved = SavedTraining.read(run / "checkpoints" / "best.ckpt")
    pixels = inference_model(saved).resized(torch.from_numpy(photo[None])).numpy()
    assert np.abs(pixels - decoded).max() <= 2
    assert np.abs(pixels - decoded).mean() < 0.1
    assert np.array_equal(pixels, np.round(pixels))
    np.testing.assert_allclose(answers(session, photo[None]), answers(session, small[None]), atol=5e-4)
    assert np.abs(answers(session, photo[None, ::4, ::6]) - answers(session, small[None])).max() > 5e-3  # others differ


def test_another_program_reads_it_as_the_docs_say(
    run: Path, session: onnxruntime.InferenceSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (60, 40), "red").save("photo.jpg")
    (code,) = (code for code in documented_code("python") if "onnxruntime" in code)
    exec(code.replace("runs/last4/version_0", str(run)), {})
    name, share = capsys.readouterr().out.split()
    assert name in Sample(50).classes
    assert 0.1 <= float(share) <= 1


def test_a_file_can_be_named_and_is_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "new" / "network.onnx"
    path.parent.mkdir()
    path.write_text("an earlier one")
    main([str(run / "checkpoints" / "last.ckpt"), "--output=~/new/network.onnx"])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path} takes images, uint8 (N, H, W, 3), and gives probabilities (N, 10)."
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    (found,) = onnxruntime.InferenceSession(path).run(None, {"images": np.zeros((1, SIDE, SIDE, 3), np.uint8)})
    last = inference_model(SavedTraining.read(run / "checkpoints" / "last.ckpt"))
    np.testing.assert_allclose(found, last(torch.zeros(1, SIDE, SIDE, 3)).detach(), atol=1e-5)


@pytest.mark.slow
def test_what_onnx_runtime_finds_otherwise_is_not_kept(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(onnxruntime.InferenceSession):
        def run(self, names: list[str], inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
            (found,) = super().run(names, inputs)
            _, height, width, _ = inputs["images"].shape
            return [found if height == width else found + 0.2]  # as where images are resized in another way

    monkeypatch.setattr(onnxruntime, "InferenceSession", Other)
    saved = SavedTraining.read(run / "checkpoints" / "best.ckpt")
    with pytest.raises(RuntimeError, match="differ from the network's by 0"):
        export(saved, tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_an_earlier_version_does_not_tell_what_was_enlarged(run: Path) -> None:
    saved = SavedTraining.read(run / "checkpoints" / "best.ckpt")
    assert inference_model(saved).side == SIDE
    del saved.data["image_size"]
    assert inference_model(saved).side == ENLARGED


@pytest.mark.parametrize(
    ("part", "missing", "message"),
    [
        ("ImageDataModule", "mean", "does not say what its classes and its input are"),
        ("ImageDataModule", "classes", "does not say what its classes and its input are"),
        ("hyper_parameters", "image_size", "does not say what its classes and its input are"),
        ("state_dict", "head.linear.bias", "is of another network: it lacks head.linear.bias"),
    ],
)
def test_a_checkpoint_that_lacks_something_is_refused(
    run: Path, tmp_path: Path, part: str, missing: str, message: str
) -> None:
    saved = SavedTraining.read(run / "checkpoints" / "best.ckpt")
    del saved.content[part][missing]
    with pytest.raises(UserError, match=message):
        export(saved, tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_no_numbers_are_refused(run: Path, tmp_path: Path) -> None:
    saved = SavedTraining.read(run / "checkpoints" / "best.ckpt")
    saved.content["state_dict"]["head.linear.bias"][0] = torch.nan
    with pytest.raises(UserError, match=r"infinite or no numbers, in head\.linear\.bias"):
        export(saved, tmp_path / "network.onnx")


def test_what_does_not_fit_into_one_file_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.export._LARGEST", 50_000_000)
    with pytest.raises(UserError, match=r"take 0\.1 GB, and one ONNX file holds 0\.1"):
        export(SavedTraining.read(run / "checkpoints" / "best.ckpt"), tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_takes_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.onnx, "export", interrupted)
    with pytest.raises(SystemExit) as ended:
        main([str(run), "--output", str(tmp_path / "network.onnx")])
    assert (ended.value.code, capsys.readouterr().err) == (130, "stopped by SIGINT\n")
    assert list(tmp_path.iterdir()) == []


def failed(*words: str) -> int | str | None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return ended.value.code


def test_mistakes_take_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other.ckpt").write_text("no checkpoint")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, tmp_path / "foreign.ckpt")
    (tmp_path / "killed" / "version_0").mkdir(parents=True)
    (tmp_path / "killed" / "version_0" / "config.yaml").touch()
    wanted = {
        (): "the following arguments are required: run. For example: python -m src.export runs/last4",
        (300 * "x",): "xxx' cannot be read: File name too long.",
        (str(tmp_path / "nowhere"),): "nowhere' is no checkpoint and no run",
        (str(tmp_path / "other.ckpt"),): "other.ckpt' is damaged or no checkpoint",
        (str(tmp_path / "foreign.ckpt"),): "foreign.ckpt' does not say what its classes and its input are",
        (str(tmp_path / "killed"),): "version_0' has no checkpoints/best.ckpt",
        (str(run), "--output", str(tmp_path / "other.ckpt" / "x.onnx")): "cannot write to ",
        (str(run), "--output", str(tmp_path)): "is a folder: give --output the name of a file",
    }
    for words, message in wanted.items():
        assert failed(*words) == 1
        printed, error = capsys.readouterr()
        assert printed == ""
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert message in error
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    assert failed(str(run)) == 1
    assert "exporting needs the package onnxscript: python -m pip install" in capsys.readouterr().err
