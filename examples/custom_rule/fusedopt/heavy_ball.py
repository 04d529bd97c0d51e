"""The heavy ball, stepped by fused kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from fusedopt.optimizer import FusedOptimizer


class _HeavyBall(torch.optim.Optimizer):
    """In plain torch: what torch.optim's class is for a rule that torch has."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float = 1e-3, momentum: float = 0.9
    ) -> None:
        if lr < 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"Invalid momentum value: {momentum}, wanted: 0 to below 1")
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the parameters that kernels cannot update, and is what tests compare with."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.grad is not None):
                buffer = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
                buffer.mul_(group["momentum"]).add_(group["lr"] * param.grad)
                param.sub_(buffer)
        return loss


class HeavyBall(FusedOptimizer, _HeavyBall, rule="heavy_ball"):
    """Momentum with the learning rate inside the buffer.

    ::

        b = momentum * b + lr * grad
        p = p - b

    State: ``momentum_buffer``, in the parameter's dtype.

    Args:
        momentum: Decay of the buffer a step.

    References:
        Polyak, "Some methods of speeding up the convergence of iteration methods", 1964.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedopt.HeavyBall([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """
