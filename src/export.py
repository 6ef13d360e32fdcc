"""Write a trained network as one ONNX file, for programs that know nothing of thaw: `python -m src.export runs/last4`.

Everything between an image's bytes and the probabilities is in the file: resizing, standardization and the network.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from src.data.standardization import standardized
from src.endings import plain_endings
from src.errors import OneLineParser, UserError
from src.files import replacing, user_path
from src.model.classifier import TransferClassifier
from src.run_directory import checkpoint_at
from src.saved_training import SavedTraining

IMAGES, PROBABILITIES = "images", "probabilities"
CLASSES = "classes"
SUFFIX = ".onnx"

_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_LARGEST = 1536 * 2**20  # bytes; beyond, torch puts the weights into another file
_TOLERANCE = (
    0.01  # of a probability; where a resized pixel lies between two whole numbers, libraries may round it apart
)


class InferenceModel(nn.Module):
    """Tell the probabilities of images as they come.

    Args:
        network: What was trained.
        side: Height and width, in pixels, to which the images of its training were resized, before any enlargement.
        mean: Of each channel, pixels from 0 to 255, as the network expects them.
        std: The same.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: TransferClassifier, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.backbone, self.head = network.backbone, network.head
        self.side, self.network_side = side, network.image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Compute probabilities, (N, classes), from bytes, (N, H, W, 3) in RGB order."""
        inputs = standardized(self.resized(images), self.mean, self.std, self.network_side)
        return self.head(self.backbone(inputs)).softmax(dim=1)

    def resized(self, images: Tensor) -> Tensor:
        """Give pixels, (N, 3, side, side), whole numbers from 0 to 255, as Pillow gives them of a folder's images.

        Where images shrink they differ from Pillow's by a grey level or two; where their size is right, not at all.
        """
        pixels = images.permute(0, 3, 1, 2).float()
        pixels = F.interpolate(pixels, size=(self.side, self.side), mode="bicubic", antialias=True)
        return pixels.round().clamp(0, 255)


def inference_model(saved: SavedTraining) -> InferenceModel:
    """Rebuild what a checkpoint holds, in single precision, whatever the training's.

    Raises:
        UserError: It is not of a training of this project.
    """
    network = saved.network()
    side = saved.data.get("image_size", network.image_size)  # earlier versions' do not tell
    return InferenceModel(network, side, saved.data["mean"], saved.data["std"]).eval()


def export(saved: SavedTraining, path: Path) -> float:
    """Write a checkpoint's network as ONNX, with the names of the classes as JSON in its metadata.

    Args:
        saved: The checkpoint.
        path: The file to write, replaced if it is there.

    Returns:
        By how much ONNX Runtime's probabilities differ from the network's own, at most, on images of noise.

    Raises:
        UserError: The checkpoint is not of this project.
        RuntimeError: ONNX Runtime finds other probabilities.
        OSError: The file cannot be written.
    """
    network = inference_model(saved)
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    if size > _LARGEST:
        raise UserError(
            f"the weights of '{saved.path}' take {size / 1e9:.1f} GB, and one ONNX file holds {_LARGEST / 1e9:.1f}: "
            "train with fewer pixels (data.source.init_args.image_size) or a smaller head (model.hidden)."
        )
    free = {axis: torch.export.Dim(name) for axis, name in enumerate(("batch", "height", "width"))}
    side = network.side
    like = torch.zeros(2, side + 1, side + 2, 3, dtype=torch.uint8)  # sides that differ, or they would be taken for one
    classes = json.dumps(saved.classes)
    with replacing(path) as temporary:  # first, to find out whether there is a place for it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # in which older versions of torch warn themselves
            program = torch.onnx.export(
                network, (like,), dynamo=True, dynamic_shapes=(free,), input_names=[IMAGES],
                output_names=[PROBABILITIES], verbose=False,
            )  # fmt: skip
        assert program is not None
        program.model.metadata_props[CLASSES] = classes
        program.save(temporary)
        difference = _largest_difference(network, temporary)
        if not difference <= _TOLERANCE:  # as NaN would be
            raise RuntimeError(f"ONNX Runtime's probabilities differ from the network's by {difference:.2g}")
    return difference


def _largest_difference(network: InferenceModel, path: Path) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    generator = torch.Generator().manual_seed(0)
    differences = []
    for height, width in ((network.side, network.side), (network.side + 7, 2 * network.side)):  # as it is, and resized
        images = torch.randint(256, (2, height, width, 3), generator=generator, dtype=torch.uint8)
        (found,) = session.run([PROBABILITIES], {IMAGES: images.numpy()})
        with torch.inference_mode():
            differences.append(float((network(images) - torch.from_numpy(found)).abs().max()))
    return max(differences)


def _check_packages() -> None:
    """Refuse to begin without the packages that it needs."""
    for name in _PACKAGES:
        try:
            __import__(name)
        except ImportError as error:
            raise UserError(
                f"exporting needs the package {name}: python -m pip install -c constraints.txt '.[export]'"
            ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Export one checkpoint.

    Args:
        args: Words of the command line; None for the process's own.

    Raises:
        SystemExit: With code 1, after one line on standard error, if the user can mend what went wrong.
    """
    parser = OneLineParser(
        prog="python -m src.export",
        description="Write a trained network as one ONNX file, from an image's bytes to the probabilities.",
        example="python -m src.export runs/last4",
    )
    parser.add_argument(
        "run", type=user_path, help="a run directory, a recipe's folder for its newest run, or a checkpoint"
    )
    parser.add_argument("--output", type=user_path, help="file to write (the checkpoint's name, ending in .onnx)")
    with plain_endings():
        options = parser.parse_args(args)
        _check_packages()
        checkpoint = checkpoint_at(options.run)
        path = options.output or checkpoint.with_suffix(SUFFIX)
        if path.is_dir():
            raise UserError(f"'{path}' is a folder: give --output the name of a file.")
        saved = SavedTraining.read(checkpoint)
        try:
            difference = export(saved, path)
        except OSError as error:
            raise UserError(f"cannot write to '{path}': {error.strerror}.") from error
        if "image_size" not in saved.data:
            print(f"'{checkpoint}' is of an earlier version: its images are taken to have entered as they were stored.")
        print(f"{path} takes images, uint8 (N, H, W, 3), and gives probabilities (N, {len(saved.classes)}).")
        print(f"ONNX Runtime's differ from the network's by {difference:.1g} at most, on images of noise.")


if __name__ == "__main__":
    main()
