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
        params: Parameters, named parameters or param groups; of any shape, floating or complex.
        lr: Learning rate, a number or a tensor of one element (default: 1e-2).
        alpha: Decay of the running averages a step (default: 0.99).
        eps: Added to the root (default: 1e-8).
        weight_decay: L2 penalty, added to the gradient (default: 0).
        momentum: Decay of the momentum buffer a step, 0 for none (default: 0).
        centered: Subtracts the squared running mean of the gradient (default: False).
        capturable: The step can be recorded in a CUDA graph; it counts on the device. On the CPU it
            is left to torch.optim (default: False).
        foreach: Validated as torch does; it chooses no arithmetic here.
        maximize: Ascends (default: False).
        differentiable: Leaves the step to torch.optim's autograd-aware code (default: False).
        backend: "auto", or the name of a backend that must update every parameter.
        state_dtype: torch.float32 keeps the states of 16-bit parameters in fp32 (default: None).

    Raises:
        ValueError, RuntimeError: As torch's; and see `FusedOptimizer` for ours.

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
