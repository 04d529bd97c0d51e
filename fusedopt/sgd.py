"""SGD: `torch.optim.SGD`, stepped by fused kernels."""

from __future__ import annotations

import torch

from fusedopt.optimizer import FusedOptimizer


class SGD(FusedOptimizer, torch.optim.SGD, rule="sgd"):
    """Stochastic gradient descent, optionally with (Nesterov) momentum.

    ::

        g = grad + weight_decay * p
        b = momentum * b + (1 - dampening) * g      (first step: b = g)
        p = p - lr * (g + momentum * b  if nesterov  else  b  if momentum  else  g)

    State: ``momentum_buffer`` with momentum, in the parameter's dtype.

    Args:
        params: Parameters, named parameters or param groups; of any shape, floating or complex.
        lr: Learning rate, a number or a tensor of one element (default: 1e-3).
        momentum: Decay of the momentum buffer a step, 0 for none (default: 0).
        dampening: Share of the gradient kept out of the buffer after the first step (default: 0).
        weight_decay: L2 penalty, added to the gradient (default: 0).
        nesterov: Looks ahead by one step of momentum (default: False).
        maximize: Ascends (default: False).
        foreach, fused: Validated as torch does; they choose no arithmetic here. With fused,
            GradScaler's scale and overflow flag are read by the kernels.
        differentiable: Leaves the step to torch.optim's autograd-aware code (default: False).
        backend: "auto", or the name of a backend that must update every parameter.
        state_dtype: torch.float32 keeps the states of 16-bit parameters in fp32 (default: None).

    Raises:
        ValueError, RuntimeError: As torch's; and see `FusedOptimizer` for ours.

    References:
        Sutskever, Martens, Dahl, Hinton, "On the importance of initialization and momentum in deep
        learning", ICML 2013.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedopt.SGD([weight], lr=0.1, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """
