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

    Raises:
        RuntimeError: this rank holds nothing of a tensor, and is not asked by those that do.
    """
    if any(spec is not None and spec.mesh.get_coordinate() is None for spec in specs):
        raise RuntimeError(
            "the norm of all gradients cannot be known on a rank that is not in the device mesh of "
            "a parameter; give parameters of other meshes an optimizer of their own, on the ranks "
            "of the mesh. Nothing was changed"
        )
    for spec, row in zip(specs, sums, strict=True):
        if spec is None:
            continue
        for dim, placement in enumerate(spec.placements):
            if not placement.is_replicate():
                dist.all_reduce(row, group=spec.mesh.get_group(dim))


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
    if not hasattr(optimizer, "_onepass"):
        raise TypeError(f"optimizer is a {type(optimizer).__name__}, wanted a fusedopt optimizer")
    onepass = optimizer._need_onepass()
    if onepass.micro_batches and onepass.group is None and not onepass.to_add_up:
        raise RuntimeError(
            f"the window has {onepass.micro_batches} micro-batches that are summed up over the "
            "ranks already; enter accumulating() where a window begins"
        )
    if onepass.group is not None and onepass.group is not model.process_group:
        raise RuntimeError(
            "the window is one of another process group; models that share an optimizer must share "
            "their process group, too"
        )
    if not onepass.core.accumulates:  # a rank without a micro-batch takes part all the same
        onepass.core.accumulates = True
        optimizer._packed = None
    around = onepass.block
    onepass.block = onepass.group = model.process_group
    try:
        with model.no_sync():
            yield
    finally:
        onepass = optimizer._need_onepass()  # load_state_dict() makes another one
        onepass.block = around
        if not onepass.micro_batches:
            onepass.group = around


def add_up_window(optimizer: FusedOptimizer, onepass: OnePass) -> None:
    """Adds up the accumulators and weights of a window over the ranks.

    Raises:
        Exception: a rank cannot step. All of them raise, none is left waiting, and nothing has been
            changed.
    """
    core, group = onepass.core, onepass.group
    params = [p for group_ in optimizer.param_groups for p in group_["params"]]
    failure = None
    try:
        optimizer._fit(_C.Purpose.FLUSH)
    except Exception as error:  # for the others to hear of
        failure = error
    taken = [float(p in optimizer.state and core.taken(p)) for p in params]
    told = [float(failure is not None), *onepass.told(), core.window_weight, *taken]
    everywhere = torch.tensor(told, dtype=torch.float64, device=params[0].device)
    dist.all_reduce(everywhere, group=group)
    failed, micro_batches, given, on_devices, weight, *taken = everywhere.tolist()
    if failure is not None:
        raise failure
    if failed:
        raise RuntimeError(
            f"{failed:.0f} of the other ranks cannot step, and say why. Nothing was changed"
        )
    if not on_devices:
        onepass.check_weights(micro_batches, given)
    members = [p for p, ranks in zip(params, taken, strict=True) if ranks]
    _have_accumulators(optimizer, members)
    sums = [optimizer.state[p]["accumulated_grad"] for p in members]
    # Of DTensors, which tensor parallelism makes, this group's ranks have the same parts.
    sums = [getattr(tensor, "_local_tensor", tensor) for tensor in sums]
    for bucket in _buckets(sums):
        flat = _flatten_dense_tensors(bucket)
        dist.all_reduce(flat, group=group)
        if not core.mean:
            flat /= dist.get_world_size(group)
        torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))
    for param in members:
        core.remember(param, True, core.fresh(param))
    core.window_weight = weight


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
    """Tensors of one dtype and device, in order, a bucket's worth at a time."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        fits = size + tensor.nbytes <= _BUCKET_BYTES
        if bucket and not (fits and _kind(tensor) == _kind(bucket[0])):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


def _kind(tensor: Tensor) -> tuple[torch.dtype, torch.device]:
    return tensor.dtype, tensor.device
