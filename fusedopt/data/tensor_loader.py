"""TensorLoader: batches gathered from tensors in memory, at memory speed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import Dataset, StackDataset, TensorDataset

from fusedopt import _C

from .device_prefetcher import MORE_BUFFERS, ahead, checked_depth
from .lanes import lane_to
from .prefetching import END
from .sampling import Distributed, Epoch, InOrder, Order, Sampled, State

# An epoch, and the number of its batches that were made.
Position = tuple[Epoch, int]


class TensorLoader:
    """Batches of rows of tensors, as a ``DataLoader`` over a ``TensorDataset`` makes them.

    One call gathers each batch, on all threads, into buffers that are reused once no tensor in them
    is alive. Batches, their order, and the random numbers drawn are those of
    ``DataLoader(TensorDataset(*tensors), batch_size, shuffle, drop_last=drop_last,
    generator=generator)``. You may keep batches: they are never overwritten.

    Args:
        *tensors: of one length in their first dimension, on the CPU, in memory or mapped from a
            file (``torch.from_file``, ``torch.from_numpy(numpy.memmap(...))``). Batches are lists
            of as many tensors. Or one mapping of names to tensors; batches are dicts then.
        batch_size: rows of a batch. Default: 1.
        shuffle: a new random order in every epoch. Default: False.
        drop_last: leaves out the last batch if it is smaller. Default: False.
        generator: draws the order; None seeds one from torch's default generator.
        sampler: an iterable of row numbers, such as a ``torch.utils.data.Sampler``, in place of
            `shuffle`. `set_epoch` calls its ``set_epoch``.
        rank: of this process, which gets the rows that ``DistributedSampler`` would give it; call
            `set_epoch` before every epoch. Requires `world_size`.
        world_size: number of processes.
        seed: of the order that all ranks share. Default: 0.
        device: a GPU. Batches are gathered into page-locked buffers and copied to it ahead of time,
            as by `DevicePrefetcher`. Default: None, batches stay in host memory.
        depth: how many batches are made ahead for a GPU. Default: 2.
        transform: is called with every batch, on its device, and returns the batch to yield.

    Raises:
        TypeError: something is not a tensor.
        ValueError: tensors differ in length, are not on the CPU, or have rows that are scattered
            in memory; arguments exclude each other; a loaded state is of another loader.
        IndexError: while iterating: the sampler yields a row number that is out of range.
        RuntimeError: the device does not exist.

    Example:
        >>> x, y = torch.arange(12.0).view(6, 2), torch.arange(6)
        >>> for inputs, targets in TensorLoader(x, y, batch_size=4):
        ...     print(tuple(inputs.shape), targets.tolist())
        (4, 2) [0, 1, 2, 3]
        (2, 2) [4, 5]
    """

    def __init__(
        self,
        *tensors: torch.Tensor | Mapping[str, torch.Tensor],
        batch_size: int = 1,
        shuffle: bool = False,
        drop_last: bool = False,
        generator: torch.Generator | None = None,
        sampler: Iterable[int] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        seed: int = 0,
        device: torch.device | str | int | None = None,
        depth: int = 2,
        transform: Callable[[Any], Any] | None = None,
    ) -> None:
        named, self._tensors = _checked_tensors(tensors)
        self.dataset: Dataset[Any] = (
            TensorDataset(*self._tensors)
            if named is None
            else StackDataset(**dict(zip(named, self._tensors, strict=True)))  # type: ignore[arg-type]
        )
        if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
            raise ValueError(
                f"batch_size={batch_size!r}: wanted a whole number of rows, at least 1"
            )
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.generator = generator
        self.sampler = sampler
        self.depth = checked_depth(depth)
        self.transform = transform
        self._names = named
        self._order = _order_of(
            len(self._tensors[0]), shuffle, drop_last, generator, sampler, rank, world_size, seed
        )
        self._lane = None if device is None else lane_to(device)
        self.device = torch.device("cpu" if device is None else device)
        self._ring = _C.Ring(depth + MORE_BUFFERS, self._lane is not None)
        self._position: Position | None = None  # in the epoch under way, after its last batch
        self._resumed: State | None = None  # a loaded state; the next epoch begins with it

    def __len__(self) -> int:
        samples = self._order.samples
        return samples // self.batch_size if self.drop_last else -(-samples // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        source = self._host_batches()
        if self._lane is not None:
            source = ahead(source, self.depth, self._lane, self._ring, self.transform)
        for batch, position in source:
            self._position = position
            if batch is not END:
                if self._lane is None and self.transform is not None:
                    batch = self.transform(batch)
                yield batch
            del batch  # do not keep a batch alive that the consumer has dropped

    def _host_batches(self) -> Iterator[tuple[Any, Position | None]]:
        """The (batch, position after it) pairs of an epoch, in host memory."""
        resumed, self._resumed = self._resumed, None
        epoch = self._order.begin()
        done = resumed["batches"] if resumed else 0
        samples = self._order.samples if epoch.index is None else len(epoch.index)
        stop = samples - samples % self.batch_size if self.drop_last else samples
        for first in range(done * self.batch_size, stop, self.batch_size):
            count = min(self.batch_size, stop - first)
            batch = self._ring.gather(self._tensors, epoch.index, first, count)
            done += 1
            if count < self.batch_size:
                epoch.finish(len(self._tensors[0]))  # a DataLoader sees the end of the data here
            named = batch if self._names is None else dict(zip(self._names, batch, strict=True))
            yield named, (epoch, done)
            del named
            del batch
        epoch.finish(len(self._tensors[0]))  # or here, after the last whole batch
        yield END, None

    def _state_at(self, position: Position | None) -> State:
        epoch, batches = position or (None, 0)
        return {
            "batches": batches,
            "order": self._order.between() if epoch is None else epoch.state,
            "of": {
                "order": type(self._order).__name__,
                "rows": len(self._tensors[0]),
                "batch_size": self.batch_size,
                "drop_last": self.drop_last,
                "shuffle": getattr(self._order, "shuffle", False),
                "seed": getattr(self._order, "seed", None),
                "world_size": getattr(self._order, "world_size", 1),
            },
        }

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next epoch: of all ranks, or of the sampler.

        Raises:
            ValueError: neither depends on it: the order of a generator follows from its state.
        """
        if isinstance(self._order, Distributed):
            self._order.epoch = epoch
        elif callable(method := getattr(self.sampler, "set_epoch", None)):
            method(epoch)
        else:
            raise ValueError(
                f"set_epoch({epoch}): the order of this loader does not depend on an epoch; "
                "wanted: a loader with rank and world_size, or with a sampler that has set_epoch"
            )

    def state_dict(self) -> State:
        """The loader's position: after the last batch that was yielded, or between two epochs.

        A loader with the same arguments that loads it continues with the next batch, in the same
        order. Without a generator, the orders of later epochs come from torch's default generator,
        whose state is not included.
        """
        if self._resumed is not None:
            return self._resumed
        return self._state_at(self._position)

    def load_state_dict(self, state_dict: State) -> None:
        """Makes the next iteration continue where `state_dict` was taken.

        Raises:
            ValueError: it is no state, or one of a loader with other arguments; nothing is changed.
        """
        mine = self._state_at(None)
        if not isinstance(state_dict, Mapping) or state_dict.keys() != mine.keys():
            raise ValueError(
                f"state_dict: wanted what state_dict() of a TensorLoader returned, with the keys "
                f"{list(mine)}"
            )
        theirs = state_dict["of"]
        other = [name for name, value in mine["of"].items() if theirs.get(name) != value]
        if other:
            told = ", ".join(f"{n}={theirs.get(n)!r} instead of {mine['of'][n]!r}" for n in other)
            raise ValueError(f"state_dict: it is of a loader with {told}; load it into such a one")
        given = state_dict["order"].get("generator") is not None
        if isinstance(self._order, InOrder) and given != (self.generator is not None):
            raise ValueError(
                f"state_dict: it is of a loader {'with' if given else 'without'} a generator, this "
                f"one is {'without' if given else 'with'}; load it into such a one"
            )
        self._order.restore(state_dict["order"], state_dict["batches"] > 0)
        self._resumed = {**state_dict}
        self._position = None


def _checked_tensors(
    tensors: tuple[Any, ...],
) -> tuple[list[str] | None, list[torch.Tensor]]:
    """Checks the tensors; returns their names, if there are any, and the tensors."""
    names = None
    if len(tensors) == 1 and isinstance(tensors[0], Mapping):
        names, tensors = list(tensors[0]), tuple(tensors[0].values())
    if not tensors:
        raise ValueError("tensors: got none; wanted at least one, or a mapping of at least one")
    labels = names or [f"tensor {i}" for i in range(len(tensors))]
    for label, tensor in zip(labels, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"tensors: {label} is a {type(tensor).__name__}; wanted: tensors, or one mapping "
                "of them; torch.from_numpy makes one of an array without copying"
            )
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise ValueError(
                f"tensors: {label} is on {tensor.device} with layout {tensor.layout}; wanted: "
                "dense tensors on the CPU; of what is on a GPU already, index_select takes batches"
            )
        if tensor.dim() == 0:
            raise ValueError(f"tensors: {label} has no dimension; wanted: at least one, the rows")
        if tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
            raise ValueError(
                f"tensors: {label} is a lazy conjugate or negative, or quantized; wanted: values "
                "in memory; call resolve_conj(), resolve_neg() or dequantize()"
            )
        if len(tensor) > 0 and not tensor[0].is_contiguous():
            raise ValueError(
                f"tensors: {label} has rows that are scattered in memory (strides "
                f"{tuple(tensor.stride())}); wanted: rows that are contiguous; call contiguous()"
            )
    lengths = [len(tensor) for tensor in tensors]
    if len(set(lengths)) > 1:
        told = ", ".join(f"{label}: {n}" for label, n in zip(labels, lengths, strict=True))
        raise ValueError(f"tensors: lengths differ ({told}); wanted: as many rows in each")
    return names, [tensor.detach() for tensor in tensors]


def _order_of(
    rows: int,
    shuffle: bool,
    drop_last: bool,
    generator: torch.Generator | None,
    sampler: Iterable[int] | None,
    rank: int | None,
    world_size: int | None,
    seed: int,
) -> Order:
    """The order that the arguments ask for."""
    if sampler is not None and (shuffle or rank is not None or world_size is not None):
        raise ValueError(
            "sampler: excludes shuffle, rank and world_size, since it is the order; wanted: either"
        )
    if (rank is None) != (world_size is None):
        raise ValueError(
            f"rank={rank!r}, world_size={world_size!r}: wanted both or neither; "
            "torch.distributed.get_rank() and get_world_size() tell them"
        )
    if sampler is not None:
        return Sampled(sampler, generator)
    if rank is None or world_size is None:
        return InOrder(rows, shuffle, generator)
    if generator is not None:
        raise ValueError(
            "generator: excludes rank and world_size: all ranks must draw one order; pass seed"
        )
    if not 0 <= rank < world_size:
        raise ValueError(
            f"rank={rank!r}: wanted a number from 0 to world_size - 1 = {world_size - 1}"
        )
    return Distributed(rows, shuffle, rank, world_size, seed, drop_last)
