"""Thaw the backbone by the schedule, and give every layer its rate."""

from __future__ import annotations

import gc

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from src.callbacks.schedule import HEAD_NUMBER, Decay, LearningRates, parse_stages, trainable_layers
from src.data.datamodule import ImageDataModule
from src.errors import UserError
from src.model.classifier import HEAD, TransferClassifier
from src.model.vgg import LAYERS
from src.replay import wait_for

NUMBERS = {**{name: number for number, name in enumerate(LAYERS)}, HEAD: HEAD_NUMBER}


class StagedUnfreezing(Callback):
    """Decide, for every epoch, how many layers train, and for every step, at which rate.

    Both are pure functions of the epoch and the step, so nothing is saved and a resumed run cannot differ.

    Args:
        stages: From which epoch on (the first is 0) how many layers train, counted from the top (0 = head only, 4 =
            block5, 18 = all); or the name of the lowest one, or `all`.
        rates: From which epoch on the head learns at which rate; null for the optimizer's.
        block_factor: Each block's rate as a multiple of that of the block above it.
        decay: Course of each layer's rate from its thaw to the end: constant, linear or cosine.
        warmup_epochs: Epochs over which a layer's rate rises from zero after it thaws.

    Raises:
        UserError: An option is outside its range.
    """

    def __init__(
        self,
        stages: dict[int, int | str],
        rates: dict[int, float] | None = None,
        block_factor: float = 1.0,
        decay: Decay = "constant",
        warmup_epochs: float = 0.0,
    ) -> None:
        self.stages = parse_stages(stages)
        self.learning_rates = LearningRates(self.stages, rates or {}, block_factor, decay, warmup_epochs)
        self.verified = False  # whether the first step of the current stage reached all that should train
        _check(rates or {}, block_factor, warmup_epochs)

    @classmethod
    def of(cls, trainer: Trainer) -> StagedUnfreezing:
        """Find the one among a trainer's callbacks."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        return next(callback for callback in callbacks if isinstance(callback, cls))

    def rate(self, trainer: Trainer, number: int, epoch: int, step: int = 0, warmed_up: bool = False) -> float:
        """Give the rate of a layer, by its number, at a step of an epoch; `warmed_up` takes warm-up for done."""
        base, steps = trainer.optimizers[0].defaults["lr"], int(trainer.num_training_batches)
        return self.learning_rates.at(base, number, epoch, step, steps, trainer.max_epochs or 1, warmed_up)

    def check_decay(self, max_epochs: int | None) -> None:
        """Refuse rates that fall towards an end which a training without a number of epochs does not have."""
        decay = self.learning_rates.decay
        if decay != "constant" and max_epochs == -1:
            raise UserError(f"unfreezing.decay {decay} needs an end: set trainer.max_epochs.")

    def check_averaging(self, callbacks: list[Callback]) -> None:
        """Refuse two averages at once, and to freeze layers again whose averaged weights would go on changing."""
        averaging = [type(callback).__name__ for callback in callbacks if isinstance(callback, WeightAveraging)]
        if len(averaging) > 1:
            raise UserError(
                f"{' and '.join(averaging)} would both average the weights: give one of them with --trainer.callbacks, "
                "which replaces the configuration's, instead of --trainer.callbacks+."
            )
        layers = list(self.stages.values())
        if averaging and layers != sorted(layers):
            raise UserError(
                "unfreezing.stages freezes layers again, and averages of their weights would go on: leave out the "
                "callback that averages weights, or let the stages only thaw."
            )

    def on_train_epoch_start(self, trainer: Trainer, pl_module: TransferClassifier) -> None:  # type: ignore[override]
        self._apply(trainer, pl_module)

    on_sanity_check_start = on_train_epoch_start  # type: ignore[assignment]
    # A run resumed within an epoch sees no epoch start.
    on_train_start = on_train_epoch_start  # type: ignore[assignment]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # DDP sends the first process's statistics round before a batch, but not after one whose gradient it only kept.
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.require_forward_param_sync = True

    def _apply(self, trainer: Trainer, model: TransferClassifier) -> None:
        layers = trainable_layers(self.stages, trainer.current_epoch)
        frozen = model.backbone.prefix_parameters(len(LAYERS) - layers)
        every = list(model.backbone.parameters())  # from the bottom, too
        as_wanted = [parameter.requires_grad == (number >= len(frozen)) for number, parameter in enumerate(every)]
        if model.trainable_layers == layers and all(as_wanted):
            return
        model.trainable_layers = layers
        if model.needs_calibration:
            model.calibrate(ImageDataModule.of(trainer).sample_images())
        self.verified = False
        for optimizer in trainer.optimizers:
            for parameter in frozen:
                optimizer.state.pop(parameter, None)  # memory, and a second thaw starts without stale momentum
        _wrap_again(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        for optimizer in trainer.optimizers:
            groups = [(group, NUMBERS[group["layer"]]) for group in optimizer.param_groups]
            # A frozen layer is not asked for a rate: that takes longer than to look.
            trained = {number for group, number in groups if group["params"][0].requires_grad}
            rates = {number: self.rate(trainer, number, trainer.current_epoch, batch_idx) for number in trained}
            for group, number in groups:
                group["lr"] = rates.get(number, 0.0)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.verified:
            return
        self.verified = True
        lost = [name for name, p in pl_module.named_parameters() if p.requires_grad and p.grad is None]
        if lost:
            raise RuntimeError(f"these parameters should train, but got no gradient: {', '.join(lost)}")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trained = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        names = sorted({group["layer"] for group in trainer.optimizers[0].param_groups})
        middle = int(trainer.num_training_batches) // 2  # the first step's would be a warm-up's beginning
        rates = {name: self.rate(trainer, NUMBERS[name], trainer.current_epoch, middle) for name in names}
        pl_module.log("trainable_parameters", float(trained))
        pl_module.log_dict({f"lr/{name}": rate for name, rate in rates.items()})


def _wrap_again(trainer: Trainer) -> None:
    """Make DDP anew: its reducer only knows the parameters that required gradients when it was made."""
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = trainer.lightning_module
        gc.collect()  # the old wrapper's hooks on the gradients go with it, before the new one's come
        # The new one copies all weights on a stream of its own, for which nobody waits.
        wait_for(strategy.root_device)
        strategy.configure_ddp()
        wait_for(strategy.root_device)


def _check(rates: dict[int, float], block_factor: float, warmup_epochs: float) -> None:
    for epoch, rate in rates.items():
        if epoch < 0 or rate < 0:
            raise UserError(f"unfreezing.rates has {epoch}: {rate}; neither epochs nor rates can be negative.")
    if block_factor <= 0:
        raise UserError(f"unfreezing.block_factor is {block_factor}: it must be above 0 (1 = the same rate for all).")
    if warmup_epochs < 0:
        raise UserError(f"unfreezing.warmup_epochs is {warmup_epochs}: it cannot be negative.")
