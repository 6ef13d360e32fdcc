"""Small maps are convolved as large ones are."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from src.model import small_maps
from src.model.classifier import TransferClassifier
from src.model.small_maps import convolve_by_tap, store_by_tap
from src.model.vgg import ConvReLU


def parts(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(5, 6, height, width, generator=generator, dtype=torch.double)
    weight = torch.randn(4, 6, 3, 3, generator=generator, dtype=torch.double)
    return maps, weight, torch.randn(4, generator=generator, dtype=torch.double)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (4, 5)])
def test_result_and_gradients_are_those_of_the_ordinary_convolution(height: int, width: int) -> None:
    results = []
    for convolution in (convolve_by_tap, lambda maps, weight, bias: F.conv2d(maps, weight, bias, padding=1)):
        inputs = [part.requires_grad_() for part in parts(height, width)]
        out = convolution(*inputs)
        out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.double).view(out.shape))
        results.append([out.detach(), *(part.grad for part in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_onednn", [True, False])
def test_single_precision_is_right_with_either_library(monkeypatch: pytest.MonkeyPatch, has_onednn: bool) -> None:
    monkeypatch.setattr(small_maps, "_HAS_ONEDNN", has_onednn and small_maps._HAS_ONEDNN)
    results = []
    for convolution in (convolve_by_tap, lambda maps, weight, bias: F.conv2d(maps, weight, bias, padding=1)):
        inputs = [part.float().requires_grad_() for part in parts(2, 2)]
        out = convolution(*inputs)
        out.square().sum().backward()
        results.append([out.detach(), *(part.grad for part in inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_only_gradients_that_are_needed_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[str] = []
    for name in ("_put_product", "_add_product"):
        monkeypatch.setattr(small_maps, name, lambda *_, name=name: products.append(name))
    for needed, wanted in ((0, "_add_product"), (1, "_put_product"), (2, None)):
        inputs = [part.requires_grad_(number == needed) for number, part in enumerate(parts(2, 2))]
        out = convolve_by_tap(*inputs)
        products.clear()
        out.sum().backward()
        assert set(products) == ({wanted} if wanted else set())


def test_storing_by_tap_leaves_shape_and_values() -> None:
    weight = parts(2, 2)[1]
    stored = torch.nn.Parameter(weight.clone())
    store_by_tap(stored)
    assert torch.equal(stored, weight)
    assert stored.permute(2, 3, 0, 1).is_contiguous()


@pytest.mark.parametrize(
    ("size", "blocks"), [(32, "block4 block5"), (39, "block4 block5"), (40, "block5"), (79, "block5"), (80, "")]
)
def test_blocks_with_small_maps_are_computed_by_tap(size: int, blocks: str) -> None:
    backbone = TransferClassifier(image_size=size).backbone
    found = {name: layer.by_tap for name, layer in backbone.named_children() if isinstance(layer, ConvReLU)}
    assert found == {name: name.partition("_")[0] in blocks.split() for name in found}
    for name, layer in backbone.named_children():
        if isinstance(layer, ConvReLU) and not found[name]:
            assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_gradients_keep_the_order_of_the_weights() -> None:
    """Else every step would copy them, and DDP its buckets."""
    model = TransferClassifier()
    model.trainable_layers = 4
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    for parameter in model.backbone.block5_conv2.parameters():
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()


def test_autocast_computes_by_tap_in_its_own_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, maps = ConvReLU(64, 64, by_tap=True), torch.randn(8, 64, 2, 2)
    results = []
    for by_tap in (True, False):
        layer.by_tap = by_tap
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(maps)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        assert layer.weight.grad is not None
        results.append((out.float(), layer.weight.grad.clone(), *(part.grad for part in [layer.bias])))
        assert layer.weight.grad.dtype == torch.float32
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02 * theirs.abs().max().item())


def test_bfloat16_errs_little_more_than_an_ordinary_convolution() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(16, 64, 4, 4, generator=generator).bfloat16()
    weight = torch.randn(64, 64, 3, 3, generator=generator).bfloat16()
    bias = torch.zeros(64, dtype=torch.bfloat16)
    exact = F.conv2d(maps.float(), weight.float(), padding=1)
    errors = [
        (convolution(maps, weight, bias).float() - exact).square().mean().sqrt().item()
        for convolution in (convolve_by_tap, lambda *parts: F.conv2d(*parts, padding=1))
    ]
    assert errors[0] < 3 * errors[1]


def test_compilers_get_the_ordinary_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Tensor) -> Tensor:
        raise AssertionError

    monkeypatch.setattr("src.model.vgg.convolve_by_tap", refuse)
    layer, maps = ConvReLU(3, 4, by_tap=True), torch.randn(2, 3, 2, 2)
    with pytest.raises(AssertionError):
        layer(maps)
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert layer(maps).shape == (2, 4, 2, 2)
