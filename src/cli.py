"""The command line: `python -m src.cli fit|validate|test|predict --config configs/last4.yaml`."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    ModelCheckpoint,
    ProgressBar,
    Timer,
    TQDMProgressBar,
    WeightAveraging,
)
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from src.callbacks.checkpoints import AtomicCheckpointIO, checkpoints
from src.callbacks.feature_cache import FrozenFeatureCache
from src.callbacks.figures import FirstBatch
from src.callbacks.history import CSV as HISTORY
from src.callbacks.history import History, read_history
from src.callbacks.predictions import PredictionWriter
from src.callbacks.seeding import StepSeed
from src.callbacks.stopping import GracefulStop, Stopped
from src.callbacks.summary import Summary
from src.callbacks.throughput import Throughput
from src.callbacks.unfreezing import StagedUnfreezing
from src.data.datamodule import ImageDataModule
from src.data.sources.image_files import shorten
from src.errors import UserError, replace_unknown_characters, say
from src.files import user_path
from src.lean_loop import Unprofiled, skip_empty_hooks
from src.model.classifier import TransferClassifier
from src.model.vgg import PUBLISHED, InputScale, expected_input
from src.plain_errors import hidden_error, known_options, plain, plain_trainer
from src.preflight import (
    NOT_OFFERED,
    check_averages,
    check_batches,
    check_callbacks,
    check_compiler,
    check_configs,
    check_device,
    check_graphs,
    check_int8,
    check_monitors,
    check_processes,
    check_trainer,
    check_whole_classes,
    count_batches,
    make_folder,
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

CallbackKind = TypeVar("CallbackKind", bound=Callback)

COMMANDS = ("fit", "validate", "test", "predict")
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
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ENTRY = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EROFS)
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

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        helps = {option: f"Not offered: {why}" for option, (_, why) in NOT_OFFERED.items()}
        for action in parser._actions:  # what Lightning says of them does not hold here
            action.help = {**helps, "ckpt_path": _CKPT_PATH}.get(action.dest, action.help)
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
        if self.saved is None:
            expected_input(config.model.weights, config.model.weights_input)  # which says what is wrong with the file
        elif self.subcommand == "predict" and config.data.source.class_path.endswith(".Unlabelled"):
            config.data.source.init_args.classes = self.saved.classes
        if self.options.warm_start is not None and self.subcommand == "fit" and self.checkpoint is None:
            # By its path, for `last` will be another one: of this very run when it is repeated from its config.yaml.
            warm_start = str(find_checkpoint(self.options.warm_start, run, place, "--run.warm_start"))
            self.options.warm_start = config.run.warm_start = warm_start

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise hidden_error(error) or error from None

    def after_instantiate_classes(self) -> None:
        """Find what would go wrong before a run directory exists, and load weights and images to see."""
        saved, self.saved = self.saved, None  # which is large
        start = origin = None
        environment = self.trainer._accelerator_connector.cluster_environment
        check_processes(environment, self.trainer.num_devices * self.trainer.num_nodes)
        device = self.trainer.strategy.root_device
        check_device(device, self.config_init[self.subcommand].trainer.sync_batchnorm)
        if self.model.compiled:
            check_compiler(device)
        if self.model.cuda_graphs and self.subcommand == "fit":
            check_graphs(device)
        if self.model.frozen_precision == "int8":
            check_int8(device)
        if self.subcommand == "fit":
            self._check_settings()
        if saved is not None:
            self._check_weights(saved)
        elif self.options.warm_start is not None:  # before images are looked for, which may take longer
            start = self._warm_start(Path(self.options.warm_start)).data_alone()
        else:
            self.model.load_pretrained()
            origin = _training_of(self.model.weights)
        self.datamodule.prepare_data()
        self.datamodule.setup(self.subcommand)
        if self.subcommand in ("test", "predict"):
            self.datamodule.require("test" if self.subcommand == "test" else self.datamodule.predicted)
        judged = {"fit": ["val", "test"], "validate": ["val"], "test": ["test"]}.get(str(self.subcommand), [])
        if not self.config_init[self.subcommand].trainer.fast_dev_run:
            check_whole_classes(self.datamodule, self.trainer, judged)
        if saved is not None and self.subcommand == "fit":
            self._check_continuation(saved)
        elif saved is not None:
            # Curves go on at the epoch of the checkpoint, instead of at the first.
            self.trainer.fit_loop.epoch_progress.current.completed = saved.content.get("epoch", 0)
            self._check_place(saved.path)
            if self.subcommand == "validate":
                self._say_if_seen(saved)
        elif start is not None:
            self._say_of_other_classes(start)
            self.datamodule.expect(start.data)
            self._say_if_seen(start)
        elif origin is not None:
            self._say_if_seen(origin)

    def _say_if_seen(self, saved: SavedTraining) -> None:
        """Say that a network may know the images by which it is judged from now on."""
        if not saved.saw(self.datamodule.identity(1, False)):
            rank_zero_only(print)(
                f"'{saved.path}' was trained and validated on other images, or on another split of them: if it was "
                "trained on some that validate now, their accuracy is too good"
            )

    def _check_weights(self, saved: SavedTraining) -> None:
        """Refuse a checkpoint that does not fit optimizer, classes and network as configured."""
        if self.subcommand == "fit":
            if self.trainer.max_steps != -1 and not self.config_init[self.subcommand].trainer.fast_dev_run:
                raise UserError(
                    "a run with trainer.max_steps cannot be continued, for Lightning would count its epochs wrong: "
                    "give trainer.max_epochs instead, or start anew from its weights with --run.warm_start."
                )
            saved.check_optimizer(type(self._make_optimizer()).__name__)
            saved.check_averages(bool(self._added(WeightAveraging)))
        elif self.model.frozen_precision == "int8":
            saved.check_ranges()
        if saved.data:
            self.datamodule.load_state_dict(saved.data)
        elif self.datamodule.standardize == "weights":  # there is nothing but the weights to tell what they expect
            expected_input(self.model.weights, self.model.hparams["weights_input"])
        saved.check_size(self.datamodule.source.image_size, self.model.image_size)  # on which the head depends
        saved.check_network(self.model.state_dict())

    def _check_continuation(self, saved: SavedTraining) -> None:
        """Refuse to go on with other images or batches, or where nothing is left to train."""
        config = self.config_init[self.subcommand]
        saved.check_whole()
        stay = config.feature_cache.views is not None
        saved.check_data(self.datamodule.identity(self.trainer.world_size, stay))
        if not config.trainer.fast_dev_run:
            saved.check_rest(count_batches(self.datamodule, self.trainer, "train")[0])
            saved.check_end(self.trainer.max_epochs)
        saved.check_time(self._added(Timer))
        if not config.trainer.fast_dev_run:
            self._check_place(saved.path)
            self._announce_replaced(saved.path, saved.content["epoch"])

    def _added(self, kind: type[CallbackKind]) -> list[CallbackKind]:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        return [callback for callback in callbacks if isinstance(callback, kind)]

    def _announce_replaced(self, checkpoint: Path, epoch: int) -> None:
        run = run_of(checkpoint)
        history = read_history(run / HISTORY) if run is not None and (run / HISTORY).is_file() else []
        later = [row for row in history if row["epoch"] > epoch]
        if later:
            rank_zero_only(print)(
                f"'{checkpoint}' is of epoch {epoch}, counted from 0: the {len(later)} that came after will be replaced"
            )

    def _check_place(self, checkpoint: Path) -> None:
        """Find out whether what comes of a checkpoint can be kept where it belongs: in its run, if it has one."""
        run = run_of(checkpoint)
        if run is not None and not os.access(run, os.W_OK):
            raise UserError(
                f"what comes of '{checkpoint}' belongs to its run, and '{run}' cannot be written to: copy the "
                "checkpoint elsewhere, and give the copy as --ckpt_path."
            )
        if run is None and isinstance(self.trainer.logger, RunLogger):
            make_folder(Path(self.trainer.logger.root_dir), "runs", "--run.root")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand].trainer
        check_trainer(config)
        check_callbacks(_listed(config.callbacks))
        if config.enable_progress_bar is None:
            config.enable_progress_bar = sys.stdout.isatty() or bool(_progress_bars(config))
        config.profiler = config.profiler or Unprofiled()
        config.plugins = [*(_listed(config.plugins) or _cluster()), AtomicCheckpointIO()]
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
        if run:  # a resumed or tested run stays where it is
            return RunLogger(run.parent.parent, run.parent.name, run.name)
        return RunLogger(self.options.root, self.name)

    def _callbacks(self, config: Namespace) -> list[Callback]:
        seed = self.config_init[self.subcommand].seed_everything
        callbacks: list[Callback] = [Summary(), Throughput(), StepSeed(seed)]
        if config.enable_progress_bar and not _progress_bars(config):
            callbacks.append(TQDMProgressBar(refresh_rate=20))
        if not config.fast_dev_run:
            callbacks += [FirstBatch(), PredictionWriter(), History(not config.enable_progress_bar)]
            callbacks += [*checkpoints(), GracefulStop()]
        return callbacks

    def _check_settings(self) -> None:
        """Refuse what needs neither weights nor images to be seen as wrong."""
        config = self.config_init[self.subcommand]
        trainer = config.trainer
        limited = trainer.max_epochs is not None or (trainer.max_steps == -1 and trainer.max_time is None)
        config.unfreezing.check_end(trainer.max_epochs if limited else -1)
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        config.unfreezing.check_averaging(callbacks)
        check_monitors(_listed(trainer.callbacks), self.trainer)
        if self.checkpoint is None:
            check_averages(_listed(trainer.callbacks))
        rate, rates = self._make_optimizer().defaults["lr"], config.unfreezing.learning_rates.from_epoch
        if rates.get(0, rate) != rate:
            rank_zero_only(print)(
                f"the optimizer's rate of {rate:g} is not used: unfreezing.rates has {rates[0]:g} from epoch 0 on"
            )

    def before_fit(self) -> None:
        config = self.config_init[self.subcommand]
        check_batches(self.datamodule, self.trainer, self.options.test_after_fit)
        cache = config.feature_cache
        if cache.views is not None and cache.folder is not None and not config.trainer.fast_dev_run:
            make_folder(cache.folder, "features", "--feature_cache.folder")
        if isinstance(self.trainer.logger, RunLogger):
            make_folder(Path(self.trainer.logger.root_dir), "runs", "--run.root")

    def _make_optimizer(self) -> torch.optim.Optimizer:
        try:
            return self.model.configure_optimizers()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"model.optimizer cannot be made: {str(error).rstrip('.')}.") from error

    def _warm_start(self, checkpoint: Path) -> SavedTraining:
        saved = SavedTraining.read(checkpoint)
        saved.check_network(self.model.state_dict(), anew=True)
        self.model.load_state_dict(saved.content["state_dict"])
        return saved

    def _say_of_other_classes(self, saved: SavedTraining) -> None:
        if saved.data.get("classes", list(self.datamodule.classes)) != list(self.datamodule.classes):
            rank_zero_only(print)(
                f"'{saved.path}' tells other classes apart, or in another order: {shorten(saved.classes)}. Its head "
                f"was trained for those; to start with a new one give --model.weights {saved.word} instead"
            )

    def after_fit(self) -> None:
        if self.config_init[self.subcommand].trainer.fast_dev_run:
            return
        reasons = self._why_it_stopped()  # before a test loads what callbacks knew when the best checkpoint was saved
        best = next(c for c in self.trainer_defaults["callbacks"] if isinstance(c, ModelCheckpoint))
        metrics = {"val/acc": float(best.best_model_score)} if best.best_model_score is not None else {}
        if self.options.test_after_fit and "test" in self.datamodule.datasets and best.best_model_path:
            for found in self.trainer.test(self.model, self.datamodule, best.best_model_path, verbose=False):
                metrics |= found
        if self.trainer.is_global_zero:
            assert isinstance(self.trainer.logger, RunLogger)
            for reason in reasons:
                print(f"stopped early: {reason}")
            if not best.best_model_path:
                print("no epoch was validated, so there is no best checkpoint, and no test")
            elif self.options.test_after_fit and "test" not in self.datamodule.datasets:
                print("there are no test images, so there is no test; validate reports on the validation images")
            self.trainer.logger.log_final(metrics)
            self._report(metrics)

    def _why_it_stopped(self) -> list[str]:
        if not self.trainer.should_stop:  # what callbacks know may be of an end that the training was continued from
            return []
        last = self.trainer.current_epoch - 1
        reasons = [early.stopping_reason_message for early in self._added(EarlyStopping) if early.stopped_epoch >= last]
        if any((timer.time_remaining() or 0.0) < 0.0 for timer in self._added(Timer)):
            reasons.append("the time of trainer.max_time was over")
        return [reason for reason in reasons if reason]

    def after_validate(self) -> None:
        if self.trainer.is_global_zero:
            self._report({name: float(value) for name, value in self.trainer.callback_metrics.items()})

    after_test = after_predict = after_validate

    def _report(self, metrics: dict[str, float]) -> None:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        if not isinstance(self.trainer.logger, RunLogger):
            return  # a fast_dev_run leaves nothing
        folder = Path(self.trainer.logger.log_dir)  # the trainer's log_dir would wait for the other processes
        print(f"\n{shown or self.subcommand}: everything of this run is in {folder}")
        files = sorted(path.name for path in folder.iterdir() if path.suffix in _SHOWN)
        print("  " + ", ".join(files), flush=True)
        self.trainer.logger.release()


def _checked_seed(seed: bool | int) -> int:
    if isinstance(seed, bool) or not 0 <= seed < 2**32:
        raise UserError(f"seed_everything is {json.dumps(seed)}: choose a seed from 0 to {2**32 - 1}.")
    return seed


def _expected_or_unknown(weights: str | None, weights_input: str | None) -> InputScale | None:
    """Do without the file of weights that a run started from: its checkpoint tells what input it wants."""
    try:
        return expected_input(weights, weights_input)
    except UserError:
        return InputScale((math.nan,) * 3, (math.nan,) * 3)


def _training_of(weights: str | None) -> SavedTraining | None:
    """Give the training whose checkpoint a file of weights is; None for any other weights."""
    if weights is None or weights in PUBLISHED:
        return None
    try:
        return SavedTraining.read(user_path(weights)).data_alone()
    except UserError:  # a state dict alone
        return None


def _progress_bars(config: Namespace) -> list[Callback]:
    return [callback for callback in _listed(config.callbacks) if isinstance(callback, ProgressBar)]


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


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
    command = next((word for word in args if word in COMMANDS), None)
    if command is not None and args[0] != command and args[0].startswith("-"):
        rest = " ".join(word for word in args if word != command)
        raise UserError(f"the command comes first: python -m src.cli {command} {rest}")
    if command is None and (not args or args[0] in ("-c", "--config")):
        raise UserError(f"say what to do: {', '.join(COMMANDS)}. For example: {USAGE}")


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: Words of the command line; None for the process's own.

    Raises:
        SystemExit: With code 1, after one line on standard error, if the user can mend what went wrong.
    """
    args = list(sys.argv[1:] if args is None else args)
    prepare_process()
    replace_unknown_characters()
    for advice in _UNWANTED_ADVICE:
        warnings.filterwarnings("ignore", f".*{advice}.*")
    for library in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(library).setLevel(logging.WARNING)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)  # what --trainer.profiler was asked for
    try:
        _check_order(args)
        with _threads_that_tell_once():
            ThawCLI(
                TransferClassifier,
                ImageDataModule,
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
                args=args,
            )
    except (UserError, MisconfigurationException, ModuleNotFoundError, OSError, torch.OutOfMemoryError) as error:
        text = _user_message(error)
        if text is None:
            raise
        print(f"error: {text}", file=sys.stderr)
        raise SystemExit(1) from None
    except Stopped as stopped:
        if stopped.exit_code:
            say(str(stopped), sys.stderr)
        raise SystemExit(stopped.exit_code) from None
    # Outside of the steps of a training, where nothing is to be saved:
    except SIGTERMException:
        _leave(signal.SIGTERM)
    except KeyboardInterrupt:
        _leave(signal.SIGINT)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning makes it an ordinary end, with code 1
            _leave(signal.SIGINT)
        raise


@contextmanager
def _threads_that_tell_once() -> Iterator[None]:
    """Have no thread print a traceback of what this process will tell in one line: TensorBoard hands its errors on."""
    usual = threading.excepthook

    def tell(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError) or _user_message(failure.exc_value) is None:
            usual(failure)

    threading.excepthook = tell
    try:
        yield
    finally:
        threading.excepthook = usual


def _user_message(error: Exception) -> str | None:
    """Say what a user can mend; None if it is a defect."""
    if isinstance(error, MisconfigurationException):
        return plain_trainer(str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "the GPU's memory is full. Give a smaller data.batch_size, or leave out data.on_device, model.cuda_graphs, "
            "or the cache in its memory (feature_cache.place disk)."
        )
    if isinstance(error, OSError):
        if error.errno in _NO_ROOM:
            return "the disk is full. Free some room; a training with a last.ckpt can go on from it."
        if error.errno in _NO_ENTRY and error.filename:
            return f"'{error.filename}' cannot be used: {error.strerror}. Mend that, or give another path."
        return None
    mistake = hidden_error(error)
    return None if mistake is None else str(mistake)


def _leave(by: signal.Signals) -> NoReturn:
    say(f"stopped by {by.name}", sys.stderr)
    raise SystemExit(128 + by) from None


if __name__ == "__main__":
    main()
