"""Windows of micro-batches of a DistributedDataParallel model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fusedopt.optimizer import FusedOptimizer, fused_optimizer


@contextmanager
def accumulating(model: Any, optimizer: FusedOptimizer) -> Iterator[None]:
    """Accumulates windows of a DistributedDataParallel model without communication.

    Every backward inside runs under ``model.no_sync()``; the update adds up the ranks' accumulators
    and weights once, before the norm, and waits for the device to learn which parameters had
    gradients on some rank. Ranks may have different weights and numbers of micro-batches; all of
    them step. ``accumulation_reduction="sum"`` means the ranks' mean of these sums, as
    DistributedDataParallel does. In the middle of a window a ``state_dict()`` has the sums of one
    rank: save each rank's, or save after a step.

    Without this, every micro-batch's gradients are averaged over the ranks by themselves. That is
    right as well if a micro-batch has the same weight on all ranks, and slower.

    Args:
        model: The DistributedDataParallel model.
        optimizer: A fusedopt optimizer of its parameters, with ``accumulation_steps`` or
            ``accumulate()``.

    Raises:
        TypeError: ``model`` or ``optimizer`` is something else.
        RuntimeError: the window has micro-batches from before, which are summed up already, or of
            other ranks.

    Example:
        >>> import fusedopt
        >>> def train_window(ddp_model, optimizer, micro_batches):
        ...     with fusedopt.accumulating(ddp_model, optimizer):
        ...         for inputs, tokens in micro_batches:
        ...             ddp_model(inputs).mean().backward()
        ...             optimizer.accumulate(weight=tokens)
        ...         optimizer.step()
    """
    if not isinstance(model, torch.nn.parallel.DistributedDataParallel):
        raise TypeError(
            f"model is a {type(model).__name__}; accumulating() is for DistributedDataParallel, "
            "whose backward would communicate. Other models need nothing around their window"
        )
    optimizer = fused_optimizer(optimizer, "accumulating()")
    with optimizer._accumulating_over(model.process_group), model.no_sync():
        yield
