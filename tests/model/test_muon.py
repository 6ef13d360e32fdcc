"""Muon on kernels and vectors."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from src.model.muon import Muon, orthogonalize
from src.model.small_maps import store_by_tap


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 9, 4))


def grouped(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    weights = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": weights}, {"params": [p for p in model.parameters() if p.ndim == 1]}]


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, count: int) -> list[float]:
    inputs, labels = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 4
    losses = []
    for _ in range(count):
        loss = nn.functional.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_kernel_steps_as_torchs_muon_steps_its_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = nn.Parameter(0.3 * torch.randn(8, 3, 3, 3, generator=generator))
    start = kernel.detach().flatten(1).clone()
    matrix, options = nn.Parameter(start.clone()), {"lr": 0.01, "weight_decay": 0.1, "ns_steps": 3}
    optimizers = Muon([kernel], **options), torch.optim.Muon([matrix], **options, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):  # the first step does not feel momentum
        kernel.grad = torch.randn(kernel.shape, generator=generator)
        matrix.grad = kernel.grad.flatten(1).clone()
        for optimizer in optimizers:
            optimizer.step()
    # Both are rounded to bfloat16 on the way.
    assert (kernel.flatten(1) - matrix).norm() < 0.05 * (matrix - start).norm()


def test_vectors_step_as_adam() -> None:
    generator, betas = torch.Generator().manual_seed(0), (0.8, 0.95)
    ours, theirs = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))
    optimizers = Muon([ours], lr=0.01, betas=betas), torch.optim.Adam([theirs], lr=0.01, betas=betas)
    for _ in range(3):
        ours.grad = torch.randn(5, generator=generator)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_it_learns_and_continues_from_its_state() -> None:
    straight = network()
    losses = steps(straight, Muon(grouped(straight), lr=0.02), 6)
    assert losses[-1] < 0.8 * losses[0]
    broken = network()
    first = Muon(grouped(broken), lr=0.02)
    steps(broken, first, 3)
    second = Muon(grouped(broken), lr=0.02)
    second.load_state_dict(first.state_dict())
    steps(broken, second, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), broken.parameters(), strict=True))


def test_what_has_no_gradient_stays_and_has_no_state() -> None:
    model = network()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    optimizer = Muon(grouped(model))
    steps(model, optimizer, 2)
    assert torch.equal(model[0].weight, before)
    assert set(optimizer.state) == set(model[2].parameters())


def to_channels_last(weight: torch.Tensor) -> None:
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rearrange", [store_by_tap, to_channels_last])
def test_order_in_memory_does_not_matter(rearrange: Callable[[torch.Tensor], None]) -> None:
    results = []
    for change in (rearrange, lambda weight: None):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(4, 6, 3, 3))
        before = weight.detach().clone()
        change(weight)
        optimizer = Muon([weight], lr=0.1)
        for _ in range(2):  # the second step has momentum
            weight.grad = torch.linspace(-1, 1, weight.numel()).sin().view(weight.shape)
            optimizer.step()
        assert not torch.allclose(weight, before, atol=1e-3)
        results.append(weight.detach())
    # Orthogonal to bfloat16's precision, in which the columns' order does not matter either.
    torch.testing.assert_close(*results, rtol=0, atol=2e-3)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40)])
def test_more_iterations_bring_singular_values_nearer_to_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    spread = []
    for steps in (0, 1, 3, 5):
        values = torch.linalg.svdvals(orthogonalize(matrix, steps).float())
        spread.append((values.max() / values.min()).item())
    assert spread == sorted(spread, reverse=True)
    assert values.min() > 0.5
    assert values.max() < 1.3


@pytest.mark.parametrize("steps", [3, 5, 9])
@pytest.mark.parametrize("shape", [(256, 2304), (300, 256)])
def test_rounding_does_not_grow_where_singular_values_differ_a_thousandfold(shape: tuple[int, int], steps: int) -> None:
    torch.manual_seed(0)
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    matrix = (left * torch.logspace(0, -3, min(shape)) @ right).bfloat16()
    largest = torch.linalg.svdvals(orthogonalize(matrix, steps).float()).max()
    assert largest < 1.3  # an exact iteration's are 1.2 at most


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(256, 2304), (300, 256)])
def test_iterations_that_go_together_are_those_one_after_the_other(shape: tuple[int, int], steps: int) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    a, b, c = 3.4445, -4.7750, 2.0315
    exact = matrix.double() / matrix.double().norm()
    for _ in range(steps):
        gram = exact @ exact.t()
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    assert (orthogonalize(matrix, steps) - exact).norm() < 0.05 * exact.norm()  # 0.002 to 0.03, in bfloat16
