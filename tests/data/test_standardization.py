import numpy as np
import pytest

from src.data import standardization
from src.data.standardization import channel_statistics
from src.errors import UserError


@pytest.mark.parametrize("chunk_pixels", [1, 1000, 2**20])
def test_statistics_count_the_chosen_images(chunk_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standardization, "_CHUNK_PIXELS", chunk_pixels)
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
