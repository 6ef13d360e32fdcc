"""A small data set drawn from a seed: coloured shapes, for trying everything without a network."""

from collections.abc import Callable

import numpy as np

from src.data.sources.base import Images, Source
from src.errors import UserError

SIDE = 32  # pixels
OVERSAMPLING = 3  # points per pixel and axis; their share inside a shape is the pixel's opacity
INVERTED = 0.3  # share of images with a dark shape on a light background

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _polygon(corners: list[tuple[float, float]]) -> Inside:
    """Return the even-odd test whether points lie inside the polygon."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        odd = np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)
        for (x0, y0), (x1, y1) in zip(corners, corners[1:] + corners[:1], strict=True):
            if y0 != y1:
                odd ^= ((y0 > y) != (y1 > y)) & (x < x0 + (x1 - x0) / (y1 - y0) * (y - y0))
        return odd

    return inside


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    turn = np.arange(2 * points) * np.pi / points
    radius = np.where(np.arange(2 * points) % 2, inner, 1.0)
    return list(zip(radius * np.sin(turn), -radius * np.cos(turn), strict=True))


# Each shape is a test on points of the square from -1 to 1, y pointing down.
SHAPES: dict[str, Inside] = {
    "arrow": _polygon([(-1, -0.3), (0, -0.3), (0, -0.85), (1, 0), (0, 0.85), (0, 0.3), (-1, 0.3)]),
    "circle": lambda x, y: x * x + y * y < 0.7,
    "crescent": lambda x, y: (x * x + y * y < 1) & ((x - 0.5) ** 2 + y * y > 0.6),
    "cross": lambda x, y: (np.minimum(abs(x), abs(y)) < 0.26) & (np.maximum(abs(x), abs(y)) < 0.95),
    "heart": lambda x, y: x * x + (y + 0.15 + 0.75 * np.sqrt(abs(x))) ** 2 < 0.8,
    "hourglass": lambda x, y: (abs(x) < abs(y) * 0.9 + 0.05) & (abs(y) < 0.9),
    "ring": lambda x, y: abs(x * x + y * y - 0.68) < 0.3,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) < 0.75,
    "star": _polygon(_star(5, 0.42)),
    "triangle": _polygon([(0, -1), (1, 0.75), (-1, 0.75)]),
}


class Sample(Source):
    """Provide ten classes of shapes on textured, noisy backgrounds, 32x32 pixels, drawn from a seed.

    Colours are random for shape and background alike, so that only the outline tells the class. The test
    split is a fifth of the training split's size and comes from a random stream of its own.

    Args:
        size: Number of training images.
        seed: Seed of every random choice; the same seed gives the same images.

    Raises:
        UserError: There would be no image of some class, or the seed is negative.
    """

    def __init__(self, size: int = 2500, seed: int = 777) -> None:
        if size < 5 * len(SHAPES):
            raise UserError(f"sample size {size} is too small; choose at least {5 * len(SHAPES)}")
        if seed < 0:
            raise UserError(f"sample seed {seed} is negative; choose 0 or more")
        self.size = size
        self.seed = seed

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(SHAPES)

    def prepare(self) -> None:
        """Do nothing: drawing takes about a second."""

    def load(self) -> dict[str, Images]:
        train, test = np.random.SeedSequence(self.seed).spawn(2)
        return {"train": _draw(self.size, train), "test": _draw(self.size // 5, test)}


def _draw(count: int, seed: np.random.SeedSequence) -> Images:
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = rng.permutation(np.arange(count, dtype=np.int64) % len(SHAPES))
    opacity = _opacity(labels, rng)[:, None]
    background, shape = _colours(count, rng)
    colours = background + opacity * (shape - background)
    colours += 0.10 * _texture(count, rng) + rng.normal(0, 0.04, (count, 3, SIDE, SIDE))
    pixels = np.rint(colours.clip(0, 1) * 255).astype(np.uint8)
    return Images(pixels, labels)


def _opacity(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return how much of each pixel the shape covers, (N, 32, 32), at a random place, size and angle."""
    count = len(labels)
    x, y = rng.uniform(-0.2, 0.2, (2, count, 1, 1))
    radius = rng.uniform(0.55, 0.8, (count, 1, 1))
    angle = rng.uniform(-0.35, 0.35, (count, 1, 1))  # radians, so 20 degrees either way
    points = SIDE * OVERSAMPLING
    axis = (np.arange(points) + 0.5) / points * 2 - 1
    across, down = axis[None, None, :] - x, axis[None, :, None] - y
    cosine, sine = np.cos(angle) / radius, np.sin(angle) / radius

    inside = np.empty((count, points, points), dtype=bool)
    for label, is_inside in enumerate(SHAPES.values()):
        of_class = labels == label
        u, v, c, s = across[of_class], down[of_class], cosine[of_class], sine[of_class]
        inside[of_class] = is_inside(c * u + s * v, c * v - s * u)
    return inside.reshape(count, SIDE, OVERSAMPLING, SIDE, OVERSAMPLING).mean(axis=(2, 4))


def _colours(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return background and shape colours, each (N, 3, 1, 1), one of them dark and the other light.

    Were the shape always the light one, a linear classifier would be right in nine cases of ten.
    """
    dark, light = rng.uniform(0, 0.4, (count, 3, 1, 1)), rng.uniform(0.6, 1, (count, 3, 1, 1))
    inverted = rng.uniform(0, 1, (count, 1, 1, 1)) < INVERTED
    return np.where(inverted, light, dark), np.where(inverted, dark, light)


def _texture(count: int, rng: np.random.Generator) -> np.ndarray:
    """Return stripes of random direction, width and tint, (N, 3, 32, 32), values from -1 to 1."""
    grid = np.arange(SIDE)
    across, down = rng.uniform(-0.2, 0.2, (2, count, 1, 1))  # periods per pixel
    phase = rng.uniform(0, 1, (count, 1, 1))
    wave = 4 * abs((across * grid[None, None, :] + down * grid[None, :, None] + phase) % 1 - 0.5) - 1
    return wave[:, None] * rng.uniform(-1, 1, (count, 3, 1, 1))
