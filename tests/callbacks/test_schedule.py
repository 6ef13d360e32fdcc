"""The arithmetic of thawing in tables; every expected value is worked out by hand."""

import math

import pytest

from src.callbacks.schedule import (
    HEAD_NUMBER,
    LearningRates,
    parse_stages,
    stage_begin,
    trainable_layers,
    training_span,
)
from src.errors import UserError

BLOCK1, BLOCK2, BLOCK3, BLOCK4, BLOCK5, HEAD = 0, 3, 6, 10, 14, 18  # the lowest layer's number


def test_head_stands_above_the_eighteen_layers() -> None:
    assert HEAD_NUMBER == HEAD


@pytest.mark.parametrize(
    ("written", "parsed"),
    [
        ({0: 0}, {0: 0}),
        ({0: 18}, {0: 18}),
        ({0: "all"}, {0: 18}),
        ({0: "4"}, {0: 4}),
        ({0: "0"}, {0: 0}),
        ({0: "block5_pool"}, {0: 1}),
        ({0: "block5_conv1"}, {0: 4}),
        ({0: "block4_conv1"}, {0: 8}),
        ({0: "block1_conv1"}, {0: 18}),
        ({8: "all", 0: 0, 3: "block5_conv1"}, {0: 0, 3: 4, 8: 18}),
        ({0: 4, 2: 0, 4: 4}, {0: 4, 2: 0, 4: 4}),
    ],
)
def test_stages_are_parsed(written: dict[int, int | str], parsed: dict[int, int]) -> None:
    assert list(parse_stages(written).items()) == list(parsed.items())  # in the order of the epochs


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ({}, "no stage at epoch 0"),
        ({1: 4}, "no stage at epoch 0"),
        ({0: 0, -1: 4}, "epoch -1"),
        ({0: 19}, "19 trainable layers"),
        ({0: "19"}, "19 trainable layers"),
        ({0: -1}, "-1 trainable layers"),
        ({0: "-1"}, "the layer '-1'"),
        ({0: "block5"}, "the layer 'block5'"),
        ({0: "block6_conv1"}, "the layer 'block6_conv1'"),
        ({0: "ALL"}, "the layer 'ALL'"),
        ({0: "head"}, "the layer 'head'"),
        ({0: ""}, "the layer ''"),
        ({0: "²"}, "the layer '²'"),
        ({0: 0, 5: 99}, "99 trainable layers"),
    ],
)
def test_nonsense_stages_are_named(written: dict[int, int | str], named: str) -> None:
    with pytest.raises(UserError, match=named) as refusal:
        parse_stages(written)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("stages", "by_epoch"),
    [
        ({0: 0}, [0, 0, 0]),
        ({0: 0, 1: 4, 3: 18}, [0, 4, 4, 18, 18]),
        ({0: 4, 2: 0, 3: 8}, [4, 4, 0, 8]),
    ],
)
def test_trainable_layers_of_every_epoch(stages: dict[int, int], by_epoch: list[int]) -> None:
    assert [trainable_layers(stages, epoch) for epoch in range(len(by_epoch))] == by_epoch


def test_a_stage_begins_where_another_number_of_layers_does() -> None:
    stages = {0: 0, 2: 0, 3: 4, 5: 0}
    assert [stage_begin(stages, epoch) for epoch in range(7)] == [0, 0, 0, 3, 3, 5, 5]


STAGED = {0: 0, 2: 4, 6: 18}
AGAIN = {0: 4, 2: 0, 4: 4}
LOWER_AGAIN = {0: 8, 2: 4, 4: 8}
LINEAR, COSINE = {"decay": "linear"}, {"decay": "cosine"}


@pytest.mark.parametrize(
    ("stages", "layer", "epoch", "epochs"),
    [
        (STAGED, HEAD, 7, (0, 10)),
        (STAGED, BLOCK5, 1, None),
        (STAGED, BLOCK5, 2, (2, 10)),
        (STAGED, BLOCK1, 9, (6, 10)),
        (AGAIN, BLOCK5, 1, (0, 2)),
        (AGAIN, BLOCK5, 3, None),
        (AGAIN, BLOCK5, 9, (4, 10)),
        (LOWER_AGAIN, BLOCK5, 3, (0, 10)),
        (LOWER_AGAIN, BLOCK4, 0, (0, 2)),
        ({0: 4, 20: 0}, BLOCK5, 5, (0, 10)),  # the training ends before the layer freezes
        ({0: 0, 20: 4}, BLOCK5, 20, (20, 21)),  # and before it thaws: the table of stages shows its first rate
    ],
)
def test_training_span_is_the_unbroken_run_of_epochs(
    stages: dict[int, int], layer: int, epoch: int, epochs: tuple[int, int] | None
) -> None:
    assert training_span(stages, layer, epoch, max_epochs=10) == epochs


@pytest.mark.parametrize(
    ("options", "stages", "layer", "epoch", "step", "share"),
    [  # `share` of the base rate, with 4 steps an epoch and 10 epochs
        # Constant: all or nothing.
        ({}, STAGED, HEAD, 0, 0, 1.0),
        ({}, STAGED, HEAD, 9, 3, 1.0),
        ({}, STAGED, BLOCK5, 1, 3, 0.0),
        ({}, STAGED, BLOCK5, 2, 0, 1.0),
        ({}, STAGED, BLOCK5 - 1, 5, 3, 0.0),  # block4_pool, one below
        ({}, STAGED, BLOCK1, 5, 3, 0.0),
        ({}, STAGED, BLOCK1, 6, 0, 1.0),
        # Linear, from each layer's own thaw to the end.
        (LINEAR, STAGED, HEAD, 0, 0, 1.0),
        (LINEAR, STAGED, HEAD, 5, 0, 0.5),
        (LINEAR, STAGED, HEAD, 9, 3, 1 / 40),
        (LINEAR, STAGED, BLOCK5, 1, 3, 0.0),
        (LINEAR, STAGED, BLOCK5, 2, 0, 1.0),
        (LINEAR, STAGED, BLOCK5, 6, 0, 4 / 8),
        (LINEAR, STAGED, BLOCK5, 9, 2, 1 / 16),
        (LINEAR, STAGED, BLOCK1, 6, 0, 1.0),
        (LINEAR, STAGED, BLOCK1, 7, 1, 1 - 1.25 / 4),
        # Cosine, likewise.
        (COSINE, STAGED, HEAD, 0, 0, 1.0),
        (COSINE, STAGED, BLOCK5, 2, 0, 1.0),
        (COSINE, STAGED, BLOCK5, 4, 0, (1 + math.sqrt(0.5)) / 2),
        (COSINE, STAGED, BLOCK5, 6, 0, 0.5),
        (COSINE, STAGED, BLOCK5, 8, 0, (1 - math.sqrt(0.5)) / 2),
        # Warm-up counts the step to be made, and decay begins after it.
        ({"warmup_epochs": 1}, STAGED, HEAD, 0, 0, 1 / 4),
        ({"warmup_epochs": 1}, STAGED, HEAD, 0, 3, 1.0),
        ({"warmup_epochs": 1}, STAGED, HEAD, 1, 0, 1.0),
        ({"warmup_epochs": 2}, STAGED, BLOCK5, 2, 0, 1 / 8),
        ({"warmup_epochs": 2}, STAGED, BLOCK5, 3, 1, 6 / 8),
        ({"warmup_epochs": 2}, STAGED, BLOCK5, 4, 0, 1.0),
        ({"warmup_epochs": 0.5}, STAGED, HEAD, 0, 0, 1 / 2),
        ({"warmup_epochs": 0.5}, STAGED, HEAD, 0, 1, 1.0),
        ({"warmup_epochs": 2, **LINEAR}, STAGED, BLOCK5, 3, 0, 5 / 8),
        ({"warmup_epochs": 2, **LINEAR}, STAGED, BLOCK5, 4, 0, 1.0),
        ({"warmup_epochs": 2, **LINEAR}, STAGED, BLOCK5, 7, 0, 3 / 6),
        ({"warmup_epochs": 20, **LINEAR}, STAGED, HEAD, 9, 3, 40 / 80),  # longer than the training
        # A factor for every block further down.
        ({"block_factor": 0.5}, {0: 18}, HEAD, 0, 0, 1.0),
        ({"block_factor": 0.5}, {0: 18}, BLOCK5 + 3, 0, 0, 1 / 2),  # block5_pool
        ({"block_factor": 0.5}, {0: 18}, BLOCK5, 0, 0, 1 / 2),
        ({"block_factor": 0.5}, {0: 18}, BLOCK5 - 1, 0, 0, 1 / 4),
        ({"block_factor": 0.5}, {0: 18}, BLOCK4, 0, 0, 1 / 4),
        ({"block_factor": 0.5}, {0: 18}, BLOCK3, 0, 0, 1 / 8),
        ({"block_factor": 0.5}, {0: 18}, BLOCK2, 0, 0, 1 / 16),
        ({"block_factor": 0.5}, {0: 18}, BLOCK1, 0, 0, 1 / 32),
        ({"block_factor": 0.5, **LINEAR}, {0: 18}, BLOCK5, 5, 0, 1 / 4),
        # Rates from given epochs on; they need not be the stages' epochs.
        ({"from_epoch": {3: 0.2, 7: 0.01}}, STAGED, HEAD, 2, 3, 1.0),
        ({"from_epoch": {3: 0.2, 7: 0.01}}, STAGED, HEAD, 3, 0, 2.0),
        ({"from_epoch": {3: 0.2, 7: 0.01}}, STAGED, HEAD, 6, 3, 2.0),
        ({"from_epoch": {3: 0.2, 7: 0.01}}, STAGED, HEAD, 7, 0, 0.1),
        ({"from_epoch": {3: 0.2}, "block_factor": 0.5}, STAGED, BLOCK5, 4, 0, 1.0),
        ({"from_epoch": {3: 0.2}}, STAGED, BLOCK1, 4, 0, 0.0),
        ({"from_epoch": {0: 0.3}}, STAGED, HEAD, 0, 0, 3.0),
        # Frozen again, thawed again: the layer's clock starts anew; the head's goes on.
        ({}, AGAIN, BLOCK5, 1, 3, 1.0),
        ({}, AGAIN, BLOCK5, 2, 0, 0.0),
        ({}, AGAIN, BLOCK5, 3, 3, 0.0),
        ({}, AGAIN, BLOCK5, 4, 0, 1.0),
        (LINEAR, AGAIN, BLOCK5, 1, 0, 1 / 2),
        (LINEAR, AGAIN, BLOCK5, 4, 0, 1.0),
        (LINEAR, AGAIN, BLOCK5, 7, 0, 3 / 6),
        (LINEAR, AGAIN, HEAD, 4, 0, 6 / 10),
        ({"warmup_epochs": 1}, AGAIN, BLOCK5, 4, 0, 1 / 4),
        ({"warmup_epochs": 1}, AGAIN, HEAD, 4, 0, 1.0),
        # A layer that a change of stage does not touch keeps its clock.
        (LINEAR, LOWER_AGAIN, BLOCK5, 5, 0, 5 / 10),
        (LINEAR, LOWER_AGAIN, BLOCK4, 1, 0, 1 / 2),
        (LINEAR, LOWER_AGAIN, BLOCK4, 3, 0, 0.0),
        (LINEAR, LOWER_AGAIN, BLOCK4, 5, 0, 5 / 6),
        # A stage beyond the end of the training changes nothing before it.
        (LINEAR, {0: 4, 20: 18}, BLOCK5, 5, 0, 1 / 2),
        (LINEAR, {0: 4, 20: 0}, BLOCK5, 5, 0, 1 / 2),
    ],
)
def test_rate_in_a_table(
    options: dict[str, object], stages: dict[int, int], layer: int, epoch: int, step: int, share: float
) -> None:
    rates = LearningRates(stages, **{"from_epoch": {}, **options})
    rate = rates.at(0.1, layer, epoch, step, steps=4, max_epochs=10)
    assert rate == pytest.approx(0.1 * share, rel=1e-12, abs=1e-15)


def test_training_without_an_end_has_a_rate() -> None:
    rates = LearningRates({0: 0, 3: 4}, {}, warmup_epochs=1)
    assert rates.at(0.1, BLOCK5, 3, 0, steps=4, max_epochs=-1) == 0.025


def test_what_will_be_reached_can_be_asked_for_before_the_warm_up() -> None:
    rates = LearningRates({0: 0}, {}, warmup_epochs=2.0)
    found = [
        rates.at(0.1, HEAD_NUMBER, 0, 0, steps=4, max_epochs=3, warmed_up=warmed_up) for warmed_up in (False, True)
    ]
    assert found == [0.1 / 8, 0.1]
