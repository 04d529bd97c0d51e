"""Sums over the ranks of a distributed run: of norms, numbers and accumulators."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

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


def add_up_numbers(numbers: list[float], device: torch.device, group: Any) -> list[float]:
    """The sums of these numbers over a group's ranks; waits for them."""
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums, group=group)
    return sums.tolist()


def add_up_tensors(tensors: list[Tensor], group: Any, *, mean: bool) -> None:
    """Replaces tensors by their sums over a group's ranks, or by the means.

    Of a DTensor, which tensor parallelism makes, this group's ranks have the same part.
    """
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    for device in dict.fromkeys(tensor.device for tensor in local):
        there = [tensor for tensor in local if tensor.device == device]
        for bucket in _take_tensors(there, _BUCKET_BYTES):  # each of one dtype
            flat = _flatten_dense_tensors(bucket)
            dist.all_reduce(flat, group=group)
            if mean:
                flat /= dist.get_world_size(group)
            torch._foreach_copy_(bucket, list(_unflatten_dense_tensors(flat, bucket)))
