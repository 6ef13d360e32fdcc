import math
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform
from support import needs_gpu
from torch import Tensor

from src.data import augment
from src.data.augment import Augmentation, uniform
from src.errors import UserError

NONE: dict[str, Any] = {"rotation": 0.0, "shift": 0.0, "zoom": 0.0, "flip": False}
OPTIONS: dict[str, Any] = {
    "rotation": 30.0, "shift": 0.1, "zoom": 0.2, "flip": True, "crop": 4, "cutout": 8, "colour": 0.4,
}  # fmt: skip
EVERYTHING = Augmentation(**OPTIONS)


def pictures(n: int, height: int = 32, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


def only(**options: Any) -> Augmentation:
    return Augmentation(**{**NONE, **options})


# Random numbers


def split_mix(seed: int, steps: int) -> int:
    """Published SplitMix64, in unbounded integers: the output after so many steps (the first is 1)."""
    bits = (seed + steps * 0x9E3779B97F4A7C15) % 2**64
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
    return bits ^ (bits >> 31)


def test_the_reference_is_split_mix() -> None:
    assert split_mix(0, 1) == 0xE220A8397B1DCDAF
    assert split_mix(1234567, 1) == 6457827717110365317


@pytest.mark.parametrize("seed", [0, 777, 2**32 - 1, 2**63, 2**64 - 1, -1])
def test_uniform_is_chained_split_mix(seed: int) -> None:
    indices = [0, 1, 49_999, 2**40]
    numbers = uniform(seed, 3, torch.tensor(indices), draws=4)
    assert numbers.dtype == torch.float32
    for index, row in zip(indices, numbers.tolist(), strict=True):
        state = 0
        for counter in (seed, 3, index):
            state = split_mix(state, counter + 1)
        assert row == [(split_mix(state, draw + 1) >> 40) / 2**24 for draw in range(4)]


def test_uniform_is_pinned() -> None:
    numbers = uniform(777, 5, torch.tensor([0, 34_999]), draws=2) * 2**24
    assert numbers.long().tolist() == [[16085829, 3678181], [6451379, 4133460]]


def test_draws_are_pinned() -> None:
    """Whoever changes them raises `features.VERSION`: kept features are of views drawn so."""
    drawn = Augmentation(crop=4, cutout=8, colour=0.5).draw(777, 5, torch.tensor([34_999]))
    assert {name: round(value.item(), 4) for name, value in drawn._asdict().items()} == {
        "angle": -0.1209, "row_shift": -0.0507, "column_shift": -0.0546, "row_zoom": 0.8987, "column_zoom": 1.1475,
        "flip": True, "row_crop": 2, "column_crop": 2, "row_cutout": 0.0458, "column_cutout": 0.6885,
        "brightness": 0.5087, "contrast": 1.316, "saturation": 1.1787,
    }  # fmt: skip


def test_uniform_does_not_depend_on_the_batch() -> None:
    indices = torch.arange(1000)
    whole = uniform(1, 2, indices, draws=5)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniform(1, 2, indices[order], draws=5), whole[order])
    assert torch.equal(uniform(1, 2, indices[17:18].to(torch.int32), draws=5), whole[17:18])
    assert torch.equal(uniform(1, 2, indices, draws=3), whole[:, :3])


@pytest.mark.parametrize("view", [0, 3, -1, -(2**40)])
def test_a_view_may_be_a_tensor(view: int) -> None:
    indices = torch.arange(100)
    assert torch.equal(uniform(1, torch.tensor(view), indices, draws=5), uniform(1, view, indices, draws=5))


@needs_gpu
def test_uniform_has_the_same_bits_on_a_gpu() -> None:
    indices = torch.arange(1000)
    assert torch.equal(uniform(1, 2, indices.cuda(), draws=5).cpu(), uniform(1, 2, indices, draws=5))


@pytest.fixture(scope="module")
def counted() -> Tensor:
    """Numbers of neighbouring counters: (seed, view, index, draw)."""
    indices = torch.arange(500)
    views = [[uniform(seed, view, indices, draws=10) for view in range(20)] for seed in range(10)]
    return torch.stack([torch.stack(of_seed) for of_seed in views]).double()


def test_uniform_is_uniform(counted: Tensor) -> None:
    n = counted.numel()
    assert 0 <= counted.min() < 1e-4
    assert 1 - 1e-4 < counted.max() < 1
    # Five standard errors of mean and variance.
    assert abs(counted.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(counted.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    expected = n / 256
    chi_square = ((torch.histc(counted, 256, 0, 1) - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("counter", range(4))
def test_every_counter_value_is_uniform(counted: Tensor, counter: int) -> None:
    others = [axis for axis in range(4) if axis != counter]
    n = counted.numel() // counted.shape[counter]
    assert ((counted.mean(others) - 1 / 2).abs() < 5 * math.sqrt(1 / 12 / n)).all()
    assert ((counted.var(others) - 1 / 12).abs() < 6 * math.sqrt(1 / 180 / n)).all()


@pytest.mark.parametrize(("counter", "distance"), list(product(range(4), (1, 2, 4, 8))))
def test_neighbours_are_independent(counted: Tensor, counter: int, distance: int) -> None:
    length = counted.shape[counter] - distance
    one = counted.narrow(counter, 0, length).flatten()
    other = counted.narrow(counter, distance, length).flatten()
    assert abs(torch.corrcoef(torch.stack((one, other)))[0, 1]) < 5 / math.sqrt(len(one))
    # Correlation misses what is not linear: count pairs in a coarse chessboard as well.
    pairs = (one * 16).long() * 16 + (other * 16).long()
    expected = len(one) / 256
    chi_square = ((torch.bincount(pairs, minlength=256) - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_counters_are_not_interchangeable(counted: Tensor) -> None:
    # 100,000 pairs of 24-bit numbers: a collision by chance has odds of 1 to 56,000.
    pairs = (counted[..., 0] * 2**48 + counted[..., 1] * 2**24).long().flatten()
    assert len(pairs.unique()) == len(pairs)


# Geometry


def keras_affine(image: Tensor, theta: float, tx: float, ty: float, zx: float, zy: float) -> np.ndarray:
    """Keras's map: rotation, shift and zoom about the centre in (row, column); tx and ty in pixels."""
    cosine, sine = math.cos(theta), math.sin(theta)
    rotation = np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    shift = np.array([[1, 0, tx], [0, 1, ty], [0, 0, 1]])
    zoom = np.diag([zx, zy, 1])
    centre_row, centre_column = image.shape[-2] / 2 - 0.5, image.shape[-1] / 2 - 0.5
    to_centre = np.array([[1, 0, centre_row], [0, 1, centre_column], [0, 0, 1]])
    matrix = to_centre @ rotation @ shift @ zoom @ np.linalg.inv(to_centre)
    channels = [
        affine_transform(channel, matrix[:2, :2], matrix[:2, 2], order=1, mode="nearest")
        for channel in image.numpy().astype(np.float64)
    ]
    return np.stack(channels)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 41)])
@pytest.mark.parametrize(
    "options",
    [
        {"rotation": 30.0},
        {"rotation": 180.0},
        {"shift": 0.1},
        {"shift": 1.0},
        {"zoom": 0.2},
        {"zoom": 0.9},
        {"flip": True},
        {"rotation": 30.0, "shift": 0.1, "zoom": 0.2, "flip": True},
    ],
)
def test_geometry_is_keras(options: dict[str, Any], height: int, width: int) -> None:
    images = pictures(24, height, width)
    indices = torch.arange(100, 124)
    augmentation = only(**options)
    results = augmentation(images, seed=5, view=1, indices=indices)
    draws = augmentation.draw(5, 1, indices)
    assert results.dtype == torch.float32
    for place, (image, result) in enumerate(zip(images, results, strict=True)):
        theta, tx, ty, zx, zy, flip = (numbers[place].item() for numbers in draws[:6])
        expected = keras_affine(image, theta, tx * height, ty * width, zx, zy)
        if flip:
            expected = expected[:, :, ::-1]
        # float32 places pixels within 1e-5 of a pixel, and neighbours differ by up to 255.
        np.testing.assert_allclose(result.numpy(), expected, atol=5e-3)


def test_signs_by_eye() -> None:
    """One bright pixel per image, so that the conventions can be checked without any matrix."""
    images = torch.zeros(200, 3, 33, 33)
    images[:, :, 6, 16] = 255.0
    indices = torch.arange(200)

    def brightest(augmentation: Augmentation) -> tuple[Tensor, Tensor]:
        place = augmentation(images, seed=1, view=0, indices=indices)[:, 0].flatten(1).argmax(1)
        return place // 33, place % 33

    rows, columns = brightest(rotated := only(rotation=90.0))
    angles = rotated.draw(1, 0, indices).angle
    # The output samples at rotation @ pixel: the picture turns the other way, by minus the angle.
    assert (rows - (16 - 10 * angles.cos())).abs().max() < 1.5
    assert (columns - (16 + 10 * angles.sin())).abs().max() < 1.5
    rows, columns = brightest(shifted := only(shift=0.1))
    draws = shifted.draw(1, 0, indices)
    assert (rows - (6 - 33 * draws.row_shift)).abs().max() <= 0.51
    assert (columns - (16 - 33 * draws.column_shift)).abs().max() <= 0.51
    rows, columns = brightest(zoomed := only(zoom=0.2))
    assert (rows - (16 - 10 / zoomed.draw(1, 0, indices).row_zoom)).abs().max() < 1
    assert (columns == 16).all()


def test_flip_and_crop_move_whole_pixels() -> None:
    images = pictures(60, 20, 24)
    indices = torch.arange(60)
    augmentation = only(flip=True, crop=4)
    results = augmentation(images, seed=9, view=2, indices=indices)
    draws = augmentation.draw(9, 2, indices)
    for place, image in enumerate(images.numpy()):
        down, right = int(draws.row_crop[place]), int(draws.column_crop[place])
        padded = np.pad(image, ((0, 0), (4, 4), (4, 4)), mode="edge")
        expected = padded[:, 4 + down : 24 + down, 4 + right : 28 + right]
        if draws.flip[place]:
            expected = expected[:, :, ::-1]
        np.testing.assert_array_equal(results[place].numpy(), expected)


def test_crop_moves_the_picture_that_the_affine_map_made() -> None:
    images = pictures(30)
    indices = torch.arange(30)
    bent = only(rotation=30.0)(images, seed=9, view=2, indices=indices)
    both = only(rotation=30.0, crop=4, flip=True)(images, seed=9, view=2, indices=indices)
    assert torch.equal(both, only(crop=4, flip=True)(bent, seed=9, view=2, indices=indices))


@pytest.mark.parametrize("side", [1, 8, 9, 64])
def test_cutout_fills_a_square_with_the_mean_colour(side: int) -> None:
    images = pictures(60)
    indices = torch.arange(60)
    augmentation = only(cutout=side)
    results = augmentation(images, seed=9, view=2, indices=indices)
    draws = augmentation.draw(9, 2, indices)
    for place, image in enumerate(images.numpy()):
        top = math.floor(draws.row_cutout[place] * 32) - side // 2
        left = math.floor(draws.column_cutout[place] * 32) - side // 2
        expected = image.astype(np.float32)
        expected[:, max(top, 0) : top + side, max(left, 0) : left + side] = image.mean((1, 2))[:, None, None]
        np.testing.assert_allclose(results[place].numpy(), expected, rtol=1e-6)
        assert (results[place] != images[place]).any()


@pytest.mark.parametrize("colour", [0.2, 1.0])
def test_colour_changes_brightness_contrast_and_saturation(colour: float) -> None:
    images = pictures(60, 20, 24)
    indices = torch.arange(60)
    augmentation = only(colour=colour)
    results = augmentation(images, seed=9, view=2, indices=indices)
    draws = augmentation.draw(9, 2, indices)
    weights = np.array([0.299, 0.587, 0.114])
    for place, image in enumerate(images.numpy().astype(np.float64)):
        brightness, contrast, saturation = (float(numbers[place]) for numbers in draws[-3:])
        mean = (weights @ image.reshape(3, -1)).mean()
        lit = brightness * (contrast * image + (1 - contrast) * mean)
        grey = np.tensordot(weights, lit, axes=1)
        expected = (saturation * lit + (1 - saturation) * grey).clip(0, 255)
        np.testing.assert_allclose(results[place].numpy(), expected, atol=2e-3)


def test_colour_comes_after_what_moves_pixels() -> None:
    images = pictures(30)
    places = {"seed": 9, "view": 2, "indices": torch.arange(30)}
    moved, recoloured = only(rotation=30.0)(images, **places), only(colour=1.0)(images, **places)
    both = only(rotation=30.0, colour=1.0)(images, **places)
    draws = only(colour=1.0).draw(**places)
    assert torch.equal(both, augment._recolour(moved, images, draws))
    assert not torch.allclose(both, only(rotation=30.0)(recoloured, **places), atol=1.0)  # for values were cut off


def test_colour_comes_before_cutout() -> None:
    images = pictures(30)
    indices = torch.arange(30)
    flipped = only(flip=True, colour=0.5)(images, seed=9, view=2, indices=indices)
    both = only(flip=True, colour=0.5, cutout=8)(images, seed=9, view=2, indices=indices)
    holes = only(cutout=8)(images, seed=9, view=2, indices=indices)
    filled = both != flipped
    assert filled.any()
    assert torch.equal(both[filled], holes[filled])


def test_no_images_are_no_mistake() -> None:
    assert EVERYTHING(pictures(1)[:0], seed=1, view=1, indices=torch.arange(0)).shape == (0, 3, 32, 32)


def test_without_options_images_stay_as_they_are() -> None:
    images = pictures(5)
    results = only()(images, seed=1, view=1, indices=torch.arange(5))
    assert results.dtype == torch.float32
    assert torch.equal(results, images.to(torch.float32))


# Draws


def test_draws_fill_their_ranges() -> None:
    draws = EVERYTHING.draw(3, 1, torch.arange(20_000))
    for numbers, lowest, highest in (
        (draws.angle.rad2deg(), -30, 30),
        (draws.row_shift, -0.1, 0.1),
        (draws.column_shift, -0.1, 0.1),
        (draws.row_zoom, 0.8, 1.2),
        (draws.column_zoom, 0.8, 1.2),
        (draws.row_cutout, 0, 1),
        (draws.column_cutout, 0, 1),
        (draws.brightness, 0.6, 1.4),
        (draws.contrast, 0.6, 1.4),
        (draws.saturation, 0.6, 1.4),
    ):
        width = highest - lowest
        assert abs(numbers.min() - lowest) < 0.001 * width
        assert abs(numbers.max() - highest) < 0.001 * width
        assert abs(numbers.mean() - (lowest + highest) / 2) < 0.02 * width
    assert draws.flip.float().mean() == pytest.approx(0.5, abs=0.02)
    for pixels in (draws.row_crop, draws.column_crop):
        values, counts = pixels.unique(return_counts=True)
        assert values.tolist() == list(range(-4, 5))
        assert (counts / 20_000 - 1 / 9).abs().max() < 0.015


def test_draws_of_an_image_are_independent() -> None:
    draws = torch.stack([numbers.double() for numbers in EVERYTHING.draw(3, 1, torch.arange(20_000))])
    correlations = torch.corrcoef(draws) - torch.eye(len(draws))
    assert correlations.abs().max() < 0.035


@pytest.mark.parametrize("off", OPTIONS)
def test_switching_one_option_off_changes_no_other(off: str) -> None:
    indices = torch.arange(50)
    fields = {
        "rotation": {"angle"},
        "shift": {"row_shift", "column_shift"},
        "zoom": {"row_zoom", "column_zoom"},
        "flip": {"flip"},
        "crop": {"row_crop", "column_crop"},
        "cutout": set(),
        "colour": {"brightness", "contrast", "saturation"},
    }[off]
    every = EVERYTHING.draw(3, 1, indices)._asdict()
    fewer = Augmentation(**{**OPTIONS, off: type(OPTIONS[off])(0)}).draw(3, 1, indices)._asdict()
    assert {name for name in every if not torch.equal(every[name], fewer[name])} == fields


# Reproducibility


@pytest.mark.parametrize("options", [{}, OPTIONS, {**NONE, "flip": True, "crop": 4, "colour": 0.4}])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_picture_does_not_depend_on_its_batch(options: dict[str, Any], dtype: torch.dtype) -> None:
    augmentation = Augmentation(**options)
    images = pictures(40, 32, 31).to(dtype)
    if dtype.is_floating_point:
        images = images / 3
    indices = torch.arange(1000, 1040)
    whole = augmentation(images, seed=1, view=2, indices=indices)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    permuted = augmentation(images[order], seed=1, view=2, indices=indices[order])
    assert torch.equal(permuted, whole[order])
    single = [
        augmentation(image[None], seed=1, view=2, indices=index[None])
        for image, index in zip(images, indices, strict=True)
    ]
    assert torch.equal(torch.cat(single), whole)
    thirteen = [
        augmentation(some, seed=1, view=2, indices=theirs)
        for some, theirs in zip(images.split(13), indices.split(13), strict=True)
    ]
    assert torch.equal(torch.cat(thirteen), whole)


def test_seed_view_and_index_each_choose_the_picture() -> None:
    images = pictures(1).expand(8, -1, -1, -1)
    augmentation = Augmentation()
    indices = torch.arange(8)
    first = augmentation(images, seed=1, view=2, indices=indices)
    torch.rand(1)
    assert torch.equal(augmentation(images, seed=1, view=2, indices=indices), first)
    for other in (
        augmentation(images, seed=2, view=2, indices=indices),
        augmentation(images, seed=1, view=3, indices=indices),
        augmentation(images, seed=1, view=2, indices=indices + 1),
    ):
        assert ((other - first).abs().amax((1, 2, 3)) > 1).all()


def test_images_are_left_untouched_and_random_state_too() -> None:
    images = pictures(8)
    before, state = images.clone(), torch.get_rng_state()
    EVERYTHING(images, seed=1, view=2, indices=torch.arange(8))
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("rotation", -1.0),
        ("rotation", 181.0),
        ("rotation", math.nan),
        ("shift", -0.1),
        ("shift", 1.5),
        ("zoom", -0.1),
        ("zoom", 1.0),
        ("crop", -1),
        ("cutout", -1),
        ("colour", -0.1),
        ("colour", 1.1),
    ],
)
def test_an_impossible_option_is_named(option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{option}={value}"):
        only(**{option: value})
