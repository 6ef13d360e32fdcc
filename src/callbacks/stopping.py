"""Ends before the last epoch: by a signal, saved at the next batch boundary; and why else a training stopped."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, EarlyStopping, Timer
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher

from src.callbacks.checkpoints import FOLDER, LAST, AtomicCheckpointIO
from src.lean_loop import agree_on_signals_less_often
from src.run_directory import CONFIG

CallbackKind = TypeVar("CallbackKind", bound=Callback)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the last when a terminal or a connection closes
_STANDARD_ERROR = 2  # its number
_CHECK_EVERY = 10  # batches between two agreements of several processes, each of which waits for all of them


class Stopped(Exception):
    """A signal ended the training; everything needed to continue is in the last checkpoint.

    Of several processes only the first leaves with the signal's code: if another one leaves with any but 0, Lightning
    and torchrun kill the others, who may still have to write.
    """

    def __init__(self, number: int, checkpoint: Path, first: bool = True, by_steps: bool = False) -> None:
        """Say how to go on.

        Args:
            number: The signal's.
            checkpoint: Where everything is.
            first: Whether this is the first process.
            by_steps: Whether the training has a last step, up to which it cannot go on.
        """
        config, word = (shlex.quote(str(path)) for path in (checkpoint.parent.parent / CONFIG, checkpoint))
        more = " --trainer.max_steps -1" if by_steps else ""
        by = signal.Signals(number).name
        super().__init__(f"stopped by {by}; continue with: fit --config {config} --ckpt_path {word}{more}")
        self.exit_code = 128 + number if first else 0


class GracefulStop(Checkpoint):
    """Turn SIGTERM, SIGHUP and Ctrl-C into a checkpoint and an orderly end; a second signal ends the process at once.

    It counts as a checkpoint callback for Lightning, so that it comes after the epoch's own checkpoints.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.previous: dict[int, Any] = {}
        self.checkpoint = Path()
        self.speaks = False
        self.late = False  # whether a look at the signals was put off

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.checkpoint = Path(trainer.log_dir or ".") / FOLDER / LAST
        self.speaks = trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Only now, because Lightning has put its own handlers in place just before.
        if threading.current_thread() is threading.main_thread():  # no other may
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN  # as nohup has it
            heard = [number for number in SIGNALS if number != signal.SIGHUP or not ignored]
            self.previous = {number: signal.signal(number, self._receive) for number in heard}
        agree_on_signals_less_often(trainer)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each in self.previous:  # a terminal that closes may say so twice
            signal.signal(each, signal.SIG_IGN if each == signal.SIGHUP else signal.SIG_DFL)
        if self.speaks:  # past Python's own stream, which the signal may have interrupted
            with suppress(OSError):  # whoever read it may be gone, by the same Ctrl-C
                os.write(_STANDARD_ERROR, b"\nstopping after this step or validation; once more ends at once\n")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        steps, kept = divmod(batch_idx + 1, trainer.accumulate_grad_batches)
        every = 1 if trainer.world_size == 1 else max(1, _CHECK_EVERY // trainer.accumulate_grad_batches)
        at_end = batch_idx + 1 == trainer.num_training_batches  # the epoch's own checkpoint follows, after validation
        if not kept and not at_end and (self.late or steps % every == 0):
            # A run that goes on from before a validation leaves it out. Where every step has one, it must be so.
            self.late = not self.late and _validates(trainer, batch_idx)
            if not self.late:
                self._stop_if_told(trainer, save=True)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_told(trainer, save=False)  # everything of the epoch before is saved and logged

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop_if_told(trainer, save=False)
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restore()
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and not isinstance(exception, Stopped):
            _kill(launcher)

    def _stop_if_told(self, trainer: Trainer, save: bool) -> None:
        if not trainer.strategy.reduce_boolean_decision(self.received is not None, all=False):
            return
        if save:
            trainer.save_checkpoint(self.checkpoint)
        files = trainer.strategy.checkpoint_io
        if isinstance(files, AtomicCheckpointIO):
            files.finish()  # while a second signal still ends the process at once
        trainer.strategy.barrier()  # whoever has nothing to write waits for the one who has
        number, by_steps = self.received or signal.SIGTERM, trainer.max_steps != -1
        raise Stopped(number, self.checkpoint, trainer.is_global_zero, by_steps)

    def _restore(self) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        self.previous = {}


def callbacks_of(trainer: Trainer, kind: type[CallbackKind]) -> list[CallbackKind]:
    """List a trainer's callbacks of one kind."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, kind)]


def why_it_stopped(trainer: Trainer) -> list[str]:
    """Say what ended a training before its last epoch; nothing if nothing did."""
    if not trainer.should_stop:  # what callbacks know may be of an end that the training was continued from
        return []
    loop = trainer.fit_loop
    if trainer.current_epoch == trainer.max_epochs and loop.epoch_loop._num_ready_batches_reached():  # all was trained
        return []
    last = trainer.current_epoch - 1
    stops = [stop for stop in callbacks_of(trainer, EarlyStopping) if stop.stopped_epoch >= last]
    reasons = [stop.stopping_reason_message for stop in stops]
    if any((timer.time_remaining() or 0.0) < 0.0 for timer in callbacks_of(trainer, Timer)):
        reasons.append("the time of trainer.max_time was over")
    return [reason for reason in reasons if reason]


def _kill(launcher: _SubprocessScriptLauncher) -> None:
    """End the processes that this one has started: they may wait for it, on GPUs for half an hour."""
    others = list(launcher.procs)
    launcher.procs.clear()  # or Lightning's observer would take their end for a failure, and end this one unheard
    for process in others:
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)


def _validates(trainer: Trainer, batch_idx: int) -> bool:
    """Tell whether a validation is due after this batch (in every epoch, though some may go without)."""
    every = trainer.val_check_batch
    done = trainer.fit_loop.total_batch_idx if trainer.check_val_every_n_epoch is None else batch_idx
    return isinstance(every, int) and (done + 1) % every == 0
