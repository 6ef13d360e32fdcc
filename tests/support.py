"""Callbacks that tests put into a training through its configuration, and helpers to start one."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel

from src.callbacks.history import Row, read_history
from src.data.sources import Images, Sample, Source
from src.model.int8 import supported

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_int8 = pytest.mark.skipif(not supported(), reason="this processor has no instructions for eight bits")
REPOSITORY = Path(__file__).resolve().parent.parent
_TIMES = ("images_per_second", "train_seconds")

DOCUMENTS = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/*.md"))]


def on_sample(recipe: str, options: Mapping[str, Any], *more: str, processes: int = 1) -> list[str]:
    """Give a command's words for a recipe, with its own decay, on built-in images; on the CPU even beside a GPU."""
    files = [recipe, "with/sample", *["with/ddp"] * (processes > 1)]
    decay = yaml.safe_load((REPOSITORY / f"configs/{recipe}.yaml").read_text())["unfreezing"].get("decay", "constant")
    options = {
        "trainer.accelerator": "cpu", "trainer.devices": processes, "unfreezing.decay": decay, **options
    }  # fmt: skip
    configs = [f"--config={REPOSITORY / 'configs' / file}.yaml" for file in files]
    return [*configs, *(f"--{name}={value}" for name, value in options.items()), *more]


def signal_at(epoch: int, batch: int, name: str) -> list[str]:
    """Give the words that have a training send itself a signal before a batch."""
    callback = ["--trainer.callbacks+=tests.support.SignalAt", "--trainer.callbacks.epoch", str(epoch)]
    return [*callback, "--trainer.callbacks.batch", str(batch), "--trainer.callbacks.name", name]


def untimed(run_directory: Path) -> list[Row]:
    """Read what a run has measured in each epoch, but for how long it took."""
    rows = read_history(run_directory / "history.csv")
    return [{name: value for name, value in row.items() if name not in _TIMES} for row in rows]


def documented_code(language: str) -> list[str]:
    """List the blocks of code in a language in README and docs."""
    text = "".join(path.read_text() for path in DOCUMENTS)
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


class SignalAt(Callback):
    """Send this very process a signal before a batch; of several, all or one of them."""

    def __init__(self, epoch: int, batch: int, name: str, rank: int | None = None) -> None:
        self.at = (epoch, batch)
        self.rank = rank
        self.number = signal.Signals[name]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if (trainer.current_epoch, batch_idx) == self.at and self.rank in (None, trainer.global_rank):
            os.kill(os.getpid(), self.number)


class OfMine(Source):
    """Give the sample's images, without an option of its own."""

    image_size = 32

    def __init__(self) -> None:
        self._sample = Sample(size=50)

    @property
    def classes(self) -> tuple[str, ...]:
        return self._sample.classes

    def prepare(self) -> None:
        self._sample.prepare()

    def load(self) -> dict[str, Images]:
        return self._sample.load()


class KeepsAPath(Callback):
    """Keep in each checkpoint what `torch.load` takes for a program."""

    def state_dict(self) -> dict[str, Any]:
        return {"folder": Path("here")}


class Lacking(Callback):
    """Miss a package, as some of Lightning's callbacks do without its extras."""

    def __init__(self, at: str) -> None:
        self.at = at
        self._look("init")

    def setup(self, *_: Any, **__: Any) -> None:
        self._look("setup")

    def _look(self, where: str) -> None:
        if where == self.at:
            raise ModuleNotFoundError("Lacking needs an extra,\nwhich is not here")


class FailsAlone(Callback):
    """Fail in the first process, while the others are busy."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if not trainer.is_global_zero:
            self.file.write_text(str(os.getpid()))
            time.sleep(60)
        while not self.file.exists():
            time.sleep(0.1)
        raise OSError(errno.ENOSPC, "No space left on device")


class EndAfter(Callback):
    """Ask Lightning to end the training after the fourth step, as a time limit does."""

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 4


class CallsItsOwn(Callback):
    """Call a hook of its own that is empty, as a callback of anybody's may."""

    def on_train_batch_start(self, *args: Any) -> None:
        self.on_train_batch_end(*args[:2], None, *args[2:])


class Validations(Callback):
    """Write down after how many steps the network was validated."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        with self.file.open("a") as file:
            print(trainer.global_step, file=file)


class Statistics(Callback):
    """Write down the head's BatchNorm statistics with which each process validates."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"rank{trainer.global_rank}.txt").open("a") as file:
            print(trainer.global_step, hash_of(pl_module.head.norm.state_dict()), file=file)


class Witness(Callback):
    """Write down, for every process and epoch, what was seen and what the weights are."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.images: list[tuple[int, float]] = []
        self.entries: list[int] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.before = [parameter.detach().clone() for parameter in pl_module.parameters()]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        sums = batch.inputs.double().sum(dim=(1, 2, 3)).tolist()
        self.images += zip(batch.indices.tolist(), sums, strict=True)
        self.entries.append(batch.entry)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        layers = _layers(pl_module)
        self.with_gradient = [name for name, layer in layers if any_has(layer, lambda p: p.grad is not None)]

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seen = {
            "images": self.images,
            "entries": self.entries,
            "changes": [_some(p.detach() - b) for p, b in zip(pl_module.parameters(), self.before, strict=True)],
            "bits": hash_of(pl_module.state_dict()),
            "layers": {name: hash_of(layer.state_dict()) for name, layer in _layers(pl_module)},
            "with_gradient": self.with_gradient,
            "with_state": [
                name for name, layer in _layers(pl_module) if any_has(layer, trainer.optimizers[0].state.get)
            ],
            "communicated": _communicated(trainer.strategy.model),
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"epoch{trainer.current_epoch}-rank{trainer.global_rank}.json"
        (self.folder / name).write_text(json.dumps(seen))
        self.images, self.entries = [], []


def _some(tensor: torch.Tensor) -> list[float]:
    """Give at most a hundred of its elements, from everywhere."""
    return tensor.flatten()[:: -(-tensor.numel() // 100)].tolist()


def _communicated(network: torch.nn.Module | None) -> int:
    """Count the gradients that DDP averages: those of the parameters which trained when it was made."""
    if not isinstance(network, DistributedDataParallel):
        return 0
    return network._get_ddp_logging_data()["total_parameter_size_bytes"] // 4


def _layers(model: LightningModule) -> list[tuple[str, torch.nn.Module]]:
    return [*model.backbone.named_children(), ("head", model.head)]


def any_has(layer: torch.nn.Module, test: Callable[[torch.nn.Parameter], Any]) -> bool:
    return any(test(parameter) for parameter in layer.parameters())


def hash_of(state: dict[str, torch.Tensor]) -> str:
    """Give a digest of all floating-point tensors, which changes with any bit of them."""
    digest = blake2b()
    for tensor in state.values():
        if tensor.is_floating_point():
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def run(
    *words: str, check: bool = True, threads: int | None = None, warnings: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(
        [sys.executable, *([] if warnings else ["-W", "ignore"]), "-m", "src.cli", *words],
        cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if check and done.returncode:
        raise AssertionError(f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done
