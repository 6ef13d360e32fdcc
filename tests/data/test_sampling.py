import subprocess
import sys
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from lightning.fabric.utilities.data import _set_sampler_epoch

from src.data.loading import BatchLoader
from src.data.sampling import EvalBatches, TrainBatches
from src.errors import UserError

TRAIN_CASES = [
    (n, batch_size, world_size)
    for n, batch_size, world_size in product((4, 5, 31, 32, 33, 64, 65, 67, 200), (2, 3, 16, 32), (1, 2, 3))
    if n >= 2 * world_size
]
EVAL_CASES = list(product((1, 2, 3, 5, 31, 32, 33, 64, 65, 66, 100), (1, 2, 16, 32), (1, 2, 3, 4)))


def train_batches(
    n: int, batch_size: int, world_size: int, epoch: int = 0, stay: bool = False
) -> list[list[list[int]]]:
    """One list of batches per rank."""
    ranks = []
    for rank in range(world_size):
        sampler = TrainBatches(n, batch_size, seed=7, rank=rank, world_size=world_size, stay=stay)
        sampler.set_epoch(epoch)
        ranks.append([batch.tolist() for batch in sampler])
        assert len(sampler) == len(ranks[-1])
    return ranks


@pytest.mark.parametrize("stay", [False, True])
@pytest.mark.parametrize(("n", "batch_size", "world_size"), TRAIN_CASES)
def test_train_ranks_share_the_images(n: int, batch_size: int, world_size: int, stay: bool) -> None:
    ranks = train_batches(n, batch_size, world_size, stay=stay)
    for slices in zip(*ranks, strict=True):  # strict: equally many batches
        assert len({len(part) for part in slices}) == 1
    seen = [index for rank in ranks for batch in rank for index in batch]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(n))
    assert all(len(batch) == batch_size for rank in ranks for batch in rank[:-1])
    assert all(2 <= len(rank[-1]) <= batch_size for rank in ranks)
    # Nothing is left out that could have made a batch of two images per process.
    left_out = n - len(seen)
    assert left_out < 2 * world_size
    if len(ranks[0][-1]) < batch_size:
        assert left_out == n % world_size


@pytest.mark.parametrize("n", [64, 65, 67])
def test_images_that_stay_are_the_same_in_every_epoch(n: int) -> None:
    for rank in range(3):
        own = set(TrainBatches(n, 4, seed=7, rank=rank, world_size=3, stay=True).positions.tolist())
        assert own == set(range(rank, n, 3))
        for epoch in range(3):
            assert {i for batch in train_batches(n, 4, 3, epoch, stay=True)[rank] for i in batch} <= own


@pytest.mark.parametrize("n", [128, 129, 130, 143, 158])
@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 16), (4, 8)])
def test_several_processes_see_the_batches_of_one(n: int, world_size: int, batch_size: int) -> None:
    (one,) = train_batches(n, 32, world_size=1, epoch=3)
    several = train_batches(n, batch_size, world_size, epoch=3)
    joined = [[i for part in slices for i in part] for slices in zip(*several, strict=True)]
    assert joined[:4] == one[:4]
    for last, expected in zip(joined[4:], one[4:], strict=False):
        assert last == expected[: len(last)]
        assert len(expected) - len(last) < world_size


def test_order_is_shuffled_and_changes_with_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = TrainBatches(1000, 10, seed)
        sampler.set_epoch(epoch)
        return tuple(np.concatenate(list(sampler)))

    orders = {(seed, epoch): order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(set(orders.values())) == 9
    for indices in orders.values():
        assert sorted(indices) == list(range(1000))
    for one, other in pairwise(orders.values()):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
        assert abs(np.corrcoef(one, range(1000))[0, 1]) < 0.15
        assert np.mean(np.equal(one, other)) < 0.01


@pytest.mark.slow
def test_order_is_the_same_in_a_fresh_process() -> None:
    program = (
        "from src.data.sampling import TrainBatches\n"
        "sampler = TrainBatches(10, 3, seed=777)\n"
        "sampler.set_epoch(5)\n"
        "print(*[batch.tolist() for batch in sampler])"
    )
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == "[5, 9, 2] [3, 1, 4] [6, 0, 7]\n"


def test_iterating_twice_repeats_the_epoch() -> None:
    sampler = TrainBatches(20, 4, seed=1)
    assert [batch.tolist() for batch in sampler] == [batch.tolist() for batch in sampler]


@pytest.mark.parametrize("skipped", [0, 1, 4, 5])
def test_skip_leaves_out_the_first_batches_once(skipped: int) -> None:
    sampler = TrainBatches(19, 4, seed=1)
    whole = [batch.tolist() for batch in sampler]
    assert len(whole) == 5
    sampler.skip(skipped)
    assert len(sampler) == 5
    assert [batch.tolist() for batch in sampler] == whole[skipped:]
    assert [batch.tolist() for batch in sampler] == whole


def test_an_iteration_keeps_its_epoch() -> None:
    sampler = TrainBatches(20, 4, seed=1)
    whole = [batch.tolist() for batch in sampler]
    iteration = iter(sampler)
    first = next(iteration).tolist()
    sampler.set_epoch(1)
    sampler.skip(2)
    assert [first, *(batch.tolist() for batch in iteration)] == whole
    assert len(list(sampler)) == 3


@pytest.mark.parametrize("batches", [-1, 6])
def test_skip_refuses_what_an_epoch_does_not_have(batches: int) -> None:
    with pytest.raises(ValueError, match="batches"):
        TrainBatches(19, 4, seed=1).skip(batches)


@pytest.mark.parametrize(
    ("n", "batch_size", "world_size", "named"),
    [(0, 4, 1, "0 training"), (1, 4, 1, "1 training"), (3, 4, 2, "3 training"), (9, 1, 1, "batch_size=1")],
)
def test_train_needs_one_batch(n: int, batch_size: int, world_size: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        TrainBatches(n, batch_size, seed=1, world_size=world_size)


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 1), (1, 1), (2, 2), (0, 0)])
def test_rank_must_exist(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match="rank"):
        TrainBatches(100, 4, seed=1, rank=rank, world_size=world_size)
    with pytest.raises(ValueError, match="rank"):
        EvalBatches(100, 4, rank=rank, world_size=world_size)


@pytest.mark.parametrize(("n", "batch_size", "world_size"), EVAL_CASES)
def test_evaluation_counts_every_image_once(n: int, batch_size: int, world_size: int) -> None:
    samplers = [EvalBatches(n, batch_size, rank, world_size) for rank in range(world_size)]
    ranks = [[batch.tolist() for batch in sampler] for sampler in samplers]
    assert [index for rank in ranks for batch in rank for index in batch] == list(range(n))
    # As few batches as can hold all images, and the same number everywhere.
    fewest = -(-n // (batch_size * world_size))
    assert [len(rank) for rank in ranks] == [len(sampler) for sampler in samplers] == [fewest] * world_size
    sizes = [len(batch) for rank in ranks for batch in rank]
    assert max(sizes) <= batch_size
    possible = n >= fewest * world_size
    assert min(sizes) >= 1 if possible else sizes.count(0) == fewest * world_size - n
    assert possible or n < world_size or batch_size == 1


def test_evaluation_by_one_process_is_plain() -> None:
    sizes = [len(batch) for batch in EvalBatches(70, 32)]
    assert sizes == [32, 32, 6]


def test_evaluation_leaves_an_image_for_the_last_batch() -> None:
    sizes = [[len(batch) for batch in EvalBatches(65, 32, rank, world_size=2)] for rank in range(2)]
    assert sizes == [[32, 1], [31, 1]]


@pytest.mark.parametrize(("n", "batch_size", "named"), [(0, 4, "no images"), (4, 0, "batch_size=0")])
def test_evaluation_of_nothing_is_refused(n: int, batch_size: int, named: str) -> None:
    with pytest.raises(UserError, match=named):
        EvalBatches(n, batch_size)


class Squares:
    def __getitem__(self, indices: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(indices) ** 2


def test_a_loader_hands_out_whole_batches_of_the_epoch_that_lightning_sets() -> None:
    sampler = TrainBatches(22, 4, seed=1)
    loader = BatchLoader(Squares(), sampler)
    _set_sampler_epoch(loader, 3)
    assert sampler.epoch == 3
    loader.load_state_dict({"served": 1})
    assert len(loader) == 6
    resumed = [batch.tolist() for batch in loader]
    assert loader.state_dict() == {"served": 0}
    whole = [batch.tolist() for batch in loader]
    assert whole == [(batch**2).tolist() for batch in sampler]
    assert resumed == whole[1:]


def test_an_empty_batch_is_still_indices() -> None:
    (batch,) = EvalBatches(1, 4, rank=1, world_size=2)
    assert batch.dtype == np.int64
    (loaded,) = BatchLoader(Squares(), EvalBatches(1, 4, rank=1, world_size=2))
    assert loaded.tolist() == []
