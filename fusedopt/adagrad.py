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
        params: Parameters, named parameters or param groups; of any shape, floating or complex.
        lr: Learning rate, a number or a tensor of one element (default: 1e-2).
        lr_decay: Decay of the learning rate a step (default: 0).
        weight_decay: L2 penalty, added to the gradient (default: 0).
        initial_accumulator_value: What ``sum`` starts at (default: 0).
        eps: Added to the root (default: 1e-10).
        foreach, fused: Validated as torch does; they choose no arithmetic here. With fused,
            GradScaler's scale and overflow flag are read by the kernels.
        maximize: Ascends (default: False).
        differentiable: Leaves the step to torch.optim's autograd-aware code (default: False).
        backend: "auto", or the name of a backend that must update every parameter.
        state_dtype: torch.float32 keeps the states of 16-bit parameters in fp32 (default: None).

    Raises:
        ValueError, RuntimeError: As torch's; and see `FusedOptimizer` for ours.

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
