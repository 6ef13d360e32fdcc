import math

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from src.data import split
from src.data.split import channel_statistics, train_val_split
from src.errors import UserError


@pytest.mark.parametrize("seed", [0, 1, 777, 2**32 - 1])
@pytest.mark.parametrize(
    ("n", "val_fraction"),
    [
        (2, 0.5),
        (3, 0.01),
        (7, 0.3),
        (10, 0.3),
        (10, 0.1 * 3),  # 0.30000000000000004: four images, not three
        (100, 0.07),  # 7.000000000000001: eight
        (100, 0.29),  # 28.999999999999996: twenty-nine
        (1000, 1 / 3),
        (1001, 0.999),
        (50_000, 0.3),
        (50_000, 0.1),
    ],
)
def test_split_is_scikit_learns(n: int, val_fraction: float, seed: int) -> None:
    expected_train, expected_val = train_test_split(range(n), test_size=val_fraction, random_state=seed)
    train, val = train_val_split(n, val_fraction, seed)
    assert train.tolist() == expected_train
    assert val.tolist() == expected_val
    assert train.dtype == val.dtype == np.int64


def test_split_of_the_tutorial() -> None:
    train, val = train_val_split(50_000, 0.3, 777)
    assert (len(train), len(val)) == (35_000, 15_000)
    assert sorted([*train, *val]) == list(range(50_000))


@pytest.mark.parametrize(
    ("n", "val_fraction", "seed", "named"),
    [
        (10, 0.0, 1, "val_fraction"),
        (10, 1.0, 1, "val_fraction"),
        (10, -0.1, 1, "val_fraction"),
        (10, 3.0, 1, "val_fraction"),
        (10, math.nan, 1, "val_fraction"),
        (10, 0.95, 1, "10 images"),
        (1, 0.5, 1, "1 images"),
        (0, 0.5, 1, "0 images"),
        (10, 0.5, -1, "split_seed"),
        (10, 0.5, 2**32, "split_seed"),
    ],
)
def test_split_names_the_mistake(n: int, val_fraction: float, seed: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        train_val_split(n, val_fraction, seed)


@pytest.mark.parametrize("chunk_pixels", [1, 1000, 2**20])
def test_statistics_count_the_chosen_images(chunk_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "_CHUNK_PIXELS", chunk_pixels)
    rng = np.random.default_rng(0)
    images = (rng.integers(0, 256, (60, 3, 8, 6)) * np.array([1.0, 0.5, 0.2])[:, None, None]).astype(np.uint8)
    images[1::2] = 255
    chosen = rng.permutation(np.arange(0, 60, 2))
    mean, std = channel_statistics(images, chosen)
    pixels = images[chosen].astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-13)


def test_statistics_are_exact() -> None:
    images = np.full((4, 3, 2, 2), 254, dtype=np.uint8)
    images[::2] = 250
    assert channel_statistics(images, np.arange(4)) == ((252.0,) * 3, (2.0,) * 3)


@pytest.mark.parametrize("constant", range(3))
def test_a_constant_channel_can_be_divided_by(constant: int) -> None:
    images = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    images[0] = 200
    images[:, constant] = 255
    mean, std = channel_statistics(images, np.arange(2))
    assert mean == tuple(255.0 if channel == constant else 100.0 for channel in range(3))
    assert std == tuple(1.0 if channel == constant else 100.0 for channel in range(3))


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="none"):
        channel_statistics(np.zeros((2, 3, 4, 4), dtype=np.uint8), np.array([], dtype=np.int64))
