"""Random changes to training images: pure functions of (seed, view, image index), without state to save."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from src.errors import UserError

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def uniform(seed: int, view: int | Tensor, indices: Tensor, draws: int) -> Tensor:
    """Return random numbers that depend on four counters alone: seed, view, image index and draw.

    The result is float32 in [0, 1), in steps of 2**-24, of shape (N, draws) for integer `indices` of shape
    (N,), on their device. It has the same bits on every device and in every batch. Seed and view may be any
    integers and count modulo 2**64; the view also a tensor of shape (), int64.

    Each counter says how far to advance a SplitMix64 generator, whose output seeds the generator of the next
    counter (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014; the
    finalizer is David Stafford's Mix13).
    """
    state = torch.tensor(0)
    for counter in (
        torch.tensor(_wrap(seed)),
        view if isinstance(view, Tensor) else torch.tensor(_wrap(view)),
        indices.to(torch.int64)[:, None],
        torch.arange(draws, device=indices.device),
    ):
        state = _mix(state + (counter + 1) * _wrap(_GOLDEN_GAMMA))
    return _shift_right(state, 40).to(torch.float32) * 2.0**-24


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shift_right(bits, 30)) * _wrap(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift_right(bits, 27)) * _wrap(0x94D049BB133111EB)
    return bits ^ _shift_right(bits, 31)


def _shift_right(bits: Tensor, count: int) -> Tensor:
    # int64's own shift copies the sign bit; uint64 would not, but has few kernels.
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _wrap(value: int) -> int:
    """Return the int64 with the lowest 64 bits of `value`."""
    return (value + 2**63) % 2**64 - 2**63


class Draws(NamedTuple):
    """What happens to each of N images: one tensor of shape (N,) per number.

    A field's place is the place of its random number, so new fields go to the end.
    """

    angle: Tensor
    """Rotation in radians."""
    row_shift: Tensor
    """Fraction of the height."""
    column_shift: Tensor
    """Fraction of the width."""
    row_zoom: Tensor
    """Source rows per output row: above 1 the picture shrinks."""
    column_zoom: Tensor
    """Source columns per output column."""
    flip: Tensor
    """Whether to mirror left and right (bool)."""
    row_crop: Tensor
    """Whole pixels (int64)."""
    column_crop: Tensor
    """Whole pixels (int64)."""
    row_cutout: Tensor
    """Centre of the hole, as a fraction of the height in [0, 1)."""
    column_cutout: Tensor
    """Centre of the hole, as a fraction of the width in [0, 1)."""
    brightness: Tensor
    """Factor of all values."""
    contrast: Tensor
    """Factor of the distance from the image's mean grey."""
    saturation: Tensor
    """Factor of the distance from the pixel's own grey."""


@dataclass(frozen=True)
class Augmentation:
    """Rotate, shift, zoom, flip, crop, recolour and cut out at random, every image by its own draws.

    Rotation, shift, zoom and flip have the geometry of Keras's `ImageDataGenerator` with
    `fill_mode="nearest"`: places outside the image repeat its edge. Crop moves the result before the flip,
    and likewise repeats its edge; colours change next, and cutout (DeVries and Taylor, arXiv:1708.04552) comes
    last. Each option has random numbers of its own, so that switching one off changes no other.

    Args:
        rotation: Largest rotation in degrees, either way (0 to 180).
        shift: Largest shift as a fraction of height and of width, either way, each axis by itself (0 to 1).
        zoom: Show 1 - zoom to 1 + zoom times the height and the width, each axis by itself (0 to below 1).
        flip: Mirror left and right with probability one half.
        crop: Largest shift in whole pixels, either way, each axis by itself (4 is usual for CIFAR-10).
        cutout: Side in pixels of a square, clipped at the borders, filled with the image's mean colour.
        colour: Multiply brightness, contrast and saturation by 1 - colour to 1 + colour, each by itself (0 to 1).

    Raises:
        UserError: If an option is outside its range.
    """

    rotation: float = 30.0
    shift: float = 0.1
    zoom: float = 0.2
    flip: bool = True
    crop: int = 0
    cutout: int = 0
    colour: float = 0.0

    def __post_init__(self) -> None:
        for name, allowed, in_range in (
            ("rotation", "0 to 180 degrees", 0 <= self.rotation <= 180),
            ("shift", "0 to 1 (a fraction of the image)", 0 <= self.shift <= 1),
            ("zoom", "0 to below 1", 0 <= self.zoom < 1),
            ("crop", "0 or more pixels", self.crop >= 0),
            ("cutout", "0 or more pixels", self.cutout >= 0),
            ("colour", "0 to 1", 0 <= self.colour <= 1),
        ):
            if not in_range:
                raise UserError(f"Augmentation option {name}={getattr(self, name)}: choose {allowed}.")

    def __call__(self, images: Tensor, *, seed: int, view: int | Tensor, indices: Tensor) -> Tensor:
        """Return augmented copies of images on the 0-255 scale, as float32 of the same shape (N, 3, H, W).

        `images` are uint8 or floating point; `indices`, of shape (N,), are their places in the data set. On a
        CPU an image's result has the same bits whichever images share its batch.
        """
        draws = self.draw(seed, view, indices.to(images.device))
        rows, columns = _output_pixels(images, draws)
        if self.rotation or self.shift or self.zoom:
            result = _sample(images, rows, columns, draws)
        elif self.flip or self.crop:
            result = _gather(images, rows, columns)
        else:
            result = images.to(torch.float32)
        if self.colour:
            result = _recolour(result, images, draws)
        return _cut_out(result, images, draws, self.cutout) if self.cutout else result

    def draw(self, seed: int, view: int | Tensor, indices: Tensor) -> Draws:
        """Draw what happens to the images with these indices (N,) in this view."""
        numbers = uniform(seed, view, indices, draws=len(Draws._fields)).unbind(1)
        angle, row_shift, column_shift, row_zoom, column_zoom = (2 * number - 1 for number in numbers[:5])
        flip, row_crop, column_crop, row_cutout, column_cutout = numbers[5:10]
        brightness, contrast, saturation = (1 + self.colour * (2 * number - 1) for number in numbers[10:])
        return Draws(
            angle=angle * (self.rotation * torch.pi / 180),
            row_shift=row_shift * self.shift,
            column_shift=column_shift * self.shift,
            row_zoom=1 + row_zoom * self.zoom,
            column_zoom=1 + column_zoom * self.zoom,
            flip=(flip < 0.5) & self.flip,
            row_crop=(row_crop * (2 * self.crop + 1)).long() - self.crop,
            column_crop=(column_crop * (2 * self.crop + 1)).long() - self.crop,
            row_cutout=row_cutout,
            column_cutout=column_cutout,
            brightness=brightness,
            contrast=contrast,
            saturation=saturation,
        )


def _output_pixels(images: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Return the row (N, H) and the column (N, W) that crop and flip bring to each place of the output."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) + draws.row_crop[:, None]
    columns = torch.arange(width, device=images.device) + draws.column_crop[:, None]
    columns = torch.where(draws.flip[:, None], columns.flip(1), columns)
    return rows.clamp(0, height - 1), columns.clamp(0, width - 1)


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Copy whole pixels: rows (N, H) and columns (N, W) of images (N, C, H, W)."""
    places = rows[:, :, None] * images.shape[-1] + columns[:, None, :]
    places = places.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, places).view_as(images).to(torch.float32)


def _sample(images: Tensor, rows: Tensor, columns: Tensor, draws: Draws) -> Tensor:
    """Sample images bilinearly at rotation @ (zoom * pixel + shift), in pixels from the centre."""
    height, width = images.shape[-2:]
    down = draws.row_zoom[:, None] * (rows - (height - 1) / 2) + (draws.row_shift * height)[:, None]
    right = draws.column_zoom[:, None] * (columns - (width - 1) / 2) + (draws.column_shift * width)[:, None]
    # The last bit may depend on the device and on the place in the batch: rounding from float64 hides it.
    angle = draws.angle.to(torch.float64)[:, None, None]
    cosine, sine = angle.cos().to(torch.float32), angle.sin().to(torch.float32)
    # Single products and sums: a matrix product may round differently in a batch of another size.
    down, right = down[:, :, None], right[:, None, :]
    # grid_sample's unit is half an image, its order (column, row).
    grid = images.new_empty((len(images), height, width, 2), dtype=torch.float32)
    torch.add(sine * down * (2 / width), cosine * right * (2 / width), out=grid[..., 0])
    torch.sub(cosine * down * (2 / height), sine * right * (2 / height), out=grid[..., 1])
    pixels = images.to(torch.float32)
    return grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _recolour(images: Tensor, originals: Tensor, draws: Draws) -> Tensor:
    """Change brightness, contrast about the original's mean grey, and saturation; values stay within 0 to 255."""
    brightness, contrast, saturation = (
        factor[:, None, None, None] for factor in (draws.brightness, draws.contrast, draws.saturation)
    )
    height, width = originals.shape[-2:]
    mean = _grey(_sums(originals)) / (1000 * height * width)
    lit = (mean + (images - mean) * contrast) * brightness
    grey = _grey(lit) / 1000
    return (grey + (lit - grey) * saturation).clamp(0, 255)


def _grey(colours: Tensor) -> Tensor:
    """Weigh red, green and blue, (N, 3, H, W), as ITU-R BT.601 does, in thousandths: (N, 1, H, W)."""
    red, green, blue = colours.split(1, dim=1)
    return 299 * red + 587 * green + 114 * blue


def _cut_out(images: Tensor, originals: Tensor, draws: Draws, side: int) -> Tensor:
    """Fill a square of each image with the mean colour of its original."""
    height, width = images.shape[-2:]
    top = (draws.row_cutout * height).long() - side // 2
    left = (draws.column_cutout * width).long() - side // 2
    below = torch.arange(height, device=images.device) - top[:, None]
    beyond = torch.arange(width, device=images.device) - left[:, None]
    in_rows, in_columns = (below >= 0) & (below < side), (beyond >= 0) & (beyond < side)
    colour = _sums(originals) / (height * width)
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(hole, colour, images)


def _sums(images: Tensor) -> Tensor:
    """Add up each channel, int64, (N, 3, 1, 1): whole levels have one exact sum, others depend on their order."""
    return images.round().sum((2, 3), keepdim=True, dtype=torch.int64)
