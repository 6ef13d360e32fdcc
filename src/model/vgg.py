"""VGG16 without its top, in eighteen named layers, and the weights it can start from.

Source: K. Simonyan and A. Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VGG16_Weights

from src.download import fetch
from src.errors import UserError
from src.files import user_path
from src.model.fusing import Convolve, fused_for, is_watched, working_dtype
from src.model.small_maps import convolve_by_tap, store_by_tap
from src.tensor_files import Unreadable, load_tensors

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # (channels, convolutions) of each block
_TORCHVISION = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
"""Torchvision's numbers of the convolutions: there each ReLU and pooling is a module of its own."""

LAYERS = tuple(
    f"block{block}_{part}"
    for block, (_, convs) in enumerate(BLOCKS, start=1)
    for part in (*(f"conv{conv}" for conv in range(1, convs + 1)), "pool")
)
FEATURES = BLOCKS[-1][0]
SMALL = 4  # side of the largest maps on which taps were seen to be faster, forwards alone too, in both precisions
REDUCTION = 2 ** len(BLOCKS)  # every block's pooling halves height and width


class InputScale(NamedTuple):
    """What network input means: (pixel - mean) / std, pixels from 0 to 255 in RGB order."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class _Published(NamedTuple):
    url: str
    expects: InputScale


PUBLISHED = {
    # The original Caffe weights: mean image colour subtracted, no division (those that Keras ships, in RGB order).
    "IMAGENET1K_FEATURES": _Published(
        VGG16_Weights.IMAGENET1K_FEATURES.url, InputScale((123.68, 116.779, 103.939), (1.0, 1.0, 1.0))
    ),
    # torchvision's own training: 0 to 1, then ImageNet mean and deviation.
    "IMAGENET1K_V1": _Published(
        VGG16_Weights.IMAGENET1K_V1.url,
        InputScale((0.485 * 255, 0.456 * 255, 0.406 * 255), (0.229 * 255, 0.224 * 255, 0.225 * 255)),
    ),
}


class ConvReLU(nn.Conv2d):
    """Convolve 3×3 with zero padding, then rectify: one layer in Keras's count.

    Args:
        in_channels: Channels that come in.
        out_channels: Channels that go out.
        by_tap: Whether to expect maps of a few pixels, and to store and compute accordingly (see `small_maps`).
    """

    def __init__(self, in_channels: int, out_channels: int, by_tap: bool = False) -> None:
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]
        self.by_tap = by_tap
        self._store()

    def _store(self) -> None:
        if self.by_tap and self.weight.device.type == "cpu":
            store_by_tap(self.weight)
        else:
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> ConvReLU:
        super()._apply(fn, recurse)
        self._store()  # whoever moves to a GPU computes otherwise there
        return self

    def forward(self, input: Tensor) -> Tensor:
        return F.relu(self.convolve(input), inplace=True)

    def convolve(self, input: Tensor) -> Tensor:
        """Do all but rectify."""
        if self.by_tap and input.device.type == "cpu" and not torch.compiler.is_compiling():
            return self._convolve_by_tap(input)  # GPUs have kernels of their own, and compilers know better
        return super().forward(input)

    def in_one_pass(self, fused: Convolve, maps: Tensor, pools: bool) -> Tensor:
        """Do all of it, and 2×2 pooling after it if told to, by what `fused_for` has found."""
        assert self.bias is not None
        dtype = working_dtype(maps.device, self.weight)  # autocast does not look into functions of our own
        return fused(maps.to(dtype), self.weight.to(dtype), self.bias.to(dtype), pools)

    def _convolve_by_tap(self, maps: Tensor) -> Tensor:
        assert self.bias is not None
        parts = (maps, self.weight, self.bias)
        if torch.is_autocast_enabled("cpu"):  # which does not look into functions of our own
            parts = tuple(part.to(torch.get_autocast_dtype("cpu")) for part in parts)  # type: ignore[assignment]
        with torch.autocast("cpu", enabled=False):
            return convolve_by_tap(*parts)


class VGGBackbone(nn.Sequential):
    """Stack the eighteen layers `block1_conv1` … `block5_pool`; weights are random until `load` is called.

    Args:
        image_size: Height and width of the images in pixels, for which the layers are laid out in memory.
    """

    def __init__(self, image_size: int = 32) -> None:
        super().__init__()
        in_channels = 3
        sides = [image_size, *(side for _, _, side in output_shapes(image_size))]  # of what enters each layer
        for name, side in zip(LAYERS, sides, strict=False):
            if name.endswith("pool"):
                self.add_module(name, nn.MaxPool2d(2))
            else:
                out_channels = BLOCKS[block_of(name) - 1][0]
                self.add_module(name, ConvReLU(in_channels, out_channels, by_tap=side <= SMALL))
                in_channels = out_channels

    def forward(self, x: Tensor, first: int = 0, last: int = len(LAYERS)) -> Tensor:
        """Run the layers first, first + 1, …, last - 1.

        Args:
            x: What enters layer `first`: (N, C, H, W), standardized images (C = 3) when `first` is 0.
            first: Number of the first layer to run, from 0.
            last: Number of the layer to stop before.
        """
        if first == 0:
            x = x.contiguous(memory_format=torch.channels_last)
        layers = self.layers(first, last)
        fused, pooled = fused_for(x, layers), False
        for layer, following in zip(layers, [*layers[1:], None], strict=False):
            pools_next = isinstance(following, nn.MaxPool2d)
            if isinstance(layer, nn.MaxPool2d):
                x, pooled = x if pooled else F.relu(layer(x), inplace=not is_watched(layer)), False
            elif isinstance(layer, ConvReLU) and fused is not None:
                x, pooled = layer.in_one_pass(fused, x, pools_next), pools_next
            elif isinstance(layer, ConvReLU) and pools_next and not is_watched(layer):
                x = layer.convolve(x)  # rectified after pooling: the same numbers, and a quarter of the pixels
            else:
                x = layer(x)
        return x

    def layers(self, first: int, last: int) -> list[nn.Module]:
        """List the layers first, first + 1, …, last - 1."""
        return list(self._modules.values())[first:last]  # what `children` does takes longer than some layers

    def prefix_parameters(self, depth: int) -> list[nn.Parameter]:
        """List the parameters of the first `depth` layers."""
        return [parameter for layer in self.layers(0, depth) for parameter in layer.parameters()]

    def load(self, weights: str) -> None:
        """Replace every weight.

        Args:
            weights: A published name (`IMAGENET1K_FEATURES`, `IMAGENET1K_V1`), or a file: a torchvision VGG16 state
                dict, whole or features only, or a checkpoint of this project.

        Raises:
            UserError: The file is absent and cannot be downloaded, is no state dict, or a layer is missing,
                misshapen, or infinite or no numbers.
        """
        path = _download(weights) if weights in PUBLISHED else user_path(weights)
        self.load_state_dict(self._translate(_read(path), path))

    def _translate(self, state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
        """Rename torchvision's or a checkpoint's keys to ours, and refuse what does not fit."""
        translated, wrong = {}, []
        convolutions = [name for name, layer in self.named_children() if isinstance(layer, ConvReLU)]
        for name, number in zip(convolutions, _TORCHVISION, strict=True):
            for kind in ("weight", "bias"):
                keys = (f"backbone.{name}.{kind}", f"{name}.{kind}", f"features.{number}.{kind}", f"{number}.{kind}")
                found = next((state[key] for key in keys if isinstance(state.get(key), Tensor)), None)
                wanted = self.get_parameter(f"{name}.{kind}").shape
                if found is None:
                    wrong.append(f"{name}.{kind} is missing")
                elif found.shape != wanted:
                    wrong.append(f"{name}.{kind} is {tuple(found.shape)} instead of {tuple(wanted)}")
                elif not found.isfinite().all():
                    wrong.append(f"{name}.{kind} is infinite in places, or no number")
                else:
                    translated[f"{name}.{kind}"] = found
        if wrong:
            more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise UserError(
                f"'{path}' does not hold VGG16's convolutions: {'; '.join(wrong[:4])}{more}. Give a torchvision VGG16 "
                "state dict or a checkpoint of this project as model.weights."
            )
        return translated


def block_of(layer: str) -> int:
    """Tell which block a layer belongs to, from 1."""
    return int(layer.removeprefix("block").partition("_")[0])


def output_shapes(image_size: int) -> list[tuple[int, int, int]]:
    """Work out what each layer puts out: (channels, height, width), in the order of `LAYERS`."""
    shapes, side = [], image_size
    for name in LAYERS:
        side = side // 2 if name.endswith("pool") else side
        shapes.append((BLOCKS[block_of(name) - 1][0], side, side))
    return shapes


def expected_input(weights: str | None, weights_input: str | None) -> InputScale | None:
    """Tell which input the weights were trained on, without loading them into a network.

    Args:
        weights: As in `VGGBackbone.load`; None for random weights, which expect nothing.
        weights_input: The published name whose input scale a plain state dict shares.

    Returns:
        None if nobody can say: random weights, or a plain state dict without `weights_input`.

    Raises:
        UserError: The file is absent or damaged, or published weights are said to expect other input.
    """
    if weights in PUBLISHED and weights_input not in (None, weights):
        raise UserError(
            f"model.weights_input is {weights_input}, and {weights} expect their own input: leave it out. It is for "
            "files, which do not say what they expect."
        )
    if weights_input is not None:
        return PUBLISHED[weights_input].expects
    if weights is None:
        return None
    if weights in PUBLISHED:
        return PUBLISHED[weights].expects
    return _input_of_checkpoint(_open(user_path(weights)))


def _input_of_checkpoint(content: Any) -> InputScale | None:
    # The data module leaves its standardization in the checkpoint under its class name (a Lightning convention).
    saved = content.get("ImageDataModule", {}) if isinstance(content, Mapping) else {}
    return InputScale(tuple(saved["mean"]), tuple(saved["std"])) if "mean" in saved else None


def _download(name: str) -> Path:
    url = PUBLISHED[name].url
    file = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.is_file():  # as torchvision does: a download is checked, a file that somebody put there is not
        return path
    return fetch(
        url,
        path,
        algorithm="sha256",
        digest=file.removesuffix(".pth").rpartition("-")[2],
        offline_hint=(
            "put the file there (TORCH_HOME chooses the folder), or start from random weights: --model.weights null "
            "--data.standardize dataset, or for a trial on built-in images --config configs/with/sample.yaml"
        ),
    )


def _read(path: Path) -> Mapping[str, Any]:
    content = _open(path)
    state = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping):
        raise UserError(f"'{path}' holds no state dict. Save one with torch.save(model.state_dict(), file).")
    return state


def _open(path: Path) -> Any:
    if not path.is_file():
        raise UserError(
            f"no weights file '{path}'. model.weights takes a file, null, or one of: {', '.join(PUBLISHED)}."
        )
    try:
        return load_tensors(path, mmap=True)
    except OSError as error:
        raise UserError(f"'{path}' cannot be read: {error.strerror or error}.") from error
    except Unreadable as error:
        raise UserError(
            f"'{path}' cannot be read as weights: it is damaged, or holds other things than tensors. If these are "
            "published weights, remove it: they are downloaded again."
        ) from error
