"""torch.amp.GradScaler, whose unscaling and checking the step does in its own passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from fusedopt.optimizer import FusedOptimizer, fused_optimizer


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` without its pass over the gradients.

    `step` hands the scale to a fusedopt optimizer, whose kernels divide by it, find gradients that
    are not finite and skip the step then; `update` asks the optimizer what they found. ``.grad``
    stays scaled. Other optimizers are served as torch does, and so are fusedopt's after
    ``unscale_()``.

    Args:
        As torch.amp.GradScaler's.

    Example:
        >>> import torch, fusedopt
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> optimizer = fusedopt.SGD([weight], lr=0.5, max_grad_norm=1.0)
        >>> scaler = fusedopt.GradScaler("cpu")
        >>> scaler.scale(weight.square().sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> round(weight.item(), 3), optimizer.grad_norm.item()
        (0.5, 2.0)
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch's: steps unless a gradient is not finite. Does not wait for the device.

        Returns:
            What ``optimizer.step()`` returns; with a closure, as torch's, an error.
        """
        if not self._enabled or not isinstance(optimizer, FusedOptimizer):
            return super().step(optimizer, *args, **kwargs)
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is not OptState.READY or "closure" in kwargs or args:
            loss = super().step(optimizer, *args, **kwargs)
            if optimizer.norm_group:  # unscale_() has asked this rank's gradients alone
                self._note(optimizer)
            return loss
        self._hand_over(optimizer, lambda: optimizer.step(**kwargs))
        state["stage"] = OptState.STEPPED
        return None

    def accumulate(self, optimizer: FusedOptimizer, weight: float | Tensor = 1.0) -> None:
        """``optimizer.accumulate(weight)`` of gradients that are still scaled.

        A micro-batch with a gradient that is not finite is left out, and its weight not counted.
        """
        fused_optimizer(optimizer, "accumulate()")
        if not self._enabled:
            return optimizer.accumulate(weight)
        return self._hand_over(optimizer, lambda: optimizer.accumulate(weight))

    def _hand_over(self, optimizer: FusedOptimizer, call: Any) -> None:
        """Calls with the scale at hand, and remembers what was found."""
        given, optimizer = optimizer, fused_optimizer(optimizer, "step()")
        if optimizer._in_backward is not None:
            optimizer._in_backward.refuse_scaler()
        self._check_scale_growth_tracker("step")
        extras = optimizer._need_extras()
        extras.adopt(extras.options, check=True)
        optimizer.grad_scale = self._get_scale_async()  # type: ignore[attr-defined]
        optimizer.found_inf = None  # type: ignore[attr-defined]
        try:
            call()
        finally:
            del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
        if not extras.flushed:  # of accumulators alone, whose micro-batches have been asked about
            self._note(given)

    def _note(self, optimizer: FusedOptimizer) -> None:
        """Remembers what the optimizer has found."""
        found = self._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
        for found_inf in fused_optimizer(optimizer, "step()")._need_extras().left_out():
            before = found.get(found_inf.device)
            both = found_inf if before is None else torch.maximum(before, found_inf)
            found[found_inf.device] = both
