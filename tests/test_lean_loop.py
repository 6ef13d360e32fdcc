"""What is left of Lightning's work around a step."""

import inspect

import pytest
from support import CallsItsOwn

from src.callbacks.checkpoints import RunCheckpoint
from src.callbacks.history import History
from src.callbacks.seeding import StepSeed
from src.lean_loop import skip_empty_hooks
from src.model.classifier import TransferClassifier


def test_only_what_a_callback_has_written_is_called() -> None:
    seed, saves, history, strange = StepSeed(1), RunCheckpoint(), History(True), CallsItsOwn()
    skip_empty_hooks([seed, saves, history, strange])
    assert callable(seed.on_train_batch_start)
    assert seed.on_train_batch_end is None
    assert saves.on_train_batch_end is None
    assert callable(saves.on_validation_end)
    assert callable(history.on_train_batch_start)
    assert history.on_after_backward is None
    assert callable(strange.on_train_batch_end)


def test_what_a_step_takes_is_known_and_not_derived_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = TransferClassifier(weights=None)
    monkeypatch.setattr(inspect, "_signature_from_function", lambda *args, **more: pytest.fail("derived again"))
    for hook in (model.training_step, model.validation_step, model.test_step, model.predict_step):
        assert inspect.getfullargspec(hook).args == ["self", "batch"]
