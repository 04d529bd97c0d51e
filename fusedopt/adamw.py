"""AdamW: `torch.optim.AdamW`, stepped by fused kernels."""

from __future__ import annotations

import torch

from fusedopt.adam import Adam


class AdamW(Adam, torch.optim.AdamW, rule="adamw"):
    """Adam with decoupled weight decay.

    ::

        p = p * (1 - lr * weight_decay)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        w = max(w, v)  if amsgrad  else  v
        p = p - lr / (1 - beta1^step) * m / (sqrt(w) / sqrt(1 - beta2^step) + eps)

    State: ``step``, ``exp_avg``, ``exp_avg_sq`` and, with amsgrad, ``max_exp_avg_sq``.

    Args:
        betas: Decay of the mean and of the mean square a step.
        eps: Added to the root, after bias correction.
        weight_decay: Decay of the parameter a step, in units of lr.
        amsgrad: Divides by the largest mean square so far.

    References:
        Loshchilov, Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, arXiv:1711.05101.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = fusedopt.AdamW([weight], lr=1e-3, weight_decay=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> bool((weight < 1).all())
        True
    """
