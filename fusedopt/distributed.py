"""Sums over the ranks of a distributed run: of norms, numbers and accumulators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _take_tensors, _unflatten_dense_tensors

# What is sent at a time: as much as DistributedDataParallel's buckets.
_BUCKET_BYTES = 25 * 2**20


# How the tensors that were summed are distributed, if they are DTensors, and the sum.
_Rows = list[tuple[Any, Tensor]]


def check_groups(norm_group: Any) -> tuple[Any, ...]:
    """The process groups that ``norm_group`` names.

    Raises:
        ValueError: it is something else, or they have more than this rank in common.
    """
    groups = tuple(norm_group) if isinstance(norm_group, (list, tuple)) else (norm_group,)
    for group in groups:
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(
                f"norm_group={norm_group!r} must be a process group that this rank is in, a list "
                "of them, or None; a DeviceMesh has them in mesh.get_group(dim)"
            )
    for number, group in enumerate(groups):
        for other in groups[:number]:
            if len(set(_ranks(group)) & set(_ranks(other))) > 1:
                raise ValueError(
                    f"norm_group: the groups of ranks {_ranks(other)} and {_ranks(group)} share "
                    "more than this rank, so that sums would be counted twice; give the "
                    "dimensions of a mesh, or one group of all"
                )
    return groups


def add_up_shards(
    groups: Sequence[Any], specs: list[list[Any]], sums: list[Tensor]
) -> list[Tensor]:
    """Adds up rows of sums over the ranks that hold other parts of what was summed.

    Args:
        groups: Process groups over which all that was summed differs, but for DTensors whose mesh
            has the same ranks.
        specs: By device and row, how the DTensors that were summed are distributed; None for plain
            tensors.
        sums: By device, one row a spec.

    Returns:
        Tensors whose rows come to the total.

    Raises:
        RuntimeError: this rank holds nothing of a tensor, and is not asked by those that do.
    """
    rows = [
        row
        for some, tensor in zip(specs, sums, strict=True)
        for row in zip(some, tensor, strict=True)
    ]
    if any(spec is not None and spec.mesh.get_coordinate() is None for spec, _ in rows):
        raise RuntimeError(
            "the norm of all gradients cannot be known on a rank that is not in the device mesh of "
            "a parameter; give parameters of other meshes an optimizer of their own, on the ranks "
            "of the mesh. Nothing was changed"
        )
    for spec, row in rows:
        if spec is None:
            continue
        for dim, placement in enumerate(spec.placements):
            if not placement.is_replicate():
                dist.all_reduce(row, group=spec.mesh.get_group(dim))
    return [_add_up_over(groups, rows)] if groups else sums


def _add_up_over(groups: Sequence[Any], rows: _Rows) -> Tensor:
    """The sum of all rows of all ranks.

    All ranks have the same bits, whatever the order in which the groups' backends would add up:
    replicas of a parameter lie in different groups, and must not drift apart.
    """
    device = _device_of(groups[0], rows[0][1].device)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for spec, row in rows:
        if spec is None or _counts(spec.mesh.mesh.flatten().tolist(), groups):
            total = total + row.to(device)
    for group in groups:
        parts = total.new_empty(dist.get_world_size(group), 2)
        dist.all_gather(list(parts), total, group=group)
        total = parts.sum(0)
    return total.view(1, 2)


def _counts(ranks: list[int], groups: Sequence[Any]) -> bool:
    """Whether it is for this rank to bring in a sum that these ranks have in common."""
    return all(min(set(ranks) & set(_ranks(group))) == dist.get_rank() for group in groups)


def _ranks(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)


def _device_of(group: Any, device: torch.device) -> torch.device:
    """This device, if the group's backends serve it; otherwise one that they do."""
    served = [served.type for served in group._device_types]
    return device if device.type in served or not served else torch.device(served[0])


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
