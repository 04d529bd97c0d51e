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
        params: Parameters, named parameters or param groups; of any shape, floating or complex.
        lr: Learning rate, a number or a tensor of one element (default: 1e-3).
        betas: Decay of the mean and of the mean square a step (default: (0.9, 0.999)).
        eps: Added to the root, after bias correction (default: 1e-8).
        weight_decay: L2 penalty, added to the gradient (default: 0).
        amsgrad: Divides by the largest mean square so far (default: False).
        foreach, fused: Validated as torch does; they choose no arithmetic here. With fused,
            GradScaler's scale and overflow flag are read by the kernels.
        maximize: Ascends (default: False).
        capturable: The step can be recorded in a CUDA graph; it counts on the device. On the CPU it
            is left to torch.optim (default: False).
        differentiable: Leaves the step to torch.optim's autograd-aware code (default: False).
        decoupled_weight_decay: Decays the parameter instead, as `AdamW` (default: False).
        backend: "auto", or the name of a backend that must update every parameter.
        state_dtype: torch.float32 keeps the states of 16-bit parameters in fp32 (default: None).

    Raises:
        ValueError, RuntimeError: As torch's; and see `FusedOptimizer` for ours.

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
