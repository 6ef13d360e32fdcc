"""The checkpoint that a command starts from, and whether what is asked of it fits."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from src.errors import UserError, say
from src.model.classifier import TransferClassifier
from src.tensor_files import Unreadable, load_tensors

_ADVICE = "Give one of runs/<name>/version_<n>/checkpoints/."
_BATCHES = (
    ("batch_size", "data.batch_size", "the same"),
    ("processes", "the number of processes", "as many devices"),
    ("seed", "seed_everything", "the same"),
    ("stay", "a cache of features in each process", "the same feature_cache.views"),
)
"""What batches depend on, in the data module's identity and for the user, and how to keep it."""


@dataclass(frozen=True, eq=False)
class SavedTraining:
    """Hold what a checkpoint says of its training; every check raises a UserError that says what to do."""

    path: Path
    content: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> SavedTraining:
        """Read a checkpoint onto the CPU.

        Raises:
            UserError: The file is none.
        """
        try:
            content = load_tensors(path)
        except PermissionError as error:
            raise UserError(f"'{path}' cannot be read: {error.strerror}.") from error
        except (OSError, Unreadable) as error:
            raise UserError(f"'{path}' is damaged or no checkpoint. {_ADVICE}") from error
        if not isinstance(content, dict) or not {"state_dict", "pytorch-lightning_version"} <= content.keys():
            raise UserError(f"'{path}' is no checkpoint of a training. {_ADVICE}")
        return cls(path, content)

    @property
    def word(self) -> str:
        """Its path as one word of a command."""
        return shlex.quote(str(self.path))

    @property
    def data(self) -> dict[str, Any]:
        """What its data module left; nothing if it had none."""
        return self.content.get("ImageDataModule", {})

    def data_alone(self) -> SavedTraining:
        """Keep what it says of its data, and let go of the weights."""
        return SavedTraining(self.path, {"ImageDataModule": self.data})

    @property
    def classes(self) -> list[str]:
        """Names of the classes that it tells apart.

        Raises:
            UserError: It does not say.
        """
        if "classes" not in self.data:
            raise self._silent()
        return self.data["classes"]

    def _silent(self) -> UserError:
        return UserError(f"'{self.path}' does not say what its classes and its input are.")

    def network(self, **options: Any) -> TransferClassifier:
        """Rebuild the network that it holds.

        Args:
            options: What shall be otherwise than in its training.

        Raises:
            UserError: It is not of a training of this project.
        """
        settings = self.content.get("hyper_parameters", {})
        if not {"mean", "std"} <= self.data.keys() or "image_size" not in settings:
            raise self._silent()
        network = TransferClassifier(**{**settings, "weights": None, "compile": False, **options})
        self.check_network(network.state_dict())
        network.load_state_dict(self.content["state_dict"])
        return network

    def check_network(self, wanted: Mapping[str, Tensor], anew: bool = False) -> None:
        """Refuse a checkpoint of another network, or one whose weights are infinite or no numbers.

        Args:
            wanted: The network's own state dict.
            anew: Whether a new training is to start from it, for which its backbone alone will do.
        """
        saved = self.content["state_dict"]
        wrong = [f"it lacks {name}" for name in wanted if name not in saved]
        wrong += [f"its {name} has no place" for name in saved if name not in wanted]
        for name in saved.keys() & wanted.keys():
            if saved[name].shape != wanted[name].shape:
                shapes = [" × ".join(map(str, tensor.shape)) for tensor in (saved[name], wanted[name])]
                wrong.append(f"its {name} is {shapes[0]} instead of {shapes[1]}")
        if wrong:
            more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
            advice = "Use the configuration of its run: the config.yaml beside its folder."
            if anew:
                advice = f"Take its backbone alone, instead of run.warm_start: --model.weights {self.word}."
            raise UserError(f"'{self.path}' is of another network: {', '.join(sorted(wrong)[:2])}{more}. {advice}")
        broken = [name for name, value in saved.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise UserError(
                f"'{self.path}' holds weights that are infinite or no numbers, in {broken[0]}: its training went wrong."
            )

    def check_size(self, stored: int, enlarged: int) -> None:
        """Refuse images of another size than in training, where each thing in them would look larger or smaller.

        Args:
            stored: Height and width of the images at hand, in pixels.
            enlarged: The same of what enters the network.
        """
        network = self.content.get("hyper_parameters", {}).get("image_size", enlarged)
        images = self.data.get("image_size", stored if network == enlarged else network)
        if (images, network) != (stored, enlarged):
            was, now = (
                f"{a} pixels" + f", enlarged to {b}" * (a != b) for a, b in ((images, network), (stored, enlarged))
            )
            raise UserError(
                f"'{self.path}' was trained on images of {was}, and these have {now}: use the config.yaml of its run, "
                "or give its data.source.init_args.image_size and data.input_size."
            )

    def check_ranges(self) -> None:
        """Refuse to compute frozen layers in eight bits if it does not tell what values flow between them."""
        frozen = self.content.get("frozen", {})
        if frozen.get("depth") != 0 and not frozen.get("ranges"):
            raise UserError(
                f"'{self.path}' was not trained with frozen layers in eight bits: leave out "
                "model.frozen_precision int8."
            )

    def check_optimizer(self, wanted: str) -> None:
        """Refuse to continue with another optimizer, which would not know the first one's state.

        Args:
            wanted: The class to continue with.
        """
        saved = self.content.get("optimizer")
        if saved is not None and saved != wanted:
            raise UserError(
                f"'{self.path}' was trained with {saved} and cannot go on with {wanted}: use the config.yaml of its "
                f"run, or start anew from its weights: --run.warm_start {self.word}."
            )

    def check_averages(self, goes_on: bool) -> None:
        """Refuse to continue averaged weights without averaging: optimizer and weights would not fit.

        Args:
            goes_on: Whether there is a callback to go on averaging.
        """
        if "averaging_state" in self.content and not goes_on:
            raise UserError(
                f"'{self.path}' holds averaged weights, and no callback goes on averaging: use the config.yaml of its "
                f"run, or start anew from its weights: --run.warm_start {self.word}."
            )

    def check_teacher(self, teacher: str) -> None:
        """Refuse to go on from labels with what learns from a teacher.

        Args:
            teacher: Under what name the callback that knows it keeps its state; there is none to go on with.
        """
        if teacher in self.content.get("callbacks", {}):
            raise UserError(
                f"'{self.path}' learns from a teacher, and no callback {teacher} goes on with it: use the config.yaml "
                f"of its run, or start anew from its weights: --run.warm_start {self.word}."
            )

    def check_whole(self) -> None:
        """Refuse to continue from weights alone."""
        if not {"optimizer_states", "loops", "callbacks"} <= self.content.keys():
            raise UserError(
                f"'{self.path}' holds weights only, and no training can go on from it: start anew with "
                f"--run.warm_start {self.word}."
            )

    @property
    def served(self) -> int:
        """How many batches it has taken of the epoch within which it was saved; 0 if of none."""
        state = self.content["loops"]["fit_loop"]["state_dict"]
        return max((loader.get("served", 0) for loader in state.get("combined_loader", [])), default=0)

    def check_rest(self, taken: int) -> None:
        """Refuse to continue within an epoch of which nothing is left.

        Args:
            taken: How many batches an epoch takes of each process's.
        """
        if self.served and self.served >= taken:
            raise UserError(
                f"'{self.path}' was saved after {self.served} batches of an epoch, and trainer.limit_train_batches "
                f"leaves {taken} to it: finish the epoch with more."
            )

    def check_data(self, now: Mapping[str, Any]) -> None:
        """Refuse to continue on other images, or within an epoch with other batches.

        Args:
            now: The data module's identity.
        """
        saved = {**now, **self.data.get("identity", {})}
        if not self.saw(now):
            raise UserError(
                f"'{self.path}' was trained on other images, or on another split of them, so that what it saw may now "
                "validate: give the data, data.val_fraction and data.split_seed of its run, or start anew: "
                f"--run.warm_start {self.word}."
            )
        loop = self.content["loops"]["fit_loop"]
        within = self.served > 0
        epoch = loop["epoch_progress"]["current"]
        if within and epoch["processed"] == epoch["started"]:
            raise UserError(
                f"'{self.path}' is of a training that trainer.max_time, trainer.max_steps or a callback ended within "
                "an epoch, and the rest of that epoch would be left out. Start anew from its weights: "
                f"--run.warm_start {self.word}; what can be continued is a training ended by SIGTERM, SIGHUP or Ctrl-C."
            )
        for name, what, means in _BATCHES:
            if within and saved[name] != now[name]:
                raise UserError(
                    f"'{self.path}' was saved within an epoch, and the rest of its batches is not known with other "
                    f"ones: {what} was {json.dumps(saved[name])} and is {json.dumps(now[name])}. Finish the epoch with "
                    f"{means}."
                )

    def check_step(self, batches: int) -> None:
        """Refuse to go on within a step of several batches: what the first of them added up is not saved.

        Args:
            batches: How many a step takes.
        """
        if self.served % batches:
            raise UserError(
                f"'{self.path}' was saved after {self.served} batches of an epoch, within a step of {batches} "
                "(trainer.accumulate_grad_batches), of which it lacks what was added up: go on from last.ckpt, with "
                "as many batches a step as before."
            )

    def saw(self, now: Mapping[str, Any]) -> bool:
        """Tell whether these are the images that it was trained and validated on, split alike, as far as it says.

        Args:
            now: The data module's identity.
        """
        saved = {**now, **self.data.get("identity", {})}
        return all(saved[part] == now[part] for part in ("images", "files"))

    def say_where(self) -> None:
        """Say from where a training goes on."""
        done = self.content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        rank_zero_only(say)(f"goes on from '{self.path}', epoch {done}, counted from 0")

    def check_end(self, max_epochs: int | None) -> bool:
        """Refuse to continue beyond the end, and say if it is reached already.

        Args:
            max_epochs: How many epochs there are to be; None or -1 for no end.

        Returns:
            Whether anything is left to train.
        """
        done = self.content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
        if max_epochs in (None, -1) or max_epochs > done:
            return True
        if max_epochs < done:
            said = f"trainer.max_epochs is {max_epochs}, and '{self.path}' has trained {done} already"
            raise UserError(f"{said}: give more.")
        said = f"'{self.path}' has trained all of its {done} epochs"
        rank_zero_only(say)(f"{said}: give trainer.max_epochs more to go on.")
        return False

    def check_time(self, timers: Sequence[Timer]) -> None:
        """Refuse to continue when the time is over, for nothing would be trained.

        Args:
            timers: Those of `trainer.max_time`.
        """
        spent = self.content["callbacks"].get("Timer", {}).get("time_elapsed", {}).get("train", 0.0)
        for timer in timers:
            given = timer.time_remaining()
            if given is not None and given <= spent:
                limit, before = (timedelta(seconds=round(seconds)) for seconds in (given, spent))
                raise UserError(
                    f"trainer.max_time is {limit}, and counts the {before} that '{self.path}' took before: give more "
                    "than that."
                )
