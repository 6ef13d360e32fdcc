"""Every file in configs/ is what its header says, and runs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from jsonargparse import Namespace
from PIL import Image
from support import REPOSITORY, documented_code

from src.cli import ThawCLI, main
from src.model.classifier import TransferClassifier

CONFIGS = REPOSITORY / "configs"
RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
OVERLAYS = sorted(path.stem for path in (CONFIGS / "with").glob("*.yaml"))
COMMAND = "python -m src.cli "
CPU = ["--trainer.accelerator", "cpu"]


class Parsed(Exception):
    """End a command when its configuration is known, and carry it."""


def parse(monkeypatch: pytest.MonkeyPatch, *words: str, until: str = "instantiate_classes") -> Namespace:
    """Parse and validate a command line without making anything."""

    def stop(cli: ThawCLI) -> None:
        raise Parsed(cli.config[cli.subcommand])

    with monkeypatch.context() as patch:
        patch.setattr(ThawCLI, until, stop)
        with pytest.raises(Parsed) as parsed:
            main(words)
    return parsed.value.args[0]


def config(name: str) -> list[str]:
    return ["--config", str(CONFIGS / f"{name}.yaml")]


def header(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    end = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    return lines[:end]


def commands(path: Path) -> list[list[str]]:
    """List the commands in a header, as words; a backslash continues the line."""
    text = "\n".join(line.removeprefix("#").strip() for line in header(path)).replace("\\\n", " ")
    return [line.split() for line in text.splitlines() if line.startswith(COMMAND)]


def documented() -> list[str]:
    """List the commands in README's and docs' blocks of shell code, without comments."""
    found = []
    for block in documented_code("sh"):
        folder = next(iter(re.findall(r'^folder="(.*)"', block, re.MULTILINE)), "")
        lines = block.replace("\\\n", " ").replace("$folder", folder).splitlines()
        found += [shlex.join(shlex.split(line, comments=True)) for line in lines if " -m src.cli " in line]
    return list(dict.fromkeys(found))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Collect the loss of every training step."""
    losses: list[torch.Tensor] = []
    original = TransferClassifier.training_step

    def training_step(self: TransferClassifier, batch: Any) -> torch.Tensor:
        losses.append(original(self, batch))
        return losses[-1]

    monkeypatch.setattr(TransferClassifier, "training_step", training_step)
    return losses


def test_there_are_recipes_and_overlays() -> None:
    assert {"head", "last4", "staged", "full"} <= set(RECIPES)
    assert {"sample", "folder", "gpu", "ddp"} <= set(OVERLAYS)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_runs_one_step_on_the_sample(recipe: str, tmp_path: Path, steps: list[torch.Tensor]) -> None:
    size = ["--data.source.init_args.size", "50"]
    fast = ["--data.batch_size", "4", "--trainer.fast_dev_run", "true", "--run.root", str(tmp_path / "runs")]
    main(["fit", *config(recipe), *config("with/sample"), *size, *fast, *CPU])
    assert len(steps) == 1
    assert steps[0].isfinite()
    assert list(tmp_path.iterdir()) == []


def test_folder_overlay_runs_one_step(tmp_path: Path, steps: list[torch.Tensor]) -> None:
    for number in range(24):
        path = tmp_path / "images" / "train" / ("cat", "dog")[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32), (number, 100, 100)).save(path)
    root = ["--data.source.init_args.root", str(tmp_path / "images")]
    words = [*config("head"), *config("with/folder"), *root, "--model.weights", "null", "--data.batch_size", "4", *CPU]
    main(["fit", *words, "--trainer.fast_dev_run", "true", "--run.root", str(tmp_path / "runs")])
    assert len(steps) == 1
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_overlay_changes_the_setting_but_not_the_stages(overlay: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = parse(monkeypatch, "fit", *config("last4"))
    joined = parse(monkeypatch, "fit", *config("last4"), *config(f"with/{overlay}"))
    if overlay == "sample":
        alone.unfreezing.decay = "cosine"  # from random weights
    assert joined.unfreezing == alone.unfreezing
    assert (joined.trainer, joined.data, joined.model) != (alone.trainer, alone.data, alone.model)


def test_without_an_overlay_one_device_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning would take all GPUs, and make the batch so many times as large."""
    assert parse(monkeypatch, "fit", *config("last4")).trainer.devices == 1


def test_gpu_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parse(monkeypatch, "fit", *config("last4"), *config("with/gpu"))
    assert (parsed.trainer.accelerator, parsed.trainer.devices, parsed.trainer.precision) == ("gpu", 1, "bf16-mixed")
    assert (parsed.model.cuda_graphs, parsed.data.on_device, parsed.model.compile) == (True, True, False)


def test_ddp_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = parse(monkeypatch, "fit", *config("last4"), *config("with/ddp"))
    assert (parsed.trainer.devices, parsed.trainer.strategy) == ("auto", "ddp")


@pytest.mark.parametrize("recipe", RECIPES)
def test_header_of_a_recipe(recipe: str) -> None:
    path = CONFIGS / f"{recipe}.yaml"
    text = "\n".join(header(path))
    assert f"python -m src.cli fit --config configs/{recipe}.yaml" in text
    assert re.search(r"Expected val/acc: \S", text)
    assert re.search(r"2 CPU cores\b[^:]*: (a minute, )?\d[\d,]* (to|and) \d[\d,]* training images a second", text)
    assert header(path)[0].endswith(".")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_header_of_an_overlay(overlay: str) -> None:
    path = CONFIGS / "with" / f"{overlay}.yaml"
    assert header(path)[0].startswith("# Overlay: ")
    assert any(f"configs/with/{overlay}.yaml" in command for command in commands(path))


@pytest.mark.parametrize("command", documented())
def test_commands_in_the_documents_are_right(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(command)
    parse(monkeypatch, *words[words.index("src.cli") + 1 :], until="before_instantiate_classes")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("**/*.yaml")), ids=lambda path: path.stem)
def test_commands_in_headers_are_right(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert commands(path)
    for command in commands(path):
        parse(monkeypatch, *command[3:])
