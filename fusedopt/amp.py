"""torch's AMP protocol for optimizers constructed with ``fused=True``.

Before such an optimizer's step, `torch.amp.GradScaler` sets two tensors on it: ``grad_scale``, by
which the gradients are still multiplied, and ``found_inf``, non-zero if one is not finite.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fusedopt.optimizer import FusedOptimizer


def overflowed(optimizer: FusedOptimizer) -> bool:
    """Whether GradScaler found a gradient that is not finite, so that the step must not happen."""
    found_inf: Tensor | None = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item() != 0)


def unscale_(optimizer: FusedOptimizer) -> None:
    """Divides the gradients by ``grad_scale``, for good, as torch's fused step does."""
    grad_scale: Tensor | None = getattr(optimizer, "grad_scale", None)
    if grad_scale is None:
        return
    grads: defaultdict[tuple[torch.device, torch.dtype], list[Tensor]] = defaultdict(list)
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None:
                grad = param.grad._values() if param.grad.is_sparse else param.grad
                grads[grad.device, grad.dtype].append(grad)
    inverse = grad_scale.double().reciprocal().float()
    for (device, _), tensors in grads.items():
        not_finite = torch.zeros((), device=device)  # asked and answered: GradScaler looked
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, not_finite, inverse.to(device))
