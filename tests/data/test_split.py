import math

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from src.data.split import train_val_split
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
