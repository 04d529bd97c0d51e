"""Detects gradient accumulation by a training framework, with which counting here counts twice."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def check_no_framework_accumulates(closure: Callable[[], Any] | None = None) -> None:
    """Raises RuntimeError if Accelerate or Lightning accumulates gradients.

    What they say of themselves is asked where a window begins. Accelerate's state counts while one
    of its data loaders is being read, because the settings alone outlive what they were made for.
    The same state tells of transformers' Trainer, but only in the middle of the Trainer's window.

    Args:
        closure: What ``step()`` was given. Lightning's, a `functools.partial`, knows its module.
    """
    accelerate = sys.modules.get("accelerate.state")
    if accelerate is not None and (state := accelerate.GradientState()).in_dataloader:
        if state.num_steps > 1:
            raise _twice("Accelerate", f"gradient_accumulation_steps={state.num_steps}")
        if not state.sync_gradients:
            raise _twice("transformers' Trainer", "gradient_accumulation_steps")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        if (lightning := sys.modules.get(name)) is None:
            continue
        for argument in getattr(closure, "args", ()):
            if isinstance(argument, lightning.LightningModule):
                steps = argument.trainer.accumulate_grad_batches
                if steps > 1:
                    raise _twice("Lightning", f"accumulate_grad_batches={steps}")


def _twice(who: str, option: str) -> RuntimeError:
    return RuntimeError(
        f"gradients are accumulated twice: by {who} ({option}), which calls step() once a window, "
        "and by this optimizer; use one of them. Nothing was changed"
    )
