"""RMSprop: `torch.optim.RMSprop`, stepped by fused kernels."""

from __future__ import annotations

import torch

from fusedopt.optimizer import FusedOptimizer


class RMSprop(FusedOptimizer, torch.optim.RMSprop, rule="rmsprop"):
    """Gradients divided by a running root mean square.

    ::

        g = grad + weight_decay * p
        v = alpha * v + (1 - alpha) * g^2
        a = alpha * a + (1 - alpha) * g  if centered  else  0
        d = g / (sqrt(v - a^2) + eps)
        b = momentum * b + d
        p = p - lr * (b  if momentum > 0  else  d)

    State: ``step``, ``square_avg``, ``momentum_buffer`` with momentum, ``grad_avg`` when centered.

    Args:
        alpha: Decay of the running averages a step.
        eps: Added to the root.
        momentum: Decay of the momentum buffer a step, 0 for none.
        centered: Subtracts the squared running mean of the gradient.

    References:
        Tieleman, Hinton, "Lecture 6.5: rmsprop", Coursera, 2012. Graves, "Generating Sequences With
        Recurrent Neural Networks", 2013, arXiv:1308.0850 (centered).

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedopt.RMSprop([weight], lr=0.01, centered=True)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """
