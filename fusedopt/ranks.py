"""Sums over the ranks of a distributed run: those of norms, and those of windows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from fusedopt._extension import _C

# Place of the window's weight in a Verdict's memory; csrc/core/onepass.h.
WEIGHT = slice(0, 8)

if TYPE_CHECKING:
    from fusedopt.onepass import OnePass
    from fusedopt.optimizer import FusedOptimizer

# What is sent at a time: as much as DistributedDataParallel's buckets.
_BUCKET_BYTES = 25 * 2**20


def add_up_shards(specs: list[Any], sums: Tensor) -> None:
    """Adds up rows of sums over the ranks that hold other parts of what was summed.

    Args:
        specs: By row, how the DTensors that were summed are distributed; None for plain tensors.
        sums: One row a spec.
    """
    for spec, row in zip(specs, sums, strict=True):
        if spec is None:
            continue
        for dim, placement in enumerate(spec.placements):
            if not placement.is_replicate():
                dist.all_reduce(row, group=spec.mesh.get_group(dim))


@contextmanager
def accumulating(model: Any, optimizer: FusedOptimizer) -> Iterator[None]:
    """Accumulates a window of a DistributedDataParallel model without communication.

    Every backward inside runs under ``model.no_sync()``; the update adds up the ranks' accumulators
    and weights once, before the norm. Without this, every micro-batch's gradients are averaged over
    the ranks by themselves, which is right as well, and slower.

    Args:
        model: The DistributedDataParallel model.
        optimizer: A fusedopt optimizer of its parameters, with ``accumulation_steps`` or
            ``accumulate()``.

    Raises:
        TypeError: ``model`` or ``optimizer`` is something else.
        RuntimeError: the window has micro-batches from before, which are summed up already.

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
    if not hasattr(optimizer, "_onepass"):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, wanted a fusedopt optimizer")
    onepass = optimizer._need_onepass()
    if onepass.micro_batches and onepass.group is None:
        raise RuntimeError(
            f"the window has {onepass.micro_batches} micro-batches that are summed up over the "
            "ranks already; enter accumulating() where a window begins"
        )
    onepass.group = model.process_group
    try:
        with model.no_sync():
            yield
    finally:
        if not onepass.micro_batches:
            onepass.group = None


def add_up_window(optimizer: FusedOptimizer, onepass: OnePass) -> None:
    """Adds up the accumulators and weights of a window over the ranks."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    device = params[0].device
    taken = [p in optimizer.state and onepass.core.taken(p) for p in params]
    anywhere = torch.tensor(taken, dtype=torch.int32, device=device)
    dist.all_reduce(anywhere, dist.ReduceOp.MAX, group=onepass.group)
    members = [p for p, flag in zip(params, anywhere.tolist(), strict=True) if flag]
    _have_accumulators(optimizer, members)
    sums = [optimizer.state[p]["accumulated_grad"] for p in members]
    for bucket in _buckets(sums):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat, group=onepass.group)
        torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))
    for param in members:
        onepass.core.remember(param, True, onepass.core.fresh(param))
    for verdict in onepass.core.verdicts:
        dist.all_reduce(verdict[WEIGHT].view(torch.float64), group=onepass.group)


def _have_accumulators(optimizer: FusedOptimizer, members: list[Tensor]) -> None:
    """Creates the state of parameters that only other ranks have had gradients of."""
    new = [p for p in members if "accumulated_grad" not in optimizer.state.get(p, {})]
    for param in new:
        param.grad = torch.zeros_like(param)
    if new:
        optimizer._fit(_C.Purpose.ACCUMULATE).created.clear()
    for param in new:
        param.grad = None


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype, in order, a bucket's worth at a time."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.nbytes > _BUCKET_BYTES or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket
