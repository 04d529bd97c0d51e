"""Whether somebody else is accumulating gradients, so that counting here would count twice."""

from __future__ import annotations

import sys
from typing import Any


def check_nobody_else_accumulates(closure: object) -> None:
    """Raises RuntimeError if Accelerate or Lightning accumulate gradients themselves.

    They call ``step()`` once a window of theirs. Both are asked only if they have been imported.

    Args:
        closure: What ``step()`` was given; Lightning's knows the trainer.
    """
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    if state is not None and state._shared_state:
        steps = state().num_steps
        if steps > 1:
            raise RuntimeError(
                f"gradients are accumulated twice: by Accelerate (gradient_accumulation_steps="
                f"{steps}), which calls step() once a window, and by this optimizer; use one of "
                "them. Nothing was changed"
            )
    for argument in getattr(closure, "args", ()):
        steps = _lightning_batches(argument)
        if steps > 1:
            raise RuntimeError(
                f"gradients are accumulated twice: by Lightning (accumulate_grad_batches={steps}), "
                "which calls step() once a window, and by this optimizer; use one of them. Nothing "
                "was changed"
            )


def _lightning_batches(module: Any) -> int:
    """What a LightningModule's trainer accumulates, 1 for anything else."""
    if not type(module).__mro__[0].__module__ or not hasattr(module, "_trainer"):
        return 1
    return getattr(module._trainer, "accumulate_grad_batches", 1)
