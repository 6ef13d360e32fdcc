"""Paste a rectangle of another image over each one, and mix their labels by area.

Source: S. Yun and others, "CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
arXiv:1905.04899.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from src.data.augment import uniform


class Patches(NamedTuple):
    """Say what is pasted over each of N images: tensors of shape (N,), int64."""

    others: Tensor
    """Position in the split of the image that is pasted from."""
    top: Tensor
    bottom: Tensor
    """First row below the rectangle; `top` where there is none."""
    left: Tensor
    right: Tensor


def draw_patches(probability: float, seed: int, view: int | Tensor, indices: Tensor, images: int, side: int) -> Patches:
    """Draw rectangles of any area, clipped at the borders: a pure function of seed, view and image index.

    Args:
        probability: How likely an image is to have one, 0 to 1.
        seed: As for `uniform`.
        view: Number of the view, from 0.
        indices: Numbers of the images, int64, (N,).
        images: How many images can be pasted from.
        side: Height and width of an image in pixels.
    """
    # Augmentation takes the numbers of views from 0 on; those below are nobody's.
    applies, other, area, row, column = uniform(seed, -1 - view, indices, draws=5).unbind(1)
    half = area.sqrt() * (side / 2) * (applies < probability)
    edges = [centre * side + offset for centre in (row, column) for offset in (-half, half)]
    others = (other * images).long().clamp(max=images - 1)  # float32 may round up to the number itself
    return Patches(others, *(edge.round().clamp(0, side).long() for edge in edges))


def shares(patches: Patches, side: int) -> Tensor:
    """Give the part of each image that is pasted over, float32, (N,), from 0 to 1."""
    area = (patches.bottom - patches.top) * (patches.right - patches.left)
    return area.to(torch.float32) / side**2


def paste(images: Tensor, others: Tensor, patches: Patches) -> Tensor:
    """Show `others` inside the rectangles and `images` outside; all (N, C, H, W)."""
    rows, columns = (torch.arange(size, device=images.device) for size in images.shape[-2:])
    in_rows = (rows >= patches.top[:, None]) & (rows < patches.bottom[:, None])
    in_columns = (columns >= patches.left[:, None]) & (columns < patches.right[:, None])
    return torch.where(in_rows[:, None, :, None] & in_columns[:, None, None, :], others, images)
