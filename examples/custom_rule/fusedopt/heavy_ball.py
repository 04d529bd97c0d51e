"""The heavy ball, stepped by fused kernels."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fusedopt.optimizer import FusedOptimizer


class _HeavyBall(torch.optim.Optimizer):
    """Its constructor, which for a rule that torch has would be torch.optim's."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float = 1e-3, momentum: float = 0.9
    ) -> None:
        if lr < 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"Invalid momentum value: {momentum}, wanted: 0 to below 1")
        super().__init__(params, {"lr": lr, "momentum": momentum})


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
