"""The arithmetic of thawing: which layers train in an epoch, and at which rate. Pure functions, no state.

A layer's number counts VGG16's eighteen layers from the bottom; the head's number is one above the last. Rates that
fall by a factor per block, towards the bottom, are discriminative rates: J. Howard and S. Ruder, "Universal Language
Model Fine-tuning for Text Classification" (ULMFiT), 2018.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from src.errors import UserError
from src.model.vgg import BLOCKS, LAYERS, block_of

HEAD_NUMBER = len(LAYERS)

Decay = Literal["constant", "linear", "cosine"]


def parse_stages(stages: Mapping[int, int | str]) -> dict[int, int]:
    """Turn what the user wrote into epochs and numbers of trainable layers, in the order of the epochs.

    Args:
        stages: For each first epoch: how many layers train, counted from the top; or the lowest one's name; or `all`.

    Raises:
        UserError: No stage begins at epoch 0, an epoch is negative, or a layer does not exist.
    """
    parsed = {}
    for epoch, layers in sorted(stages.items()):
        if epoch < 0:
            raise UserError(f"unfreezing.stages names epoch {epoch}: epochs count from 0.")
        parsed[epoch] = _count_layers(layers)
    if 0 not in parsed:
        raise UserError(
            "unfreezing.stages has no stage at epoch 0: say what trains from the start, e.g. {0: 0} for the head alone."
        )
    return parsed


def _count_layers(layers: int | str) -> int:
    if isinstance(layers, str) and layers.isdecimal():
        layers = int(layers)
    if layers == "all":
        return len(LAYERS)
    if isinstance(layers, str):
        if layers not in LAYERS:
            raise UserError(f"unfreezing.stages names the layer '{layers}': there are {', '.join(LAYERS)}, and 'all'.")
        return len(LAYERS) - LAYERS.index(layers)
    if not 0 <= layers <= len(LAYERS):
        raise UserError(f"unfreezing.stages wants {layers} trainable layers: VGG16 has 0 (head only) to {len(LAYERS)}.")
    return layers


def trainable_layers(stages: Mapping[int, int], epoch: int) -> int:
    """Tell how many backbone layers, counted from the top, train in an epoch; the head always does."""
    return stages[max(first for first in stages if first <= epoch)]


def stage_begin(stages: Mapping[int, int], epoch: int) -> int:
    """Find the first epoch since which as many layers train as in this one."""
    layers = trainable_layers(stages, epoch)
    while epoch > 0 and trainable_layers(stages, epoch - 1) == layers:
        epoch -= 1
    return epoch


def training_span(stages: Mapping[int, int], number: int, epoch: int, max_epochs: int) -> tuple[int, int] | None:
    """Find the unbroken run of epochs, around `epoch`, in which a layer trains.

    Args:
        stages: As `parse_stages` gives them.
        number: The layer's number.
        epoch: An epoch of that run.
        max_epochs: How many epochs there are.

    Returns:
        Its first epoch and the one after its last; None if the layer is frozen in `epoch`.
    """

    def trains(at: int) -> bool:
        return number >= HEAD_NUMBER - trainable_layers(stages, at)

    if not trains(epoch):
        return None
    begin = max(e for e in stages if e <= epoch and trains(e) and (e == 0 or not trains(e - 1)))
    end = min([max_epochs, *(e for e in stages if e > epoch and not trains(e))])
    return begin, max(end, epoch + 1)


@dataclass(frozen=True)
class LearningRates:
    """Say how fast each layer learns at each step.

    Attributes:
        stages: As `parse_stages` gives them.
        from_epoch: Rate of the head from the given epochs on.
        block_factor: Factor on the rate for every block further down; the head has none, block 5 has it once.
        decay: Course of the rate from a layer's thaw to the end of its training.
        warmup_epochs: Epochs, from a layer's thaw, over which its rate rises linearly from nothing.
    """

    stages: Mapping[int, int]
    from_epoch: Mapping[int, float]
    block_factor: float = 1.0
    decay: Decay = "constant"
    warmup_epochs: float = 0.0

    def at(
        self,
        base: float,
        number: int,
        epoch: int,
        step: int,
        steps: int,
        max_epochs: int,
        warmed_up: bool = False,
    ) -> float:
        """Give the rate of a layer at one step; 0 while it is frozen.

        Args:
            base: Rate of the head before the first epoch of `from_epoch`.
            number: The layer's number, `HEAD_NUMBER` for the head.
            epoch: The epoch, from 0.
            step: The step within the epoch, from 0.
            steps: Steps of an epoch.
            max_epochs: Epochs of the whole training, where every decay ends.
            warmed_up: Whether to take warm-up for done.
        """
        epochs = training_span(self.stages, number, epoch, max_epochs)
        if epochs is None:
            return 0.0
        begin, end = epochs
        elapsed = epoch - begin + step / steps
        # Warm-up counts the step to be made, so that the first one is not wasted at rate 0.
        risen = min(1.0, (elapsed + 1 / steps) / self.warmup_epochs) if self.warmup_epochs and not warmed_up else 1.0
        span = end - begin - self.warmup_epochs
        faded = min(1.0, max(0.0, elapsed - self.warmup_epochs) / span) if span > 0 else 0.0
        begun = [first for first in self.from_epoch if first <= epoch]
        head = self.from_epoch[max(begun)] if begun else base
        return head * self.block_factor ** blocks_below_head(number) * risen * _fade(self.decay, faded)


def blocks_below_head(number: int) -> int:
    """Count the blocks from the head, 0, down to a layer's: 1 for block 5, 5 for block 1."""
    return 0 if number == HEAD_NUMBER else len(BLOCKS) + 1 - block_of(LAYERS[number])


def _fade(decay: Decay, share: float) -> float:
    if decay == "linear":
        return 1.0 - share
    if decay == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * share))
    return 1.0
