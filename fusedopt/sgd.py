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
        momentum: Decay of the momentum buffer a step, 0 for none.
        dampening: Share of the gradient kept out of the buffer after the first step.
        nesterov: Looks ahead by one step of momentum.

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
