"""Looks at a test image."""

import torch

from src.model.test_time import average, looks

IMAGES = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)


def test_flip_is_the_image_and_its_mirror_image() -> None:
    first, second = looks(IMAGES, "flip")
    assert torch.equal(first, IMAGES)
    assert torch.equal(second, IMAGES[..., [3, 2, 1, 0]])


def test_shifts_are_one_pixel_each_way_and_repeat_the_edge() -> None:
    found = looks(IMAGES, "flip_shift")
    assert torch.equal(found[0], IMAGES)
    rows, columns = [[0, 0, 1, 2], [1, 2, 3, 3]], [[0, 0, 1, 2], [1, 2, 3, 3]]
    moved = [IMAGES[:, :, row] for row in rows] + [IMAGES[..., column] for column in columns]
    assert len(found) == 10
    for number, image in enumerate(moved, start=1):
        assert torch.equal(found[2 * number], image)
        assert torch.equal(found[2 * number + 1], image.flip(-1))


def test_probabilities_are_averaged_not_logits() -> None:
    logits = iter([torch.tensor([[0.0, 100.0]]), torch.tensor([[1.0, 0.0]]).log()])
    assert torch.allclose(average(lambda _: next(logits), IMAGES[:1], "flip"), torch.tensor([[0.5, 0.5]]))


def test_what_is_known_of_the_unchanged_image_is_not_computed_again() -> None:
    seen = []

    def classify(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images[:, 0, 0]

    for kind in ("flip", "flip_shift"):
        whole = average(classify, IMAGES, kind)
        seen.clear()
        assert torch.equal(average(classify, IMAGES, kind, classify(IMAGES).softmax(dim=1)), whole)
        assert len(seen) == len(looks(IMAGES, kind))
