"""Adagrad: `torch.optim.Adagrad`, stepped by fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedopt.optimizer import FusedOptimizer


class Adagrad(FusedOptimizer, torch.optim.Adagrad, rule="adagrad"):
    """A learning rate a coordinate, from the sum of its squared gradients.

    ::

        g   = grad + weight_decay * p
        sum = sum + g^2
        p   = p - lr / (1 + (step - 1) * lr_decay) * g / (sqrt(sum) + eps)

    State: ``step`` and ``sum``, the latter in the parameter's dtype.

    Args:
        lr_decay: Decay of the learning rate a step.
        initial_accumulator_value: What ``sum`` starts at.
        eps: Added to the root.

    References:
        Duchi, Hazan, Singer, "Adaptive Subgradient Methods for Online Learning and Stochastic
        Optimization", JMLR 12, 2011.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedopt.Adagrad([weight], lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """

    def _initial_state(self, param: Tensor, name: str) -> Tensor:
        value = self.defaults["initial_accumulator_value"]
        start = complex(value, value) if param.is_complex() else value
        dtype = self._dtype_of_states(param)
        return torch.full_like(param, start, dtype=dtype, memory_format=torch.preserve_format)
