"""`fused_conv` against torch's own convolution, ReLU and pooling: on a GPU, and everywhere by Triton's interpreter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from support import REPOSITORY, needs_gpu
from torch import Tensor, nn
from torch.nn import functional as F

from src.model import fusing, vgg
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


def made_of(
    case: tuple[Any, ...], dtype: torch.dtype, device: str, for_maps: bool = True, order: Any = torch.channels_last
) -> list[Tensor]:
    images, inputs, outputs, side, _ = case
    torch.manual_seed(0)
    maps = torch.randn(images, inputs, side, side).contiguous(memory_format=order)
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
    # Images need no gradient, and have a way of their own then; a cache and a head have another order in memory.
    for for_maps, order in product((True, False), (torch.channels_last, torch.contiguous_format)):
        parts, same = (made_of(case, dtype, device, for_maps, order) for _ in range(2))
        found, expected = fused_conv.convolve(*parts, case[-1]), convolve(*same, case[-1])
        assert found.is_contiguous(memory_format=torch.channels_last)
        grad = torch.randn_like(expected).contiguous(memory_format=order)
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
            maps[0, 0, 2, 2] = torch.nan  # which poolings meet at each of their places
            out = fused_conv.convolve(maps, weight, bias, pools)
            expected = convolve(maps, weight, bias, pools)
            passes.append(torch.equal(out.isnan(), expected.isnan()) and bool(out.isnan().any()))
    return passes


def second_derivative(device: str) -> str:
    """Ask for one, and give what torch says."""
    from src.model import fused_conv

    maps, weight, bias = made_of((2, 16, 16, 4, False), torch.float32, device)
    loss = fused_conv.convolve(maps, weight, bias, False).square().sum()
    (grad,) = torch.autograd.grad(loss, maps, create_graph=True)
    try:
        grad.square().sum().backward()
    except RuntimeError as error:
        return str(error)
    return ""


def main() -> None:
    """Print everything that the tests ask for, computed by Triton's interpreter."""
    from src.model import fused_conv

    fused_conv._PROGRAMS = 2  # so that each of them takes more than one turn
    found = {
        f"{name} {dtype}": errors(case, dtype, "cpu")
        for name, case in zip(IDS, CASES, strict=True)
        for dtype in (torch.float16, torch.float32)  # it rounds to bfloat16 otherwise than a GPU
    }
    for inputs in (3, 16):
        fused_conv.try_out(torch.device("cpu"), torch.float16, inputs, 16)
    told = {"no numbers": what_is_no_number_remains("cpu"), "second derivative": second_derivative("cpu")}
    print(json.dumps({"errors": found, **told}))


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


def test_a_second_derivative_is_refused(interpreted: dict[str, Any]) -> None:
    assert "once_differentiable" in interpreted["second derivative"]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> str:
    """Ask for a GPU, and what Triton needs to compile for it."""
    if torch.cuda.get_device_capability() < (8, 0) or not (shutil.which("gcc") or shutil.which("clang")):
        pytest.skip("needs a GPU of Ampere or newer, and a C compiler")
    pytest.importorskip("triton")
    from src.model import fused_conv

    monkeypatch.setattr(fused_conv, "_PROGRAMS", 2)  # so that each of them takes more than one turn
    return "cuda"


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_does_what_torch_does(on_gpu: str, dtype: torch.dtype) -> None:
    wide = [(2, 128, 256, 8, True), (2, 256, 512, 4, False), (2, 512, 512, 2, True)]
    found = {str(case): max(errors(case, dtype, on_gpu).values()) for case in [*CASES, *wide]}
    assert {name: error for name, error in found.items() if error >= 5e-3} == {}  # in TF32, a float32 may be so far off


@needs_gpu
def test_a_gpu_keeps_what_is_no_number(on_gpu: str) -> None:
    assert all(what_is_no_number_remains(on_gpu))


@needs_gpu
def test_a_gpu_trains_so_and_what_it_records_is_the_same(on_gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []

    def found(x: Tensor, layers: list[nn.Module]) -> fusing.Convolve | None:
        fused = fusing.fused_for(x, layers)
        calls.append(fused is not None)
        return fused

    torch.manual_seed(0)
    backbone, images = VGGBackbone().to(on_gpu), torch.randn(8, 3, 32, 32, device=on_gpu)

    def step(images: Tensor) -> list[Tensor]:
        with torch.autocast("cuda", torch.bfloat16):
            loss = backbone(images).float().square().mean()
        return [loss, *torch.autograd.grad(loss, list(backbone.parameters()))]

    monkeypatch.setattr(vgg, "fused_for", lambda x, layers: None)
    expected = step(images)
    monkeypatch.setattr(vgg, "fused_for", found)
    recorded = Replay(step)
    for _ in range(4):
        for one, other in zip(recorded(images), expected, strict=True):
            assert difference(one, other) < 0.05
    assert calls == [True] * 3  # two to get warm, and what is recorded


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[torch.dtype], bool]]:
    """Have the network convolve in one pass, as on a GPU, and note what it is given."""
    calls: list[tuple[set[torch.dtype], bool]] = []

    def note(maps: Tensor, weight: Tensor, bias: Tensor, pools: bool) -> Tensor:
        calls.append(({maps.dtype, weight.dtype, bias.dtype}, pools))
        return convolve(maps, weight, bias, pools)

    monkeypatch.setattr(vgg, "fused_for", lambda x, layers: note)
    return calls


@pytest.mark.parametrize(("first", "last"), [(0, 18), (0, 14), (0, 2), (2, 9), (3, 4), (5, 18)])
def test_layers_are_run_in_one_pass_where_something_does_so(
    noted: list[tuple[set[torch.dtype], bool]], monkeypatch: pytest.MonkeyPatch, first: int, last: int
) -> None:
    """A range of layers may end between a convolution and its pooling."""
    torch.manual_seed(0)
    backbone, shapes = VGGBackbone(), [(3, 32, 32), *vgg.output_shapes(32)]
    maps = torch.randn(2, *shapes[first])
    found = backbone(maps, first, last)
    names = LAYERS[first:last]
    convolutions = [number for number, name in enumerate(names) if "conv" in name]
    assert [pools for _, pools in noted] == [
        "pool" in "".join(names[number + 1 : number + 2]) for number in convolutions
    ]
    monkeypatch.setattr(vgg, "fused_for", lambda x, layers: None)
    torch.testing.assert_close(found, backbone(maps, first, last), rtol=1e-4, atol=1e-5)


def test_parts_have_the_type_that_autocast_asks_for(noted: list[tuple[set[torch.dtype], bool]]) -> None:
    backbone = VGGBackbone()
    backbone(torch.randn(1, 3, 32, 32), 0, 1)
    with torch.autocast("cpu", torch.bfloat16):
        backbone(torch.randn(1, 3, 32, 32), 0, 1)
    assert [types for types, _ in noted] == [{torch.float32}, {torch.bfloat16}]


@dataclass
class Maps:
    """What the network asks of its input, as a GPU's would answer."""

    is_cuda: bool = True
    images: int = 2
    number: int = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.number)

    def __len__(self) -> int:
        return self.images


@pytest.fixture
def capable(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Pretend that there is a GPU on which everything runs, and list the sizes that are tried."""
    pytest.importorskip("triton")
    from src.model import fused_conv

    tried: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(fused_conv, "try_out", lambda device, dtype, *sizes: tried.append(sizes))
    for remembers in (fusing.runs, fusing._tell):
        remembers.cache_clear()
    yield tried
    for remembers in (fusing.runs, fusing._tell):
        remembers.cache_clear()


@pytest.mark.parametrize(
    ("maps", "fused"),
    [(Maps(), True), (Maps(is_cuda=False), False), (Maps(images=0), False), (Maps(number=1), False)],
    ids=["gpu", "cpu", "empty", "another gpu"],
)
def test_what_no_kernel_takes_is_left_to_torch(
    capable: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, maps: Any, fused: bool
) -> None:
    backbone = VGGBackbone()
    assert (fusing.fused_for(maps, backbone.layers(0, 6)) is not None) == fused
    assert capable == ([(3, 64), (64, 64), (64, 128), (128, 128)] if fused else [])
    assert fusing.fused_for(maps, backbone.layers(2, 3)) is None  # a pooling alone
    assert fusing.fused_for(maps, backbone.double().layers(0, 6)) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert fusing.fused_for(maps, backbone.float().layers(0, 6)) is None


@pytest.mark.parametrize(
    "listen", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
@pytest.mark.parametrize("layer", ["block1_conv1", "block1_conv2", "block1_pool"])
def test_layers_that_somebody_watches_are_called_by_themselves(
    capable: list[tuple[int, int]], listen: str, layer: str
) -> None:
    backbone, seen, maps = VGGBackbone(), [], Maps()
    expected = backbone(torch.ones(1, 3, 32, 32), 0, 3)
    getattr(backbone.get_submodule(layer), listen)(lambda *_: seen.append(layer))
    assert fusing.fused_for(maps, backbone.layers(0, 3)) is None  # type: ignore[arg-type]
    found = backbone(torch.ones(1, 3, 32, 32, requires_grad=True), 0, 3)
    found.sum().backward()
    assert seen == [layer]
    torch.testing.assert_close(found, expected)


def test_gpu_without_a_compiler_is_told_once_and_convolves_in_several_passes(
    capable: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from src.model import fused_conv

    def fail(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nMore.")

    monkeypatch.setattr(fused_conv, "try_out", fail)
    backbone: Any = VGGBackbone()
    for first, last in ((0, 6), (0, 18)):
        assert fusing.fused_for(Maps(), backbone.layers(first, last)) is None  # type: ignore[arg-type]
    assert capsys.readouterr().out == (
        "convolutions are slower than they could be: Triton does not work here "
        "(Failed to find C compiler. Please specify via CC environment variable.)\n"
    )


def test_full_memory_is_not_taken_for_a_triton_that_fails(
    capable: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from src.model import fused_conv

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(fused_conv, "try_out", fail)
    with pytest.raises(torch.OutOfMemoryError):
        fusing.fused_for(Maps(), VGGBackbone().layers(0, 6))  # type: ignore[arg-type]


def test_torch_without_triton_convolves_in_several_passes(
    capable: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "src.model.fused_conv")
    monkeypatch.delattr("src.model.fused_conv")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fusing.fused_for(Maps(), VGGBackbone().layers(0, 6)) is None  # type: ignore[arg-type]
    assert "Triton does not work here (import of triton halted" in capsys.readouterr().out


def test_old_gpus_are_left_to_torch(
    capable: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert fusing.fused_for(Maps(), VGGBackbone().layers(0, 6)) is None  # type: ignore[arg-type]
    assert not capsys.readouterr().out


if __name__ == "__main__":
    main()
