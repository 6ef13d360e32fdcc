"""`VGGBackbone` against torchvision's own VGG16: layers, shapes, and every kind of file it can start from."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import vgg16

from src.errors import UserError
from src.model import vgg
from src.model.vgg import LAYERS, ConvReLU, InputScale, VGGBackbone, expected_input, output_shapes

CAFFE = ((123.68, 116.779, 103.939), (1.0, 1.0, 1.0))
TORCHVISION = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
PLAIN = "vgg16.pth"  # torchvision's whole state dict

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    """Make torchvision's VGG16 with random features; its huge classifier has keys, but no numbers."""
    with torch.device("meta"):
        model = vgg16(weights=None)
    model.features.to_empty(device="cpu")
    torch.manual_seed(0)
    for name, parameter in model.features.named_parameters():
        nn.init.normal_(parameter, std=0.1 if name.endswith("bias") else (2 / parameter[0].numel()) ** 0.5)
    return model


@pytest.fixture(scope="module")
def whole(theirs: nn.Module) -> State:
    return {name: torch.zeros(1) if value.is_meta else value for name, value in theirs.state_dict().items()}


@pytest.fixture(scope="module")
def folder(whole: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    torch.save(whole, folder / PLAIN)
    return folder


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def backbone() -> VGGBackbone:
    """Make one network for all tests that do not mind its weights: drawing them takes a while."""
    return VGGBackbone()


@pytest.fixture(params=["load", "expected_input"])
def read(request: pytest.FixtureRequest, backbone: VGGBackbone) -> Callable[[Path], object]:
    """Give either way in which a weights file is opened."""
    if request.param == "load":
        return lambda path: backbone.load(str(path))
    return lambda path: expected_input(str(path), None)


def only_features(whole: State) -> State:
    return {name: value for name, value in whole.items() if name.startswith("features.")}


def without_prefix(whole: State) -> State:
    return {name.removeprefix("features."): value for name, value in only_features(whole).items()}


def layer_names(whole: State) -> State:
    """Rename as this project names layers, by counting: both have thirteen convolutions, a weight and a bias each."""
    convolutions = [f"block{b}_conv{c}" for b, convs in enumerate((2, 2, 3, 3, 3), 1) for c in range(1, convs + 1)]
    names = [f"{convolution}.{kind}" for convolution in convolutions for kind in ("weight", "bias")]
    return dict(zip(names, only_features(whole).values(), strict=True))


def checkpoint(whole: State) -> dict[str, object]:
    state = {f"backbone.{name}": value for name, value in layer_names(whole).items()}
    return {"state_dict": {**state, "head.linear.weight": torch.zeros(10, 256)}, "epoch": 3, "global_step": 7}


def test_layers_are_the_eighteen_of_keras() -> None:
    assert LAYERS == (
        "block1_conv1", "block1_conv2", "block1_pool",
        "block2_conv1", "block2_conv2", "block2_pool",
        "block3_conv1", "block3_conv2", "block3_conv3", "block3_pool",
        "block4_conv1", "block4_conv2", "block4_conv3", "block4_pool",
        "block5_conv1", "block5_conv2", "block5_conv3", "block5_pool",
    )  # fmt: skip


def test_layers_stand_in_their_order(backbone: VGGBackbone) -> None:
    assert tuple(name for name, _ in backbone.named_children()) == LAYERS


def test_parameters_are_as_many_as_in_keras(backbone: VGGBackbone) -> None:
    assert sum(parameter.numel() for parameter in backbone.parameters()) == 14_714_688
    below_block5 = sum(parameter.numel() for parameter in backbone.prefix_parameters(14))
    assert 14_714_688 - below_block5 == 7_079_424
    assert backbone.prefix_parameters(0) == []
    assert [id(p) for p in backbone.prefix_parameters(18)] == [id(p) for p in backbone.parameters()]


@pytest.mark.parametrize("size", [32, 48, 64, 71])
def test_output_shapes_are_those_of_a_forward_pass(backbone: VGGBackbone, size: int) -> None:
    activations, shapes = torch.zeros(1, 3, size, size), []
    with torch.no_grad():
        for layer in backbone.children():
            activations = layer(activations)
            shapes.append(tuple(activations.shape[1:]))
    assert output_shapes(size) == shapes


@pytest.mark.parametrize("depth", range(0, 19, 3))
@torch.no_grad()
def test_forward_in_two_parts_is_forward(backbone: VGGBackbone, images: Tensor, depth: int) -> None:
    features = backbone(images, 0, depth)
    assert features.shape[1:] == ((3, 40, 40) if depth == 0 else output_shapes(40)[depth - 1])
    assert torch.equal(backbone(features, depth), backbone(images))
    assert torch.equal(backbone(features, depth, depth), features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling_before_rectifying_is_rectifying_before_pooling(images: Tensor, dtype: torch.dtype) -> None:
    """To the bit, gradients too, though in bfloat16 many pixels of a map are alike."""
    backbone, results = VGGBackbone(), []
    for run in (backbone, lambda inputs: nn.Sequential.forward(backbone, inputs)):
        backbone.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            out = run(images)
        out.float().square().sum().backward()
        results.append([out.detach(), *(parameter.grad for parameter in backbone.parameters())])
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


def test_random_weights_keep_the_size_of_activations(images: Tensor) -> None:
    torch.manual_seed(0)
    backbone = VGGBackbone()
    with torch.no_grad():
        deviation = backbone(images, 0, 17).square().mean().sqrt()
    assert 0.02 < deviation < 10  # about 0.05; PyTorch's own initialization ends at 0.006
    assert all(not layer.bias.any() for layer in backbone.children() if isinstance(layer, ConvReLU))


@pytest.mark.parametrize(
    ("content", "zipped"),
    [
        (dict, True),
        (dict, False),  # as files were before PyTorch 1.6, the original VGG16's among them
        (only_features, True),
        (without_prefix, True),
        (layer_names, True),
        (checkpoint, True),
    ],
)
@torch.no_grad()
def test_every_kind_of_file_gives_torchvisions_features(
    theirs: nn.Module, whole: State, images: Tensor, tmp_path: Path, backbone: VGGBackbone,
    content: Callable[[State], object], zipped: bool,
) -> None:  # fmt: skip
    torch.save(content(whole), tmp_path / PLAIN, _use_new_zipfile_serialization=zipped)
    for parameter in backbone.parameters():
        parameter.zero_()
    backbone.load(str(tmp_path / PLAIN))
    torch.testing.assert_close(backbone(images), theirs.features(images), rtol=1e-4, atol=1e-4)  # sums in another order


def test_training_does_not_change_the_file(folder: Path, theirs: nn.Module, backbone: VGGBackbone) -> None:
    for _ in range(2):
        backbone.load(str(folder / PLAIN))
        assert torch.equal(backbone.block1_conv1.weight, theirs.features[0].weight)
        with torch.no_grad():
            backbone.block1_conv1.weight.zero_()


def test_published_weights_are_taken_from_torch_home(
    folder: Path, theirs: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: VGGBackbone
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints/vgg16_features-amdegroot-88682ab5.pth"
    file.parent.mkdir(parents=True)
    file.symlink_to(folder / PLAIN)
    backbone.load("IMAGENET1K_FEATURES")
    assert torch.equal(backbone.block5_conv3.weight, theirs.features[28].weight)


def test_downloaded_weights_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(vgg, "fetch", lambda *where, algorithm, digest, **_: asked.append((*where, algorithm, digest)))
    vgg._download("IMAGENET1K_V1")
    url = "https://download.pytorch.org/models/vgg16-397923af.pth"
    assert asked == [(url, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth", "sha256", "397923af")]


@pytest.mark.parametrize(
    ("name", "file"),
    [("IMAGENET1K_FEATURES", "vgg16_features-amdegroot-88682ab5.pth"), ("IMAGENET1K_V1", "vgg16-397923af.pth")],
)
def test_published_weights_without_network_name_the_file_and_a_way_out(
    name: str, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backbone: VGGBackbone
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"with/sample\.yaml") as refusal:
        backbone.load(name)
    assert str(tmp_path / "hub/checkpoints" / file) in str(refusal.value)


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_missing_layer_is_named_and_nothing_changes(
    whole: State, tmp_path: Path, backbone: VGGBackbone, kind: str
) -> None:
    torch.save({name: value for name, value in whole.items() if name != f"features.10.{kind}"}, tmp_path / PLAIN)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    with pytest.raises(UserError, match=rf"{PLAIN}.*: block3_conv1\.{kind} is missing\.") as refusal:
        backbone.load(str(tmp_path / PLAIN))
    assert "\n" not in str(refusal.value)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_misshapen_layer_is_named(whole: State, tmp_path: Path, backbone: VGGBackbone) -> None:
    torch.save({**whole, "features.24.weight": torch.zeros(512, 512, 1, 1)}, tmp_path / PLAIN)
    with pytest.raises(UserError, match=r"block5_conv1\.weight is \(512, 512, 1, 1\) instead of \(512, 512, 3, 3\)\."):
        backbone.load(str(tmp_path / PLAIN))


def test_weights_that_are_no_numbers_are_named(whole: State, tmp_path: Path, backbone: VGGBackbone) -> None:
    torch.save({**whole, "features.24.bias": torch.full((512,), torch.nan)}, tmp_path / PLAIN)
    with pytest.raises(UserError, match=r"block5_conv1\.bias is infinite in places, or no number\."):
        backbone.load(str(tmp_path / PLAIN))


def test_another_networks_weights_are_refused_in_few_words(tmp_path: Path, backbone: VGGBackbone) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / PLAIN)
    with pytest.raises(UserError, match=r"block1_conv1\.weight is missing; .* and 22 more"):
        backbone.load(str(tmp_path / PLAIN))


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], 7, {"state_dict": torch.zeros(3)}])
def test_what_is_no_state_dict_is_refused(tmp_path: Path, backbone: VGGBackbone, content: object) -> None:
    torch.save(content, tmp_path / PLAIN)
    with pytest.raises(UserError, match=f"{PLAIN}' holds no state dict"):
        backbone.load(str(tmp_path / PLAIN))


def test_what_is_no_weights_file_is_refused_in_one_line(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "notes.pth"
    path.write_text("<!DOCTYPE html>\n<html>\nNot found\n</html>")
    with pytest.raises(UserError, match=r"notes\.pth' cannot be read as weights") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)


def test_missing_file_is_named_beside_the_published_names(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(UserError, match=r"no weights file '.*nowhere\.pth'.*IMAGENET1K_FEATURES, IMAGENET1K_V1"):
        read(tmp_path / "nowhere.pth")


class Program:
    """Leave a mark when unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "save",
    [
        torch.save,
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
    ],
    ids=["zip", "legacy", "plain pickle"],
)
def test_programs_in_a_weights_file_do_not_run(
    tmp_path: Path, save: Callable[[object, Path], None], read: Callable[[Path], object]
) -> None:
    path, mark = tmp_path / "harmful.pth", tmp_path / "harm"
    save({"features.0.weight": Program(mark)}, path)
    with pytest.raises(UserError, match=r"harmful\.pth' cannot be read") as refusal:
        read(path)
    assert "\n" not in str(refusal.value)
    assert not mark.exists()


def same(found: InputScale | None, wanted: tuple[tuple[float, ...], tuple[float, ...]]) -> bool:
    return found is not None and found.mean == pytest.approx(wanted[0]) and found.std == pytest.approx(wanted[1])


def test_published_weights_say_what_they_expect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # the files themselves are not needed
    assert same(expected_input("IMAGENET1K_FEATURES", None), CAFFE)
    assert same(expected_input("IMAGENET1K_V1", None), TORCHVISION)


def test_random_weights_expect_nothing() -> None:
    assert expected_input(None, None) is None


def test_plain_file_expects_what_the_user_says(folder: Path) -> None:
    plain = str(folder / PLAIN)
    assert expected_input(plain, None) is None
    assert same(expected_input(plain, "IMAGENET1K_V1"), TORCHVISION)
    assert same(expected_input(plain, "IMAGENET1K_FEATURES"), CAFFE)


def test_checkpoint_expects_what_it_was_trained_on(tmp_path: Path) -> None:
    trained_on = {"classes": ["cat", "dog"], "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]}
    torch.save({"state_dict": {}, "ImageDataModule": trained_on}, tmp_path / "best.ckpt")
    found = expected_input(str(tmp_path / "best.ckpt"), None)
    assert same(found, ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)))


def test_kernels_lie_as_the_device_computes_with_them() -> None:
    """By tap for small maps on a CPU; channels last where a library convolves."""
    layer = ConvReLU(3, 4, by_tap=True)
    values = layer.weight.detach().clone()
    by_tap = layer.weight.stride()
    assert by_tap != values.contiguous(memory_format=torch.channels_last).stride()
    assert layer.to("cpu").weight.stride() == by_tap
    assert torch.equal(layer.weight, values)
    assert layer.to("meta").weight.is_contiguous(memory_format=torch.channels_last)
