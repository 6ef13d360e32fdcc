"""Muon for a network that also has convolutions, biases and norms.

Source: K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024, for the idea and the
coefficients; J. Liu and others, "Muon is Scalable for LLM Training", 2025, for the size of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from src.replay import Replay, side_by_side

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # lift small singular values fastest, at the price of ending around 1
_LARGE = 256  # rows from which it shows how long a product takes


class Muon(torch.optim.Optimizer):
    """Turn every weight's step into an orthogonal one; biases and norms take Adam's.

    torch's Muon wants matrices only. Here a convolution's kernels count as one matrix, a row an output channel, and
    nothing is copied to make it one where the kernels lie in memory channels last.

    Args:
        params: Parameters or groups of them: matrices, kernels and vectors.
        lr: Learning rate of both kinds, made comparable by scaling Muon's steps to the size of AdamW's.
        weight_decay: Decoupled weight decay of matrices and kernels.
        momentum: Momentum of matrices and kernels, Nesterov's.
        ns_steps: Newton-Schulz iterations that make a step orthogonal; fewer are faster and less exact.
        betas: Decay rates of Adam's two averages, for vectors.

    Raises:
        ValueError: A setting is outside its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        for name, value, in_range in (
            ("learning rate", lr, lr >= 0),
            ("weight decay", weight_decay, weight_decay >= 0),
            ("momentum", momentum, 0 <= momentum < 1),
            ("number of iterations", ns_steps, ns_steps >= 1),
            ("betas", betas, all(0 <= beta < 1 for beta in betas)),
        ):
            if not in_range:
                raise ValueError(f"Invalid {name}: {value}")
        settings = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "ns_steps": ns_steps, "betas": betas}
        super().__init__(params, settings)
        self.cuda_graphs = False
        """Whether to record orthogonal steps on a GPU, and to repeat them: some twenty launches a matrix."""
        self._trained = 0
        self._steps_replay = Replay(_orthogonal_steps, lambda: self._trained)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = [[own for own in group["params"] if own.grad is not None] for group in self.param_groups]
        self._trained = sum(map(len, every))  # another number begins another stage, and what was recorded is forgotten
        for group, trained in zip(self.param_groups, every, strict=True):
            matrices = [parameter for parameter in trained if parameter.ndim > 1]
            vectors = [parameter for parameter in trained if parameter.ndim <= 1]
            if matrices:
                self._step_matrices(group, matrices)
            if vectors:
                self._step_vectors(group, vectors)
        return loss

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momenta = [self._state(parameter, "momentum_buffer")[0] for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        recorded = self.cuda_graphs and parameters[0].is_cuda
        orthogonal_steps = self._steps_replay if recorded else _orthogonal_steps
        for parameter, step in zip(parameters, orthogonal_steps(group["ns_steps"], *ahead), strict=True):
            longer_side = max(len(step), step[0].numel())
            rate = group["lr"] * 0.2 * longer_side**0.5  # an orthogonal step of the root mean square of AdamW's
            parameter.add_(step, alpha=-rate)

    def _step_vectors(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        averages = [self._state(parameter, "exp_avg", "exp_avg_sq") for parameter in parameters]
        counts = [self._count(parameter) for parameter in parameters]
        beta1, beta2 = group["betas"]
        adam(
            parameters, [parameter.grad for parameter in parameters if parameter.grad is not None],
            [average for average, _ in averages], [square for _, square in averages], [], counts,
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=0.0, eps=1e-8, maximize=False,
            fused=parameters[0].is_cuda or None,
        )  # fmt: skip

    def _count(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        place = parameter.device if parameter.is_cuda else torch.device("cpu")  # where torch's Adam wants it
        state["step"] = state["step"].to(place) if "step" in state else torch.zeros((), device=place)
        return state["step"]

    def _state(self, parameter: Tensor, *names: str) -> list[Tensor]:
        state = self.state[parameter]
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(parameter)
        return [state[name] for name in names]


def _orthogonal_steps(steps: int, *updates: Tensor) -> list[Tensor]:
    """Make updates of matrices and kernels orthogonal, each in its own shape, type and order in memory."""

    def orthogonal(update: Tensor) -> Tensor:
        return _as_kernels(orthogonalize(_as_matrix(update.bfloat16()), steps).to(update.dtype), update.shape)

    return side_by_side(orthogonal, updates)  # one matrix after the other would leave most of a GPU idle


def orthogonalize(matrix: Tensor, steps: int) -> Tensor:
    """Bring every singular value of a matrix (rows, columns) near 1, in bfloat16.

    An iteration multiplies the matrix from the left by a polynomial of its Gram matrix (rows × rows). Where there are
    many rows, polynomials are multiplied first, and the matrix by their product once, which pays from one and a half
    times as many columns as rows: nine times, as kernels have, it halves the work. Rounding errors of the Gram matrix
    grow twelvefold an iteration, so that it is made anew from the matrix after three of them, and then after every
    second; after every third some matrices were seen to explode by the ninth. Small matrices, which take no time, are
    spared the errors: theirs is made anew each time.

    Args:
        matrix: Of any scale, in bfloat16; the order of its columns does not matter to the others.
        steps: Newton-Schulz iterations of degree five.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    wide = wide / wide.norm().clamp(min=1e-7)
    done = 0
    while done < steps:
        together = min((2 if done else 3) if len(wide) >= _LARGE else 1, steps - done)
        wide = _polynomials(wide @ wide.t(), together) @ wide
        done += together
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.t()


def _polynomials(gram: Tensor, steps: int) -> Tensor:
    """Multiply the polynomials of so many iterations that start from a matrix with this Gram matrix."""
    product = polynomial = _polynomial(gram)
    for _ in range(steps - 1):
        gram = polynomial @ gram @ polynomial  # which is symmetric, and so are its powers
        polynomial = _polynomial(gram)
        product = polynomial @ product
    return product


def _polynomial(gram: Tensor) -> Tensor:
    a, b, c = _COEFFICIENTS
    found = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    found.diagonal().add_(a)
    return found


def _as_matrix(weight: Tensor) -> Tensor:
    """Lay out kernels (O, I, h, w) as (O, h · w · I); a matrix is one already."""
    return weight.flatten(1) if weight.ndim < 3 else weight.movedim(1, -1).flatten(1)


def _as_kernels(matrix: Tensor, shape: torch.Size) -> Tensor:
    if len(shape) < 3:
        return matrix.view(shape)
    return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
