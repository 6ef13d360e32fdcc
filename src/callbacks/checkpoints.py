"""Two checkpoints: the best by validation, and the last of every epoch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from copy import deepcopy
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from src.errors import UserError
from src.files import replacing
from src.replay import streams

FOLDER = "checkpoints"
BEST = "best.ckpt"
LAST = "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write a checkpoint beside its destination and rename it: a run killed in between keeps the old one.

    A run's best and last one, if on a GPU, are copied there, and written while training goes on, for a GPU's epoch may
    take less time than its checkpoint. One that has not been begun when the next comes for the same file is left out.
    Whoever reads one, a stop by a signal, and the end of the training wait for all.
    """

    def __init__(self) -> None:
        self._writer = ThreadPoolExecutor(max_workers=1)
        self._writing: list[Future[None]] = []
        self._waiting: dict[Path, _Copy] = {}  # the newest of each file
        self._failed = False  # then nothing more is written: the last checkpoint names a best one
        self._lock = Lock()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path, device = Path(path), _gpu_of(checkpoint)
        # Whoever saves another one may want to read it at once.
        if device is None or path.parent.name != FOLDER or path.name not in (BEST, LAST):
            self.finish()
            _write(checkpoint, path)
            return
        self.finish(only_done=True)
        copy = _Copy(checkpoint, device)
        with self._lock:
            self._waiting[path] = copy
        self._writing.append(self._writer.submit(self._write_waiting))

    def _write_waiting(self) -> None:
        with self._lock:  # all at once: one by one, a best one might always come before the last
            waiting, self._waiting = self._waiting, {}
        for path in sorted(waiting, key=lambda path: path.name != BEST):  # which the last one names
            if self._failed:
                return
            try:
                waiting[path].write(path)
            except BaseException:
                self._failed = True
                raise

    def finish(self, only_done: bool = False) -> None:
        """Wait for what is being written, and raise what went wrong with it first."""
        due = [future for future in self._writing if future.done() or not only_done]
        self._writing = [future for future in self._writing if future not in due]
        errors = [error for future in due if (error := future.exception()) is not None]
        if errors:
            raise errors[0]

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        self.finish()
        return super().load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.finish()
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        self.finish()


class _Copy:
    """What a checkpoint holds now, on its GPU until it is written."""

    def __init__(self, checkpoint: dict[str, Any], device: torch.device) -> None:
        self._content = deepcopy(checkpoint)
        self._made = self._event(device)
        self._stream = streams(device.index or 0).checkpoints

    def _event(self, device: torch.device) -> torch.cuda.Event:
        return torch.cuda.current_stream(device).record_event()

    def write(self, path: Path) -> None:
        with torch.cuda.stream(self._stream):  # not behind the steps to come
            self._made.wait()
            _write(self._content, path)


def _gpu_of(checkpoint: dict[str, Any]) -> torch.device | None:
    return next((tensor.device for tensor in _tensors(checkpoint) if tensor.is_cuda), None)


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, (Mapping, list, tuple)):
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from _tensors(part)


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # which hides that the disk is full
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class RunCheckpoint(ModelCheckpoint):
    """Save as Lightning does, and name the optimizer; make what is loaded fit the run and the command of today.

    A run moved elsewhere keeps its best scores: Lightning compares folders as text, and forgets them where they differ.
    An evaluation gets averaged weights where there are any, and EarlyStopping keeps the patience that it was given now.
    """

    _plain = False
    """Whether what callbacks keep was seen to be readable, which the first checkpoint tells of nearly all."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero:
            for unfinished in Path(str(self.dirpath)).glob(f".{self.filename}{self.FILE_EXTENSION}.*"):
                unfinished.unlink(missing_ok=True)  # what a kill while saving left

    on_train_batch_end = Callback.on_train_batch_end  # it saves at the end of epochs only

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if not self._plain:
            _check_plain(checkpoint.get("callbacks", {}))
            self._plain = True
        if trainer.optimizers:
            checkpoint["optimizer"] = type(trainer.optimizers[0]).__name__

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Averaged weights are what was validated. A test after `fit` finds Lightning's averaging still at work, which
        # puts the others in their place, as for a training that goes on.
        if "current_model_state" in checkpoint and trainer.state.fn != TrainerFn.FITTING:
            pl_module.load_state_dict(checkpoint["state_dict"])
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EarlyStopping):  # whose patience is the one that is asked for now
                checkpoint.get("callbacks", {}).get(callback.state_key, {})["patience"] = callback.patience
        states = [state for state in checkpoint.get("callbacks", {}).values() if "dirpath" in state]
        folder = checkpoint.get("callbacks", {}).get(self.state_key, {}).get("dirpath")
        for state in states:  # of all that save into this folder, the user's own too
            if state["dirpath"] == folder:
                state.update(_moved(state, str(self.dirpath)))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Else it is a checkpoint without its run: the new run finds a best one of its own.
        if state_dict["dirpath"] == self.dirpath and Path(state_dict["best_model_path"]).is_file():
            super().load_state_dict(state_dict)


def _check_plain(states: Mapping[str, Any]) -> None:
    """Refuse states that could be saved, and not be read again: checkpoints are read as data, not as programs."""
    for name, state in states.items():
        try:
            written = BytesIO()
            torch.save(state, written)
            written.seek(0)
            torch.load(written, weights_only=True)
        except Exception as error:  # whatever pickling meets
            raise UserError(
                f"the callback {name.partition('{')[0]} would save in each checkpoint what cannot be read again: have "
                "its state_dict give tensors, numbers, text, lists and dictionaries only."
            ) from error


def _moved(state: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Name the files of a checkpoint's callback where they are now; nothing if its best one is not there."""

    def moved(path: str) -> str:  # a name like {val/f1} makes folders of its own
        return str(Path(folder, os.path.relpath(path, state["dirpath"]))) if path else path

    if not Path(moved(state["best_model_path"])).is_file():
        return {}
    paths = {name: moved(state[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")}
    scores = {moved(path): score for path, score in state["best_k_models"].items()}
    return {"dirpath": folder, "best_k_models": scores, **paths}


def checkpoints() -> tuple[ModelCheckpoint, ModelCheckpoint]:
    """Make both callbacks: the best's, then the last's."""
    best = RunCheckpoint(filename=Path(BEST).stem, monitor="val/acc", mode="max", enable_version_counter=False)
    last = RunCheckpoint(filename=Path(LAST).stem, save_on_train_epoch_end=True, enable_version_counter=False)
    return best, last
