"""Gradients that torch's GradScaler leaves to a step, where kernels do not unscale them.

Before the step of an optimizer constructed with ``fused=True``, `torch.amp.GradScaler` sets two
tensors on it: ``grad_scale``, by which the gradients are still multiplied, and ``found_inf``,
non-zero if one is not finite. Kernels on a device read them there; here is what the CPU driver and
parameters that torch steps need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor


def unscale_(params: Iterable[Tensor], grad_scale: Tensor) -> None:
    """Divides the gradients by ``grad_scale``, for good, as torch's fused step does."""
    grads: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for param in params:
        if param.grad is not None:
            grad = param.grad._values() if param.grad.is_sparse else param.grad
            grads[grad.device, grad.dtype].append(grad)
    inverse = grad_scale.double().reciprocal().float()
    for (device, _), tensors in grads.items():
        found_inf = torch.zeros((), device=device)  # required by the op; GradScaler has checked
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found_inf, inverse.to(device))
