"""`TransferClassifier`: what trains and what does not, what the optimizer is given, and what is measured."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from support import needs_gpu
from torch import Tensor, nn

from src.batch import Batch
from src.errors import UserError
from src.model.classifier import TransferClassifier
from src.model.vgg import LAYERS

Groups = list[dict[str, Any]]


def make(**options: Any) -> TransferClassifier:
    torch.manual_seed(0)
    return TransferClassifier(weights=None, **options)


@pytest.fixture(scope="module")
def shared() -> TransferClassifier:
    return make(hidden=8)


@pytest.fixture
def model(shared: TransferClassifier) -> TransferClassifier:
    """Give a network whose weights tests leave alone; stage and mode are reset."""
    shared.trainable_layers = 0
    shared.zero_grad()
    return shared.train()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def batch_of(images: Tensor, entry: int = 0, num_classes: int = 10) -> Batch:
    n = len(images)
    return Batch(images, torch.arange(n) % num_classes, torch.arange(n), entry)


def structure(head: nn.Sequential) -> list[str]:
    return [type(layer).__name__ for layer in head if not (isinstance(layer, nn.Dropout) and layer.p == 0)]


@pytest.mark.parametrize("image_size", [32, 64, 95])
def test_head_is_the_tutorials(image_size: int) -> None:
    head = make(image_size=image_size, num_classes=7).head
    assert structure(head) == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    linear = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert linear == [(512 * (image_size // 32) ** 2, 256), (256, 7)]


def test_dropout_stands_before_the_classifier() -> None:
    head = make(hidden=16, dropout=0.4).head
    assert structure(head) == ["Flatten", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    assert [layer.p for layer in head if isinstance(layer, nn.Dropout)] == [0.4]
    assert [layer.out_features for layer in head if isinstance(layer, nn.Linear)] == [16, 10]


def test_head_without_hidden_layer_is_linear() -> None:
    assert structure(make(hidden=0).head) == ["Flatten", "Linear"]


@pytest.mark.parametrize("image_size", [32, 64])
def test_logits_are_those_of_backbone_and_head(image_size: int) -> None:
    model = make(hidden=8, image_size=image_size, num_classes=3).eval()
    images = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        assert model(images).shape == (2, 3)
        assert torch.equal(model(images), model.head(model.backbone(images)))


@pytest.mark.parametrize("image_size", [31, 1, 0])
def test_images_that_would_vanish_are_refused(image_size: int) -> None:
    with pytest.raises(UserError, match=rf"images of {image_size} pixels .* at least 32"):
        TransferClassifier(weights=None, image_size=image_size)


def test_hyperparameters_are_plain_scalars(shared: TransferClassifier) -> None:
    assert {type(value) for value in shared.hparams.values()} <= {int, float, str, bool, type(None)}


@pytest.mark.parametrize("layers", [0, 1, 2, 4, 5, 8, 18])
def test_exactly_the_last_layers_and_the_head_train(model: TransferClassifier, layers: int) -> None:
    model.trainable_layers = 18 - layers  # whatever was before
    model.trainable_layers = layers
    assert model.trainable_layers == layers
    training = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    upper = LAYERS[18 - layers :]
    wanted = {f"backbone.{name}.{kind}" for name in upper if "conv" in name for kind in ("weight", "bias")}
    assert training == wanted | {f"head.{name}" for name, _ in model.head.named_parameters()}


def test_frozen_parameters_have_no_gradient_at_all(model: TransferClassifier, images: Tensor) -> None:
    model.trainable_layers = 8
    model(images).sum().backward()
    upper = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None for parameter in upper)
    model.trainable_layers = 4
    frozen = model.backbone.prefix_parameters(14)
    assert all(parameter.grad is None for parameter in frozen)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)  # they were not asked to forget


@pytest.mark.parametrize("layers", [0, 4, 8, 18])
@pytest.mark.parametrize("entry", [1, 3, 10, 13, 14, 18])
@torch.no_grad()
def test_features_continue_where_they_enter(model: TransferClassifier, images: Tensor, layers: int, entry: int) -> None:
    model.eval()
    model.trainable_layers = layers
    features = model.backbone(images, 0, entry)
    assert torch.equal(model(features, entry), model(images))


@pytest.mark.parametrize("layers", [0, 4, 8])
@torch.no_grad()
def test_prefix_gives_what_the_suffix_takes(model: TransferClassifier, images: Tensor, layers: int) -> None:
    model.eval()
    model.trainable_layers = layers
    features = model.prefix(images)
    assert torch.equal(features, model.backbone(images, 0, 18 - layers))
    assert torch.equal(model.prefix(model.backbone(images, 0, 5), 5), features)
    assert torch.equal(model(features, 18 - layers), model(images))


def test_prefix_has_no_graph_even_where_parameters_want_gradients(model: TransferClassifier, images: Tensor) -> None:
    model.backbone.requires_grad_(True)
    features = model.prefix(images)
    assert features.grad_fn is None
    assert not features.requires_grad


@pytest.mark.parametrize("layers", [0, 4, 8])
def test_graph_ends_below_the_suffix(model: TransferClassifier, images: Tensor, layers: int) -> None:
    model.trainable_layers = layers
    model.backbone.requires_grad_(True)  # the worst case: only no_grad keeps autograd out of the prefix
    saved: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape[2:]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits = model(images)
    reached = {id(parameter) for parameter in _leaves(logits)}
    frozen = model.backbone.prefix_parameters(18 - layers)
    assert reached == {id(parameter) for parameter in model.parameters()} - {id(parameter) for parameter in frozen}
    assert not {(32, 32), (16, 16)} & set(saved)  # nothing of the blocks 1 and 2 is kept in memory
    assert any(saved) == (layers > 0)


def _leaves(output: Tensor) -> list[Tensor]:
    found, waiting, seen = [], [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.append(node.variable)
        waiting += [following for following, _ in node.next_functions]
    return found


def outline(groups: Groups) -> list[tuple[object, object, list[int]]]:
    return [(group["layer"], group.get("weight_decay"), [id(p) for p in group["params"]]) for group in groups]


@pytest.mark.parametrize("hidden", [8, 0])
def test_groups_are_the_same_at_every_stage(hidden: int) -> None:
    model = make(hidden=hidden)
    model.trainable_layers = 0
    at_first = outline(model.parameter_groups())
    for layers in (4, 18, 1, 0):
        model.trainable_layers = layers
        assert outline(model.parameter_groups()) == at_first


def test_groups_hold_every_parameter_once(model: TransferClassifier) -> None:
    grouped = [id(parameter) for group in model.parameter_groups() for parameter in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(parameter) for parameter in model.parameters()}


def test_groups_go_from_the_bottom_to_the_head(model: TransferClassifier) -> None:
    layers = list(dict.fromkeys(group["layer"] for group in model.parameter_groups()))
    assert layers == [*(name for name in LAYERS if "conv" in name), "head"]
    modules = {**dict(model.backbone.named_children()), "head": model.head}
    for group in model.parameter_groups():
        own = {id(parameter) for parameter in modules[group["layer"]].parameters()}
        assert {id(parameter) for parameter in group["params"]} <= own


def test_weight_decay_spares_biases_and_norms() -> None:
    model = make(hidden=8, optimizer=lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.5))
    model.trainable_layers = 4
    optimizer = model.configure_optimizers()
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.fill_(1.0)
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = {name: round(parameter.flatten()[0].item(), 6) for name, parameter in model.named_parameters()}
    shrunk = {name for name, value in after.items() if value == 0.95}
    assert shrunk == {
        *(f"backbone.block5_conv{number}.weight" for number in (1, 2, 3)),
        "head.hidden.weight",
        "head.linear.weight",
    }
    assert {after[name] for name in set(after) - shrunk} == {1.0}


def test_one_step_moves_what_trains_and_nothing_else(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(hidden=8, optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1))
    model.trainable_layers = 4
    listen(model, monkeypatch)
    optimizer = model.configure_optimizers()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.training_step(batch_of(images)).backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(moved) == 6 + 6  # three convolutions of block5; the head's two linear layers and its norm


def fake(model: TransferClassifier, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Let the first pixels be the logits, and collect what the model logs."""
    monkeypatch.setattr(model.backbone, "forward", lambda inputs, first=0, last=18: inputs)
    monkeypatch.setattr(model.head, "forward", lambda inputs: inputs.flatten(1)[:, :10])
    return listen(model, monkeypatch)


def listen(model: TransferClassifier, monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Collect what the model logs, for want of a trainer."""
    logged: dict[str, float] = {}
    monkeypatch.setattr(model, "log", lambda name, value: logged.update({name: float(value)}))
    monkeypatch.setattr(model, "log_dict", lambda values: logged.update({n: float(v) for n, v in values.items()}))
    return logged


def batches(sizes: tuple[int, ...]) -> list[Batch]:
    rng = torch.Generator().manual_seed(3)
    found = []
    for size in sizes:
        logits = 2 * torch.randn(size, 3, 32, 32, generator=rng)
        labels = torch.randint(0, 10, (size,), generator=rng)
        logits.flatten(1)[torch.arange(size), labels] += 1
        found.append(Batch(logits, labels, torch.arange(size)))
    return found


def measured(seen: list[Batch]) -> dict[str, float]:
    logits = torch.cat([batch.inputs.flatten(1)[:, :10] for batch in seen]).double()
    labels = torch.cat([batch.labels for batch in seen]).numpy()
    predicted = logits.argmax(dim=1).numpy()
    return {
        "loss": float(log_loss(labels, logits.softmax(dim=1).numpy(), labels=np.arange(10))),
        "acc": float(accuracy_score(labels, predicted)),
        "f1": float(f1_score(labels, predicted, average="macro")),
    }


def test_accuracy_with_test_time_augmentation_is_that_of_the_averages(
    model: TransferClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = fake(model, monkeypatch)
    monkeypatch.setattr(model, "test_time_augmentation", "flip")
    # Ten logits in a line, which a flip reverses: each image is of class 0 by itself, and of class 1 on average.
    inputs = torch.tensor([2.0, 1.9, 0, 0, 0, 0, 0, 0, 1.9, 0]).expand(4, 1, 1, 10).clone()
    probabilities = model.test_step(Batch(inputs, torch.tensor([1, 1, 1, 0]), torch.arange(4)))
    assert probabilities["plain"].argmax(dim=1).tolist() == [0] * 4
    assert probabilities["tta"].argmax(dim=1).tolist() == [1] * 4
    model.on_test_epoch_end()
    assert (logged["test/acc"], logged["test/acc_tta"]) == (0.25, 0.75)


Step = Callable[[TransferClassifier, Batch], object]
End = Callable[[TransferClassifier], None]


@pytest.mark.parametrize(
    ("split", "step", "end"),
    [
        ("train", TransferClassifier.training_step, TransferClassifier.on_train_epoch_end),
        ("val", TransferClassifier.validation_step, TransferClassifier.on_validation_epoch_end),
        ("test", TransferClassifier.test_step, TransferClassifier.on_test_epoch_end),
    ],
)
def test_metrics_weigh_every_image_alike(
    model: TransferClassifier, monkeypatch: pytest.MonkeyPatch, split: str, step: Step, end: End
) -> None:
    logged = fake(model, monkeypatch)
    for sizes in ((40, 40, 3), (5, 60)):  # two epochs: the second must not remember the first
        seen = batches(sizes)
        for batch in seen:
            step(model, batch)
        end(model)
        names = ("loss", "acc") if split == "train" else ("loss", "acc", "f1")
        wanted = {f"{split}/{name}": measured(seen)[name] for name in names}
        assert logged == pytest.approx(wanted, rel=1e-5)


def test_label_smoothing_is_for_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(hidden=0, label_smoothing=0.2)
    logged = fake(model, monkeypatch)
    (batch,) = batches((50,))
    loss = model.training_step(batch)
    smooth = 0.02 + 0.8 * nn.functional.one_hot(batch.labels, 10)
    assert loss.item() == pytest.approx(-(smooth * batch.inputs.flatten(1)[:, :10].log_softmax(1)).sum(1).mean().item())
    model.validation_step(batch)
    model.on_validation_epoch_end()
    assert logged["val/loss"] == pytest.approx(measured([batch])["loss"], rel=1e-5)


def test_mixed_images_count_for_both_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(hidden=0, label_smoothing=0.1)
    logged = fake(model, monkeypatch)
    (batch,) = batches((60,))
    others, shares = (batch.labels + 1) % 10, torch.linspace(0, 1, 60)
    loss = model.training_step(batch._replace(other_labels=others, other_shares=shares))
    own, other = (nn.functional.one_hot(labels, 10) for labels in (batch.labels, others))
    target = 0.01 + 0.9 * (own + shares[:, None] * (other - own))
    logits = batch.inputs.flatten(1)[:, :10]
    assert loss.item() == pytest.approx(-(target * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5)
    model.on_train_epoch_end()
    main_class = torch.where(shares > 0.5, others, batch.labels)
    assert logged["train/acc"] == pytest.approx((logits.argmax(1) == main_class).float().mean().item())
    assert logged["train/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_batch_without_images_counts_nothing(model: TransferClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    logged = fake(model, monkeypatch)
    (full,) = batches((20,))
    empty = Batch(full.inputs[:0], full.labels[:0], full.indices[:0])
    for batch in (full, empty):
        model.validation_step(batch)
    model.on_validation_epoch_end()
    assert logged["val/loss"] == pytest.approx(measured([full])["loss"], rel=1e-5)
    for kind in (None, "flip_shift"):
        monkeypatch.setattr(model, "test_time_augmentation", kind)
        assert all(part.shape == (0, 10) for part in model.test_step(empty).values())


@pytest.mark.parametrize("step", ["test_step", "predict_step"])
def test_steps_give_probabilities(
    model: TransferClassifier, monkeypatch: pytest.MonkeyPatch, images: Tensor, step: str
) -> None:
    model.eval()
    with torch.no_grad():
        given = getattr(model, step)(batch_of(images))
        assert list(given) == ["plain"]
        torch.testing.assert_close(given["plain"], model(images).softmax(dim=1))
        monkeypatch.setattr(model, "test_time_augmentation", "flip")
        given = getattr(model, step)(batch_of(images))
        both = [model(look).softmax(dim=1) for look in (images, images.flip(3))]
        torch.testing.assert_close(given["tta"], (both[0] + both[1]) / 2)
        assert ("plain" in given) == (step == "test_step")
    model.test_metrics.reset()
    model.tta_accuracy.reset()


@pytest.mark.parametrize("before", [(30, 7), ()])
def test_metrics_of_a_broken_epoch_go_on(
    model: TransferClassifier, monkeypatch: pytest.MonkeyPatch, before: tuple[int, ...]
) -> None:
    fake(model, monkeypatch)
    first, rest = batches((*before, 25))[: len(before)], batches((*before, 25))[len(before) :]
    for batch in first:
        model.training_step(batch)
    saved: dict[str, Any] = {}
    model.on_save_checkpoint(saved)
    file = io.BytesIO()
    torch.save(saved, file)
    model.train_metrics.reset()
    file.seek(0)

    resumed = make(hidden=0)
    logged = fake(resumed, monkeypatch)
    resumed.on_load_checkpoint(torch.load(file, weights_only=True))
    for batch in rest:
        resumed.training_step(batch)
    resumed.on_train_epoch_end()
    wanted = measured([*first, *rest])
    assert logged["train/loss"] == pytest.approx(wanted["loss"], rel=1e-5)
    assert logged["train/acc"] == pytest.approx(wanted["acc"])
    assert resumed.train_metrics.seen == 0  # ready for the next epoch


def test_metrics_go_on_after_several_processes_saved_within_validation(
    model: TransferClassifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """torchmetrics puts what all processes have seen in place of the states while it is saved."""
    logged, seen = fake(model, monkeypatch), batches((30, 7))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        model.training_step(seen[0])
        with torch.no_grad():
            model.on_save_checkpoint({})
        model.training_step(seen[1])
    finally:
        torch.distributed.destroy_process_group()
    model.on_train_epoch_end()
    assert logged["train/loss"] == pytest.approx(measured(seen)["loss"], rel=1e-5)


def test_epoch_that_was_saved_at_its_end_can_be_measured(
    model: TransferClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake(model, monkeypatch)
    seen = batches((30,))
    model.training_step(seen[0])
    saved: dict[str, Any] = {}
    model.on_save_checkpoint(saved)
    resumed = make(hidden=0)
    logged = fake(resumed, monkeypatch)
    resumed.on_load_checkpoint(saved)
    resumed.on_train_epoch_end()  # without a further batch, torchmetrics would warn
    assert logged["train/loss"] == pytest.approx(measured(seen)["loss"], rel=1e-5)
    model.train_metrics.reset()


def test_checkpoint_without_metrics_loads(model: TransferClassifier) -> None:
    model.on_load_checkpoint({})


@pytest.mark.parametrize(
    ("optimizer", "fused"),
    [
        (torch.optim.Adam, True),
        (torch.optim.AdamW, True),
        (torch.optim.SGD, True),
        (torch.optim.RMSprop, None),  # has no fused step
        (lambda params: torch.optim.Adam(params, fused=False), False),
        (lambda params: torch.optim.Adam(params, fused=True), True),
        (lambda params: torch.optim.Adam(params, foreach=True), None),
    ],
)
def test_step_is_fused_unless_the_user_decided(optimizer: Callable[..., Any], fused: bool | None) -> None:
    made = make(hidden=0, optimizer=optimizer).configure_optimizers()
    assert {group.get("fused") for group in made.param_groups} == {fused}
    assert not getattr(made, "_step_supports_amp_scaling", False)  # with it Lightning refuses to clip under 16-mixed


@pytest.mark.parametrize("precision", ["same", "bf16"])
def test_frozen_layers_have_their_own_precision(images: Tensor, precision: str) -> None:
    """In half precision their output is near, and what trains remains in single precision."""
    model = make(hidden=0, frozen_precision=precision)
    model.trainable_layers = 4
    features, expected = model.prefix(images), model.backbone(images, 0, 14)
    assert features.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    difference = (features.float() - expected).abs().max() / expected.abs().max()
    assert (0 < difference < 0.03) if precision == "bf16" else difference == 0
    logits = model(images)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, model(features, 14))  # as from a cache
    logits.sum().backward()
    assert model.backbone.block5_conv1.weight.grad.dtype == torch.float32


def test_loss_of_a_batch_is_drawn_whole_under_accumulation(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning hands it over divided by the number of batches of a step."""
    drawn: list[dict[str, float]] = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: drawn.append(metrics))
    trainer = SimpleNamespace(global_step=1, log_every_n_steps=1, accumulate_grad_batches=4, logger=logger)
    model = make(hidden=0)
    monkeypatch.setattr(TransferClassifier, "trainer", trainer)
    monkeypatch.setattr(TransferClassifier, "logger", logger)
    for number in range(2):  # of the four batches of a step
        model.on_train_batch_end({"loss": torch.tensor(0.5)}, batch_of(images), number)
    assert drawn == [{"train/batch_loss": 2.0}]


@pytest.mark.parametrize(
    ("began_fused", "fused", "device", "place"),
    [(False, True, "meta", "meta"), pytest.param(True, False, "cuda", "cpu", marks=needs_gpu)],
)
def test_adams_count_lies_where_the_settings_of_today_want_it(
    began_fused: bool, fused: bool, device: str, place: str
) -> None:
    """On a GPU a fused kernel looks for the count there; any other would wait for each one that is not on the CPU."""
    model = make(hidden=0, optimizer=lambda groups: torch.optim.Adam(groups, fused=fused))
    model.trainable_layers = 0
    began = torch.optim.Adam(model.parameter_groups(), fused=began_fused)
    for parameter in model.head.parameters():
        parameter.grad = torch.zeros_like(parameter)
    began.step()
    model.to(device)
    optimizer = model.configure_optimizers()
    optimizer.load_state_dict(began.state_dict())
    counts = [state["step"] for state in optimizer.state.values()]
    assert len(counts) == 2
    assert {count.device.type for count in counts} == {place}


def test_deterministic_mode_counts_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchmetrics would take images × classes² of memory."""
    counted, bincount = [], torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda *args, **options: counted.append(1) or bincount(*args, **options))
    model = make()
    model._guesses.append(torch.tensor([[0, 1, 1], [0, 1, 0]]))
    torch.use_deterministic_algorithms(True)
    try:
        model._count_guesses(model.val_metrics)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert counted
