"""Adam: `torch.optim.Adam`, stepped by fused kernels."""

from __future__ import annotations

import torch

from fusedopt.optimizer import FusedOptimizer


class Adam(FusedOptimizer, torch.optim.Adam, rule="adam"):
    """Adam: a bias-corrected mean of the gradient over the root of that of its square.

    ::

        g = grad + weight_decay * p                 (p = p * (1 - lr * weight_decay) if decoupled)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        w = max(w, v)  if amsgrad  else  v
        p = p - lr / (1 - beta1^step) * m / (sqrt(w) / sqrt(1 - beta2^step) + eps)

    State: ``step``, ``exp_avg``, ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq``.

    Args:
        betas: Decay of the mean and of the mean square a step.
        eps: Added to the root, after bias correction.
        amsgrad: Divides by the largest mean square so far.
        decoupled_weight_decay: Decays the parameter instead, as `AdamW`.

    References:
        Kingma, Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, arXiv:1412.6980. Reddi,
        Kale, Kumar, "On the Convergence of Adam and Beyond", ICLR 2018 (amsgrad).

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedopt.Adam([weight], lr=1e-3)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """
