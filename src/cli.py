"""The command line: `python -m src.cli fit|validate|test|predict --config configs/last4.yaml`."""

from __future__ import annotations

import json
import logging
import math
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, TQDMProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from src.callbacks.checkpoints import AtomicCheckpointIO, checkpoints
from src.callbacks.distillation import Distillation, teacher_at
from src.callbacks.feature_cache import FrozenFeatureCache
from src.callbacks.figures import FirstBatch
from src.callbacks.history import History
from src.callbacks.predictions import PredictionWriter
from src.callbacks.seeding import StepSeed
from src.callbacks.stopping import GracefulStop, callbacks_of, why_it_stopped
from src.callbacks.summary import Summary
from src.callbacks.throughput import Throughput
from src.callbacks.unfreezing import StagedUnfreezing
from src.data.datamodule import ImageDataModule
from src.data.sources.folder import lacks_train
from src.endings import plain_endings
from src.errors import UserError, say
from src.files import make_folder, user_path
from src.lean_loop import Unprofiled, skip_empty_hooks
from src.machine import check_machine, say_if_emulated
from src.model.classifier import TransferClassifier
from src.model.vgg import InputScale, expected_input
from src.plain_errors import COMMANDS, HIGHEST_SEED, hidden_error, known_options, plain, plain_trainer
from src.preflight import (
    NOT_OFFERED,
    check_accumulation,
    check_averages,
    check_batches,
    check_callbacks,
    check_configs,
    check_monitors,
    check_offered,
    check_trainer,
    check_whole_classes,
)
from src.process import prepare_process
from src.run_directory import (
    RunLogger,
    RunOptions,
    find_checkpoint,
    last_if_any,
    newest_run,
    run_meant,
    run_name,
    run_of,
)
from src.run_settings import SaveConfig
from src.saved_training import SavedTraining
from src.starting_point import (
    check_continuation,
    check_place,
    load_checkpoint,
    load_warm_start,
    say_if_seen,
    say_of_other_classes,
    training_of,
)

USAGE = "python -m src.cli fit --config configs/last4.yaml"

_UNWANTED_ADVICE = (
    "smaller than the logging interval",  # curves are drawn by the epoch
    "exists and is not empty",  # a resumed run stays in its directory
    "sync_dist=True",  # every process logs the same, or for itself
    "smallest subnormal",  # is zero on purpose; numpy 2.0 wonders
    "LeafSpec",  # how Lightning asks torch for one is for them to mend
    "callbacks used to create the checkpoint need to be provided",  # a run that goes on says what has changed
    "could not find the monitored key",  # of the best, where nothing validates; a user's own has been looked at before
    "WeightAveraging state cannot be restored",  # only a training needs it; averaged weights are what is tested
)
_CKPT_PATH = (
    "Checkpoint to start from: a file, or `best` or `last` of the newest run of this configuration's name, or of the "
    "run whose own config.yaml is given, where it lies; in fit also `last_if_any`, which begins a new run where there "
    "is none."
)
_SHOWN = (".png", ".csv", ".json", ".yaml")


class ThawParser(LightningArgumentParser):
    """Report mistakes in one line instead of a usage text."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:  # a class's own parser: whoever called it adds where this happened
            super().error(message, ex)
        raise hidden_error(ex) or UserError(plain(message, known_options(self))) from ex


class ThawCLI(LightningCLI):
    """Join data, model and callbacks by configuration, and give each run its directory."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        return super().init_parser(allow_abbrev=False, **kwargs)

    def __init__(self, *, args: list[str], **options: Any) -> None:
        self._asked = args[0] if args and args[0] in self.subcommands() else None
        super().__init__(args=args, **options)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if self._asked not in (subcommand, None):  # nobody wants its options, and to gather them takes long
            return self.init_parser(**kwargs)
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.set_defaults(return_predictions=False)  # nobody takes them, and a GPU would be waited for
        helps = {name: f"Not offered: {why}" for name, (_, why) in NOT_OFFERED.items()}
        helps |= {"ckpt_path": _CKPT_PATH, "seed_everything": f"Of all random numbers, from 0 to {HIGHEST_SEED}."}
        for action in parser._actions:  # what Lightning says of them does not hold here
            action.help = helps.get(action.dest, action.help)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunOptions, "run")
        parser.add_lightning_class_args(StagedUnfreezing, "unfreezing")
        parser.add_lightning_class_args(FrozenFeatureCache, "feature_cache")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_checked_seed)
        weights = ("model.weights", "model.weights_input")
        parser.link_arguments(weights, "data.weights_input", compute_fn=_expected_or_unknown)
        parser.link_arguments("model.cuda_graphs", "data.cuda_graphs")
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        words = cast(Sequence[str], args)
        check_configs(words)
        self.config = parser.parse_args(words)  # Lightning's own way warns that the process has words besides these

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as the user gave it: Lightning would put the checkpoint's values above it."""

    @property
    def chosen(self) -> Namespace:
        """The command's own settings, classes made."""
        return self.config_init[self.subcommand]

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        self.options = RunOptions(**config.run)
        self.options.root = str(user_path(self.options.root))  # as Lightning's logger does
        configs = [Path(str(path)) for path in config.config or [] if path is not None]
        self.name = run_name(self.options, configs)
        wanted = config.ckpt_path or (None if self.subcommand == "fit" else "best")
        place = Path(self.options.root) / self.name
        run = run_meant(place, configs)
        if wanted == "last_if_any" and self.subcommand == "fit":
            self.checkpoint = last_if_any(run) or last_if_any(newest_run(place))  # one that this command began
        else:
            self.checkpoint = find_checkpoint(str(wanted), run, place) if wanted else None
        config.ckpt_path = self.checkpoint and str(self.checkpoint)
        self.saved = None if self.checkpoint is None else SavedTraining.read(self.checkpoint)
        if self.subcommand == "fit":
            _find_teachers(config.trainer)
        if self.saved is not None:
            self._tell_classes(config.data.source, self.saved)
        elif self.options.warm_start is not None:
            # By its path, for `last` will be another one: of this very run when it is repeated from its config.yaml.
            warm_start = str(find_checkpoint(self.options.warm_start, run, place, "--run.warm_start"))
            self.options.warm_start = config.run.warm_start = warm_start
        else:
            expected_input(config.model.weights, config.model.weights_input)  # which says what is wrong with the file

    def _tell_classes(self, source: Namespace, saved: SavedTraining) -> None:
        """Have a source that does not know its classes take the checkpoint's."""
        ours, kind = source.class_path.startswith("src."), source.class_path.rpartition(".")[2]
        if not ours or self.subcommand == "fit":
            return
        if kind == "Unlabelled" and self.subcommand == "predict":
            source.init_args.classes = saved.classes
        if kind == "ImageFolder" and source.init_args.classes is None and lacks_train(user_path(source.init_args.root)):
            source.init_args.classes = saved.classes

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise hidden_error(error) or error from None

    def after_instantiate_classes(self) -> None:
        """Find what would go wrong before a run directory exists, and load weights and images to see."""
        saved, self.saved = self.saved, None  # which is large
        trains, chosen = self.subcommand == "fit", self.chosen
        check_machine(self.trainer, self.model, chosen.trainer.sync_batchnorm, trains)
        if trains:
            self._check_settings()
        origin: SavedTraining | None = None
        if saved is not None:
            load_checkpoint(saved, self.trainer, self.model, self.datamodule, trains)
        elif self.options.warm_start is not None:  # before images are looked for, which may take longer
            origin = load_warm_start(Path(self.options.warm_start), self.model, self.datamodule)
        else:
            self.model.load_pretrained()
            origin = training_of(self.model.weights)
        learning = callbacks_of(self.trainer, Distillation) if trains else []
        teachers = [distillation.load(self.model, self.datamodule, saved) for distillation in learning]
        self._load_images()
        for teacher in teachers:
            say_if_seen(teacher, self.datamodule)
        if saved is not None and trains:
            check_continuation(saved, self.trainer, self.datamodule, chosen.feature_cache.views is not None)
        elif saved is not None:
            # Curves go on at the epoch of the checkpoint, instead of at the first.
            self.trainer.fit_loop.epoch_progress.current.completed = saved.content.get("epoch", 0)
            check_place(saved.path, self.trainer)
            if self.subcommand == "validate":
                say_if_seen(saved, self.datamodule)
        elif origin is not None:
            if self.options.warm_start is not None:
                say_of_other_classes(origin, self.datamodule)
                self.datamodule.expect(origin.data)
            say_if_seen(origin, self.datamodule)

    def _load_images(self) -> None:
        data = self.datamodule
        data.prepare_data()
        data.setup(str(self.subcommand))
        after_fit = ["val", *["test"] * self.options.test_after_fit]
        judged = {"fit": after_fit, "validate": ["val"], "test": ["test"], "predict": []}[str(self.subcommand)]
        if self.subcommand != "fit":
            data.require(*judged or [data.predicted])
        if not self.chosen.trainer.fast_dev_run:
            check_whole_classes(data, self.trainer, judged)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.chosen.trainer
        check_offered(self.chosen)
        check_trainer(config)
        self.added = list(_listed(config.callbacks))  # before Lightning puts those of every run among them
        check_callbacks(self.added)
        check_accumulation(self.added, config.accumulate_grad_batches)
        if config.enable_progress_bar is None:
            config.enable_progress_bar = sys.stdout.isatty() or bool(_progress_bars(config))
        config.profiler = config.profiler or Unprofiled()
        plugins = _listed(config.plugins)
        starts = any(isinstance(plugin, ClusterEnvironment) for plugin in plugins)
        config.plugins = [*plugins, *([] if starts else _cluster()), AtomicCheckpointIO()]
        if not config.fast_dev_run:
            config.logger = self._logger()
        self.trainer_defaults["callbacks"] = self._callbacks(config)
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            raise UserError(plain_trainer(str(error))) from error
        skip_empty_hooks(trainer.callbacks)  # type: ignore[attr-defined]
        return trainer

    def _logger(self) -> RunLogger:
        run = self.checkpoint and run_of(self.checkpoint)
        draws = self.subcommand != "validate"
        if run:  # a resumed or tested run stays where it is
            return RunLogger(run.parent.parent, run.parent.name, run.name, draws)
        return RunLogger(self.options.root, self.name, draws=draws)

    def _callbacks(self, config: Namespace) -> list[Callback]:
        callbacks: list[Callback] = [Summary(), Throughput(), StepSeed(self.chosen.seed_everything)]
        if config.enable_progress_bar and not _progress_bars(config):
            callbacks.append(TQDMProgressBar(refresh_rate=20))
        if not config.fast_dev_run:
            callbacks += [FirstBatch(), PredictionWriter(), History(not config.enable_progress_bar)]
            self.best, last = checkpoints()
            callbacks += [self.best, last, GracefulStop()]
        return callbacks

    def _check_settings(self) -> None:
        """Refuse what needs neither weights nor images to be seen as wrong."""
        config, trainer = self.chosen, self.chosen.trainer
        limited = trainer.max_epochs is not None or (trainer.max_steps == -1 and trainer.max_time is None)
        config.unfreezing.check_decay(trainer.max_epochs if limited else -1)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        config.unfreezing.check_averaging(callbacks)
        for distillation in callbacks_of(self.trainer, Distillation):
            distillation.check_settings(self.model, cached=config.feature_cache.views is not None)
        check_monitors(self.added, self.trainer)
        if self.checkpoint is None:
            check_averages(self.added)
        decay = config.unfreezing.learning_rates.decay
        if decay != "constant" and (trainer.max_steps != -1 or trainer.max_time is not None):
            limit = "max_time" if trainer.max_steps == -1 else "max_steps"
            rank_zero_only(say)(
                f"unfreezing.decay {decay} falls towards epoch {trainer.max_epochs}, where trainer.{limit} may end the "
                "training long before: rates may then be still high; trainer.max_epochs says how long it is to be"
            )
        if self.model.hparams["dropout"] and not self.model.hparams["hidden"]:
            rank_zero_only(say)("model.dropout is not used: the head has no hidden layer whose activations it drops")
        rate, rates = self.model.configure_optimizers().defaults["lr"], config.unfreezing.learning_rates.from_epoch
        if rates.get(0, rate) != rate:
            rank_zero_only(say)(
                f"the optimizer's rate of {rate:g} is not used: unfreezing.rates has {rates[0]:g} from epoch 0 on"
            )

    def before_fit(self) -> None:
        check_batches(self.datamodule, self.trainer, self.options.test_after_fit)
        say_if_emulated(self.trainer)
        cache = self.chosen.feature_cache
        if cache.views is not None and cache.folder is not None and not self.chosen.trainer.fast_dev_run:
            make_folder(cache.folder, "features", "--feature_cache.folder")
        if isinstance(self.trainer.logger, RunLogger):
            make_folder(Path(self.trainer.logger.root_dir), "runs", "--run.root")

    def after_fit(self) -> None:
        if self.chosen.trainer.fast_dev_run:
            return
        best, reasons = self.best, why_it_stopped(self.trainer)  # before a test loads what callbacks knew at the best
        metrics = {"val/acc": float(best.best_model_score)} if best.best_model_score is not None else {}
        if self.options.test_after_fit and "test" in self.datamodule.datasets and best.best_model_path:
            for found in self.trainer.test(self.model, self.datamodule, best.best_model_path, verbose=False):
                metrics |= found
        if self.trainer.is_global_zero:
            assert isinstance(self.trainer.logger, RunLogger)
            for reason in reasons:
                say(f"stopped early: {reason}")
            if not best.best_model_path:
                say("no epoch was validated, so there is no best checkpoint, and no test")
            elif self.options.test_after_fit and "test" not in self.datamodule.datasets:
                say("there are no test images, so there is no test; validate reports on the validation images")
            self.trainer.logger.log_final(metrics)
            self._report(metrics)

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            self._report({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    after_test = after_predict = after_validate

    def _report(self, metrics: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        if not isinstance(self.trainer.logger, RunLogger):
            return  # a fast_dev_run leaves nothing
        folder = Path(self.trainer.logger.log_dir)  # the trainer's log_dir would wait for the other processes
        say(f"\n{shown or self.subcommand}: everything of this run is in {folder}")
        files = sorted(path.name for path in folder.iterdir() if path.suffix in _SHOWN)
        say("  " + ", ".join(files))
        self.trainer.logger.release()


def _checked_seed(seed: bool | int) -> int:
    if isinstance(seed, bool) or not 0 <= seed <= HIGHEST_SEED:
        raise UserError(f"seed_everything is {json.dumps(seed)}: choose a seed from 0 to {HIGHEST_SEED}.")
    return seed


def _expected_or_unknown(weights: str | None, weights_input: str | None) -> InputScale | None:
    """Do without the file of weights that a run started from: its checkpoint tells what input it wants."""
    try:
        return expected_input(weights, weights_input)
    except UserError:
        return InputScale((math.nan,) * 3, (math.nan,) * 3)


def _progress_bars(config: Namespace) -> list[Callback]:
    return [callback for callback in _listed(config.callbacks) if isinstance(callback, ProgressBar)]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _find_teachers(trainer: Namespace) -> None:
    """Write down which checkpoint a run means that is named as a teacher: there may be a newer one another time."""
    for callback in _listed(trainer.callbacks):
        if callback.class_path == f"{Distillation.__module__}.{Distillation.__qualname__}":
            callback.init_args.teacher = str(teacher_at(user_path(callback.init_args.teacher)))


def _cluster() -> list[ClusterEnvironment]:
    # On its own Lightning would save a checkpoint into this folder before Slurm's time limit and requeue the job; a
    # training of any other recipe that is started here afterwards would continue from that checkpoint, unasked.
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        try:
            return [SLURMEnvironment(auto_requeue=False)]
        except RuntimeError as error:
            raise UserError(plain_trainer(str(error))) from error
    return []


def _check_order(args: Sequence[str]) -> None:
    place = next((place for place, word in enumerate(args) if word in COMMANDS and not _is_value(args, place)), None)
    command = None if place is None else args[place]
    if place and args[0].startswith("-"):
        rest = shlex.join([*args[:place], *args[place + 1 :]])
        raise UserError(f"the command comes first: python -m src.cli {command} {rest}")
    if command is None and (not args or args[0] in ("-c", "--config")):
        raise UserError(f"say what to do: {', '.join(COMMANDS)}. For example: {USAGE}")


def _is_value(args: Sequence[str], place: int) -> bool:
    """Tell whether a word may be the value of the option before it."""
    return place > 0 and args[place - 1].startswith("-") and "=" not in args[place - 1]


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: Words of the command line; None for the process's own.

    Raises:
        SystemExit: With code 1, after one line on standard error, if the user can mend what went wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    prepare_process()
    for advice in _UNWANTED_ADVICE:
        warnings.filterwarnings("ignore", f".*{advice}.*")
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    # What a profiler, a ModelSummary or EarlyStopping's verbose was asked for, and why all processes end with one.
    for told in ("pytorch.profilers", "pytorch.callbacks", "fabric.strategies.launchers"):
        logging.getLogger(f"lightning.{told}").setLevel(logging.INFO)
    with plain_endings():
        _check_order(args)
        ThawCLI(
            args=args,
            model_class=TransferClassifier,
            datamodule_class=ImageDataModule,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "devices": 1,  # with all of a machine's GPUs the same recipe would make other steps
                "enable_model_summary": False,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
            },
            seed_everything_default=777,
            parser_class=ThawParser,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )


if __name__ == "__main__":
    main()
