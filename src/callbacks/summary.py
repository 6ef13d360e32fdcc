"""What the terminal shows before training: how many images, the network's layers, and the schedule of stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from src.callbacks.schedule import HEAD_NUMBER, trainable_layers
from src.callbacks.unfreezing import StagedUnfreezing
from src.data.datamodule import ImageDataModule
from src.data.loading import ArrayDataset
from src.errors import say, shorten
from src.model.classifier import HEAD, TransferClassifier
from src.model.vgg import LAYERS, output_shapes


class Summary(Callback):
    """Print what will be trained, when, and how fast, before it happens."""

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        unfreezing = StagedUnfreezing.of(trainer)
        layers = trainable_layers(unfreezing.stages, trainer.current_epoch)
        say(f"{image_line(ImageDataModule.of(trainer))}\n\n{layer_table(pl_module, layers)}\n")
        rate = partial(unfreezing.rate, trainer, warmed_up=True)
        say(stage_table(pl_module, unfreezing.stages, rate, trainer.max_epochs or 1))


def image_line(data: ImageDataModule) -> str:
    """Count classes and images, and say of which classes there are fewest and most to train on, and which have none."""
    counts = {split: f"{len(dataset):,}" for split, dataset in data.datasets.items()}
    by_class = {split: _by_class(dataset, data.num_classes) for split, dataset in data.datasets.items()}
    (fewest, rare), *_, (most, common) = sorted(zip(by_class["train"], data.classes, strict=True))
    spread = f"{fewest:,} of {rare} to {most:,} of {common}"
    rest = f"{counts['val']} to validate, {counts.get('test', 'none')} to test"
    lines = [f"{data.num_classes} classes: {counts['train']} training images ({spread}), {rest}"]
    for split, purpose in (("train", "to train on"), ("val", "to validate"), ("test", "to test")):
        numbers = by_class.get(split, [])
        lacking = [name for name, count in zip(data.classes, numbers, strict=False) if not count]
        lines += [f"none {purpose} of {shorten(lacking)}"] * bool(lacking)
    return "\n".join(lines)


def _by_class(dataset: ArrayDataset, classes: int) -> list[int]:
    return torch.bincount(dataset.labels.cpu()[dataset.chosen], minlength=classes).tolist()


def layer_table(model: TransferClassifier, layers: int) -> str:
    """List every layer with its output shape, its parameters and whether it trains when `layers` of them do."""
    rows = []
    for number, (name, layer) in enumerate(model.backbone.named_children()):
        shape = " × ".join(str(side) for side in output_shapes(model.image_size)[number])
        count = _count(layer)
        rows.append((name, shape, f"{count:,}", "yes" if number >= HEAD_NUMBER - layers and count else ""))
    for name, layer in model.head.named_children():
        count = _count(layer)
        size = layer.out_features if hasattr(layer, "out_features") else ""
        rows.append((f"{HEAD}.{name}", str(size), f"{count:,}", "yes" if count else ""))
    backbone, suffix = _count(model.backbone), _suffix_parameters(model, layers)
    rows.append(("backbone", "", f"{backbone:,}", f"{suffix:,}"))
    total = _count(model.head)
    rows.append(("backbone and head", "", f"{backbone + total:,}", f"{suffix + total:,}"))
    return table(("layer", "output", "parameters", "trains"), rows)


def stage_table(
    model: TransferClassifier, stages: Mapping[int, int], rate: Callable[[int, int], float], max_epochs: int
) -> str:
    """List the stages: epochs, what trains, how many parameters, and the rates after warm-up.

    Args:
        model: Whose parameters are counted.
        stages: Epochs and numbers of layers, as `parse_stages` gives them.
        rate: Gives the rate of a layer's number at the start of an epoch, warm-up aside.
        max_epochs: How many epochs there are, stages beyond are marked; -1 for no end.
    """
    rows = []
    end = math.inf if max_epochs == -1 else max_epochs
    for first, following in zip(stages, [*list(stages)[1:], math.inf], strict=True):
        layers = stages[first]
        lowest = HEAD_NUMBER - layers
        last = min(following, end) - 1
        trains = "head" if not layers else f"{LAYERS[lowest]} … head"
        rates = f"{rate(HEAD_NUMBER, first):.2g}"
        if layers:
            rates += f" … {rate(lowest, first):.2g}"
        epochs = f"{first} to {last}" if last >= first else f"{first} (after the end)"
        if last == math.inf:
            epochs = f"{first} on"
        rows.append((epochs, str(layers), trains, f"{_suffix_parameters(model, layers) + _count(model.head):,}", rates))
    return table(("epochs", "layers", "what trains", "parameters", "rates, head … lowest"), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align text in columns: the first left, the others too unless they are numbers."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def cell(text: str, column: int) -> str:
        number = text.replace(",", "").isdigit()
        return text.rjust(widths[column]) if number else text.ljust(widths[column])

    drawn = ["  ".join(cell(text, column) for column, text in enumerate(line)).rstrip() for line in lines]
    return "\n".join([drawn[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *drawn[1:]])


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _suffix_parameters(model: TransferClassifier, layers: int) -> int:
    return sum(map(_count, model.backbone.layers(HEAD_NUMBER - layers, HEAD_NUMBER)))
