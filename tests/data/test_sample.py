"""`Sample`: reproducible, and about shapes, not about colours or places."""

import time

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
        assert part.pixels.dtype == np.uint8 and part.pixels.shape == (len(part), 3, 32, 32)
        assert part.pixels.flags.c_contiguous and part.labels.dtype == np.int64
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


def test_default_is_drawn_within_seconds() -> None:
    start = time.process_time()
    Sample().load()
    assert time.process_time() - start < 4


def test_linear_classifier_is_not_enough() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    images = Sample().load()
    flat = {split: part.pixels.reshape(len(part), -1).astype(np.float32) for split, part in images.items()}
    mean, std = flat["train"].mean(0), flat["train"].std(0)
    # Ridge regression of the classes' indicators has a closed form; it does no worse here than the logistic one.
    classifier = linear_model.RidgeClassifier(alpha=3000.0)
    classifier.fit((flat["train"] - mean) / std, images["train"].labels)
    accuracy = classifier.score((flat["test"] - mean) / std, images["test"].labels)
    assert accuracy < 0.6


def test_colours_say_little_about_the_class() -> None:
    """Classify by the nearest class mean of each image's average colour and spread: chance is 0.1."""
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
