"""Muon for a network that also has convolutions, biases and norms, on torch's own Muon.

Source: K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class Muon(torch.optim.Muon):
    """Turn every weight's step into an orthogonal one; biases and norms take Adam's.

    torch's Muon wants matrices only. Here a convolution's kernels count as one matrix, a row an output channel.

    Args:
        params: Parameters or groups of them, each group all matrices and kernels or all vectors.
        lr: Learning rate of both kinds, made comparable by scaling Muon's steps to the size of AdamW's.
        weight_decay: Decoupled weight decay of matrices and kernels.
        momentum: Momentum of matrices and kernels.
        betas: Decay rates of Adam's two averages, for vectors.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        # torch's own constructor refuses whatever is no matrix, so it is given none and the groups come after it.
        groups = list(params)
        placeholder = torch.nn.Parameter(torch.empty(0, 0))
        super().__init__([placeholder], lr, weight_decay, momentum, adjust_lr_fn="match_rms_adamw")
        self.defaults["betas"] = betas
        self.param_groups.clear()
        for group in groups if isinstance(groups[0], dict) else [{"params": groups}]:
            self.add_param_group(group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        every = self.param_groups
        try:
            for group in every:
                trained = [parameter for parameter in group["params"] if parameter.grad is not None]
                if all(parameter.ndim > 1 for parameter in trained):
                    self._step_matrices(group, trained)
                else:
                    self._step_vectors(group, trained)
        finally:
            self.param_groups = every
        return loss

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        matrices = []
        for parameter in parameters:
            matrix = parameter.flatten(1)  # a copy, where memory has another order
            assert parameter.grad is not None
            matrix.grad = parameter.grad.flatten(1)
            if parameter in self.state:
                self.state[matrix] = self.state[parameter]
            matrices.append(matrix)
        self.param_groups = [{**group, "params": matrices}]
        super().step()
        for parameter, matrix in zip(parameters, matrices, strict=True):
            self.state[parameter] = self.state.pop(matrix)
            parameter.copy_(matrix.view(parameter.shape))

    def _step_vectors(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            if parameter not in self.state:
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.zeros(()), **zeros}
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adam(
            parameters, [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [],
            [state["step"] for state in states],
            amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=0.0, eps=1e-8, maximize=False,
        )  # fmt: skip
