"""Several looks at the same test image, whose predictions are averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

TestTimeAugmentation = Literal["flip", "flip_shift"]

_SHIFTS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))


def looks(images: Tensor, kind: TestTimeAugmentation) -> list[Tensor]:
    """Mirror images, (N, C, H, W), and with `flip_shift` also move them by one pixel each way, repeating the edge.

    Returns:
        Two batches for `flip`, ten for `flip_shift`, the first of them unchanged.
    """
    shifts = _SHIFTS if kind == "flip_shift" else _SHIFTS[:1]
    height, width = images.shape[-2:]
    wider = F.pad(images, (1, 1, 1, 1), mode="replicate")
    moved = [wider[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width] for down, right in shifts]
    return [look for image in moved for look in (image, image.flip(-1))]


def average(
    classify: Callable[[Tensor], Tensor], images: Tensor, kind: TestTimeAugmentation, plain: Tensor | None = None
) -> Tensor:
    """Average the probabilities, (N, classes), that `classify`'s logits give for all looks at the images.

    `plain` are those of the images unchanged, if they are known already.
    """
    found = [] if plain is None else [plain]
    found += [classify(look).float().softmax(dim=1) for look in looks(images, kind)[len(found) :]]
    return torch.stack(found).mean(dim=0)
