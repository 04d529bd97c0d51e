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
        params: Parameters, named parameters or param groups; of any shape, floating or complex.
        lr: Learning rate, a number or a tensor of one element (default: 1e-3).
        betas: Decay of the mean and of the mean square a step (default: (0.9, 0.999)).
        eps: Added to the root, after bias correction (default: 1e-8).
        weight_decay: Decay of the parameter a step, in units of lr (default: 1e-2).
        amsgrad: Divides by the largest mean square so far (default: False).
        maximize: Ascends (default: False).
        foreach, fused: Validated as torch does; they choose no arithmetic here. With fused,
            GradScaler's scale and overflow flag are read by the kernels.
        capturable: The step can be recorded in a CUDA graph; it counts on the device. On the CPU it
            is left to torch.optim (default: False).
        differentiable: Leaves the step to torch.optim's autograd-aware code (default: False).
        backend: "auto", or the name of a backend that must update every parameter.
        state_dtype: torch.float32 keeps the states of 16-bit parameters in fp32 (default: None).

    Raises:
        ValueError, RuntimeError: As torch's; and see `FusedOptimizer` for ours.

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
