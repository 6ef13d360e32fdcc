"""`fused_conv` against torch's own convolution, ReLU and pooling: on a GPU, and everywhere by Triton's interpreter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from support import REPOSITORY, needs_gpu
from torch import Tensor
from torch.nn import functional as F

from src.model import vgg
from src.model.vgg import LAYERS, VGGBackbone
from src.replay import Replay

CASES = [
    # images, channels in and out, side, whether to pool
    (2, 3, 64, 8, False),  # the first layer, which has a kernel of its own
    (3, 3, 64, 7, False),
    (2, 3, 64, 8, True),
    (2, 16, 64, 8, False),
    (2, 16, 128, 8, True),
    (3, 16, 64, 7, True),  # whose last line and column no pooling sees
    (2, 64, 64, 2, True),
    (1, 16, 16, 20, False),  # more pixels than two programs take at once
    (1, 16, 16, 36, True),
    (1, 3, 16, 20, False),
]
IDS = ["-".join(map(str, case)) for case in CASES]
NAMES = ["output", "maps", "weight", "bias"]


def convolve(maps: Tensor, weight: Tensor, bias: Tensor, pools: bool) -> Tensor:
    """Do it as torch does, where a convolution is rounded before the bias is added, as cuDNN's is."""
    out = F.relu(F.conv2d(maps, weight, None, padding=1) + bias.view(1, -1, 1, 1))
    return F.max_pool2d(out, 2) if pools else out


def made_of(case: tuple[Any, ...], dtype: torch.dtype, device: str, for_maps: bool = True) -> list[Tensor]:
    images, inputs, outputs, side, _ = case
    torch.manual_seed(0)
    maps = torch.randn(images, inputs, side, side).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, 3, 3) / (3 * inputs**0.5)
    parts = [part.to(device, dtype) for part in (maps, weight, torch.randn(outputs))]
    return [part.requires_grad_(wanted) for part, wanted in zip(parts, (for_maps, True, True), strict=True)]


def difference(found: Tensor, expected: Tensor) -> float:
    """Give the relative error; more than any bound where shapes differ or there are other things than numbers."""
    if found.shape != expected.shape or not found.isfinite().all():
        return 1e9
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def errors(case: tuple[Any, ...], dtype: torch.dtype, device: str) -> dict[str, float]:
    """Compare output and gradients."""
    from src.model import fused_conv

    worst = dict.fromkeys(NAMES, 0.0)
    for for_maps in (True, False):  # images need no gradient, and have a way of their own then
        parts, same = (made_of(case, dtype, device, for_maps) for _ in range(2))
        found, expected = fused_conv.convolve(*parts, case[-1]), convolve(*same, case[-1])
        assert found.is_contiguous(memory_format=torch.channels_last)
        grad = torch.randn_like(expected)
        found.backward(grad)
        expected.backward(grad)
        ours, theirs = ([out.detach(), *(part.grad for part in of)] for out, of in ((found, parts), (expected, same)))
        for name, one, other in zip(NAMES, ours, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                worst[name] = max(worst[name], difference(one, other))
    return worst


def what_is_no_number_remains(device: str) -> list[bool]:
    from src.model import fused_conv

    passes = []
    for inputs in (3, 16):
        for pools in (False, True):
            maps, weight, bias = made_of((2, inputs, 16, 4, pools), torch.float16, device, for_maps=False)
            maps[0, 0, 1, 1] = torch.nan
            out = fused_conv.convolve(maps, weight, bias, pools)
            expected = convolve(maps, weight, bias, pools)
            passes.append(torch.equal(out.isnan(), expected.isnan()) and bool(out.isnan().any()))
    return passes


def main() -> None:
    """Print everything that the tests ask for, computed by Triton's interpreter."""
    from src.model import fused_conv

    fused_conv._PROGRAMS = 2  # so that each of them takes more than one turn
    found = {
        f"{name} {dtype}": errors(case, dtype, "cpu")
        for name, case in zip(IDS, CASES, strict=True)
        for dtype in (torch.float16, torch.float32)  # it rounds to bfloat16 otherwise than a GPU
    }
    fused_conv.try_out(torch.device("cpu"))
    print(json.dumps({"errors": found, "no numbers": what_is_no_number_remains("cpu")}))


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Ask a process of its own, for what Triton compiles it cannot interpret any more."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"}
    words, told = [sys.executable, __file__], {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(words, env=environment, check=False, **told)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("case", IDS)
def test_interpreted_kernels_do_what_torch_does(interpreted: dict[str, Any], case: str, dtype: torch.dtype) -> None:
    assert max(interpreted["errors"][f"{case} {dtype}"].values()) < {torch.float16: 1e-3, torch.float32: 1e-6}[dtype]


def test_what_is_no_number_remains_none(interpreted: dict[str, Any]) -> None:
    assert all(interpreted["no numbers"])


@pytest.fixture
def on_gpu() -> str:
    """Ask for a GPU, and what Triton needs to compile for it."""
    if torch.cuda.get_device_capability() < (8, 0) or not (shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("needs a GPU of Ampere or newer, and a C compiler")
    pytest.importorskip("triton")
    return "cuda"


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_does_what_torch_does(on_gpu: str, dtype: torch.dtype) -> None:
    found = {name: max(errors(case, dtype, on_gpu).values()) for name, case in zip(IDS, CASES, strict=True)}
    assert {name: error for name, error in found.items() if error >= 5e-3} == {}  # in TF32, a float32 may be so far off


@needs_gpu
def test_a_gpu_keeps_what_is_no_number(on_gpu: str) -> None:
    assert all(what_is_no_number_remains(on_gpu))


@needs_gpu
def test_a_gpu_trains_so_and_what_it_records_is_the_same(on_gpu: str) -> None:
    assert vgg.fused_convolution(torch.device(on_gpu, torch.cuda.current_device())) is not None
    torch.manual_seed(0)
    backbone = VGGBackbone().to(on_gpu)

    def step(images: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            loss = backbone(images).float().square().mean()
        return [loss, *torch.autograd.grad(loss, list(backbone.parameters()))]

    recorded = Replay(step)
    for _ in range(4):
        images = torch.randn(8, 3, 32, 32, device=on_gpu)
        for one, other in zip(recorded(images), step(images), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(("first", "last"), [(0, 18), (0, 14), (0, 2), (2, 9), (3, 4), (5, 18)])
def test_layers_are_computed_in_one_go_where_something_does_so(
    monkeypatch: pytest.MonkeyPatch, first: int, last: int
) -> None:
    """A range of layers may end between a convolution and its pooling."""
    calls: list[bool] = []

    def noted(maps: Tensor, weight: Tensor, bias: Tensor, pools: bool) -> Tensor:
        calls.append(pools)
        return convolve(maps, weight, bias, pools)

    torch.manual_seed(0)
    backbone, shapes = VGGBackbone(), [(3, 32, 32), *vgg.output_shapes(32)]
    maps = torch.randn(2, *shapes[first])
    expected = backbone(maps, first, last)
    monkeypatch.setattr(vgg, "_fused_for", lambda x, layers: noted)
    torch.testing.assert_close(backbone(maps, first, last), expected, rtol=1e-4, atol=1e-5)
    names = LAYERS[first:last]
    convolutions = [number for number, name in enumerate(names) if "conv" in name]
    assert calls == ["pool" in "".join(names[number + 1 : number + 2]) for number in convolutions]


def test_parts_have_the_type_that_autocast_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    types: list[set[torch.dtype]] = []

    def noted(maps: Tensor, weight: Tensor, bias: Tensor, pools: bool) -> Tensor:
        types.append({maps.dtype, weight.dtype, bias.dtype})
        return convolve(maps, weight, bias, pools)

    monkeypatch.setattr(vgg, "_fused_for", lambda x, layers: noted)
    backbone = VGGBackbone()
    backbone(torch.randn(1, 3, 32, 32), 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(1, 3, 32, 32), 0, 1)
    assert types == [{torch.float32}, {torch.bfloat16}]


@dataclass
class Maps:
    """What the network asks of its input, as a GPU's would answer."""

    is_cuda: bool = True
    dtype: torch.dtype = torch.float32
    images: int = 2
    number: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.number)

    def __len__(self) -> int:
        return self.images


@pytest.mark.parametrize(
    ("maps", "fused"),
    [
        (Maps(), True),
        (Maps(is_cuda=False), False),
        (Maps(dtype=torch.float64), False),
        (Maps(images=0), False),
        (Maps(number=1), False),
    ],
    ids=["gpu", "cpu", "float64", "empty", "another gpu"],
)
def test_what_no_kernel_takes_is_left_to_torch(monkeypatch: pytest.MonkeyPatch, maps: Any, fused: bool) -> None:
    monkeypatch.setattr(vgg, "fused_convolution", lambda device: convolve)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    layers = VGGBackbone().layers(0, 3)
    assert (vgg._fused_for(maps, layers) is convolve) == fused
    for listen in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(layers[2], listen)(lambda *_: None)  # what shows a pooling's output would not be called
        assert vgg._fused_for(maps, layers) is None
        handle.remove()
    assert (vgg._fused_for(maps, layers) is convolve) == fused
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert vgg._fused_for(maps, layers) is None


def capable(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int] = (9, 0)) -> Callable[..., Any]:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    return vgg.fused_convolution.__wrapped__


def test_gpu_without_a_compiler_is_told_once_and_computes_in_several_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")
    from src.model import fused_conv

    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore.")

    find = capable(monkeypatch)
    monkeypatch.setattr(fused_conv, "try_out", fail)
    assert find(torch.device("cuda", 0)) is None
    assert capsys.readouterr().out == (
        "convolutions are slower than they could be: Triton does not work here "
        "(Failed to find C compiler. Please specify via CC environment variable.)\n"
    )
    monkeypatch.setattr(fused_conv, "try_out", lambda device: None)
    assert find(torch.device("cuda", 0)) is fused_conv.convolve


def test_torch_without_triton_computes_in_several_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = capable(monkeypatch)
    monkeypatch.delitem(sys.modules, "src.model.fused_conv", raising=False)
    monkeypatch.delattr("src.model.fused_conv", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    assert find(torch.device("cuda", 0)) is None
    assert "Triton does not work here (import of triton halted" in capsys.readouterr().out


def test_old_gpus_are_left_to_torch(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert capable(monkeypatch, (7, 5))(torch.device("cuda", 0)) is None
    assert not capsys.readouterr().out


if __name__ == "__main__":
    main()
