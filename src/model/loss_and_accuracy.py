"""Loss and accuracy of an epoch in one metric, for a few operations a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


@contextmanager
def counting_plainly() -> Iterator[None]:
    """Have torchmetrics count with `torch.bincount` in deterministic mode, too.

    It would compare every image with every pair of classes there, which takes images × classes² of memory. Whole
    numbers add up to the same in any order.
    """
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)


class LossAndAccuracy(Metric):
    """Average the loss, and count the right predictions, over all images of all processes. NaN is never right.

    torchmetrics has a metric for each; together they take 27 tensor operations of every step, this one eleven. On a GPU
    each is a launch.
    """

    full_state_update = False
    loss: Tensor
    right: Tensor
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("loss", torch.zeros(()), dist_reduce_fx="sum")
        for count in ("right", "seen"):
            self.add_state(count, torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor, loss: Tensor) -> None:
        """Take in a batch.

        Args:
            logits: (N, classes).
            labels: Numbers of the right classes, (N,).
            loss: The batch's mean, ().
        """
        # In place: to set an attribute of a module takes longer than to add two numbers.
        self.loss.add_(loss.detach(), alpha=len(labels))
        # A row with NaN in it has NaN for its maximum.
        values, guesses = logits.detach().max(dim=1)
        self.right.add_(((guesses == labels) & (values == values)).sum())
        self.seen.add_(len(labels))

    def sync(self, *arguments: Any, **options: Any) -> None:
        """Add up all processes; `unsync` gives back the same tensors, where torchmetrics would give copies.

        A recorded step would go on writing to the others, and copies made during a validation cannot be written to
        outside of it.
        """
        own = self.metric_state
        super().sync(*arguments, **options)
        if self._is_synced:
            self._cache = own

    def reset(self) -> None:
        """Begin anew, in the same tensors: a recorded step goes on writing to them."""
        kept = self.loss, self.right, self.seen
        super().reset()
        self.loss, self.right, self.seen = (each.zero_() for each in kept)

    def note_update(self) -> None:
        """Know that there was one of which Python saw nothing."""
        self._update_count, self._computed = max(self._update_count, 1), None

    def compute(self) -> dict[str, Tensor]:
        return {"loss": self.loss / self.seen, "acc": self.right / self.seen}
