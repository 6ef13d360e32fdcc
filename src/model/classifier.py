"""The network in training: backbone and head, loss and metrics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from src.batch import Batch
from src.errors import UserError, say
from src.lean_loop import remember_signature
from src.model.int8 import UNSUPPORTED, Int8Layers, Ranges, measure, supported
from src.model.lean_step import forget_gradients
from src.model.loss_and_accuracy import LossAndAccuracy, counting_plainly
from src.model.optimizer import build_optimizer, parameter_groups
from src.model.test_time import TestTimeAugmentation, average
from src.model.vgg import FEATURES, LAYERS, REDUCTION, VGGBackbone
from src.replay import Replay

HEAD = "head"


class TransferClassifier(LightningModule):
    """Classify images with VGG16's convolutions and a new head.

    Args:
        weights: What the backbone starts from: IMAGENET1K_FEATURES (the original VGG16), IMAGENET1K_V1
            (torchvision's), null (random), or a file: a torchvision VGG16 state dict or a checkpoint of this project.
        weights_input: For a plain state dict file, the published weights whose input scale it shares.
        hidden: Width of the head's hidden layer; 0 for a single linear layer.
        dropout: Probability with which the head's hidden activations are dropped in training.
        label_smoothing: Share of every training label that is spread evenly over all classes.
        optimizer: Any torch optimizer by class path; weight decay never reaches biases and norms.
        compile: Whether to compile the network with torch.compile, anew at each stage.
        cuda_graphs: Whether to record a step's forward and backward pass on a GPU as a CUDA graph, once for each stage
            and size of batch, and to replay it as one launch; likewise the augmentation of images kept on the GPU, and
            Muon's orthogonal steps. The passes are not recorded with strategy ddp, gradient accumulation,
            16-mixed or detect_anomaly. What a callback changes in a layer takes effect at the next stage.
        frozen_precision: Precision of the frozen layers: `same` as of those that train (trainer.precision); `bf16`,
            about twice as fast on processors with bfloat16 instructions, with features of half the size; or `int8`,
            several times as fast on processors with VNNI instructions, with features of a quarter of the size.
        test_time_augmentation: In test and predict, average over each image and its mirror image (flip), or over those
            and their shifts by one pixel (flip_shift); test reports both, with and without.
        num_classes: Number of classes; set from the data.
        image_size: Height and width of the images in pixels, at least 32; set from the data.

    Raises:
        UserError: An option is outside its range.
    """

    def __init__(
        self,
        weights: str | None = "IMAGENET1K_FEATURES",
        weights_input: Literal["IMAGENET1K_FEATURES", "IMAGENET1K_V1"] | None = None,
        hidden: int = 256,
        dropout: float = 0.0,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-4),
        compile: bool = False,
        cuda_graphs: bool = False,
        frozen_precision: Literal["same", "bf16", "int8"] = "same",
        test_time_augmentation: TestTimeAugmentation | None = None,
        num_classes: int = 10,
        image_size: int = 32,
    ) -> None:
        super().__init__()
        if image_size < REDUCTION:
            raise UserError(f"images of {image_size} pixels vanish in VGG16's poolings: use at least {REDUCTION}.")
        if hidden < 0:
            raise UserError(f"model.hidden is {hidden}: give the layer's width, or 0 for none.")
        for name, share in (("dropout", dropout), ("label_smoothing", label_smoothing)):
            if not 0 <= share < 1:
                raise UserError(f"model.{name} is {share}: it must be 0 or more, and below 1.")
        self.save_hyperparameters(ignore=["optimizer"], logger=False)
        self.backbone = VGGBackbone(image_size)
        self.head = _head(FEATURES * (image_size // REDUCTION) ** 2, hidden, dropout, num_classes)
        self.depth = len(LAYERS)
        self.weights = weights
        self.image_size = image_size
        self.label_smoothing = label_smoothing
        self.make_optimizer = optimizer
        self.frozen_precision = frozen_precision
        self.ranges: Ranges | None = None
        self._int8: Int8Layers | None = None
        self.compiled = compile
        self._prefix: Callable[[Tensor, int], Tensor] = torch.compile(self._run_prefix) if compile else self._run_prefix
        self._suffix: Callable[[Tensor, int], Tensor] = torch.compile(self._run_suffix) if compile else self._run_suffix
        self.cuda_graphs = cuda_graphs
        self.replays = False
        """Whether `training_step` repeats recorded work if it can, and has then made the gradients too."""
        self._prefix_replay = Replay(self.prefix)
        self._step_replay = Replay(self._forward_and_backward, self._step_settings)
        self._evaluation_replay = Replay(self._evaluated)
        self.keep_features: dict[str, Callable[[Tensor, Tensor], None]] = {}
        """For each split, if any, what is called with a batch's indices and what the frozen layers made of it."""
        self.loss_on_images: Callable[[Tensor, Tensor], Tensor] | None = None
        """What tells, from logits and network input, how wrong they are in training, if labels do not."""
        self._drawn = 0  # steps made when the loss of a batch was last drawn
        self.checkpoint_epoch: int | None = None  # of the checkpoint that was loaded last, counted from 0
        self.train_metrics = LossAndAccuracy()
        self.val_metrics = _metrics(num_classes)
        self.test_metrics = _metrics(num_classes)
        self._guesses: list[Tensor] = []  # classes guessed and right, each (2, N), since the last count
        self.test_time_augmentation = test_time_augmentation
        self.tta_accuracy = MulticlassAccuracy(num_classes, average="micro", validate_args=False)

    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning notes which hook runs, some forty times a step, and a module would look for parameters each time.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def load_pretrained(self) -> None:
        """Load the backbone's weights; whoever restores a checkpoint instead need not have them.

        Raises:
            UserError: As `VGGBackbone.load`.
        """
        if self.weights is not None:
            self.backbone.load(self.weights)

    @property
    def trainable_layers(self) -> int:
        """How many backbone layers train, counted from the top; the head always does."""
        return len(LAYERS) - self.depth

    @trainable_layers.setter
    def trainable_layers(self, layers: int) -> None:
        depth = len(LAYERS) - layers
        if depth != self.depth:
            self.ranges = None
        self.depth, self._int8 = depth, None
        self._forget()
        if self.compiled:
            torch.compiler.reset()  # a graph compiled before could go on without the thawed layers' gradients
        for parameter in self.backbone.parameters():
            parameter.requires_grad_(True)
        for parameter in self.backbone.prefix_parameters(self.depth):
            parameter.requires_grad_(False)
            parameter.grad = None  # a zero gradient is not no gradient: momentum and decay would go on

    def calibrate(self, images: Tensor) -> None:
        """Fit eight-bit frozen layers to standardized sample images, (N, 3, H, W)."""
        self.ranges, self._int8 = measure(self.backbone.layers(0, self.depth), images), None

    @property
    def needs_calibration(self) -> bool:
        """Whether `calibrate` must come before the next image."""
        return self.frozen_precision == "int8" and self.depth > 0 and self.ranges is None

    def prefix(self, inputs: Tensor, entry: int = 0) -> Tensor:
        """Run the frozen layers from `entry` on, without gradients: images in, (N, C, h, w) features out.

        Features of eight-bit layers are bytes, and those layers run all or not at all.
        """
        if entry >= self.depth:
            return inputs
        if self.frozen_precision == "int8":
            assert entry == 0
            return self._int8_prefix(inputs)
        half = torch.autocast(inputs.device.type, torch.bfloat16) if self.frozen_precision == "bf16" else nullcontext()
        with torch.no_grad(), half:
            return self._prefix(inputs, entry)

    def _int8_prefix(self, images: Tensor) -> Tensor:
        if self._int8 is None:
            assert self.ranges is not None, "calibrate() comes before the first image"
            if not supported():
                raise UserError(UNSUPPORTED)
            self._int8 = Int8Layers(self.backbone.layers(0, self.depth), self.ranges)
        return self._int8(images)

    def forward(self, inputs: Tensor, entry: int = 0) -> Tensor:
        """Compute logits, (N, classes), from what enters layer `entry`."""
        return self._suffix(self.prefix(inputs, entry), max(entry, self.depth))

    def _run_prefix(self, inputs: Tensor, entry: int) -> Tensor:
        return self.backbone(inputs, entry, self.depth)

    def _run_suffix(self, features: Tensor, entry: int) -> Tensor:
        half = torch.is_autocast_enabled(features.device.type)
        if features.dtype == torch.uint8:
            assert self.ranges is not None
            dtype = torch.get_autocast_dtype(features.device.type) if half else torch.float32
            features = features.to(dtype) * self.ranges.scale
        elif not half:
            features = features.float()  # which frozen layers in bfloat16 do not give
        return self.head(self.backbone(features, entry))

    def _keeps(self, batch: Batch, split: str) -> bool:
        """Tell whether a cache wants what the frozen layers make of a batch."""
        return split in self.keep_features and batch.entry < self.depth

    def _kept(self, batch: Batch, split: str) -> Batch:
        """Give a batch as the frozen layers leave it to a cache that wants it; they are recorded by themselves."""
        if not self._keeps(batch, split):
            return batch
        prefix = self._prefix_replay if self._records(split) else self.prefix
        features = prefix(batch.inputs, batch.entry)
        self.keep_features[split](batch.indices, features)
        return batch._replace(inputs=features, entry=self.depth)

    def _records(self, split: str) -> bool:
        # Compiled for the inference mode of a validation, it would be compiled anew for a recording, while it is made.
        return self.replays and (split == "train" or not self.compiled)

    def _logits(self, batch: Batch, split: str) -> Tensor:
        batch = self._kept(batch, split)
        return self(batch.inputs, batch.entry)

    def on_fit_start(self) -> None:
        hindrance = self._hindrance()
        self.replays = self.cuda_graphs and hindrance is None
        if self.cuda_graphs and hindrance is not None:
            rank_zero_only(say)(f"model.cuda_graphs: steps are not recorded, for {hindrance}")

    def on_fit_end(self) -> None:
        self.replays = False
        self._forget()

    def _forget(self) -> None:
        self._prefix_replay.forget()
        self._step_replay.forget()
        self._evaluation_replay.forget()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TransferClassifier:
        self._forget()  # recordings know where in memory the weights are
        super()._apply(fn, recurse)
        return self

    def _step_settings(self) -> Hashable:
        return self.label_smoothing

    def _hindrance(self) -> str | None:
        """Say what keeps a step from being repeated: something beside its batch that has a part in it."""
        hindrances = {
            "strategy ddp shares gradients between processes": isinstance(self.trainer.strategy, DDPStrategy),
            "gradients of several batches are added up": self.trainer.accumulate_grad_batches > 1,
            "16-mixed scales the loss": self.trainer.precision == "16-mixed",
            "trainer.detect_anomaly looks at every gradient": self.trainer._detect_anomaly,
        }
        return next((what for what, applies in hindrances.items() if applies), None)

    @remember_signature
    def training_step(self, batch: Batch) -> Tensor:
        if not self.replays:
            return self._train_on(batch)
        loss, gradients = self._step_replay(*self._kept(batch, "train"))
        for parameter, gradient in gradients:
            parameter.grad = gradient
        self.train_metrics.note_update()
        return loss

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.replays:  # else gradients are there already, and the next step writes over them
            forget_gradients(optimizer)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self.replays:
            super().backward(loss, *args, **kwargs)

    def _forward_and_backward(self, *parts: Any) -> tuple[Tensor, list[tuple[nn.Parameter, Tensor | None]]]:
        """Give the loss of a batch, whose parts these are, and the gradient of each parameter that trains."""
        loss = self._train_on(Batch(*parts))
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        with torch.autocast(loss.device.type, enabled=False):  # Lightning's, around a step; gradients keep their types
            gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        return loss.detach(), [(own, _in_order_of(own, found)) for own, found in zip(trained, gradients, strict=True)]

    def _train_on(self, batch: Batch) -> Tensor:
        logits = self._logits(batch, "train")
        loss, labels = self._loss(logits, batch), batch.labels
        if batch.other_labels is not None and batch.other_shares is not None:
            labels = torch.where(batch.other_shares > 0.5, batch.other_labels, labels)  # what most of the image shows
        self.train_metrics.update(logits, labels, loss)
        return loss

    def _loss(self, logits: Tensor, batch: Batch) -> Tensor:
        if self.loss_on_images is not None:
            return self.loss_on_images(logits, batch.inputs)
        smoothing = self.label_smoothing
        if batch.other_labels is None or batch.other_shares is None:
            return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        own, other = (
            F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
            for labels in (batch.labels, batch.other_labels)
        )
        return torch.lerp(own, other, batch.other_shares).mean()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        # Straight into the logger, and now and then: `log` takes a millisecond of every step.
        steps, every = self.trainer.global_step, self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self.logger is not None and every and steps % every == 0 and steps > self._drawn:
            self._drawn = steps
            loss = outputs["loss"].item() * self.trainer.accumulate_grad_batches  # which Lightning has divided by it
            self.logger.log_metrics({"train/batch_loss": loss}, steps - 1)

    def on_train_epoch_end(self) -> None:
        self._log_epoch("train", self.train_metrics)

    @remember_signature
    def validation_step(self, batch: Batch) -> dict[str, Tensor]:
        """Give probabilities, (N, classes), as `plain`."""
        return {"plain": self._evaluate(batch, "val")}

    def on_validation_epoch_end(self) -> None:
        self._count_guesses(self.val_metrics)
        self._log_epoch("val", self.val_metrics)

    @remember_signature
    def test_step(self, batch: Batch) -> dict[str, Tensor]:
        """Give probabilities, (N, classes): `plain` ones and, if it is on, `tta`, those with test-time augmentation."""
        found = {"plain": self._evaluate(batch, "test")}
        if self.test_time_augmentation is not None:
            found["tta"] = average(self, batch.inputs, self.test_time_augmentation, found["plain"])
            if len(batch.labels):
                self.tta_accuracy.update(found["tta"].argmax(dim=1), batch.labels)
        return found

    def on_test_epoch_end(self) -> None:
        self._count_guesses(self.test_metrics)
        self._log_epoch("test", self.test_metrics)
        if self.test_time_augmentation is not None:
            self.log("test/acc_tta", self.tta_accuracy.compute())
            self.tta_accuracy.reset()

    @remember_signature
    def predict_step(self, batch: Batch) -> dict[str, Tensor]:
        """Give probabilities, (N, classes): `tta`, those with test-time augmentation, if that is on, else `plain`."""
        if self.test_time_augmentation is not None:
            return {"tta": average(self, batch.inputs, self.test_time_augmentation)}
        return {"plain": self(batch.inputs, batch.entry).float().softmax(dim=1)}

    def _evaluate(self, batch: Batch, split: str) -> Tensor:
        if not len(batch.labels):  # a process may run out of images before the others do
            return self._logits(batch, split).float().softmax(dim=1)
        if self._records(split):
            found = self._evaluation_replay(split, *self._kept(batch, split))
            probabilities, guesses = (each.clone() for each in found)  # the next batch's take their place
            self._metrics_of(split)["loss_and_accuracy"].note_update()  # type: ignore[operator]
        else:
            probabilities, guesses = self._evaluated(split, *batch)
        self._guesses.append(guesses)
        return probabilities

    def _evaluated(self, split: str, *parts: Any) -> tuple[Tensor, Tensor]:
        """Give probabilities, (N, classes), and classes guessed and right, (2, N), of a batch of these parts."""
        batch = Batch(*parts)
        logits = self._logits(batch, split)
        self._metrics_of(split)["loss_and_accuracy"].update(logits, batch.labels, F.cross_entropy(logits, batch.labels))
        return logits.float().softmax(dim=1), torch.stack((logits.argmax(dim=1), batch.labels))

    def _metrics_of(self, split: str) -> MetricCollection:
        return {"val": self.val_metrics, "test": self.test_metrics}[split]

    def _count_guesses(self, metrics: MetricCollection) -> None:
        """Update F1 once an epoch: torchmetrics asks for the largest class, and on a GPU batches would wait for it."""
        if self._guesses:
            with counting_plainly():
                metrics["f1"].update(*torch.cat(self._guesses, dim=1))
            self._guesses.clear()

    def _log_epoch(self, stage: str, metrics: Metric | MetricCollection) -> None:
        self.log_dict({f"{stage}/{name}": value for name, value in metrics.compute().items()})
        metrics.reset()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_numbers(checkpoint)
        # A run stopped within an epoch must report that epoch's training metrics over all batches of all processes.
        with self.train_metrics.sync_context():
            checkpoint["train_metrics"] = deepcopy(self.train_metrics.metric_state)
        checkpoint["frozen"] = {"depth": self.depth, "ranges": self.ranges and tuple(self.ranges)}

    def _check_numbers(self, checkpoint: dict[str, Any]) -> None:
        """End a training of which nothing is left, before it takes the place of what was saved earlier."""
        states = (checkpoint.get(name, {}) for name in ("state_dict", "current_model_state"))  # two if it averages
        values = [value for state in states for value in state.values() if value.is_floating_point() and value.numel()]
        extremes = [extreme.to(self.device) for value in values for extreme in value.aminmax()]  # NaN is both
        finite = not extremes or bool(torch.stack(extremes).isfinite().all())  # asked once: a GPU must be waited for
        if self._trainer is not None:  # statistics of BatchNorm differ between processes
            finite = self.trainer.strategy.reduce_boolean_decision(finite)
        if not finite:
            raise UserError(
                f"in epoch {self.current_epoch}, counted from 0, weights became infinite or no numbers: start again "
                "with lower rates (model.optimizer.init_args.lr, unfreezing.rates), or with trainer.gradient_clip_val."
            )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.checkpoint_epoch = checkpoint.get("epoch")
        # What all processes had seen is counted once, by the first.
        if "train_metrics" in checkpoint and self.global_rank == 0:
            for name, value in checkpoint["train_metrics"].items():
                setattr(self.train_metrics, name, value.to(self.device))
            self.train_metrics._update_count = 1  # else compute() warns that it was never updated
        if "frozen" in checkpoint:  # so that other commands compute in each layer's precision what training did
            self.depth, ranges = checkpoint["frozen"]["depth"], checkpoint["frozen"]["ranges"]
            self.ranges, self._int8 = ranges and Ranges(*ranges), None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Group all parameters by layer, from the bottom up to the head; see `optimizer.parameter_groups`."""
        return parameter_groups([*self.backbone.named_children(), (HEAD, self.head)])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return build_optimizer(self.make_optimizer, self.parameter_groups(), self.cuda_graphs)


def _in_order_of(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """Lay a gradient out in memory as its parameter, which fused optimizers take for granted."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _head(features: int, hidden: int, dropout: float, num_classes: int) -> nn.Sequential:
    if hidden == 0:
        return nn.Sequential(OrderedDict(flatten=nn.Flatten(), linear=nn.Linear(features, num_classes)))
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            hidden=nn.Linear(features, hidden),
            norm=nn.BatchNorm1d(hidden),
            relu=nn.ReLU(inplace=True),
            dropout=nn.Dropout(dropout),
            linear=nn.Linear(hidden, num_classes),
        )
    )


def _metrics(num_classes: int) -> MetricCollection:
    return MetricCollection(
        {
            "loss_and_accuracy": LossAndAccuracy(),
            "f1": MulticlassF1Score(num_classes, average="macro", validate_args=False),
        },
        compute_groups=False,
    )
