"""A run's settings: config.yaml, and how two of them differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from src.errors import UserError, say
from src.files import replacing
from src.run_directory import CONFIG, RunLogger

_ORIGIN = ("model.weights", "model.weights_input", "data.standardize")
"""Settings that make a training's first weights and its input, of which its checkpoint holds the outcome."""


class SaveConfig(SaveConfigCallback):
    """Write the resolved configuration of a training, and show it in TensorBoard's HParams tab."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        config = config.clone()
        config.ckpt_path = None  # who repeats the run with this file wants a new one
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.already_saved:
            return
        self._hold(trainer)
        path = Path(trainer.log_dir or ".") / CONFIG  # asks all processes
        before = _content(path) if trainer.is_global_zero else None
        if before is not None:  # of the run that goes on
            self._keep_origin(settings(before))
        with replacing(path) if trainer.is_global_zero else nullcontext(path) as temporary:
            self.config_filename = temporary.name  # Lightning empties what it writes to, and fills it some time later
            super().setup(trainer, pl_module, stage)
        if before is not None:
            for change in changes(before, _content(path) or {}):
                say(f"goes on with {change}")

    def _keep_origin(self, before: Mapping[str, Any]) -> None:
        """Write down what the run once started from, and say where the command has it otherwise."""
        first, given = before.get("run.warm_start"), self.config.run.warm_start
        if given not in (None, first):  # a job that is started again names the first one
            say(f"run.warm_start stays {json.dumps(first)}, as the training began")
        self.config.run.warm_start = first
        for name in _ORIGIN:
            if name in before and self.config[name] != before[name]:
                say(f"{name} stays {json.dumps(before[name])}, as the training began")
                self.config[name] = before[name]

    def _hold(self, trainer: Trainer) -> None:
        """Keep other trainings out; if one is there all processes end, lest they wait for the first in vain."""
        refusal = None
        if trainer.is_global_zero:
            assert isinstance(trainer.logger, RunLogger)
            try:
                trainer.logger.hold()
            except UserError as error:
                refusal = str(error)
        refusal = trainer.strategy.broadcast(refusal)
        if refusal is not None:
            raise UserError(refusal) if trainer.is_global_zero else SystemExit(1)  # one line for all of them

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        config = yaml.safe_load(self.parser.dump(self.config))
        shown = {room: config.get(room) for room in ("model", "data", "unfreezing", "feature_cache", "seed_everything")}
        shown["trainer"] = {key: config["trainer"].get(key) for key in ("max_epochs", "precision", "devices")}
        assert isinstance(trainer.logger, RunLogger)
        trainer.logger.log_hyperparams(shown)


def settings(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Flatten a configuration: `data.batch_size` and what it was set to, and so on.

    Args:
        config: As config.yaml has it.
        above: What its keys belong to, with a dot at its end.
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        name = above if key == "init_args" else f"{above}{key}."
        if isinstance(value, dict) and value and all(isinstance(each, str) for each in value):
            found |= settings(value, name)
        else:
            found[name.removesuffix(".").removesuffix(".class_path")] = value
    return found


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say what differs between two configurations, setting by setting."""
    old, new = settings(before), settings(now)
    names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    was = {name: json.dumps(old[name]) if name in old else "not set" for name in names}
    return [f"{name} {json.dumps(new.get(name))}, which was {was[name]}" for name in names]


def _content(path: Path) -> dict[str, Any] | None:
    """Read a run's configuration; None where there is none, or nothing that can be read."""
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return content if isinstance(content, dict) else None
