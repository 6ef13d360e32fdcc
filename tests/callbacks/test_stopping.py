"""Signals: when a training ends by one, and what a second one does."""

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping

from src.callbacks.checkpoints import AtomicCheckpointIO
from src.callbacks.stopping import SIGNALS, GracefulStop, Stopped, why_it_stopped


def test_a_stop_waits_for_the_optimizers_step_and_for_its_file(monkeypatch: pytest.MonkeyPatch) -> None:
    stop, saved, files = GracefulStop(), [], AtomicCheckpointIO()
    finished: list[bool] = []
    monkeypatch.setattr(files, "finish", lambda: finished.append(bool(saved)))
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=2, num_training_batches=5, world_size=1, val_check_batch=5, check_val_every_n_epoch=1,
        max_steps=-1, strategy=SimpleNamespace(
            reduce_boolean_decision=lambda told, all: told and not all, checkpoint_io=files,
            barrier=lambda: finished.append(False),
        ),
        save_checkpoint=saved.append, is_global_zero=True,
    )  # fmt: skip
    model: Any = None
    stop.received = signal.SIGTERM
    stop.on_train_batch_end(trainer, model, None, None, 0)  # a gradient that is only kept
    assert saved == []
    with pytest.raises(Stopped):
        stop.on_train_batch_end(trainer, model, None, None, 1)
    assert saved == [stop.checkpoint]
    assert finished == [True, False]  # the others wait for the file


@pytest.mark.parametrize(
    ("accumulated", "looks"), [(1, [9, 19, 29]), (2, [9, 19, 29]), (16, [15, 31]), (4, [7, 15, 23, 31])]
)
def test_several_processes_look_for_a_signal_now_and_then(accumulated: int, looks: list[int]) -> None:
    asked: list[int] = []
    strategy = SimpleNamespace(reduce_boolean_decision=lambda told, all: asked.append(batch))
    trainer: Any = SimpleNamespace(
        accumulate_grad_batches=accumulated, num_training_batches=39, world_size=2, val_check_batch=39,
        check_val_every_n_epoch=1, strategy=strategy,
    )  # fmt: skip
    for batch in range(39):
        GracefulStop().on_train_batch_end(trainer, None, None, None, batch)  # type: ignore[arg-type]
    assert asked == looks


def test_several_processes_do_not_ask_each_other_before_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Lightning does on its own, with a wait for the device."""
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: pytest.fail("asked"))
    trainer, stop = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), GracefulStop()
    try:
        stop.on_train_start(trainer, None)  # type: ignore[arg-type]
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    finally:
        stop.on_exception(trainer, None, RuntimeError())  # type: ignore[arg-type]


def test_only_the_first_process_leaves_with_the_signals_code() -> None:
    assert Stopped(signal.SIGTERM, Path("last.ckpt")).exit_code == 143
    assert Stopped(signal.SIGTERM, Path("last.ckpt"), first=False).exit_code == 0
    assert str(Stopped(signal.SIGTERM, Path("my runs/last.ckpt"))).endswith("--ckpt_path 'my runs/last.ckpt'")
    by_steps = Stopped(signal.SIGTERM, Path("last.ckpt"), by_steps=True)
    assert str(by_steps).endswith("last.ckpt --trainer.max_steps -1")  # a command, and nothing after it


def test_an_end_at_the_last_epoch_is_not_early() -> None:
    stopping = EarlyStopping("val/loss")
    stopping.stopped_epoch, stopping.stopping_reason_message = 4, "it did not improve"
    whole = [True]
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(_num_ready_batches_reached=lambda: whole[0]))
    trainer: Any = SimpleNamespace(
        should_stop=True, current_epoch=5, max_epochs=6, callbacks=[stopping], fit_loop=loop
    )  # fmt: skip
    assert why_it_stopped(trainer) == ["it did not improve"]
    trainer.max_epochs = 5
    assert why_it_stopped(trainer) == []
    whole[0] = False  # it ended within the last epoch
    assert why_it_stopped(trainer) == ["it did not improve"]


def test_a_second_signal_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if whoever read what the first one says is gone, by the same signal."""

    def gone(number: int, text: bytes) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("src.callbacks.stopping.os.write", gone)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = GracefulStop()
    stop.speaks, stop.previous = True, before
    try:
        stop._receive(signal.SIGINT, None)
        assert stop.received == signal.SIGINT
        assert {signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)} == {signal.SIG_DFL}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_signal_that_nohup_ignores_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.callbacks.stopping.agree_on_signals_less_often", lambda trainer: None)
    before, stop = signal.signal(signal.SIGHUP, signal.SIG_IGN), GracefulStop()
    try:
        stop.on_train_start(None, None)  # type: ignore[arg-type]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == stop._receive
        stop.received = signal.SIGTERM
        stop._receive(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        stop._restore()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_word_of_a_closed_terminal_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell may pass it on, and then the kernel."""
    monkeypatch.setattr("src.callbacks.stopping.agree_on_signals_less_often", lambda trainer: None)
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = GracefulStop()
    try:
        stop.on_train_start(None, None)  # type: ignore[arg-type]
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
        assert stop.received == signal.SIGHUP
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
