"""`Sample`: reproducible, and about shapes, not about colours or places."""

import numpy as np
import pytest

from src.data.sources import Sample
from src.errors import UserError


def test_splits_are_balanced_arrays() -> None:
    source = Sample(size=200)
    source.prepare()
    images = source.load()
    assert {split: len(part) for split, part in images.items()} == {"train": 200, "test": 40}
    for part in images.values():
        assert part.pixels.dtype == np.uint8
        assert part.pixels.shape == (len(part), 3, 32, 32)
        assert part.pixels.flags.c_contiguous
        assert part.labels.dtype == np.int64
        assert np.bincount(part.labels).tolist() == [len(part) // 10] * 10
    assert len(set(source.classes)) == 10


def test_seed_decides_every_pixel() -> None:
    first, same, other = (Sample(100, seed).load() for seed in (1, 1, 2))
    for split in first:
        np.testing.assert_array_equal(first[split].pixels, same[split].pixels)
        np.testing.assert_array_equal(first[split].labels, same[split].labels)
        assert not np.array_equal(first[split].pixels, other[split].pixels)


def test_test_images_are_none_of_the_training_images() -> None:
    images = Sample(100).load()
    train = {pixels.tobytes() for pixels in images["train"].pixels}
    assert len(train) == 100
    assert not train & {pixels.tobytes() for pixels in images["test"].pixels}
    as_many_for_testing = Sample(500).load()["test"]
    assert not train & {pixels.tobytes() for pixels in as_many_for_testing.pixels}


def test_linear_classifier_is_not_enough() -> None:
    """Solve ridge regression on the classes' indicators; logistic regression does no better here."""
    images = Sample().load()
    train, test = (images[split].pixels.reshape(len(images[split]), -1) for split in ("train", "test"))
    mean, std = train.mean(0), train.std(0)
    train, test = (train - mean) / std, (test - mean) / std
    indicators = np.eye(10)[images["train"].labels] - 0.1
    dual = np.linalg.solve(train @ train.T + 1e4 * np.eye(len(train)), indicators)
    accuracy = ((test @ train.T @ dual).argmax(1) == images["test"].labels).mean()
    assert 0.2 < accuracy < 0.6


def test_colours_say_little_about_the_class() -> None:
    """Classify by the nearest class mean of the image's and its corner's average colour; chance is 0.1."""
    images = Sample().load()
    features = {}
    for split, part in images.items():
        pixels = part.pixels / 255.0
        features[split] = np.concatenate([pixels.mean((2, 3)), pixels[:, :, :3, :3].mean((2, 3))], axis=1)
    labels = images["train"].labels
    centres = np.stack([features["train"][labels == label].mean(0) for label in range(10)])
    distances = np.linalg.norm(features["test"][:, None] - centres, axis=2)
    assert (distances.argmin(1) == images["test"].labels).mean() < 0.25


def test_size_must_give_every_class_a_test_image() -> None:
    assert set(Sample(50).load()["test"].labels) == set(range(10))
    with pytest.raises(UserError, match="size 49 is too small; choose at least 50"):
        Sample(49)
